"""Continual metrics: against plain loops on random matrices, Avalanche's arrays, and absent scores."""

import copy
import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from workloads.evaluation import continual
from workloads.evaluation.continual import (
    Matrix,
    aggregates,
    forgetting_by_stage,
    intransigence,
    order_sensitivity,
)

scores = st.floats(-1000, 1000, allow_nan=False).map(lambda value: round(value, 6))


@st.composite
def matrices(draw, num_tasks=st.integers(1, 6), gaps=True):
    """A random matrix; with `gaps`, cells that may be absent sometimes are."""
    size = draw(num_tasks)
    optional = scores | st.none() if gaps and draw(st.booleans()) else scores
    rows = [[draw(scores if i <= t else optional) for i in range(size)] for t in range(size)]
    before = [draw(optional) for _ in range(size)] if draw(st.booleans()) else None
    never = {f"never {j}": [draw(optional) for _ in range(size)] for j in range(draw(st.integers(0, 2)))}
    return matrix_of(rows, before, never)


def matrix_of(rows, before=None, never=None):
    """Rows may end at the diagonal."""
    size = len(rows)
    return Matrix(
        tasks=tuple(f"task {i}" for i in range(size)),
        rows=tuple((*row, *[None] * (size - len(row))) for row in rows),
        before=None if before is None else tuple(before),
        never_trained={name: tuple(column) for name, column in (never or {}).items()},
    )


def total(values):
    """The sum, or None as soon as a value is absent."""
    result = 0.0
    for value in values:
        if value is None:
            return None
        result += value
    return result


def over(value, count):
    return None if value is None or count == 0 else value / count


def reference(matrix):
    """The definitions written out, with stages and tasks counted from 1 as in the papers."""
    T = len(matrix.tasks)
    A = {(t, i): matrix.rows[t - 1][i - 1] for t in range(1, T + 1) for i in range(1, T + 1)}
    for i in range(1, T + 1):
        A[0, i] = matrix.before[i - 1] if matrix.before is not None else None
    maa, changes, lost, gains, later = 0.0, 0.0, 0.0, [], []
    for t in range(1, T + 1):
        seen = 0.0
        for i in range(1, t + 1):
            seen += A[t, i]
        maa += seen / t
    for i in range(1, T):
        changes += A[T, i] - A[i, i]
        best = -math.inf
        for t in range(1, T):
            if A[t, i] is not None and A[t, i] > best:
                best = A[t, i]
        lost += best - A[T, i]
    for i in range(2, T + 1):
        known = A[i - 1, i] is not None and A[0, i] is not None
        gains.append(A[i - 1, i] - A[0, i] if known else None)
        later.append(over(total(A[t, i] for t in range(1, i)), i - 1))
    never = [column[T - 1] for column in matrix.never_trained.values()]
    return {
        "final": total(A[T, i] for i in range(1, T + 1)) / T,
        "mft": total(A[i, i] for i in range(1, T + 1)) / T,
        "maa": maa / T,
        "bwt_T": changes / T,
        "bwt_Tminus1": over(changes, T - 1),
        "forgetting": over(lost, T - 1),
        "fwt": over(total(gains), T - 1),
        "zero_shot_later": over(total(later), T - 1),
        "zero_shot_never": over(total(never), len(never)),
    }


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None or found[name] is None:
            assert found[name] is value, name
        else:
            assert type(found[name]) is float
            assert found[name] == pytest.approx(value, rel=1e-12, abs=1e-9), name


@given(matrices())
@settings(max_examples=300, deadline=None)
def test_aggregates_equal_the_definitions_written_out(matrix):
    same(aggregates(matrix), reference(matrix))


@given(matrices(gaps=False))
@settings(max_examples=60, deadline=None)
def test_what_lies_above_the_diagonal_leaves_other_aggregates_as_they_are(matrix):
    lower = dataclasses.replace(
        matrix,
        rows=tuple(
            tuple(v if i <= t else None for i, v in enumerate(row)) for t, row in enumerate(matrix.rows)
        ),
    )
    kept = ("final", "mft", "maa", "bwt_T", "bwt_Tminus1", "zero_shot_never")
    whole, part = aggregates(matrix), aggregates(lower)
    assert {name: part[name] for name in kept} == {name: whole[name] for name in kept}
    assert part["zero_shot_later"] is None
    assert part["fwt"] is None
    if len(matrix.tasks) > 1:
        assert part["forgetting"] <= whole["forgetting"]


@given(matrices(), st.sampled_from([0.01, 100.0]))
@settings(max_examples=60, deadline=None)
def test_aggregates_have_the_unit_of_the_scores(matrix, factor):
    times = lambda cells: tuple(None if v is None else v * factor for v in cells)  # noqa: E731
    scaled = Matrix(
        tasks=matrix.tasks,
        rows=tuple(times(row) for row in matrix.rows),
        before=None if matrix.before is None else times(matrix.before),
        never_trained={name: times(column) for name, column in matrix.never_trained.items()},
    )
    expected = aggregates(matrix)
    same(aggregates(scaled), {name: None if v is None else v * factor for name, v in expected.items()})


@given(matrices())
@settings(max_examples=60, deadline=None)
def test_inputs_are_never_changed(matrix):
    before = copy.deepcopy(matrix)
    bound_T = np.arange(len(matrix.tasks), dtype=np.float64)
    bound_T.setflags(write=False)
    aggregates(matrix)
    forgetting_by_stage(matrix)
    intransigence(matrix, bound_T)
    order_sensitivity({"one": [matrix], "other": [matrix]})
    assert matrix == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        matrix.rows = ()  # type: ignore[misc]


def test_forgetting_develops_as_avalanche_s_arrays_say():
    matrix = matrix_of([[1, 0, 0], [0.5, 0.8, 1], [0.2, 1, 0.5]])
    developed = forgetting_by_stage(matrix)
    assert developed == pytest.approx(np.array([[0, 0, 0], [0.5, 0, 0], [0.8, -0.2, 0]]), abs=1e-15)
    assert aggregates(matrix)["forgetting"] == pytest.approx((0.8 - 0.2) / 2, abs=1e-15)


@given(matrices())
@settings(max_examples=60, deadline=None)
def test_forgetting_at_a_stage_is_the_forgetting_of_the_stream_that_ends_there(matrix):
    developed = forgetting_by_stage(matrix)
    for t in range(1, len(matrix.tasks)):
        shorter = matrix_of([row[: t + 1] for row in matrix.rows[: t + 1]])
        expected = reference(shorter)["forgetting"]
        assert sum(developed[t, :t].tolist()) / t == pytest.approx(expected, rel=1e-12, abs=1e-9)
        assert not developed[t, t:].any()


def test_forgetting_remembers_a_best_stage_that_is_not_the_task_s_own():
    matrix = matrix_of([[10], [30, 10], [20, 10, 10]])
    assert aggregates(matrix)["forgetting"] == pytest.approx((10 + 0) / 2)
    assert aggregates(matrix)["bwt_Tminus1"] == pytest.approx((10 + 0) / 2)
    assert aggregates(matrix)["bwt_T"] == pytest.approx((10 + 0) / 3)


def test_maa_is_not_the_mean_of_all_cells():
    assert aggregates(matrix_of([[90], [10, 20]]))["maa"] == pytest.approx((90 + 15) / 2)


def test_a_single_task_has_no_forgetting_and_no_transfer():
    found = aggregates(matrix_of([[61.5]], before=[20.0], never={"other": [8.0]}))
    assert found == {
        "final": 61.5, "mft": 61.5, "maa": 61.5, "bwt_T": 0.0, "bwt_Tminus1": None, "forgetting": None,
        "fwt": None, "zero_shot_later": None, "zero_shot_never": 8.0,
    }  # fmt: skip
    assert forgetting_by_stage(matrix_of([[61.5]])).tolist() == [[0.0]]


def test_a_score_that_is_absent_takes_only_what_needs_it():
    rows = [[50, 10, None], [40, 60, 20], [30, 50, 70]]
    found = aggregates(matrix_of(rows, before=[None, 5, 5], never={"a": [None, None, 4], "b": [1, 1, 2]}))
    assert found["fwt"] == pytest.approx((10 - 5 + 20 - 5) / 2)
    assert found["zero_shot_later"] is None
    assert found["zero_shot_never"] == pytest.approx(3)
    found = aggregates(matrix_of(rows, before=[5, 5, None], never={"a": [4, 4, None], "b": [1, 1, 2]}))
    assert found["fwt"] is None
    assert found["zero_shot_never"] is None


@given(matrices(), st.data())
@settings(max_examples=60, deadline=None)
def test_intransigence_is_the_mean_shortfall_at_each_task_s_own_stage(matrix, data):
    size = len(matrix.tasks)
    bounds = data.draw(st.lists(scores, min_size=size, max_size=size))
    expected = sum(bounds[i] - matrix.rows[i][i] for i in range(size)) / size
    assert intransigence(matrix, np.array(bounds)) == pytest.approx(expected, rel=1e-12, abs=1e-9)


def t_interval(values):
    """Mean and half width, written out."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, stats.t.ppf(0.975, len(values) - 1) * math.sqrt(variance / len(values))


def test_order_sensitivity_is_the_spread_of_final_scores_over_orders():
    finals = {"given": [60.0, 62.0, 58.0], "reversed": [50.0, 56.0, 54.0], "sampled": [55.0, 51.0, 62.0]}
    by_order = {
        order: [matrix_of([[90.0, 0.0], [value - 10, value + 10]]) for value in values]
        for order, values in finals.items()
    }
    # Another order of the same tasks.
    by_order["reversed"] = [dataclasses.replace(m, tasks=m.tasks[::-1]) for m in by_order["reversed"]]
    found = order_sensitivity(by_order)
    means, spreads = [], []
    for column in zip(*finals.values(), strict=True):
        mean = sum(column) / 3
        means.append(mean)
        spreads.append(math.sqrt(sum((value - mean) ** 2 for value in column) / 2))
    for interval, values in ((found.mean, means), (found.spread, spreads), (found.worst, finals["reversed"])):
        mean, half = t_interval(values)
        assert interval.mean == pytest.approx(mean, rel=1e-12)
        assert interval.half_width == pytest.approx(half, rel=1e-9)
        assert interval.num_seeds == 3
    assert found.worst_order == "reversed"


def test_a_single_order_has_no_spread():
    found = order_sensitivity({"given": [matrix_of([[60.0]]), matrix_of([[70.0]])]})
    assert found.spread is None
    assert found.worst_order == "given"
    assert found.mean == found.worst


def test_orders_that_cannot_be_compared_are_refused():
    one, other = matrix_of([[60.0]]), Matrix(tasks=("elsewhere",), rows=((60.0,),))
    with pytest.raises(ValueError, match="need the same tasks.*elsewhere.*task 0"):
        order_sensitivity({"given": [one], "reversed": [other]})
    with pytest.raises(ValueError, match="need the same seeds.*'given': 1, 'reversed': 2"):
        order_sensitivity({"given": [one], "reversed": [one, one]})
    for nothing in ({}, {"given": []}):
        with pytest.raises(ValueError, match="need the same seeds"):
            order_sensitivity(nothing)


@pytest.mark.parametrize(
    "fields",
    [
        {"tasks": ()},
        {"tasks": ("a", "a")},
        {"rows": ((1.0, None),)},
        {"rows": ((1.0,), (1.0, 1.0))},
        {"rows": ((1.0, None), (None, 1.0))},
        {"rows": ((1.0, None), (math.nan, 1.0))},
        {"before": (1.0,)},
        {"never_trained": {"c": (1.0,)}},
        {"never_trained": {"a": (1.0, 1.0)}},
    ],
)
def test_a_matrix_that_breaks_its_own_rules_is_not_made(fields):
    good = {"tasks": ("a", "b"), "rows": ((1.0, None), (0.5, 1.0))}
    assert Matrix(**good).before is None
    with pytest.raises(AssertionError):
        Matrix(**{**good, **fields})


def test_every_aggregate_is_listed_once_under_its_function_s_name():
    assert {name: function.__name__ for name, function in continual.AGGREGATES.items()} == {
        name: name for name in aggregates(matrix_of([[1.0]]))
    }
