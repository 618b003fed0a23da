"""ANLS against a slow edit distance; relaxed accuracy on its published edge cases."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workloads.evaluation.scorers.documents import anls, relaxed

short = st.text(st.sampled_from("abA "), max_size=7)


@cache
def distance(left, right):
    if not left or not right:
        return len(left) + len(right)
    if left[0] == right[0]:
        return distance(left[1:], right[1:])
    return 1 + min(distance(left[1:], right), distance(left, right[1:]), distance(left[1:], right[1:]))


def squeezed(text):
    return " ".join(word for word in text.lower().split(" ") if word)


@given(short, short)
def test_anls_is_one_minus_the_edit_distance_or_nothing_below_a_half(raw, gold):
    left, right = squeezed(raw), squeezed(gold)
    longer = max(len(left), len(right))
    similar = 1.0 if longer == 0 else 1 - distance(left, right) / longer
    assert anls(raw, gold) == pytest.approx(similar if similar >= 0.5 else 0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("raw", "gold", "score"),
    [
        ("", "", 1.0),  # no division by zero
        (" ", "\n", 1.0),
        ("", "a", 0.0),
        ("a", "", 0.0),
        ("Hello World", "hello  world", 1.0),
        ("helo", "hello", 0.8),
        ("ab", "ax", 0.5),  # exactly at the threshold: kept
        ("abc", "axy", 0.0),  # 1/3
        ("1,000", "1000", 0.8),
        ("kitten", "sitting", 1 - 3 / 7),
        ("a" * 100_000, "b", 0.0),
    ],
)
def test_anls_on_cases_computed_by_hand(raw, gold, score):
    assert anls(raw, gold) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    ("raw", "gold", "score"),
    [
        ("100", "100", 1.0),
        ("95", "100", 1.0),
        ("94.99", "100", 0.0),
        ("105", "100", 1.0),
        ("105.01", "100", 0.0),
        ("1.05", "1", 1.0),  # exactly 5 %, which binary fractions put above it
        ("-95", "-100", 1.0),
        ("95", "-100", 0.0),
        ("0.5", "50%", 1.0),  # % is a hundredth
        ("50", "50%", 0.0),
        ("52%", "50 %", 1.0),
        ("1e2", "100", 1.0),
        (" 100\n", "100", 1.0),
        ("0", "0", 1.0),  # a gold 0 is compared as text
        ("0.0", "0", 0.0),
        ("0.001", "0", 0.0),
        ("0%", "0%", 1.0),
        ("0", "0%", 0.0),
        ("1,000", "1000", 0.0),  # thousands separators are text
        ("1,000", "1,000", 1.0),
        ("1,001", "1,000", 0.0),
        ("Male", "male", 1.0),
        ("males", "male", 0.0),
        ("100 people", "100", 0.0),
        ("nan", "nan", 1.0),  # a text
        ("inf", "100", 0.0),
        ("1_000", "1000", 0.0),
        ("", "", 0.0),
        ("", "100", 0.0),
        ("%", "5%", 0.0),
        (".", "5", 0.0),
        ("1e999", "1e999", 1.0),
        ("1e999", "2", 0.0),
    ],
)
def test_relaxed_accuracy_on_its_edge_cases(raw, gold, score):
    assert relaxed(raw, gold) == score


@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6).filter(bool))
def test_relaxed_accuracy_is_5_percent_of_the_gold_number(number, gold):
    assert relaxed(str(number), str(gold)) == float(20 * abs(number - gold) <= abs(gold))
