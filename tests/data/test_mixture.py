"""Budgets are nested, shares are as specified, and the stream is a pure function of the seed."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads.config import DataConfig
from workloads.data import mixture
from workloads.errors import UserError

POOLS = {"document": range(900), "general": range(900), "biomedical": range(900)}


def config(samples=50, upsample="fresh", **weights):
    return DataConfig(
        mixture=weights or {"general": 1.0, "document": 1.0}, samples=samples, upsample=upsample
    )


weights = st.dictionaries(st.sampled_from(sorted(POOLS)), st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=1)


@settings(max_examples=40, deadline=None)
@given(weights, st.integers(1, 120), st.integers(0, 50))
def test_doubling_the_budget_only_adds_samples_after_the_same_prefix(parts, samples, seed):
    once = mixture.stream(config(samples, **parts), POOLS, seed)
    twice = mixture.stream(config(2 * samples, **parts), POOLS, seed)
    exact = all(float(w * samples).is_integer() for w in parts.values())
    if exact:
        assert twice[: len(once)] == once
    for domain in parts:
        first = [slot.index for slot in once if slot.domain == domain]
        both = [slot.index for slot in twice if slot.domain == domain]
        assert both[: len(first)] == first


@settings(max_examples=40, deadline=None)
@given(weights, st.integers(1, 200), st.integers(0, 50))
def test_shares_are_the_weights_and_no_sample_is_repeated(parts, samples, seed):
    stream = mixture.stream(config(samples, **parts), POOLS, seed)
    assert Counter(slot.domain for slot in stream) == Counter(
        {domain: round(weight * samples) for domain, weight in parts.items() if round(weight * samples)}
    )
    assert len(set(stream)) == len(stream)


@settings(max_examples=20, deadline=None)
@given(weights, st.integers(30, 200), st.integers(0, 50))
def test_every_stretch_of_the_stream_has_nearly_the_specified_shares(parts, samples, seed):
    stream = mixture.stream(config(samples, **parts), POOLS, seed)
    seen = Counter()
    for place, slot in enumerate(stream, start=1):
        seen[slot.domain] += 1
        for domain, weight in parts.items():
            expected = place * weight / sum(parts.values())
            assert abs(seen[domain] - expected) <= len(parts) + max(parts.values())


def test_the_stream_follows_from_the_seed_alone():
    assert mixture.stream(config(), POOLS, 3) == mixture.stream(config(), POOLS, 3)
    assert mixture.stream(config(), POOLS, 3) != mixture.stream(config(), POOLS, 4)


def test_other_domains_leave_a_domains_samples_unchanged():
    alone = mixture.stream(config(general=1.0), POOLS, 1)
    mixed = mixture.stream(config(general=1.0, biomedical=2.0), POOLS, 1)
    assert [s.index for s in mixed if s.domain == "general"] == [s.index for s in alone]


def test_up_sampling_by_repeating_shows_the_same_samples_again():
    stream = mixture.stream(config(40, "repeat", document=2.0, general=1.0), POOLS, 1)
    counted = Counter(slot.index for slot in stream if slot.domain == "document")
    assert len(counted) == 40
    assert set(counted.values()) == {2}


def test_rejected_samples_are_never_in_the_stream():
    usable = {"general": [i for i in range(100) if i % 7], "document": range(100)}
    stream = mixture.stream(config(80), usable, 0)
    assert all(slot.index % 7 for slot in stream if slot.domain == "general")


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (config(10, general=1.0, documents=1.0), ["data.mixture.documents", "did you mean 'document'"]),
        (config(901, general=1.0), ["data.samples", "901", "900"]),
        (config(500, general=2.0), ["1000 of general", "900"]),
    ],
)
def test_unknown_domains_and_too_large_budgets_are_told(broken, words):
    with pytest.raises(UserError) as error:
        mixture.check(broken, {domain: len(pool) for domain, pool in POOLS.items()})
    for word in words:
        assert word in str(error.value)


def test_repeating_needs_no_fresh_samples():
    mixture.check(config(500, "repeat", general=2.0), {"general": 500})


def test_a_domain_of_weight_0_changes_no_sample():
    with_zero = mixture.stream(config(30, document=0.0, general=1.0, biomedical=2.0), POOLS, 5)
    assert with_zero == mixture.stream(config(30, general=1.0, biomedical=2.0), POOLS, 5)
