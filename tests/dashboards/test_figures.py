"""Figures: positions follow values, nothing leaves its box, and every figure is well-formed XML."""

import itertools
import math
import re
from xml.etree import ElementTree

import pytest

from dashboards.details import domain_bits, duration, effective_experts, when
from dashboards.figures import (
    Curve,
    bar_row,
    curve_panel,
    difference_axis,
    expert_map,
    interval_row,
    nice_limit,
    thin,
    tone,
)
from workloads.evaluation.statistics import Interval


def interval(mean, low, high, num_seeds=8):
    return Interval(mean=mean, low=low, high=high, df=7.0, num_seeds=num_seeds, num_items=100)


def percents(element, *names):
    return [float(element.get(name).rstrip("%")) for name in names]


def test_an_interval_is_drawn_where_its_ends_are():
    svg = ElementTree.fromstring(interval_row(interval(0.02, -0.01, 0.05), 0.1))
    zero, whisker = svg.findall("line")
    assert percents(zero, "x1", "x2") == [50, 50]
    assert percents(whisker, "x1", "x2") == pytest.approx([45, 75])
    assert percents(svg.find("circle"), "cx") == pytest.approx([60])


@pytest.mark.parametrize("ends", [(-9.0, 9.0), (-math.inf, math.inf)])
def test_what_is_off_the_axis_ends_at_its_edge(ends):
    svg = ElementTree.fromstring(interval_row(interval(0.0, *ends), 0.1))
    assert percents(svg.findall("line")[1], "x1", "x2") == [0, 100]
    bar = ElementTree.fromstring(bar_row(interval(0.9, *ends), "mix", {}))
    assert percents(bar.findall("line")[-1], "x1", "x2") == [0, 100]


def test_a_bar_is_as_long_as_its_score_and_marks_stand_at_theirs():
    svg = ElementTree.fromstring(bar_row(interval(0.713, 0.69, 0.736), "mix", {"majority": 0.21}))
    assert percents(svg.findall("rect")[1], "width") == pytest.approx([71.3])
    mark = next(line for line in svg.findall("line") if "majority" in line.get("class"))
    assert percents(mark, "x1", "x2") == pytest.approx([21, 21])


@pytest.mark.parametrize(
    ("ends", "num_seeds", "kind"),
    [
        ((0.01, 0.03), 8, "gain"),
        ((-0.03, -0.01), 8, "loss"),
        ((-0.01, 0.03), 8, "flat"),
        ((0.01, 0.03), 1, "flat"),
    ],
)
def test_colour_means_an_interval_without_0_over_enough_seeds(ends, num_seeds, kind):
    assert tone(interval(sum(ends) / 2, *ends, num_seeds=num_seeds)) == kind


@pytest.mark.parametrize("value", [0.021, 0.1, 0.0999, 0.14, 0.26, 0.77, 3.2])
def test_an_axis_holds_its_values_without_wasting_half(value):
    limit = nice_limit([value, -value / 2, math.inf])
    assert value <= limit * (1 + 1e-9)
    assert limit <= 2 * value
    assert nice_limit([]) == nice_limit([0.001]) == 0.02


def test_the_axis_is_labelled_in_points():
    texts = [text.text for text in ElementTree.fromstring(difference_axis(0.15)).findall("text")]
    assert texts == ["−15", "0", "+15"]


def test_an_expert_map_has_a_cell_for_each_layer_and_expert():
    shares_LE = [[0.2, 0.3, 0.5], [0.0, 1.0, 0.0]]
    svg = ElementTree.fromstring(expert_map(shares_LE))
    strengths = [float(cell.get("style").split(":")[1]) for cell in svg.findall("rect")]
    assert len(strengths) == 6
    flat = [share for row in shares_LE for share in row]
    assert sorted(range(6), key=strengths.__getitem__) == sorted(range(6), key=flat.__getitem__)
    texts = [text.text for text in svg.findall("text")]
    assert texts == ["E1", "E2", "E3", "0", "20", "30", "50", "1", "0", "100", "0"]
    assert "layer 1: 0 %, 100 %, 0 %" in svg.get("aria-label")


def test_curves_stay_in_their_panel_and_fall_when_the_loss_falls():
    points = [(float(x), 5.0 * math.exp(-x / 500)) for x in range(0, 2001, 100)]
    svg = ElementTree.fromstring(curve_panel([Curve(colour="mix", points=points, is_mean=True)]))
    width, height = (float(part) for part in svg.get("viewBox").split()[2:])
    drawn = [tuple(map(float, place.split(","))) for place in svg.find("polyline").get("points").split()]
    assert all(0 <= x <= width and 0 <= y <= height for x, y in drawn)
    assert [y for _, y in drawn] == sorted(y for _, y in drawn)
    # The logarithm of this loss is a straight line.
    steps = [b[1] - a[1] for a, b in itertools.pairwise(drawn)]
    assert max(steps) - min(steps) <= 0.2 + 1e-9


@pytest.mark.parametrize("losses", [[], [(0.0, 0.0), (100.0, 1e-9)], [(1.0, 50.0)], [(10.0, 0.5)]])
def test_odd_losses_are_drawn_inside_the_panel(losses):
    text = curve_panel([Curve(colour="mix", points=losses, is_mean=False)])
    assert "nan" not in text
    for x, y in re.findall(
        r"([\d.-]+),([\d.-]+)", ElementTree.fromstring(text).find("polyline").get("points")
    ):
        assert 0 <= float(x) <= 360
        assert 0 <= float(y) <= 210


def test_thinning_keeps_the_mean_and_the_number_asked_for():
    points = [(float(i), float(i % 7)) for i in range(1000)]
    few = thin(points, 50)
    assert len(few) == 50
    assert sum(y for _, y in few) / 50 == pytest.approx(sum(y for _, y in points) / 1000)
    assert thin(points[:20], 50) == points[:20]


def test_user_text_in_a_figure_is_escaped():
    assert "<b>" not in bar_row(interval(0.5, 0.4, 0.6), "mix", {"<b>": 0.3})


def entropy(shares):
    return -sum(p * math.log2(p) for p in shares if p > 0)


def test_expert_figures_equal_loops_and_ignore_the_numbering(rng):
    shares_DLE = rng.dirichlet([1.0, 2.0, 0.5], size=(2, 4))
    effective, bits = 0.0, 0.0
    for layer in range(4):
        both = [sum(shares_DLE[d][layer][e] for d in range(2)) / 2 for e in range(3)]
        effective += 2 ** entropy(both) / 4
        bits += (entropy(both) - sum(entropy(shares_DLE[d][layer]) for d in range(2)) / 2) / 4
    for order in ([0, 1, 2], [2, 0, 1]):
        assert effective_experts(shares_DLE[:, :, order]) == pytest.approx(effective)
        assert domain_bits(shares_DLE[:, :, order]) == pytest.approx(bits)


def test_expert_figures_at_their_ends(rng):
    one_each = rng.permutation(3)[:, None, None] == range(3)
    assert domain_bits(one_each.astype(float)) == pytest.approx(math.log2(3))
    assert effective_experts(one_each.astype(float)) == pytest.approx(3)
    same = (rng.permutation(3) == 0).astype(float)[None, None].repeat(3, axis=0)
    assert domain_bits(same) == pytest.approx(0)
    assert effective_experts(same) == pytest.approx(1)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.421, "0.421 s"), (42.31, "42.3 s"), (2210, "36 min 50 s"), (6120, "1 h 42 min")]
)
def test_durations_are_readable(seconds, text):
    assert duration(seconds) == text


def test_dates_are_utc_and_an_unknown_one_is_empty():
    assert when(1_763_000_000) == "13 November 2025, 02:13 UTC"
    assert when(0) == ""
