"""What the page shows of a stream: matrices, curves of each task, order strips, the selector's choices."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dashboards.figures import nice_limit
from dashboards.results import StudyResults
from dashboards.stream_differences import PAIRED, Difference, differences
from dashboards.stream_figures import Dot, Spot, TaskLine
from dashboards.stream_rows import COLUMNS, ROLES, StreamSummary, scale_of, summarise_stream, values_of
from dashboards.stream_tables import scale_lines
from dashboards.streams import Chain, Stream, missing_lines, stream_of
from dashboards.units import UNITS
from dashboards.views import arm_colours
from workloads.evaluation.statistics import Interval, over_seeds
from workloads.record import TOP, Scale

_COLOURS = 6


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of a heat map: how strongly to tint it, 0 to 100 %."""

    interval: Interval
    scale: Scale
    strength: int
    # The task's own stage.
    is_own: bool


@dataclass(frozen=True, kw_only=True)
class MatrixRow:
    """Scores after one stage, or of a bound."""

    label: str
    # Empty for a stage that all seeds have finished.
    note: str
    is_bound: bool
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True, kw_only=True)
class ArmView:
    """One arm in one order, mean over seeds."""

    arm: str
    order: str
    num_seeds: int
    # Tasks in the order of training, then those that are never trained.
    tasks: tuple[str, ...]
    never: tuple[str, ...]
    rows: tuple[MatrixRow, ...]
    # Scale -> lines of the tasks that are scored on it, and the score at which their axis ends.
    curves: dict[Scale, tuple[tuple[TaskLine, ...], float]]


@dataclass(frozen=True, kw_only=True)
class Strip:
    """Final scores of one arm: a dot for each order and seed."""

    arm: str
    dots: tuple[Dot, ...]
    mean: Interval
    # Spread over orders and the worst order, in words.
    spread: Interval | None
    worst: str


@dataclass(frozen=True, kw_only=True)
class SelectorView:
    """Which task a method finds for the items of each task, after the last stage, seeds together."""

    arm: str
    order: str
    accuracy: Interval | None
    found: tuple[str, ...]
    # Task -> number of items and share of the task's, for each of `found`.
    rows: dict[str, tuple[tuple[int, int], ...]]


@dataclass(frozen=True, kw_only=True)
class StreamView:
    """Everything the page shows of a stream."""

    summary: StreamSummary
    columns: dict[str, tuple[str, str, bool, Scale | None]]
    roles: dict[str, str]
    # Differences of arms and the headings of their metrics; none where the tasks' scales differ.
    differences: tuple[Difference, ...]
    paired: dict[str, str]
    arms: tuple[ArmView, ...]
    # Order -> colour, and the ends of the strips' axis.
    orders: dict[str, str]
    strips: tuple[Strip, ...]
    ends: tuple[float, float]
    spots: tuple[Spot, ...]
    selectors: tuple[SelectorView, ...]
    scale_lines: list[str]
    missing: list[str]


def view_of(results: StudyResults) -> StreamView | None:
    """The view of a study's stream; None when it has none."""
    stream = stream_of(results)
    if stream is None:
        return None
    summary = summarise_stream(stream)
    orders = {order: f"c{place % _COLOURS + 1}" for place, order in enumerate(stream.orders)}
    strips = tuple(_strips(summary, orders))
    return StreamView(
        summary=summary,
        columns={
            name: (column.heading, column.words, column.is_difference, scale_of(name, stream))
            for name, column in COLUMNS.items()
        },
        roles=ROLES,
        differences=differences(stream),
        paired={name: COLUMNS[name].heading for name in PAIRED},
        arms=tuple(_arm_view(stream, arm) for arm in stream.arms if _chosen(stream, arm)),
        orders=orders,
        strips=strips,
        ends=_ends([dot.value for strip in strips for dot in strip.dots], stream.scale),
        spots=tuple(_spots(summary, arm_colours(results))),
        selectors=tuple(view for arm in stream.arms if (view := _selector(stream, arm))),
        scale_lines=scale_lines(stream),
        missing=missing_lines(stream),
    )


def _chosen(stream: Stream, arm: str) -> list[Chain]:
    """The chains of the first order in which the arm has finished a stage."""
    chains = (stream.of(arm, order) for order in stream.orders)
    return next((part for part in chains if any(run for chain in part for run in chain.runs)), [])


def _arm_view(stream: Stream, arm: str) -> ArmView:
    chains = _chosen(stream, arm)
    names = (*chains[0].tasks, *stream.never)
    rows = [_bound_row(stream, chains, "before", names)]
    for place, task in enumerate(chains[0].tasks):
        known = [
            (*row, *never) for c in chains if (row := c.rows[place]) and (never := c.never[place]) is not None
        ]
        note = "" if len(known) == len(chains) else f"{len(known)} of {len(chains)} seeds"
        cells = _cells(stream, names, known, own=place)
        rows.append(MatrixRow(label=f"{place + 1} {task}", note=note, is_bound=False, cells=cells))
    rows += [_bound_row(stream, chains, role, names) for role in ("joint", "alone")]
    return ArmView(
        arm=arm,
        order=chains[0].order,
        num_seeds=len(chains),
        tasks=chains[0].tasks,
        never=stream.never,
        rows=tuple(row for row in rows if row),
        curves=_curves(stream, chains),
    )


def _bound_row(stream: Stream, chains: Sequence[Chain], role: str, names: Sequence[str]) -> MatrixRow | None:
    """The row of an arm outside every order, at the chains' seeds."""
    known = [scores for chain in chains if (scores := stream.bound(role, chain))]
    if not known:
        return None
    cells = _cells(stream, names, [[scores.get(name) for name in names] for scores in known])
    note = "" if len(known) == len(chains) else f"{len(known)} of {len(chains)} seeds"
    return MatrixRow(label=ROLES[role], note=note, is_bound=True, cells=cells)


def _cells(
    stream: Stream, names: Sequence[str], by_seed: Sequence[Sequence[float | None]], own: int = -1
) -> tuple[Cell | None, ...]:
    """A cell for each name, over the seeds that have a score."""
    out: list[Cell | None] = []
    for place, name in enumerate(names):
        values = [value for row in by_seed if (value := row[place]) is not None]
        scale = stream.scales[name]
        if not values or scale is None:
            out.append(None)
            continue
        mean = over_seeds(np.array(values))
        strength = round(70 * min(max(mean.mean / _top(scale), 0.0), 1.0))
        out.append(Cell(interval=mean, scale=scale, strength=strength, is_own=place == own))
    return tuple(out)


def _top(scale: Scale) -> float:
    """The score at which a tint is strongest; a CIDEr above 2 is rare."""
    return 2.0 if scale == "cider" else TOP[scale]


def _curves(stream: Stream, chains: Sequence[Chain]) -> dict[Scale, tuple[tuple[TaskLine, ...], float]]:
    """Each task's mean score over stages, 0 for the untrained model."""
    found: dict[Scale, list[TaskLine]] = {}
    for place, task in enumerate(chains[0].tasks):
        scale = stream.scales[task]
        if scale is None:
            continue
        by_stage = [[chain.before for chain in chains]]
        by_stage += [[chain.rows[stage] for chain in chains] for stage in range(len(chains[0].tasks))]
        points = []
        for stage, rows in enumerate(by_stage):
            values = [value for row in rows if row and (value := row[place]) is not None]
            if values:
                points.append((stage, sum(values) / len(values)))
        # The colour is the task's in every arm and order.
        kind = stream.tasks.index(task) if task in stream.tasks else place
        colour, is_dashed = f"c{kind % _COLOURS + 1}", kind >= _COLOURS
        line = TaskLine(task=task, colour=colour, is_dashed=is_dashed, own=place + 1, points=tuple(points))
        found.setdefault(scale, []).append(line)
    out: dict[Scale, tuple[tuple[TaskLine, ...], float]] = {}
    for scale, lines in found.items():
        values = [value for line in lines for _, value in line.points]
        out[scale] = (tuple(lines), UNITS[scale].bar or nice_limit(values, UNITS[scale].least))
    return out


def _strips(summary: StreamSummary, orders: dict[str, str]) -> list[Strip]:
    out = []
    for arm, found in summary.sensitivity.items():
        chains = [chain for chain in summary.stream.of(arm) if chain.matrix]
        finals = [(chain, values_of(summary.stream, chain)["final"]) for chain in chains]
        dots = [
            Dot(value=value, colour=orders[chain.order], label=f"{chain.order}, seed {chain.seed}")
            for chain, value in finals
            if value is not None
        ]
        worst = found.worst_order if found.spread else ""
        out.append(Strip(arm=arm, dots=tuple(dots), mean=found.mean, spread=found.spread, worst=worst))
    return out


def _ends(values: Sequence[float], scale: Scale | None) -> tuple[float, float]:
    """Ends of an axis that holds all values: multiples of a twentieth of the scale, of 0.1 for CIDEr."""
    step = TOP[scale or "fraction"] / (100 if scale == "cider" else 20)
    low, high = min(values, default=0.0), max(values, default=step)
    return float(np.floor(low / step) * step), float(
        max(np.ceil(high / step), np.floor(low / step) + 1) * step
    )


def _spots(summary: StreamSummary, colours: dict[str, str]) -> list[Spot]:
    out = []
    for row in summary.arms:
        lost, learned = row.values["forgetting"], row.values["mft"]
        if lost and learned:
            out.append(Spot(label=row.arm, colour=colours[row.arm], x=lost, y=learned))
    return out


def _selector(stream: Stream, arm: str) -> SelectorView | None:
    """What the method's selector found after the last stage; None for a method that selects no task."""
    chains = _chosen(stream, arm)
    last = [run for chain in chains if (run := chain.runs[-1]) and run.selected]
    if not last:
        return None
    counts: dict[str, dict[str, int]] = {}
    for run in last:
        for task, found in run.selected.items():
            mine = counts.setdefault(task, {})
            for name, number in found.items():
                mine[name] = mine.get(name, 0) + number
    tasks = sorted(counts, key=lambda task: (*chains[0].tasks, task).index(task))
    columns = dict.fromkeys([*tasks, *(name for found in counts.values() for name in found)])
    rows = {}
    for task in tasks:
        total = max(sum(counts[task].values()), 1)
        numbers = [counts[task].get(name, 0) for name in columns]
        rows[task] = tuple((number, round(100 * number / total)) for number in numbers)
    shares = [run.selector_accuracy for run in last if run.selector_accuracy is not None]
    accuracy = over_seeds(np.array(shares)) if shares else None
    return SelectorView(arm=arm, order=chains[0].order, accuracy=accuracy, found=tuple(columns), rows=rows)
