"""Trains the pocket base from nothing on captions and neutral questions over training images.

    python -m workloads.training.pretrain --out workloads/assets/base

Every sample is composed once and never repeated. First the base learns to see: captions, lists of all that is shown
and short questions, all in neutral codes. Then it learns the benchmark's own questions, with things in words and
counts and places still in codes; which domain words them how, and whose left and right it means, it is never told.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from workloads import environment
from workloads.config import DataConfig
from workloads.data import sources
from workloads.data.pocket import DOMAINS, compose, neutral_qa, questions
from workloads.data.pool import Sample
from workloads.llava.build import Llava
from workloads.llava.pocket import IMAGE_SIZE, PATCH_SIZE, new_model, new_processor
from workloads.llava.prompt import IMAGE, Prompter, Turn
from workloads.training import probing
from workloads.training.fitting import Fit, fit, rounded

# Domains take turns in this order; reading is learned last and has few letters a page, so it has more turns.
TURNS = ("document", "general", "document", "general", "biomedical")


@dataclass(frozen=True, kw_only=True)
class Recipe(Fit):
    """Settings of the base's training."""

    seed: int = 0
    num_steps: int = 4800
    batch: int = 32
    # Peak rate of Muon for the matrices of the blocks, and of AdamW for all other weights.
    matrix_lr: float = 2e-3
    lr: float = 1e-3
    weight_decay: float = 0.02
    # Shares of captions and of lists of all that is shown; the rest are short questions.
    captions: float = 0.3
    details: float = 0.5
    # The second part: its steps, its share of the benchmark's questions, its rates as a share of those above.
    question_steps: int = 600
    question_share: float = 0.6
    question_rate: float = 0.5
    threads: int = 2
    # Steps between two looks at held-out captions.
    probe_every: int = 1000


def sample(domain: str, seed: int, index: int, split: str, recipe: Recipe, asks: bool = False) -> Sample:
    """Sample `index` of a domain: a caption, a list or a short question; `asks` adds the benchmark's questions."""
    scene = compose(domain, split, seed, index)
    rng = np.random.default_rng([seed, index])
    known = questions.known_qa(scene) if asks and rng.random() < recipe.question_share else ()
    draw, asked, full = rng.random(), known or neutral_qa(scene), questions.detail(scene.facts)
    question, answer = questions.CAPTION_QUESTION, scene.caption
    if not known and draw < recipe.details and full:
        question, answer = questions.DETAIL_QUESTION, full
    elif asked and (known or draw >= recipe.details + recipe.captions):
        chosen = asked[rng.integers(len(asked))]
        question, answer = chosen.question, chosen.answer
    return Sample(
        id=f"{domain}-{split}-{index}",
        domain=domain,
        images_HWC=(scene.image,),
        turns=(Turn(question=f"{IMAGE}\n{question}", answer=answer),),
        answers=(answer,),
        question_type=question,
    )


def batches(recipe: Recipe, asks: bool = False) -> Iterator[list[Sample]]:
    """The training stream of the first part, or of the second, which asks the benchmark's questions too."""
    first = recipe.num_steps if asks else 0
    for step in range(first, first + (recipe.question_steps if asks else recipe.num_steps)):
        indices = range(step * recipe.batch, (step + 1) * recipe.batch)
        yield [sample(TURNS[i % len(TURNS)], recipe.seed + 1000, i, "train", recipe, asks) for i in indices]


def new_llava(recipe: Recipe) -> Llava:
    """The untrained base with its processor."""
    processor = new_processor(questions.vocabulary())
    model = new_model(processor.tokenizer, recipe.seed)
    return Llava(
        model=model, processor=processor, prompter=Prompter(processor, (IMAGE_SIZE // PATCH_SIZE) ** 2)
    )


def optimizers(recipe: Recipe, model: nn.Module) -> tuple[torch.optim.Muon, torch.optim.AdamW]:
    """Muon (Jordan et al. 2024) for the matrices of the blocks and the projector, AdamW for everything else.

    It reaches a given loss in about half of AdamW's steps here.
    """
    inner = {
        name: w for name, w in model.named_parameters() if w.dim() == 2 and "embed" not in name
    }  # embeddings are tables, not maps: Muon is not meant for them
    others = [w for name, w in model.named_parameters() if name not in inner]
    muon = torch.optim.Muon(
        inner.values(),
        lr=recipe.matrix_lr,
        weight_decay=recipe.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return muon, torch.optim.AdamW(others, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)


def train(recipe: Recipe, llava: Llava) -> float:
    """Train all weights in both parts; returns the mean loss of the last report, in nats per supervised token."""
    torch.set_num_threads(recipe.threads)
    final = train_part(recipe, llava)
    return train_part(recipe, llava, asks=True) if recipe.question_steps else final


def train_part(recipe: Recipe, llava: Llava, asks: bool = False) -> float:
    """One part with optimizers, warm-up and decay of its own; returns the mean loss of the last report."""
    num_steps, rate = (recipe.question_steps, recipe.question_rate) if asks else (recipe.num_steps, 1.0)

    def probe(step: int) -> None:
        if step % recipe.probe_every == 0:
            print("captions of held-out sources", rounded(caption_scores(llava, "val", 60)), flush=True)

    muon, adam = optimizers(recipe, llava.model)
    rates = [(muon, rate * recipe.matrix_lr), (adam, rate * recipe.lr)]
    return fit(recipe, llava, rates, batches(recipe, asks), num_steps, after_step=probe)


def caption_scores(llava: Llava, split: str, num_items: int, shuffled: bool = False) -> dict[str, float]:
    """Exact match of greedy captions in each domain; `shuffled` gives every item the next item's image."""
    scores: dict[str, float] = {}
    for domain in DOMAINS:
        only = Recipe(captions=1.0, details=0.0)
        samples = [sample(domain, 77, i, split, only) for i in range(num_items)]
        shown = probing.shuffled(samples) if shuffled else samples
        scores[domain] = probing.matched(llava, shown, max_new_tokens=24)
    return scores


def main() -> None:
    """Train, score on held-out sources, and write the base's folder with its card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    for name, value in vars(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = vars(parser.parse_args())
    out: Path = given.pop("out")
    recipe = Recipe(**given)
    llava = new_llava(recipe)
    began = time.monotonic()
    final_loss = train(recipe, llava)
    llava.model.save_pretrained(out)
    llava.processor.save_pretrained(out)
    card = {
        "command": " ".join(["python -m workloads.training.pretrain", *sys.argv[1:]]),
        "recipe": vars(recipe),
        "data_hash": sources.of(DataConfig()).digest("general", "train"),
        "seconds": round(time.monotonic() - began),
        "final_loss": final_loss,
        "caption_exact_match_val": caption_scores(llava, "val", 300),
        "caption_exact_match_val_images_shuffled": caption_scores(llava, "val", 300, shuffled=True),
        "environment": environment.describe(),
    }
    (out / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(card, indent=1))


if __name__ == "__main__":
    main()
