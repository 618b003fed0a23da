"""Side-by-side benchmarks: training steps of two adapters on the pocket model, interleaved in one process.

    python -m workloads.bench

Prints the median time of each and the median and spread of the ratio of neighbouring repeats.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch

from workloads import adapters
from workloads.adapters.base import Trace
from workloads.config import AdapterConfig, ModelConfig, from_tree
from workloads.data import pool
from workloads.data.collate import Batch, train_batch
from workloads.llava.build import build, train_projector
from workloads.training import loss


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Seconds of a step of each side, and the ratio of neighbouring repeats with its quartiles."""

    seconds: tuple[float, float]
    ratio: float
    quartiles: tuple[float, float]


def compare(first: Callable[[], None], second: Callable[[], None], repeats: int) -> Comparison:
    """Time both functions in turn, after three rounds of warm-up; the ratio is first / second."""
    times: list[tuple[float, float]] = []
    for turn in range(repeats + 3):
        pair = [_seconds(first), _seconds(second)] if turn % 2 else [_seconds(second), _seconds(first)][::-1]
        if turn >= 3:
            times.append((pair[0], pair[1]))
    ratios = [one / other for one, other in times]
    low, _, high = quantiles(ratios, n=4)
    return Comparison(
        seconds=(median(one for one, _ in times), median(other for _, other in times)),
        ratio=median(ratios),
        quartiles=(low, high),
    )


def _seconds(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def adapter_config(tree: dict[str, Any]) -> AdapterConfig:
    """The checked configuration of one adapter."""
    return from_tree({"adapter": tree, "data": {"mixture": {"general": 1}}}).adapter


def training_step(config: AdapterConfig, batch_size: int) -> Callable[[], None]:
    """A training step (forward, losses, backward, AdamW) of an adapter on the pocket model."""
    llava, trace = build(ModelConfig(), "fp32"), Trace()
    torch.manual_seed(0)
    attached = adapters.attach(llava.model, config, trace)
    train_projector(llava.model)
    trace.watch(llava.model)
    llava.model.train()
    adam = torch.optim.AdamW([w for w in llava.model.parameters() if w.requires_grad], lr=1e-3)
    samples = pool.load("pocket", "general", "train", llava.prompter, 128)
    batch: Batch = train_batch([samples.sample(i) for i in range(batch_size)], llava)

    def step() -> None:
        batch.begin(trace)
        losses_N, _ = loss.token_losses(lambda inputs: llava.model(**inputs), batch)
        total = losses_N.mean()
        for term in attached.losses(trace).values():
            total = total + term
        total.backward()
        trace.clear()
        adam.step()
        attached.after_step(lambda part: part)
        adam.zero_grad()

    return step


def main() -> None:
    """Compare MoLE with plain LoRA at equal active rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    mole = adapter_config({"name": "mole", "num_experts": 3, "rank_per_expert": options.rank})
    lora = adapter_config({"name": "lora", "rank": options.rank})
    result = compare(training_step(mole, options.batch), training_step(lora, options.batch), options.repeats)
    print(
        f"mole {result.seconds[0] * 1e3:.1f} ms, lora {result.seconds[1] * 1e3:.1f} ms a step of {options.batch}"
    )
    low, high = result.quartiles
    print(
        f"mole / lora {result.ratio:.2f} [{low:.2f}, {high:.2f}] (median, quartiles of {options.repeats} repeats)"
    )


if __name__ == "__main__":
    main()
