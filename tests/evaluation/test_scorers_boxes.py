"""Grounding: boxes are read with all their digits whatever brackets they stand in; IoU against counted cells."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workloads.evaluation.scorers import boxes

GOLD = "[0.25, 0.25, 0.75, 0.75]"
corner = st.integers(0, 6)
box = st.tuples(corner, corner, corner, corner)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[0.12,0.34,0.56,0.78]", (0.12, 0.34, 0.56, 0.78)),  # the first and the last digit stay
        ("[12, 34, 56, 78]", (12, 34, 56, 78)),
        ("0.12, 0.34, 0.56, 0.78", (0.12, 0.34, 0.56, 0.78)),
        (" [[0.1, 0.2, 0.3, 0.4]]\n", (0.1, 0.2, 0.3, 0.4)),
        ("[0.1 0.2 0.3 0.4].", (0.1, 0.2, 0.3, 0.4)),
        ("(0.1, 0.2), (0.3, 0.4)", (0.1, 0.2, 0.3, 0.4)),
        ("[0.1, 0.2, 0.3, 0.4", (0.1, 0.2, 0.3, 0.4)),
        ("The 2 dogs are at [.1, -0.2, 3., 4e-1].", (0.1, -0.2, 3, 0.4)),
        ("[1, 2] [0.1, 0.2, 0.3, 0.4] [5, 6, 7, 8]", (0.1, 0.2, 0.3, 0.4)),
        ("<box>1,2,3,4</box>", (1, 2, 3, 4)),
        ("[0.1, 0.2, 0.3]", None),
        ("[0.1, 0.2, 0.3, 0.4, 0.5]", None),
        ("2 dogs at 0.1, 0.2, 0.3, 0.4", None),  # five numbers
        ("x1 x2 y1 y2", None),
        ("1 2 3 " + "9" * 400, None),  # not finite
        ("", None),
        ("[]", None),
    ],
)
def test_the_box_of_an_answer(text, wanted):
    assert boxes.parse(text) == wanted


def covered(x1, y1, x2, y2):
    """The unit cells that a box covers."""
    return {(x, y) for x in range(x1, x2) for y in range(y1, y2)}


@given(box, box)
def test_iou_counts_cells(one, other):
    union = covered(*one) | covered(*other)
    wanted = len(covered(*one) & covered(*other)) / len(union) if union else 0.0
    assert boxes.iou(one, other) == pytest.approx(wanted, abs=1e-12)


@given(box, box)
def test_right_means_more_than_half(one, other):
    shared, union = covered(*one) & covered(*other), covered(*one) | covered(*other)
    assert boxes.grounding(str(list(one)), str(other)) == float(2 * len(shared) > len(union))


@pytest.mark.parametrize(
    ("raw", "score"),
    [
        (GOLD, 1.0),
        ("[0.25, 0.25, 0.5, 0.75]", 0.0),  # IoU exactly 0.5
        ("[0.25, 0.25, 0.51, 0.75]", 1.0),
        ("[0.75, 0.75, 0.25, 0.25]", 0.0),  # corners exchanged: no area
        ("[5.25, 0.25, 0.75, 0.75]", 0.0),
        ("[1e308, 1e308, 1e309, 1e309]", 0.0),
        ("[-1e308, -1e308, 1e308, 1e308]", 0.0),
        ("in the middle", 0.0),
        ("", 0.0),
    ],
)
def test_grounding_on_cases_computed_by_hand(raw, score):
    assert boxes.grounding(raw, GOLD) == score


def test_what_was_read_is_what_is_shown():
    assert boxes.normalise("at [0.10, 0.2, 0.3, 0.4]") == "[0.1, 0.2, 0.3, 0.4]"
    assert boxes.normalise("nowhere") == ""
