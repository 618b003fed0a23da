"""Prepares the pretrained pair `smol`: joins its two parts and trains what is between them on captions.

Source:  Liu et al. 2023, LLaVA, arXiv:2304.08485: in the first stage captions train the projector alone, between a
         frozen tower and a frozen language model.
Differs: a language model of which blocks were cut off is no language model any more (its captions start at twice the
         loss of a guess): what is left of its blocks is trained along with the projector. A whole one stays frozen.
         Captions are composed over the packaged pictures of `pocket`, in plain English, and a few of the benchmark's
         questions about the same picture follow as turns of one conversation: what every domain words alike. The
         projector starts from features of unit deviation and from the size of the embeddings.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from workloads import environment
from workloads.config import DataConfig, ModelConfig
from workloads.data import sources
from workloads.data.cache import ENVIRONMENT_KEY
from workloads.data.collate import vision
from workloads.data.pocket import DOMAINS, QUESTIONS, Facts, compose, questions
from workloads.data.pool import Sample
from workloads.errors import UserError, reason_of, require
from workloads.llava import folder as folders
from workloads.llava.build import Llava, build
from workloads.llava.parts import put
from workloads.llava.prompt import IMAGE, Turn
from workloads.llava.smol import joining, language, places
from workloads.llava.smol import vision as seeing
from workloads.llava.smol.places import Place
from workloads.training import probing
from workloads.training.fitting import Fit, fit, rounded
from workloads.training.pretrain import TURNS

VERSION = 1
CAPTION_QUESTION = "describe the picture ."
# Questions whose answers every domain words alike; counts, places and sides are left to adapters.
_SHARED = ("name", "at_mark", "largest", "total")
# Seed of the pictures: the benchmark's are drawn with 0, those of the pocket base with 1000.
_PICTURES = 3000
_HELD_OUT = 30
Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Recipe(Fit):
    """Settings of the training."""

    seed: int = 0
    num_steps: int = 900
    batch: int = 16
    # Peak rates of AdamW for the projector, and for the blocks of a language model that was cut.
    lr: float = 2e-3
    blocks_lr: float = 1e-3
    # Questions that follow the caption, at most.
    num_questions: int = 2
    report_every: int = 25
    threads: int = 2
    # Matrix products in bfloat16: quicker on processors that have them (AMX, AVX-512 BF16), slower on others.
    bf16: bool = False


def prepare(given: dict[str, str], layers: int, recipe: Recipe, hub: bool, command: str, tell: Tell) -> Path:
    """The pair's folder in the cache, made unless it is there; its name then leads to it.

    `given` has the parts' folders by option (`--lm`, `--tower`). Raises `UserError` when a part is missing or of
    another kind, and when the cache cannot be written.
    """
    names = {number: name for name, number in folders.PREPARED.items()}
    require(layers in names, "--layers", layers, f"one of {', '.join(map(str, names))}")
    require(recipe.num_steps >= 1, "--steps", recipe.num_steps, "a whole number of 1 or more")
    parts = places.find(given, hub)
    target = folders.prepared_home() / _key(parts, layers, recipe)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not (target / "config.json").is_file():
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".preparing-") as scratch:
                made = Path(scratch) / target.name
                _make(made, parts, layers, recipe, command, tell)
                put(made, target)
        folders.name_prepared(names[layers], target)
    except OSError as error:
        raise UserError(f"{ENVIRONMENT_KEY}: cannot write {target}: {reason_of(error)}") from None
    return target


def _key(parts: Sequence[Place], layers: int, recipe: Recipe) -> str:
    """16 hex digits over the parts, the blocks that are kept, the recipe and the pictures."""
    about = [VERSION, [part.hash for part in parts], layers, asdict(recipe), _data_hash()]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def _data_hash() -> str:
    return sources.of(DataConfig()).digest("general", "train")


def _make(made: Path, parts: Sequence[Place], layers: int, recipe: Recipe, command: str, tell: Tell) -> None:
    """Write the joined folder, train its projector, write it again with its card."""
    began = time.monotonic()
    torch.set_num_threads(recipe.threads)
    for part in parts:
        tell(f"from {part.source}")
    speaker, tokenizer, is_whole = language.load(parts[0], layers)
    tower = seeing.load(parts[1])
    joining.joined(speaker, tower, tokenizer, recipe.seed).save_pretrained(made)
    joining.processor(tokenizer, tower).save_pretrained(made)
    del speaker, tower
    llava = build(ModelConfig(name_or_path=str(made)), "fp32")
    mark = time.monotonic()
    loss = train(recipe, llava, blocks=not is_whole)
    seconds = round(time.monotonic() - mark)
    llava.model.save_pretrained(made)
    text: Any = llava.model.config.get_text_config()
    card = {
        "command": command,
        "recipe": asdict(recipe),
        "layers": text.num_hidden_layers,
        "trained": "projector"
        if is_whole
        else "projector, and the blocks that are left of the language model",
        "parts": {
            key: {"source": part.source, "hash": part.hash, "licence": part.licence}
            for key, part in zip(("language_model", "vision_tower"), parts, strict=True)
        },
        "pictures": "workloads/assets, terms in its NOTICES.md",
        "data_hash": _data_hash(),
        "seconds": round(time.monotonic() - began),
        "training_seconds": seconds,
        "final_loss": loss,
        **held_out(llava),
        "environment": environment.describe(),
    }
    (made / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


def train(recipe: Recipe, llava: Llava, blocks: bool) -> float:
    """Train the projector, and with `blocks` the language model's blocks; embeddings and tower never change.

    Returns the mean loss of the last report, in nats per supervised token.
    """
    model = llava.model.model
    parts = [(model.multi_modal_projector, recipe.lr)]
    parts += [
        (model.language_model.layers, recipe.blocks_lr),
        (model.language_model.norm, recipe.blocks_lr),
    ] * blocks
    llava.model.requires_grad_(False)
    _settle(llava, next(batches(recipe)))
    rates = []
    for part, rate in parts:
        part.requires_grad_(True)
        adam = torch.optim.AdamW(part.parameters(), betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        rates.append((adam, rate))
    return fit(recipe, llava, rates, batches(recipe), recipe.num_steps, bf16=recipe.bf16)


@torch.no_grad()
def _settle(llava: Llava, samples: Sequence[Sample]) -> None:
    """Scale the new projector: it takes features of mean 0 and deviation 1, and gives vectors of embeddings' size."""
    model: Any = llava.model.model
    read: Any = llava.model.config.vision_feature_layer
    seen = model.vision_tower(vision(samples, llava), output_hidden_states=[read])
    features_PD = seen.hidden_states[read][:, 1:].flatten(0, 1)
    mean_D, deviation_D = features_PD.mean(dim=0), features_PD.std(dim=0) + 1e-3
    projector = model.multi_modal_projector
    first, last = projector.linear_1, projector.linear_2
    first.weight.div_(deviation_D)
    first.bias.copy_(-first.weight @ mean_D)
    size = model.get_input_embeddings().weight.pow(2).mean().sqrt()
    factor = size / projector(features_PD).pow(2).mean().sqrt()
    last.weight.mul_(factor)
    last.bias.mul_(factor)


def batches(recipe: Recipe) -> Iterator[list[Sample]]:
    """The stream: every picture is composed once and never repeated."""
    for step in range(recipe.num_steps):
        indices = range(step * recipe.batch, (step + 1) * recipe.batch)
        yield [sample(TURNS[i % len(TURNS)], recipe, i, "train") for i in indices]


def sample(domain: str, recipe: Recipe, index: int, split: str) -> Sample:
    """Sample `index` of a domain: its caption, then some of its questions, as one conversation."""
    scene = compose(domain, split, recipe.seed + _PICTURES, index)
    rng = np.random.default_rng([recipe.seed, index])
    asked = [qa for qa in questions.known_qa(scene) if qa.question_type in _SHARED]
    chosen = rng.permutation(len(asked))[: recipe.num_questions]
    turns = [Turn(question=f"{IMAGE}\n{CAPTION_QUESTION}", answer=caption(scene.facts))]
    turns += [Turn(question=QUESTIONS[asked[k].question_type], answer=asked[k].answer) for k in chosen]
    return Sample(
        id=f"{domain}-{split}-{index}",
        domain=domain,
        images_HWC=(scene.image,),
        turns=tuple(turns),
        answers=(turns[-1].answer,),
        question_type=CAPTION_QUESTION,
    )


def caption(facts: Facts) -> str:
    """What a picture shows, in plain English; e.g. `a photo of a red boot on a brown background`.

    Things are named and readings given; counts, places and sides, which the domains word each in its own way, are not.
    """
    down = sorted(facts.parts, key=lambda part: (part.box[1], part.box[0]))
    match facts.layout:
        case "word":
            return f"the word {facts.name}"
        case "receipt":
            lines = ", ".join(f"{part.label.upper()} {part.value:.0f}" for part in down)
            return f"a receipt: {lines}, total {facts.total}"
        case "chart":
            labels = " ".join(part.label for part in sorted(down, key=lambda part: part.box[0]))
            return f"a bar chart of {labels}, the tallest is {facts.largest}"
        case "scan":
            seen = f", a mark on {facts.at_mark}" if facts.at_mark else ""
            return f"a brain scan, {facts.plane}{seen}"
    things = ", ".join(_with_article(f"{part.colour} {part.label}".strip()) for part in down)
    return f"a photo of {things} on {_with_article(facts.ground)} background"


def _with_article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def held_out(llava: Llava) -> dict[str, dict[str, float]]:
    """Captions of held-out sources by domain: exact matches and losses, with their pictures and with each other's."""
    out: dict[str, dict[str, float]] = {}
    only = Recipe(seed=77, num_questions=0)
    for domain in DOMAINS:
        samples = [sample(domain, only, i, "val") for i in range(_HELD_OUT)]
        for name, shown in (("", samples), ("_images_shuffled", probing.shuffled(samples))):
            exact, lost = probing.matched(llava, shown, 24), probing.mean_loss(llava, shown)
            out.setdefault(f"caption_exact_match_val{name}", {})[domain] = exact
            out.setdefault(f"caption_loss_val{name}", {})[domain] = lost
    return {key: rounded(values) for key, values in out.items()}
