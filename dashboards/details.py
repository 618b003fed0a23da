"""What the page shows beside the comparison: expert load, learning curves, cost, configuration, trials.

Shape letters: D domains, L layers, E experts.
"""

import datetime
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dashboards.figures import Curve, thin
from dashboards.results import StudyResults
from dashboards.rows import ordered_arms
from dashboards.views import arm_colours
from workloads.evaluation.statistics import Interval, over_seeds
from workloads.record import RunRecord

# Points of all learning curves together, so that a page stays below its size whatever the study's.
_MAX_POINTS = 24_000
# Settings that follow from where a run stands in a stream.
_STAGED = ("data.mixture", "init_from", "continual.task", "adapter.tasks")


@dataclass(frozen=True, kw_only=True)
class ExpertView:
    """Expert load of one arm."""

    arm: str
    # The run whose maps are shown; experts of different seeds do not correspond to each other.
    seed: int
    # Domain -> share of tokens (L, E).
    maps: dict[str, list[list[float]]]
    # Over seeds: experts in use as if equally loaded, of `num_experts`; bits the expert tells of the domain.
    effective: Interval
    num_experts: int
    bits: Interval
    max_bits: float


@dataclass(frozen=True, kw_only=True)
class CostRow:
    """Cost of one arm, as means over its runs."""

    arm: str
    num_runs: int
    seconds: float
    train_seconds: float
    eval_seconds: float
    samples_per_second: float
    tokens_per_second: float
    peak_bytes: float
    trainable: int
    adapter_weights: int
    # Adapter weights that one token meets.
    adapter_active: int


def expert_views(results: StudyResults) -> list[ExpertView]:
    """One view for each arm that routes."""
    views = []
    for arm in ordered_arms(results):
        runs = [run for run in results.last_runs(arm) if run.routing]
        if runs:
            shares = [np.array(list(run.routing.values())) for run in runs]
            num_domains, _, num_experts = shares[0].shape
            views.append(
                ExpertView(
                    arm=arm,
                    seed=runs[0].seed,
                    maps=runs[0].routing,
                    effective=over_seeds(np.array([effective_experts(s) for s in shares])),
                    num_experts=num_experts,
                    bits=over_seeds(np.array([domain_bits(s) for s in shares])),
                    max_bits=math.log2(min(num_domains, num_experts)),
                )
            )
    return views


def effective_experts(shares_DLE: np.ndarray) -> float:
    """Two to the entropy of the load over all domains, mean over layers: E when all experts work equally."""
    return float((2 ** _entropy(shares_DLE.mean(axis=0))).mean())


def domain_bits(shares_DLE: np.ndarray) -> float:
    """Mutual information of domain and expert with equally frequent domains, in bits, mean over layers."""
    return float((_entropy(shares_DLE.mean(axis=0)) - _entropy(shares_DLE).mean(axis=0)).mean())


def curve_panels(results: StudyResults) -> list[tuple[str, list[Curve]]]:
    """(domain, curves): a thin line for each run and a strong one for each arm's mean."""
    num_lines = sum(len(curves) for curves in results.curves.values())
    most = max(8, min(80, _MAX_POINTS // max(num_lines, 1)))
    colours = arm_colours(results)
    panels = []
    for domain in dict.fromkeys(domain for curves in results.curves.values() for domain in curves):
        lines: list[Curve] = []
        for arm in ordered_arms(results):
            runs = [results.curves[run.fingerprint].get(domain, []) for run in results.runs(arm)]
            lines += _arm_curves([thin(run, most) for run in runs if run], colours[arm])
        panels.append((domain, sorted(lines, key=lambda line: line.is_mean)))
    return panels


def cost_rows(results: StudyResults) -> list[CostRow]:
    """Mean cost of each arm's finished runs."""
    names = (
        "seconds", "train_seconds", "eval_seconds", "samples_per_second", "tokens_per_second", "peak_bytes",
    )  # fmt: skip
    rows = []
    for arm in ordered_arms(results):
        costs = [run.cost for run in results.runs(arm)]
        if costs:
            means = {name: sum(getattr(cost, name) for cost in costs) / len(costs) for name in names}
            rows.append(
                CostRow(
                    arm=arm,
                    num_runs=len(costs),
                    trainable=costs[0].trainable,
                    adapter_weights=costs[0].adapter_weights,
                    adapter_active=costs[0].adapter_active,
                    **means,
                )
            )
    return rows


def configuration(results: StudyResults) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """(settings that all runs share, setting -> arm -> value where arms differ); seeds and names left out."""
    by_arm = {arm: _joined([_flat(run.config) for run in results.runs(arm)]) for arm in ordered_arms(results)}
    for arm in results.staged_arms:
        by_arm[arm] = {key: value for key, value in by_arm[arm].items() if key not in _STAGED}
    by_arm = {arm: settings for arm, settings in by_arm.items() if settings}
    keys = dict.fromkeys(key for settings in by_arm.values() for key in settings)
    values = {key: {arm: settings.get(key, "–") for arm, settings in by_arm.items()} for key in keys}
    shared = {key: next(iter(v.values())) for key, v in values.items() if len(set(v.values())) == 1}
    return shared, {key: v for key, v in values.items() if key not in shared}


def versions(results: StudyResults) -> tuple[dict[str, str], dict[str, str]]:
    """(what entered the fingerprints, packages and machine); where runs differ, all values are listed."""
    runs = results.records.values()
    return _joined([run.identity for run in runs]), _joined([run.environment for run in runs])


def run_seconds(results: StudyResults) -> float:
    """Time of all finished runs together."""
    return sum(run.cost.seconds for run in results.records.values())


def duration(seconds: float) -> str:
    """2210 -> 36 min 50 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.3g} s"


def when(unix_seconds: float) -> str:
    """A date and time in UTC; empty for 0."""
    if not unix_seconds:
        return ""
    return datetime.datetime.fromtimestamp(unix_seconds, tz=datetime.UTC).strftime("%-d %B %Y, %H:%M UTC")


def rejected(runs: Iterable[RunRecord]) -> int:
    """Bad samples that were set aside, over all runs."""
    return sum(run.num_rejected for run in runs)


def _entropy(shares: np.ndarray) -> np.ndarray:
    """Entropy in bits over the last axis; shares that do not quite add up to 1 are scaled to."""
    total = shares.sum(axis=-1, keepdims=True)
    p = np.divide(shares, total, out=np.zeros_like(shares, dtype=np.float64), where=total > 0)
    return -(p * np.log2(np.where(p > 0, p, 1.0))).sum(axis=-1)


def _arm_curves(runs: Sequence[list[tuple[float, float]]], colour: str) -> list[Curve]:
    one = [Curve(colour=colour, points=run, is_mean=False) for run in runs]
    if not runs or len({len(run) for run in runs}) > 1:
        # Runs that report at different steps have no common points to average.
        return one
    places = zip(*runs, strict=True)
    mean = [(place[0][0], sum(y for _, y in place) / len(place)) for place in places]
    return [*one, Curve(colour=colour, points=mean, is_mean=True)]


def _flat(config: Mapping[str, Any]) -> dict[str, str]:
    """Settings by dotted key; what names a run or tells its seed is left out."""
    out: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            out |= {f"{key}.{sub}": _text(item) for sub, item in value.items()}
        elif key not in ("seed", "name"):
            out[key] = _text(value)
    return out


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items()) or "–"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value)) or "–"
    return f"{value:g}" if isinstance(value, float) else str(value) or "–"


def _joined(parts: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Key -> its value, or all its values, over several mappings."""
    parts = list(parts)
    keys = dict.fromkeys(itertools.chain.from_iterable(parts))
    return {key: " / ".join(dict.fromkeys(part[key] for part in parts if key in part)) for key in keys}
