"""Continual metrics of a stream's arms with their intervals, computed once for the terminal and the page.

The sample unit is the seed. Chains of one seed share start weights and draws of samples, and where their orders begin
alike whole stages, so an arm's O x S chains are not O x S samples. Over all its orders an arm has the interval of the
two-way crossed design: what the chains of one seed have in common counts as the seed's, and repeats as often as there
are seeds. Orders are taken as draws from all orders, also where the study names them (given, reversed). An arm in one
order, a role outside every order and the sensitivity to orders have t-intervals over seeds. Test items are fixed.

Shape letters: S seeds, O orders.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dashboards.streams import Chain, Stream
from workloads.evaluation.continual import (
    Matrix,
    OrderSensitivity,
    aggregates,
    intransigence,
    order_sensitivity,
)
from workloads.evaluation.statistics import Interval, interval, over_seeds
from workloads.record import Scale

Values = dict[str, Interval | None]
# Role of an arm that runs outside every order -> what it is.
ROLES = {"before": "untrained", "joint": "all at once", "alone": "each alone"}


@dataclass(frozen=True, kw_only=True)
class Column:
    """One metric: its short heading, what it is, and whether it is a difference, which carries a sign."""

    heading: str
    words: str
    is_difference: bool = False


COLUMNS: Mapping[str, Column] = {
    "final": Column(heading="final", words="mean over tasks after the last stage"),
    "mft": Column(heading="MFT", words="mean over tasks right after their own stage"),
    "maa": Column(heading="MAA", words="mean over stages of the mean over tasks seen so far"),
    "bwt_T": Column(heading="bwt_T", words="change since each task's own stage: sum / T", is_difference=True),
    "bwt_Tminus1": Column(heading="bwt_Tminus1", words="the same sum / (T − 1)", is_difference=True),
    "forgetting": Column(
        heading="forgetting",
        words="best earlier score − last score, but for the last task",
        is_difference=True,
    ),
    "fwt": Column(
        heading="FWT", words="just before a task's own stage − untrained model", is_difference=True
    ),
    "zero_shot_never": Column(
        heading="never trained", words="tasks that no stage trains, after the last stage"
    ),
    "zero_shot_later": Column(heading="yet to come", words="tasks before their own stage"),
    "intransigence": Column(
        heading="intransigence",
        words="the task trained alone − right after its own stage",
        is_difference=True,
    ),
    "mif": Column(
        heading="MIF",
        words="share of outputs in the form of their task's answers, right or wrong, after the last stage",
    ),
}


@dataclass(frozen=True, kw_only=True)
class StreamRow:
    """One arm over all its orders, or in one of them."""

    arm: str
    method: str
    # Empty: over all orders that are in the intervals.
    order: str
    num_orders: int
    num_seeds: int
    # Finished chains, of all.
    num_whole: int
    num_chains: int
    # One for each of COLUMNS; None where something that it takes is missing.
    values: Values


@dataclass(frozen=True, kw_only=True)
class BoundRow:
    """An arm that runs outside every order, with t-intervals over seeds."""

    role: str
    arm: str
    num_seeds: int
    # `final`: the mean over all tasks; `zero_shot_never`; `mif`.
    values: Values


@dataclass(frozen=True, kw_only=True)
class StreamSummary:
    """Everything computed from one stream."""

    stream: Stream
    arms: tuple[StreamRow, ...]
    # Arm -> its rows order by order.
    by_order: dict[str, tuple[StreamRow, ...]]
    bounds: tuple[BoundRow, ...]
    # Of arms with a whole order.
    sensitivity: dict[str, OrderSensitivity]


def summarise_stream(stream: Stream) -> StreamSummary:
    """Compute all rows; where the tasks' scales differ there are no means, and all values are None."""
    chosen = {arm: rectangle(stream.of(arm)) for arm in stream.arms}
    return StreamSummary(
        stream=stream,
        arms=tuple(_row(stream, arm, "", grid) for arm, grid in chosen.items()),
        by_order={
            arm: tuple(_row(stream, arm, order, rectangle(stream.of(arm, order))) for order in stream.orders)
            for arm in stream.arms
        },
        bounds=tuple(_bounds(stream)),
        sensitivity={
            arm: order_sensitivity({order: [_whole(chain) for chain in part] for order, part in grid.items()})
            for arm, grid in chosen.items()
            if grid and stream.scale
        },
    )


def rectangle(chains: Sequence[Chain]) -> dict[str, list[Chain]]:
    """Order -> its whole chains, with the same seeds for every order.

    Orders in which nothing is whole are left out, then seeds that are not whole in all the others; where that
    leaves none, the order with most seeds stands alone.
    """
    by_order: dict[str, dict[int, Chain]] = {}
    for chain in chains:
        if chain.matrix is not None:
            by_order.setdefault(chain.order, {})[chain.seed] = chain
    if not by_order:
        return {}
    seeds = set.intersection(*(set(part) for part in by_order.values()))
    if not seeds:
        best = max(by_order, key=lambda order: len(by_order[order]))
        by_order, seeds = {best: by_order[best]}, set(by_order[best])
    return {order: [part[seed] for seed in sorted(seeds)] for order, part in by_order.items()}


def values_of(stream: Stream, chain: Chain) -> dict[str, float | None]:
    """Every metric of one whole chain; `None` where something that it takes is missing."""
    matrix = _whole(chain)
    alone = stream.bound("alone", chain)
    bounds = [alone.get(task) for task in chain.tasks]
    known = [bound for bound in bounds if bound is not None]
    cost = intransigence(matrix, np.array(known)) if len(known) == len(bounds) else None
    return {**aggregates(matrix), "intransigence": cost, "mif": _mean(chain.forms, chain.tasks)}


def scale_of(name: str, stream: Stream) -> Scale | None:
    """The scale of a metric; a share of outputs is a fraction whatever their scores are."""
    if name == "mif":
        return "fraction"
    return stream.never_scale if name == "zero_shot_never" else stream.scale


def crossed(values_SO: np.ndarray) -> Interval:
    """Interval over seeds and orders: both are taken as draws, and every order has the same seeds.

    With one seed it is over orders alone, and knows nothing of other seeds; with one order over seeds alone.
    """
    return interval(values_SO) if values_SO.shape[1] > 1 else over_seeds(values_SO[:, 0])


def intervals(
    stream: Stream, found: Sequence[Sequence[Mapping[str, float | None]]], names: Iterable[str]
) -> Values:
    """The interval of each metric, of values by order and seed; `None` where one is missing or scales differ."""
    out: Values = {}
    for name in names:
        rows_OS = [[values[name] for values in part] for part in found]
        known = bool(rows_OS) and scale_of(name, stream) is not None
        whole = known and all(value is not None for row in rows_OS for value in row)
        out[name] = crossed(np.array(rows_OS, dtype=np.float64).T) if whole else None
    return out


def _row(stream: Stream, arm: str, order: str, grid: Mapping[str, Sequence[Chain]]) -> StreamRow:
    chains = stream.of(arm, order)
    runs = [run for chain in chains for run in chain.runs if run]
    return StreamRow(
        arm=arm,
        method=str(runs[0].config["adapter"]["name"]) if runs else "",
        order=order,
        num_orders=len(grid),
        num_seeds=len(next(iter(grid.values()), ())),
        num_whole=sum(chain.matrix is not None for chain in chains),
        num_chains=len(chains),
        values=_values(stream, grid),
    )


def _values(stream: Stream, grid: Mapping[str, Sequence[Chain]]) -> Values:
    found = [[values_of(stream, chain) for chain in chains] for chains in grid.values()]
    return intervals(stream, found, COLUMNS)


def _bounds(stream: Stream) -> list[BoundRow]:
    rows = []
    for role, arms in stream.bounds.items():
        for arm, seeds in arms.items():
            final = [_mean(scores, stream.tasks) for scores in seeds.values()] if stream.scale else []
            never = [_mean(scores, stream.never) for scores in seeds.values()] if stream.never_scale else []
            shares = stream.bound_forms.get(role, {}).get(arm, {}).values()
            mif = [_mean(found, stream.tasks) for found in shares]
            values = {"final": _over(final), "zero_shot_never": _over(never), "mif": _over(mif)}
            rows.append(BoundRow(role=role, arm=arm, num_seeds=len(seeds), values=values))
    return rows


def _mean(scores: Mapping[str, float | None], names: Sequence[str]) -> float | None:
    """The mean over `names`; None without any, and where one has no score."""
    found = [scores.get(name) for name in names]
    present = [score for score in found if score is not None]
    return sum(present) / len(present) if present and len(present) == len(found) else None


def _over(values: Sequence[float | None]) -> Interval | None:
    """A t-interval over the seeds that have a value."""
    present = [value for value in values if value is not None]
    return over_seeds(np.array(present)) if present else None


def _whole(chain: Chain) -> Matrix:
    assert chain.matrix is not None
    return chain.matrix
