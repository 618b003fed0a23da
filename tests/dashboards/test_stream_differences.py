"""Differences between arms of a stream: as a loop over the files finds them, paired, never of chains that one lacks."""

import dataclasses
import statistics

import pytest
from scipy import stats

from dashboards.load import study_results
from dashboards.page import render
from dashboards.stream_differences import difference, differences
from dashboards.streams import stream_of
from dashboards.tables import stream_comparison
from tests.dashboards.stream_study import ORDERS, TASKS, make_stream
from tests.dashboards.test_page import Page
from tests.dashboards.test_streams import slow_matrix
from tests.dashboards.test_tables import text_of


def read(folder):
    return study_results(folder, folder.parent)


def slow_final(folder, arm, order, seed):
    return sum(slow_matrix(folder, arm, order, seed).rows[-1]) / len(TASKS)


def test_a_difference_is_the_mean_over_pairs_of_one_order_and_seed(tmp_path):
    folder = make_stream(tmp_path)
    found = difference(stream_of(read(folder)), "ewc", "lora")
    pairs = [
        slow_final(folder, "ewc", order, seed) - slow_final(folder, "lora", order, seed)
        for order in ORDERS
        for seed in range(3)
    ]
    assert (found.num_orders, found.num_seeds) == (3, 3)
    assert found.values["final"].mean == pytest.approx(sum(pairs) / 9)


def test_in_one_order_the_interval_is_a_paired_t_interval_over_seeds(tmp_path):
    folder = make_stream(tmp_path, orders=("given",))
    found = difference(stream_of(read(folder)), "ewc", "lora").values["final"]
    pairs = [slow_final(folder, "ewc", "given", s) - slow_final(folder, "lora", "given", s) for s in range(3)]
    half = stats.t.ppf(0.975, 2) * statistics.stdev(pairs) / 3**0.5
    assert found.mean == pytest.approx(sum(pairs) / 3)
    assert found.half_width == pytest.approx(half)


def test_what_orders_and_seeds_do_to_both_arms_cancels(tmp_path):
    stream = stream_of(read(make_stream(tmp_path)))
    lora = [chain for chain in stream.chains if chain.arm == "lora"]
    shifted = [dataclasses.replace(chain, arm="ewc", matrix=raised(chain.matrix)) for chain in lora]
    found = difference(dataclasses.replace(stream, chains=(*lora, *shifted)), "ewc", "lora")
    assert found.values["final"].mean == pytest.approx(0.125)
    assert found.values["final"].half_width == pytest.approx(0, abs=1e-12)
    assert found.values["forgetting"].mean == pytest.approx(0, abs=1e-12)


def raised(matrix):
    rows = tuple(tuple(score + 0.125 for score in row) for row in matrix.rows)
    return dataclasses.replace(matrix, rows=rows)


def test_only_orders_and_seeds_in_which_both_arms_are_whole_are_paired(tmp_path):
    unfinished = {("ewc", "reversed", seed, 3): ("pending", "") for seed in range(3)}
    unfinished |= {("lora", "given", 2, 3): ("pending", "")}
    folder = make_stream(tmp_path, orders=("given", "reversed"), unfinished=unfinished)
    found = difference(stream_of(read(folder)), "ewc", "lora")
    pairs = [slow_final(folder, "ewc", "given", s) - slow_final(folder, "lora", "given", s) for s in (0, 1)]
    assert (found.num_orders, found.num_seeds) == (1, 2)
    assert found.values["final"].mean == pytest.approx(sum(pairs) / 2)


def test_without_a_common_chain_there_is_a_dash_and_no_number(tmp_path):
    unfinished = {("ewc", order, seed, 3): ("pending", "") for order in ORDERS for seed in range(3)}
    results = read(make_stream(tmp_path, unfinished=unfinished))
    found = difference(stream_of(results), "ewc", "lora")
    assert (found.num_orders, found.num_seeds) == (0, 0)
    assert set(found.values.values()) == {None}
    line = next(line for line in text_of(stream_comparison(results)).splitlines() if "ewc − lora" in line)
    assert line.split() == ["ewc", "−", "lora", "–", "–", "–", "–"]


def test_every_arm_stands_beside_the_first_and_beside_the_one_before_it(tmp_path):
    stream = stream_of(read(make_stream(tmp_path, arms=("lora", "ewc", "lwf", "replay"), orders=("given",))))
    found = [(row.arm, row.against) for row in differences(stream)]
    first = [("ewc", "lora"), ("lwf", "lora"), ("replay", "lora")]
    assert found == [*first, ("lwf", "ewc"), ("replay", "lwf")]


def test_page_and_terminal_show_the_same_difference(tmp_path):
    folder = make_stream(tmp_path, orders=("given", "reversed"))
    results = read(folder)
    told = text_of(stream_comparison(results))
    line = next(line for line in told.splitlines() if line.startswith("ewc − lora"))
    shown = " ".join(Page(render(results)).text.split())
    mean, low, high = line.split()[6:9]
    assert f"ewc − lora 2 × 3 {mean} {low} {high}" in shown


def test_scores_on_different_scales_are_not_subtracted(tmp_path):
    results = read(make_stream(tmp_path, orders=("given",), scales={"digits": "cider"}))
    assert "ewc − lora" not in text_of(stream_comparison(results))
    assert "ewc − lora" not in Page(render(results)).text
