"""Intervals over items and seeds: against loops in float64, and by how often they hold the truth."""

import dataclasses
import math
import sys

import numpy as np
import pytest
from scipy import stats

from workloads.evaluation.statistics import Interval, interval, mean_interval, over_seeds, verdict


def reference(sets):
    """(mean, half width, degrees of freedom) from sums written out one by one; `sets` are lists of lists."""
    num_sets, num_seeds = len(sets), len(sets[0])
    per_seed = [sum(sum(table[s]) / len(table[s]) for table in sets) / num_sets for s in range(num_seeds)]
    grand = sum(per_seed) / num_seeds
    seeds = sum((m - grand) ** 2 for m in per_seed) / (num_seeds - 1) / num_seeds
    items = rest = items_df = rest_df = 0.0
    for table in sets:
        num_items = len(table[0])
        mean = sum(map(sum, table)) / (num_seeds * num_items)
        rows = [sum(row) / num_items for row in table]
        columns = [sum(row[i] for row in table) / num_seeds for i in range(num_items)]
        ms_items = num_seeds * sum((c - mean) ** 2 for c in columns) / (num_items - 1)
        ss_rest = 0.0
        for s in range(num_seeds):
            for i in range(num_items):
                ss_rest += (table[s][i] - rows[s] - columns[i] + mean) ** 2
        ms_rest = ss_rest / ((num_seeds - 1) * (num_items - 1))
        unit = num_seeds * num_items * num_sets * num_sets
        items += ms_items / unit
        rest += ms_rest / unit
        items_df += (ms_items / unit) ** 2 / (num_items - 1)
        rest_df += (ms_rest / unit) ** 2 / ((num_items - 1) * (num_seeds - 1))
    var_seed, var_item = max(seeds - rest, 0.0), max(items - rest, 0.0)
    variance = var_seed + var_item + rest
    df = variance**2 / ((var_seed + rest) ** 2 / (num_seeds - 1) + items_df + rest_df)
    df = max(df, min(num_seeds, *(len(table[0]) for table in sets)) - 1)
    return grand, stats.t.ppf(0.975, df) * math.sqrt(variance), df


def draw(rng, num_seeds, num_items, seed_sd, item_sd, rest_sd):
    return (
        rng.normal(0, seed_sd, (num_seeds, 1))
        + rng.normal(0, item_sd, (1, num_items))
        + rng.normal(0, rest_sd, (num_seeds, num_items))
    )


@pytest.mark.parametrize("effects", [(0.1, 0.3, 0.4), (0.0, 0.3, 0.4), (0.2, 0.0, 0.4), (0.0, 0.0, 1.0)])
@pytest.mark.parametrize("sizes", [(2, (7,)), (3, (3,)), (3, (11,)), (8, (20, 9, 5))])
def test_interval_equals_sums_written_out(effects, sizes):
    num_seeds, num_items = sizes
    rng = np.random.default_rng(5)
    sets = [draw(rng, num_seeds, count, *effects) for count in num_items]
    mean, half, df = reference([values.tolist() for values in sets])
    found = mean_interval(sets)
    assert found.mean == pytest.approx(mean, rel=1e-12, abs=1e-14)
    assert found.half_width == pytest.approx(half, rel=1e-9)
    assert found.df == pytest.approx(df, rel=1e-9)
    assert (found.num_seeds, found.num_items) == (num_seeds, sum(num_items))


def covers(values, truth, make):
    found = make(values)
    return found.low <= truth <= found.high


@pytest.mark.parametrize("num_seeds", [3, 5, 8])
@pytest.mark.parametrize(
    ("effects", "highest"),
    [
        ((0.10, 0.3, 0.4), 0.97),  # seeds dominate
        ((0.05, 0.3, 0.4), 0.98),  # seeds and items matter equally
        ((0.00, 0.3, 0.4), 0.99),  # items alone
        ((0.20, 0.0, 0.4), 0.98),  # seeds alone
    ],
)
def test_95_percent_intervals_hold_the_truth_in_95_percent(num_seeds, effects, highest):
    rng = np.random.default_rng(11)
    draws = 2500
    hits = sum(covers(draw(rng, num_seeds, 60, *effects), 0.0, interval) for _ in range(draws))
    # Monte-Carlo standard error 0.44 points; 0.925 leaves room for Satterthwaite's approximation at 3 seeds.
    assert 0.925 <= hits / draws <= highest


@pytest.mark.parametrize("sizes", [(3, 3), (3, 5), (5, 3)])
@pytest.mark.parametrize(
    "effects",
    [(1.0, 1.0, 1.0), (0.0, 1.0, 1.0), (1.0, 0.0, 1.0), (0.0, 2.0, 1.0), (2.0, 0.0, 1.0), (0.0, 1.0, 0.3)],
)
def test_few_seeds_crossed_with_few_orders_hold_the_truth_in_95_percent(sizes, effects):
    rng = np.random.default_rng(14)
    draws = 1500
    hits = sum(covers(draw(rng, *sizes, *effects), 0.0, interval) for _ in range(draws))
    # Monte-Carlo standard error 0.56 points.
    assert hits / draws >= 0.935


@pytest.mark.parametrize("num_seeds", [2, 3, 4])
def test_degrees_of_freedom_are_never_fewer_than_those_of_the_smaller_side(num_seeds):
    rng = np.random.default_rng(15)
    for num_items in (2, 3, 9):
        found = [interval(draw(rng, num_seeds, num_items, 0.0, 1.0, 1.0)) for _ in range(200)]
        assert min(each.df for each in found) >= min(num_seeds, num_items) - 1


@pytest.mark.parametrize("num_seeds", [3, 5, 8])
def test_coverage_holds_for_right_and_wrong_answers(num_seeds):
    rng = np.random.default_rng(12)
    draws, hits = 2500, 0
    for _ in range(draws):
        chance = 0.6 + rng.uniform(-0.1, 0.1, (num_seeds, 1)) + rng.uniform(-0.3, 0.3, (1, 80))
        hits += covers((rng.uniform(size=chance.shape) < chance).astype(float), 0.6, interval)
    assert 0.925 <= hits / draws <= 0.98


@pytest.mark.parametrize("num_seeds", [3, 5, 8])
def test_coverage_of_the_mean_holds_when_domains_rise_and_fall_with_the_seed(num_seeds):
    rng = np.random.default_rng(13)
    draws, hits = 2000, 0
    for _ in range(draws):
        shared = rng.normal(0, 0.08, (num_seeds, 1))
        sets = [shared + draw(rng, num_seeds, count, 0.02, 0.3, 0.4) for count in (60, 60, 40)]
        hits += covers(sets, 0.0, mean_interval)
    assert 0.925 <= hits / draws <= 0.98


def test_domains_that_share_the_seed_are_not_taken_for_independent():
    rng = np.random.default_rng(17)
    shared = rng.normal(0, 0.2, (6, 1))
    sets = [shared + draw(rng, 6, 200, 0.0, 0.1, 0.1) for _ in range(3)]
    as_if_independent = math.sqrt(sum(interval(values).half_width ** 2 for values in sets)) / 3
    # Three domains with one common seed effect say no more about it than one domain does.
    assert mean_interval(sets).half_width > 1.6 * as_if_independent


def test_an_interval_is_never_narrower_than_over_seeds_or_over_items_alone():
    rng = np.random.default_rng(3)
    for seed_sd, item_sd in ((0.0, 0.0), (0.3, 0.0), (0.0, 0.5), (0.1, 0.1)):
        for _ in range(50):
            values = draw(rng, 5, 30, seed_sd, item_sd, 0.4)
            found = interval(values)
            error = found.half_width / stats.t.ppf(0.975, found.df)
            assert error >= values.mean(axis=1).std(ddof=1) / math.sqrt(5) * (1 - 1e-9)
            assert error >= values.mean(axis=0).std(ddof=1) / math.sqrt(30) * (1 - 1e-9)


def test_the_mean_over_one_set_is_that_set():
    values = draw(np.random.default_rng(1), 4, 12, 0.1, 0.2, 0.3)
    assert mean_interval([values]) == interval(values)


def test_domains_weigh_the_same_whatever_their_number_of_items():
    small, large = np.zeros((3, 4)), np.ones((3, 400))
    assert mean_interval([small, large]).mean == 0.5


def test_one_seed_gives_an_interval_over_items_that_says_so():
    values = draw(np.random.default_rng(2), 1, 40, 0, 0.3, 0.2)
    found = interval(values)
    expected = stats.t.interval(0.95, 39, loc=values.mean(), scale=stats.sem(values[0]))
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-9)
    assert found.num_seeds == 1
    assert found.df == pytest.approx(39)


def test_one_seed_of_several_domains_adds_their_variances():
    rng = np.random.default_rng(21)
    sets = [rng.normal(size=(1, count)) for count in (30, 50)]
    found = mean_interval(sets)
    error = math.sqrt(sum(stats.sem(values[0]) ** 2 for values in sets)) / 2
    assert found.half_width == pytest.approx(stats.t.ppf(0.975, found.df) * error, rel=1e-9)
    assert 29 <= found.df <= 78


def test_an_interval_over_seeds_is_the_textbook_t_interval():
    values = np.array([0.61, 0.58, 0.7, 0.66, 0.64])
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = over_seeds(values)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert (found.num_seeds, found.num_items) == (5, 0)


@pytest.mark.parametrize(
    "found",
    [interval(np.array([[0.7]])), interval(np.array([[0.7], [0.6]])), over_seeds(np.array([0.7]))],
    ids=["one item, one seed", "one item, two seeds", "one seed"],
)
def test_nothing_repeated_gives_an_infinite_interval(found):
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert found.df == 0


def test_values_that_never_vary_give_width_zero():
    found = interval(np.full((3, 10), 0.25))
    assert (found.low, found.mean, found.high) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize("factor", [100.0, 1e-3])
def test_the_interval_is_in_the_unit_of_its_values(factor):
    values = draw(np.random.default_rng(4), 5, 30, 0.1, 0.2, 0.3) + 0.5
    one, scaled = interval(values), interval(values * factor)
    assert (scaled.mean, scaled.low, scaled.high) == pytest.approx(
        (one.mean * factor, one.low * factor, one.high * factor), rel=1e-9
    )
    assert scaled.df == pytest.approx(one.df, rel=1e-9)


def test_order_of_seeds_and_items_does_not_matter_and_inputs_stay():
    rng = np.random.default_rng(6)
    values = draw(rng, 5, 30, 0.1, 0.2, 0.3)
    before = values.copy()
    values.setflags(write=False)
    found = interval(values)
    shuffled = interval(values[rng.permutation(5)][:, rng.permutation(30)])
    assert shuffled.half_width == pytest.approx(found.half_width, rel=1e-9)
    mean_interval([values, values])
    over_seeds(values[:, 0])
    assert np.array_equal(values, before)


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        ([], "seeds x items"),
        ([np.zeros((2, 0))], r"\(2, 0\)"),
        ([np.zeros(3)], r"\(3,\)"),
        ([np.zeros((2, 3)), np.zeros((4, 3))], r"\[2, 4\]"),
        ([np.array([[0.0, math.nan]])], "finite"),
        ([np.array([[0.0, math.inf]])], "finite"),
    ],
)
def test_bad_arrays_are_refused(sets, words):
    with pytest.raises(ValueError, match=words):
        mean_interval(sets)


def between(low, high, num_seeds):
    return Interval(mean=(low + high) / 2, low=low, high=high, df=4.0, num_seeds=num_seeds, num_items=10)


@pytest.mark.parametrize(
    ("low", "high", "num_seeds", "word"),
    [
        (0.1, 0.2, 5, "reproduced"),
        (-0.2, -0.1, 5, "not reproduced"),
        (-0.1, 0.2, 8, "inconclusive"),
        (0.0, 0.0, 8, "inconclusive"),
        (-math.inf, math.inf, 5, "inconclusive"),
        (0.1, 0.2, 4, ""),
        (-0.2, -0.1, 1, ""),
    ],
)
def test_the_verdict_needs_five_seeds_and_an_interval_without_0(low, high, num_seeds, word):
    assert verdict(between(low, high, num_seeds)) == word


def test_more_seeds_can_be_asked_for():
    assert verdict(between(0.1, 0.2, 6), min_seeds=8) == ""


def test_intervals_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        between(0, 1, 5).mean = 3  # type: ignore[misc]


def test_neither_torch_nor_ray_nor_mlflow_is_imported(tmp_path):
    import subprocess

    code = (
        "import sys, workloads.evaluation.conflict, workloads.evaluation.statistics;"
        "print([m for m in ('torch', 'ray', 'mlflow', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
