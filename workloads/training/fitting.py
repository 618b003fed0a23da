"""Fits weights of a base model to a stream of batches, with warm-up, cosine decay and clipping."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from workloads.data.collate import train_batch
from workloads.data.pocket import DOMAINS
from workloads.data.pool import Sample
from workloads.llava.build import Llava
from workloads.training import loss
from workloads.training.optim import cosine_with_warmup
from workloads.training.tally import Tally


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Settings of every training of a base."""

    warmup_ratio: float = 0.03
    clip: float = 1.0
    report_every: int = 100


def fit(
    settings: Fit,
    llava: Llava,
    optimizers: Sequence[tuple[torch.optim.Optimizer, float]],
    stream: Iterable[Sequence[Sample]],
    num_steps: int,
    after_step: Callable[[int], None] = lambda step: None,
    bf16: bool = False,
) -> float:
    """Fit the weights of the optimizers, each with its peak rate, to `num_steps` batches.

    With `bf16` matrix products are in bfloat16, while weights, their gradients and the loss stay in float32.
    Returns the mean loss of the last report, in nats per supervised token.
    """
    weights = [w for optimizer, _ in optimizers for group in optimizer.param_groups for w in group["params"]]
    window, final = Tally(domains=list(DOMAINS)), 0.0
    for step, samples in enumerate(stream, start=1):
        llava.model.train()
        batch = train_batch(samples, llava)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            losses_N, rows_N = loss.token_losses(lambda inputs: llava.model(**inputs), batch)
        losses_N.mean().backward()
        torch.nn.utils.clip_grad_norm_(weights, settings.clip)
        factor = cosine_with_warmup(step - 1, num_steps, settings.warmup_ratio)
        for optimizer, peak in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad()
        window.add(*loss.by_domain(losses_N, rows_N, batch, window.domains), [s.domain for s in samples], 0)
        if step % settings.report_every == 0 or step == num_steps:
            final = window.metrics()["loss"]
            print(f"step {step}/{num_steps}", rounded(window.metrics()), flush=True)
            window.clear()
        after_step(step)
    return final


def rounded(values: dict[str, float]) -> dict[str, float]:
    """Values for people."""
    return {key: round(value, 3) for key, value in values.items()}
