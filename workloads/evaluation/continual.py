"""Continual metrics: what a model that learns tasks one after another keeps, loses and carries forward.

Source:  A[t][i] is the score on task i after stage t of T; row 0 is the model before any training.
           final         mean_i A[T][i]
           mft           mean_i A[i][i]
           maa           mean_t of mean_{i <= t} A[t][i]
           bwt_T         sum_{i < T} (A[T][i] - A[i][i]) / T, as GEM's code divides (Lopez-Paz, Ranzato 2017)
           bwt_Tminus1   the same sum / (T - 1), as MCITlib, SMoLoRA and Mammoth divide
           forgetting    mean_{i < T} (max_{t < T} A[t][i] - A[T][i]), Chaudhry et al. 2018, arXiv:1801.10112
           fwt           mean_{i > 1} (A[i-1][i] - A[0][i])
           zero_shot_later   mean_{i > 1} of mean_{1 <= t < i} A[t][i]: tasks that are yet to be trained
           zero_shot_never   mean over the tasks that no stage trains, after stage T
           intransigence     mean_i (bound_i - A[i][i]), bound_i from training on task i alone
Differs: what needs a score that nobody measured is `None`, not a mean over fewer cells, and so is a mean over
         scores on several scales. Only the maximum in `forgetting` is over the stages that were measured, so that a
         lower triangle has a forgetting too.

Values keep the unit of the scores: nothing is rescaled, rounded or clipped.

Shape letters: T stages, and as many tasks; O orders; S seeds.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from workloads.evaluation.statistics import FloatArray, Interval, over_seeds
from workloads.record import DomainScore, Scale, mean_over

# Scores of which some may be absent.
Cells = tuple[float | None, ...]
# Task -> domains that it is scored on.
Parts = Mapping[str, Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Scores on T tasks after each of T training stages; `None` where nobody measured."""

    # In the order in which they are trained.
    tasks: tuple[str, ...]
    # One row a stage, one cell a task; cells up to the diagonal are never absent.
    rows: tuple[Cells, ...]
    # Scores before any training.
    before: Cells | None = None
    # Task that no stage trains -> its score after each stage.
    never_trained: Mapping[str, Cells] = field(default_factory=dict)
    # Task that no stage trains -> its score before any training.
    never_before: Mapping[str, float | None] = field(default_factory=dict)
    # Task of either kind -> scale of its scores, where that is known; all others lie on one.
    scales: Mapping[str, Scale] = field(default_factory=dict)

    def __post_init__(self) -> None:
        num_tasks = len(self.tasks)
        names = [*self.tasks, *self.never_trained]
        columns = self.never_trained.values()
        lines = [*self.rows, *columns, *([] if self.before is None else [self.before])]
        cells = [*(cell for line in lines for cell in line), *self.never_before.values()]
        assert num_tasks > 0, "at least one task"
        assert len(set(names)) == len(names), "each task once"
        assert len(self.rows) == num_tasks, "one stage for each task"
        assert all(len(line) == num_tasks for line in lines), "a cell for each task or stage"
        assert all(None not in row[: t + 1] for t, row in enumerate(self.rows)), "scores up to the diagonal"
        assert set(self.never_before) <= set(self.never_trained), "scores before of tasks never trained"
        assert set(self.scales) <= set(names), "scales of tasks"
        assert all(math.isfinite(cell) for cell in cells if cell is not None), "finite scores"


@dataclass(frozen=True, kw_only=True)
class OrderSensitivity:
    """How much the final score depends on the order of the tasks; intervals over seeds."""

    # Mean over orders.
    mean: Interval
    # Standard deviation over orders at one seed; with a single order there is none.
    spread: Interval | None
    # The order whose mean over seeds is lowest; the first of equals.
    worst_order: str
    worst: Interval


def by_task(scores: Mapping[str, DomainScore], parts: Parts) -> dict[str, float | None]:
    """Score on each task: the mean over its domains; None where one was not scored, or their scales differ."""
    return {task: mean_over(scores, domains) for task, domains in parts.items()}


def never_trained(parts: Parts, runs: Iterable[Mapping[str, DomainScore]]) -> tuple[str, ...]:
    """The domains that some run was scored on and that belong to none of the tasks, nor have the name of one."""
    learned = {*parts, *(domain for domains in parts.values() for domain in domains)}
    return tuple(dict.fromkeys(domain for scores in runs for domain in scores if domain not in learned))


def assembled(
    parts: Parts,
    stages: Sequence[Mapping[str, DomainScore]],
    before: Mapping[str, float | None] | None,
    never: Sequence[str],
) -> Matrix | None:
    """The matrix of a stream from the scores after each stage, all that was recorded of its tasks and of `never`.

    `parts` are the stages' tasks in order; `before` has scores by the names of both kinds of tasks. None when a stage
    was not scored on a task that it has seen.
    """
    rows = [tuple(by_task(scores, parts).values()) for scores in stages]
    if any(None in row[: t + 1] for t, row in enumerate(rows)):
        return None
    columns = {name: tuple(mean_over(scores, [name]) for scores in stages) for name in never}
    scales: dict[str, Scale] = {d: score.scale for scores in stages for d, score in scores.items()}
    firsts = {**{task: domains[0] for task, domains in parts.items()}, **{name: name for name in never}}
    return Matrix(
        tasks=tuple(parts),
        rows=tuple(rows),
        before=None if before is None else tuple(before.get(task) for task in parts),
        never_trained=columns,
        never_before={} if before is None else {name: before.get(name) for name in never},
        scales={name: scales[domain] for name, domain in firsts.items() if domain in scales},
    )


def final(matrix: Matrix) -> float | None:
    """Mean over all tasks after the last stage."""
    return _mean(matrix.rows[-1])


def mft(matrix: Matrix) -> float | None:
    """Mean over tasks of the score right after the task's own stage."""
    return _mean(_diagonal(matrix))


def maa(matrix: Matrix) -> float | None:
    """Mean over stages of the mean over the tasks seen so far; not the mean of all cells."""
    return _mean(_mean(row[: t + 1]) for t, row in enumerate(matrix.rows))


def bwt_T(matrix: Matrix) -> float | None:
    """Change since each task's own stage, summed and divided by T; 0 for a single task."""
    return _mean(map(_minus, matrix.rows[-1], _diagonal(matrix)))


def bwt_Tminus1(matrix: Matrix) -> float | None:
    """Change since each task's own stage, mean over all tasks but the last; `None` for a single task."""
    return _mean(map(_minus, matrix.rows[-1][:-1], _diagonal(matrix)))


def forgetting(matrix: Matrix) -> float | None:
    """Best score of an earlier stage minus the last score, mean over all tasks but the last.

    Negative where the last stage is the best. `None` for a single task.
    """
    return _mean(forgetting_by_stage(matrix)[-1, :-1].tolist())


def forgetting_by_stage(matrix: Matrix) -> FloatArray:
    """How forgetting develops, (T, T): by stage and task; 0 for tasks that no earlier stage has trained."""
    size = len(matrix.tasks)
    lost_TT = np.zeros((size, size))
    for t, row in enumerate(matrix.rows):
        for i, score in enumerate(row[:t]):
            earlier = [cells[i] for cells in matrix.rows[:t]]
            assert score is not None
            lost_TT[t, i] = max(cell for cell in earlier if cell is not None) - score
    return lost_TT


def fwt(matrix: Matrix) -> float | None:
    """Score just before each task's own stage minus the score before any training, mean over tasks 2 to T."""
    if matrix.before is None:
        return None
    return _mean(_minus(matrix.rows[i - 1][i], matrix.before[i]) for i in range(1, len(matrix.tasks)))


def zero_shot_later(matrix: Matrix) -> float | None:
    """Mean over tasks 2 to T of the mean score after the stages before the task's own."""
    columns = ([row[i] for row in matrix.rows[:i]] for i in range(1, len(matrix.tasks)))
    return _mean(map(_mean, columns))


def zero_shot_never(matrix: Matrix) -> float | None:
    """Mean after the last stage over the tasks that no stage trains."""
    return _mean(cells[-1] for cells in matrix.never_trained.values())


AGGREGATES: Mapping[str, Callable[[Matrix], float | None]] = {
    "final": final,
    "mft": mft,
    "maa": maa,
    "bwt_T": bwt_T,
    "bwt_Tminus1": bwt_Tminus1,
    "forgetting": forgetting,
    "fwt": fwt,
    "zero_shot_later": zero_shot_later,
    "zero_shot_never": zero_shot_never,
}


def aggregates(matrix: Matrix) -> dict[str, float | None]:
    """Every aggregate by name; `None` for what needs absent scores, or scores on several scales."""
    return {
        name: function(matrix) if one_scale(matrix, name == "zero_shot_never") else None
        for name, function in AGGREGATES.items()
    }


def one_scale(matrix: Matrix, never: bool = False) -> bool:
    """Whether the scores on all tasks, or on those that no stage trains, lie on one scale as far as it is known."""
    names = matrix.never_trained if never else matrix.tasks
    return len({matrix.scales[name] for name in names if name in matrix.scales}) <= 1


def intransigence(matrix: Matrix, bound_T: FloatArray) -> float | None:
    """What training in a sequence costs each task at its own stage, against training on it alone; mean.

    `bound_T` holds the scores of one model for each task, in the order of `matrix.tasks`.
    """
    assert bound_T.shape == (len(matrix.tasks),), "one bound for each task"
    return _mean(map(_minus, bound_T.tolist(), _diagonal(matrix)))


def order_sensitivity(by_order: Mapping[str, Sequence[Matrix]]) -> OrderSensitivity:
    """Final scores over orders; `by_order` gives each order's matrices, the same seeds for all, in one order.

    The sample unit is the seed: orders are fixed, and one seed's are summed up before the t-interval over seeds.
    The spread holds the noise of training as well, so it is to be read beside the spread over seeds of one order.
    The worst order's interval does not know that it was chosen as the lowest of several, which lowers it.
    Raises `ValueError` when orders differ in their seeds' number or train other tasks.
    """
    counts = {order: len(matrices) for order, matrices in by_order.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise ValueError(f"orders: need the same seeds for each, at least one, got {counts}")
    trained = {tuple(sorted(matrix.tasks)) for matrices in by_order.values() for matrix in matrices}
    if len(trained) != 1:
        raise ValueError(f"orders: need the same tasks for each, got {sorted(trained)}")
    final_OS = np.array([[final(matrix) for matrix in seeds] for seeds in by_order.values()], np.float64)
    lowest = int(final_OS.mean(axis=1).argmin())
    return OrderSensitivity(
        mean=over_seeds(final_OS.mean(axis=0)),
        spread=over_seeds(final_OS.std(axis=0, ddof=1)) if len(by_order) > 1 else None,
        worst_order=list(by_order)[lowest],
        worst=over_seeds(final_OS[lowest]),
    )


def _diagonal(matrix: Matrix) -> list[float | None]:
    return [row[i] for i, row in enumerate(matrix.rows)]


def _minus(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right


def _mean(cells: Iterable[float | None]) -> float | None:
    """The mean of `cells`; `None` if there are none or one of them is absent."""
    values = list(cells)
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present and len(present) == len(values) else None
