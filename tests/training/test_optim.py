"""The schedule: linear to the peak, then down to nearly nothing, never negative, as the formula says."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads.training.optim import cosine_with_warmup

lengths = st.integers(1, 400)
ratios = st.integers(0, 99)  # hundredths


def schedule(num_steps, hundredths):
    return [cosine_with_warmup(step, num_steps, hundredths / 100) for step in range(num_steps)]


def num_rising(rates):
    """Steps before the cosine's first one, which is at the peak too."""
    rising = 0
    while rising < len(rates) and rates[rising] < 1:
        rising += 1
    return rising + 1 if rising else 0


@settings(max_examples=200, deadline=None)
@given(lengths, ratios)
def test_the_rate_is_positive_and_at_most_the_peak(num_steps, hundredths):
    rates = schedule(num_steps, hundredths)
    assert all(0 < rate <= 1 for rate in rates)
    assert max(rates) == 1


@settings(max_examples=200, deadline=None)
@given(lengths, ratios)
def test_warm_up_is_linear_and_as_long_as_its_share(num_steps, hundredths):
    rates = schedule(num_steps, hundredths)
    rising = num_rising(rates)
    for step in range(rising):
        assert rates[step] == pytest.approx(float(Fraction(step + 1, rising)), rel=1e-15)
    share = Fraction(hundredths, 100) * num_steps
    if share > 1:
        assert share <= rising <= share + 1
    else:
        assert rising <= 1


@settings(max_examples=200, deadline=None)
@given(lengths, ratios)
def test_after_warm_up_it_is_the_squared_cosine_of_the_half_angle(num_steps, hundredths):
    rates = schedule(num_steps, hundredths)
    rising = num_rising(rates) or (1 if 0 < hundredths * num_steps <= 100 else 0)
    falling = rates[rising:]
    for place, rate in enumerate(falling):
        angle = math.pi / 2 * place / len(falling)
        assert rate == pytest.approx(math.cos(angle) ** 2, abs=1e-12)
    assert all(later < earlier for earlier, later in pairwise(falling))


@pytest.mark.parametrize("num_steps", [50, 750, 10_000])
def test_it_ends_at_nearly_nothing(num_steps):
    last = cosine_with_warmup(num_steps - 1, num_steps, 0.03)
    assert 0 < last < (math.pi / 2 / (0.96 * num_steps)) ** 2
    assert cosine_with_warmup(num_steps, num_steps, 0.03) == pytest.approx(0, abs=1e-15)


def test_without_warm_up_it_starts_at_the_peak():
    assert cosine_with_warmup(0, 7, 0.0) == 1
    assert cosine_with_warmup(0, 1, 0.0) == 1
