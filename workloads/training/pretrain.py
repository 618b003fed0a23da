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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from workloads import environment
from workloads.config import DataConfig
from workloads.data import sources
from workloads.data.collate import prompt_batch, train_batch
from workloads.data.pocket import DOMAINS, compose, neutral_qa, questions
from workloads.data.pool import Sample
from workloads.evaluation.scorers import exact
from workloads.llava.build import Llava
from workloads.llava.pocket import IMAGE_SIZE, PATCH_SIZE, new_model, new_processor
from workloads.llava.prompt import IMAGE, Prompter, Turn
from workloads.training import loss
from workloads.training.optim import cosine_with_warmup
from workloads.training.tally import Tally

# Domains take turns in this order; reading is learned last and has few letters a page, so it has more turns.
TURNS = ("document", "general", "document", "general", "biomedical")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of the base's training."""

    seed: int = 0
    num_steps: int = 4800
    batch: int = 32
    # Peak rate of Muon for the matrices of the blocks, and of AdamW for all other weights.
    matrix_lr: float = 2e-3
    lr: float = 1e-3
    weight_decay: float = 0.02
    warmup_ratio: float = 0.03
    clip: float = 1.0
    # Shares of captions and of lists of all that is shown; the rest are short questions.
    captions: float = 0.3
    details: float = 0.5
    # The second part: its steps, its share of the benchmark's questions, its rates as a share of those above.
    question_steps: int = 600
    question_share: float = 0.6
    question_rate: float = 0.5
    threads: int = 2
    report_every: int = 100
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
    muon, adam = optimizers(recipe, llava.model)
    num_steps, rate = (recipe.question_steps, recipe.question_rate) if asks else (recipe.num_steps, 1.0)
    window, final = Tally(domains=list(DOMAINS)), 0.0
    for step, samples in enumerate(batches(recipe, asks), start=1):
        llava.model.train()
        batch = train_batch(samples, llava)
        losses_N, rows_N = loss.token_losses(lambda inputs: llava.model(**inputs), batch)
        losses_N.mean().backward()
        torch.nn.utils.clip_grad_norm_(llava.model.parameters(), recipe.clip)
        factor = rate * cosine_with_warmup(step - 1, num_steps, recipe.warmup_ratio)
        for optimizer, peak in ((muon, recipe.matrix_lr), (adam, recipe.lr)):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad()
        window.add(*loss.by_domain(losses_N, rows_N, batch, window.domains), [s.domain for s in samples], 0)
        if step % recipe.report_every == 0 or step == num_steps:
            final = window.metrics()["loss"]
            print(f"step {step}/{num_steps}", _rounded(window.metrics()), flush=True)
            window.clear()
        if step % recipe.probe_every == 0:
            print("captions of held-out sources", _rounded(caption_scores(llava, "val", 60)), flush=True)
    return final


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 3) for key, value in values.items()}


@torch.no_grad()
def caption_scores(llava: Llava, split: str, num_items: int, shuffled: bool = False) -> dict[str, float]:
    """Exact match of greedy captions in each domain; `shuffled` gives every item the next item's image."""
    llava.model.eval()
    tokenizer: Any = llava.prompter.tokenizer
    scores: dict[str, float] = {}
    for domain in DOMAINS:
        only = Recipe(captions=1.0, details=0.0)
        samples = [sample(domain, 77, i, split, only) for i in range(num_items)]
        images = [s.images_HWC for s in samples]
        images = images[1:] + images[:1] if shuffled else images
        shown = [replace(s, images_HWC=seen) for s, seen in zip(samples, images, strict=True)]
        batch = prompt_batch(shown, llava)
        model: Any = llava.model
        ids_BT = model.generate(
            **batch.inputs(), do_sample=False, max_new_tokens=24, pad_token_id=tokenizer.pad_token_id
        )
        texts = [llava.prompter.decode(ids) for ids in ids_BT[:, batch.ids_BT.shape[1] :].tolist()]
        scores[domain] = sum(exact(t, s.answer) for t, s in zip(texts, shown, strict=True)) / num_items
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
