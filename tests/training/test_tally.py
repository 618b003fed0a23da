"""Tallies: merging is adding in any order, text keeps every bit, and means are sums over counts."""

import math
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workloads.training import engine
from workloads.training.tally import Tally

DOMAINS = ["biomedical", "document", "general"]
# Whole numbers of this size add without rounding, so that sums do not depend on their order.
whole = st.integers(-(2**30), 2**30).map(float)
any_float = st.floats(allow_nan=False, allow_infinity=False)
by_domain = st.lists(whole, min_size=3, max_size=3)


def micro_batches(numbers):
    """Losses and supervised tokens by domain, owners of the samples, all tokens, loss terms."""
    each = st.lists(numbers, min_size=3, max_size=3)
    owners = st.lists(st.sampled_from(DOMAINS), max_size=5)
    terms = st.dictionaries(st.sampled_from(["balance_loss", "z_loss"]), numbers)
    return st.lists(st.tuples(each, each, owners, st.integers(0, 999), terms), max_size=6)


def tally_of(batches):
    tally = Tally(domains=DOMAINS)
    for losses, tokens, owners, all_tokens, terms in batches:
        tally.add(losses, tokens, owners, all_tokens)
        for name, value in terms.items():
            tally.add_term(name, value, len(owners))
    return tally


def merged(tallies):
    total = Tally(domains=DOMAINS)
    for tally in tallies:
        total.merge(tally)
    return total


@given(micro_batches(whole), st.randoms(use_true_random=False))
def test_merging_in_any_order_is_adding_everything_to_one(batches, random):
    parts = [tally_of([batch]) for batch in batches]
    random.shuffle(parts)
    assert merged(parts) == tally_of(batches)


@given(micro_batches(whole), st.integers(0, 6))
def test_merging_groups_is_merging_all(batches, cut):
    parts = [tally_of([batch]) for batch in batches]
    assert merged([merged(parts[:cut]), merged(parts[cut:])]) == merged(parts)


@given(micro_batches(whole))
def test_merging_leaves_the_other_tally(batches):
    other = tally_of(batches)
    before = other.to_json()
    total = merged([other])
    total.add([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], ["general"], 1)
    total.add_term("balance_loss", 1.0, 1)
    assert other.to_json() == before


@given(micro_batches(any_float))
def test_text_keeps_every_bit(batches):
    tally = tally_of(batches)
    if all(math.isfinite(v) for v in [*tally.loss_sums, *tally.tokens, *tally.terms.values()]):
        assert Tally.from_json(tally.to_json()) == tally


@given(micro_batches(st.floats(1, 1000)))
def test_metrics_are_sums_over_counts(batches):
    total, tokens, terms, samples = defaultdict(float), defaultdict(float), defaultdict(float), 0
    for losses, counts, owners, _, values in batches:
        samples += len(owners)
        for domain, loss, count in zip(DOMAINS, losses, counts, strict=True):
            total[domain] += loss
            tokens[domain] += count
        for name, value in values.items():
            terms[name] += value * len(owners)
    wanted = {f"loss/{domain}": total[domain] / tokens[domain] for domain in tokens}
    wanted["loss"] = sum(total.values()) / sum(tokens.values()) if batches else 0.0
    wanted |= {name: value / max(1, samples) for name, value in terms.items()}
    tally = tally_of(batches)
    assert tally.metrics() == pytest.approx(wanted, rel=1e-12)
    assert tally.losses() == pytest.approx({d: total[d] / tokens[d] for d in tokens}, rel=1e-12)


def test_a_domain_that_was_not_seen_has_no_loss():
    tally = tally_of([([3.0, 0.0, 5.0], [2.0, 0.0, 4.0], ["general", "biomedical"], 9, {})])
    assert tally.losses() == {"biomedical": 1.5, "general": 1.25}
    assert tally.samples == [1.0, 0.0, 1.0]


@given(micro_batches(whole))
def test_clearing_starts_from_zero_and_keeps_the_names_of_the_terms(batches):
    tally = tally_of(batches)
    tally.clear()
    assert set(tally.metrics().values()) == {0.0}
    assert tally.terms.keys() == {name for *_, terms in batches for name in terms}
    assert tally.losses() == {}


@given(micro_batches(whole), micro_batches(whole))
def test_the_sum_over_workers_is_the_merge_of_their_tallies(ours, theirs):
    # Every worker has the same terms, since every worker takes part in every micro-batch.
    one, two = (tally_of(batches) for batches in (ours, theirs))
    for tally in (one, two):
        for name in ("balance_loss", "z_loss"):
            tally.add_term(name, 0.0, 0)
    flat = []

    def other_worker(values):
        flat.append(values)
        return values

    def add_other_worker(values):
        return [a + b for a, b in zip(values, flat[0], strict=True)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "reduce_sum", other_worker)
        two.reduced()
        patch.setattr(engine, "reduce_sum", add_other_worker)
        assert one.reduced() == merged([one, two])
