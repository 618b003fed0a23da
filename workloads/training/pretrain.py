"""Trains the pocket base from nothing on captions and neutral questions over training images.

    python -m workloads.training.pretrain --out workloads/assets/base

Every sample is composed once and never repeated; no question that a domain's own convention answers is seen.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from workloads import environment, identity
from workloads.data.collate import prompt_batch, train_batch
from workloads.data.pocket import DOMAINS, compose, neutral_qa, questions
from workloads.data.pool import Sample
from workloads.evaluation.scorers import exact
from workloads.llava.build import Llava
from workloads.llava.pocket import IMAGE_SIZE, PATCH_SIZE, new_model, new_processor
from workloads.llava.prompt import Prompter
from workloads.training import loss
from workloads.training.optim import cosine_with_warmup
from workloads.training.tally import Tally


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of the base's training."""

    seed: int = 0
    num_steps: int = 4500
    batch: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.02
    warmup_ratio: float = 0.03
    clip: float = 1.0
    # Shares of captions and of full lists of what is shown; the rest are neutral questions.
    captions: float = 0.3
    details: float = 0.5
    threads: int = 2
    report_every: int = 100
    # Steps between two looks at held-out captions.
    probe_every: int = 1000


def sample(seed: int, index: int, split: str, recipe: Recipe) -> Sample:
    """Sample `index`: a caption, a list or a neutral question over one composed scene; domains take turns."""
    domain = DOMAINS[index % len(DOMAINS)]
    scene = compose(domain, split, seed, index)
    rng = np.random.default_rng([seed, index])
    draw, asked, full = rng.random(), neutral_qa(scene), questions.detail(scene.facts)
    question, answer = questions.CAPTION_QUESTION, scene.caption
    if draw < recipe.details and full:
        question, answer = questions.DETAIL_QUESTION, full
    elif draw >= recipe.details + recipe.captions and asked:
        chosen = asked[rng.integers(len(asked))]
        question, answer = chosen.question, chosen.answer
    return Sample(
        id=f"{domain}-{split}-{index}",
        domain=domain,
        image_HWC=scene.image,
        question=question,
        answer=answer,
        question_type=question,
    )


def batches(recipe: Recipe) -> Iterator[list[Sample]]:
    """The training stream."""
    for step in range(recipe.num_steps):
        first = step * recipe.batch
        yield [sample(recipe.seed + 1000, first + i, "train", recipe) for i in range(recipe.batch)]


def new_llava(recipe: Recipe) -> Llava:
    """The untrained base with its processor."""
    processor = new_processor(questions.vocabulary())
    model = new_model(processor.tokenizer, recipe.seed)
    return Llava(
        model=model, processor=processor, prompter=Prompter(processor, (IMAGE_SIZE // PATCH_SIZE) ** 2)
    )


def train(recipe: Recipe, llava: Llava) -> float:
    """Train all weights; returns the mean loss of the last report, in nats per supervised token."""
    torch.set_num_threads(recipe.threads)
    decayed = [w for w in llava.model.parameters() if w.dim() > 1]
    other = [w for w in llava.model.parameters() if w.dim() <= 1]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": other, "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98), fused=True)
    window, final = Tally(domains=list(DOMAINS)), 0.0
    for step, samples in enumerate(batches(recipe), start=1):
        llava.model.train()
        batch = train_batch(samples, llava)
        losses_N, rows_N = loss.token_losses(lambda inputs: llava.model(**inputs), batch)
        losses_N.mean().backward()
        torch.nn.utils.clip_grad_norm_(llava.model.parameters(), recipe.clip)
        for group in adam.param_groups:
            group["lr"] = recipe.lr * cosine_with_warmup(step - 1, recipe.num_steps, recipe.warmup_ratio)
        adam.step()
        adam.zero_grad()
        window.add(*loss.by_domain(losses_N, rows_N, batch, window.domains), [s.domain for s in samples], 0)
        if step % recipe.report_every == 0 or step == recipe.num_steps:
            final = window.metrics()["loss"]
            print(f"step {step}/{recipe.num_steps}", _rounded(window.metrics()), flush=True)
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
    for k, domain in enumerate(DOMAINS):
        only = Recipe(captions=1.0, details=0.0)
        samples = [sample(77, i * len(DOMAINS) + k, split, only) for i in range(num_items)]
        images = [s.image_HWC for s in samples]
        images = images[1:] + images[:1] if shuffled else images
        shown = [
            Sample(
                id=s.id,
                domain=domain,
                image_HWC=image,
                question=s.question,
                answer=s.answer,
                question_type="caption",
            )
            for s, image in zip(samples, images, strict=True)
        ]
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
        "data_hash": identity.data_hash("pocket"),
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
