"""What a study's runs take of a GPU, as `plan` shows it: memory of a worker under every ZeRO stage, disk, hours.

The formulas are in workloads/footprint.py; nothing is measured, and of the base model its config.json alone is read.
"""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from orchestrator.plan import planned, samples
from orchestrator.study import Study
from orchestrator.trials import foreseen
from workloads.config import RunConfig

if TYPE_CHECKING:
    from workloads.footprint import Memory

_STAGES = (0, 1, 2, 3)
# Hours below which a study is no matter for a GPU.
_WORTH_SAYING = 0.1
_CHOICES = tuple(itertools.product(("bf16", "fp32"), (False, True)))


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """Memory of a worker of the arm that trains most weights, and what else there is to say."""

    memory: Table
    lines: tuple[str, ...]


def sizing(study: Study) -> Sizing:
    """What the study's runs take by formula; raises `UserError` when there is no config.json."""
    from workloads import footprint

    trials = planned(study)
    arms = {trial.arm: trial.config for trial in trials}
    # Arms that differ in what they train on have the same weights.
    distinct = {repr((config.model, config.adapter)): config for config in arms.values()}
    counted = {key: footprint.counts(config) for key, config in distinct.items()}
    sizes = {arm: counted[repr((config.model, config.adapter))] for arm, config in arms.items()}
    largest = max(sizes, key=lambda arm: sizes[arm].trained)
    config, count = arms[largest], sizes[largest]
    out = Table(
        "ZeRO stage", *(_label(*choice) for choice in _CHOICES), title=escape(_title(largest, config))
    )
    for stage in _STAGES:
        cells = []
        for dtype, again in _CHOICES:
            chosen = with_settings(config, stage, dtype, again)
            text = f"{footprint.memory(chosen, count).total / 1e9:.2f}"
            cells.append(f"[bold]{text}[/bold]" if chosen == config else text)
        out.add_row(str(stage), *cells)
    adapter, checkpoints = map(
        max, zip(*(footprint.disk(arms[arm], sizes[arm]) for arm in arms), strict=True)
    )
    images, features = footprint.features(foreseen(study, trials))
    kept = f"; features of {images:,} images: {_bytes(features)}" if images else ""
    disk = (
        f"an adapter of at most {_bytes(adapter)} a run; checkpoints of {_bytes(checkpoints)} while it trains"
    )
    lines = [
        _as_set(config, footprint.memory(config, count)),
        f"weights: {count.trained / 1e6:.2f} M train, {count.frozen / 1e6:.2f} M are frozen",
        f"disk: {disk}{kept}",
    ]
    a100, h100 = (
        sum(footprint.hours(t.config, sizes[t.arm], samples(t.config), gpu) for t in trials)
        for gpu in ("A100", "H100")
    )
    if a100 >= _WORTH_SAYING:
        lines.append(_hours(a100, h100, config.execution.workers, footprint.UTILISATION))
    return Sizing(memory=out, lines=tuple(lines))


def with_settings(config: RunConfig, stage: int, dtype: Any, checkpointing: bool) -> RunConfig:
    """The same run under another ZeRO stage, in another dtype, with or without gradient checkpointing."""
    replace = dataclasses.replace
    execution = replace(config.execution, zero_stage=stage, gradient_checkpointing=checkpointing)
    return replace(config, execution=execution, optim=replace(config.optim, dtype=dtype))


def _label(dtype: str, checkpointing: bool) -> str:
    return f"{dtype}, checkpointed" if checkpointing else dtype


def _title(arm: str, config: RunConfig) -> str:
    workers, micro, length = config.execution.workers, config.execution.micro_batch, config.data.max_length
    return f"GB of one of {workers} worker(s) by formula: {arm}, {micro} samples of {length} tokens at once"


def _as_set(config: RunConfig, found: "Memory") -> str:
    """The parts of the bold number."""
    named = [(part.name, getattr(found, part.name)) for part in dataclasses.fields(found)]
    parts = ", ".join(f"{name} {_bytes(size)}" for name, size in named)
    label = _label(config.optim.dtype, config.execution.gradient_checkpointing)
    return f"as set (stage {config.execution.zero_stage}, {label}): {parts}"


def _hours(a100: float, h100: float, workers: int, share: float) -> str:
    return (
        f"time: to train all runs at most {a100:.3g} h on {workers} A100 or {h100:.3g} h on {workers} H100, "
        f"every sample as long as it may be, at {share:.0%} of the bf16 peak"
    )


def _bytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
