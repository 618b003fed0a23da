"""What is replayed: uniform or equal over stages, of the size asked for, decided by the past and the seed alone."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads.data.mixture import Slot
from workloads.data.replay import kept, mixed

KINDS = ("reservoir", "balanced")


def stage(place, size):
    return [Slot(domain=f"d{place}", index=i, task=f"t{place}") for i in range(size)]


sizes = st.lists(st.integers(1, 60), min_size=1, max_size=5)
shares = st.floats(0.0, 1.0)


@settings(max_examples=80, deadline=None)
@given(sizes, shares, st.sampled_from(KINDS), st.integers(0, 99))
def test_as_many_are_kept_as_the_share_says_and_each_at_most_once(counts, share, kind, seed):
    earlier = [stage(place, size) for place, size in enumerate(counts)]
    buffer = kept(earlier, kind, share, seed)
    assert len(buffer) == round(share * sum(counts))
    assert len(set(buffer)) == len(buffer)
    assert set(buffer) <= {slot for slots in earlier for slot in slots}


@settings(max_examples=80, deadline=None)
@given(sizes, shares, st.integers(0, 99))
def test_balanced_is_equal_for_every_stage_that_has_as_many(counts, share, seed):
    earlier = [stage(place, size) for place, size in enumerate(counts)]
    found = Counter(slot.domain for slot in kept(earlier, "balanced", share, seed))
    held = [found[f"d{place}"] for place in range(len(counts))]
    most = max(held)
    for have, size in zip(held, counts, strict=True):
        assert have >= min(size, most - 1)


@settings(max_examples=40, deadline=None)
@given(sizes, shares, shares, st.sampled_from(KINDS), st.integers(0, 99))
def test_a_larger_share_keeps_all_that_a_smaller_one_does(counts, one, other, kind, seed):
    earlier = [stage(place, size) for place, size in enumerate(counts)]
    small, large = sorted((one, other))
    assert set(kept(earlier, kind, small, seed)) <= set(kept(earlier, kind, large, seed))


@settings(max_examples=40, deadline=None)
@given(sizes, shares, st.integers(1, 60), st.integers(0, 99))
def test_a_later_reservoir_holds_nothing_of_the_past_that_an_earlier_one_had_let_go(
    counts, share, more, seed
):
    """Of the first stages, a reservoir of the same size keeps a part of what it held before the next stage."""
    earlier = [stage(place, size) for place, size in enumerate(counts)]
    size = round(share * sum(counts))
    before = kept(earlier, "reservoir", size / sum(counts), seed)
    total = sum(counts) + more
    after = kept([*earlier, stage(len(counts), more)], "reservoir", size / total, seed)
    assert len(after) == len(before) == size
    assert {slot for slot in after if slot.domain != f"d{len(counts)}"} <= set(before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_keeps_the_same_and_another_one_others(kind):
    earlier = [stage(0, 40), stage(1, 40)]
    assert kept(earlier, kind, 0.25, 3) == kept(earlier, kind, 0.25, 3)
    assert kept(earlier, kind, 0.25, 3) != kept(earlier, kind, 0.25, 4)


def test_every_earlier_sample_is_as_likely_to_be_in_the_reservoir():
    """Chi-square of how often each of 30 samples of unequal stages is kept, over 2,000 seeds."""
    earlier = [stage(0, 5), stage(1, 20), stage(2, 5)]
    num_seeds, share = 2000, 0.2
    counts = Counter(slot for seed in range(num_seeds) for slot in kept(earlier, "reservoir", share, seed))
    assert sum(counts.values()) == num_seeds * 6
    # Kept or not, each sample is a draw with chance 0.2; samples of one seed are nearly independent.
    variance = num_seeds * share * (1 - share) * 30 / 29
    chi = sum((counts[slot] - num_seeds * share) ** 2 / variance for slots in earlier for slot in slots)
    assert 13.1 < chi < 52.3, "between the 0.5 % points of 29 degrees of freedom"
    pairs = Counter()
    for seed in range(num_seeds):
        held = sorted(kept(earlier, "reservoir", share, seed), key=lambda slot: (slot.domain, slot.index))
        pairs.update((one, two) for k, one in enumerate(held) for two in held[k + 1 :])
    expected = num_seeds * (6 * 5) / (30 * 29)
    assert max(pairs.values()) < expected + 5 * expected**0.5, "no two samples stay together"


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 80), sizes, shares, st.integers(0, 99))
def test_mixing_keeps_the_stages_own_order_and_adds_every_kept_sample_once(num_own, counts, share, seed):
    own = stage("own", num_own)
    old = kept([stage(place, size) for place, size in enumerate(counts)], "reservoir", share, seed)
    stream = mixed(own, old, seed)
    assert [slot for slot in stream if slot.domain == "down"] == own
    assert Counter(stream) == Counter([*own, *old])
    assert stream == mixed(own, old, seed)


def test_kept_samples_are_spread_over_the_whole_stage_and_shuffled():
    own, old = stage("own", 400), kept([stage(0, 100), stage(1, 100)], "balanced", 0.5, 0)
    stream = mixed(own, old, 0)
    for start in range(0, 500, 50):
        part = [slot for slot in stream[start : start + 50] if slot.domain != "down"]
        assert 8 <= len(part) <= 12
        assert len({slot.domain for slot in part}) == 2
