"""Fingerprints: what changes a number changes them, where a run happens does not."""

import pytest

from workloads.config import from_tree
from workloads.identity import fingerprint

GOOD = {"adapter": {"name": "lora"}, "data": {"mixture": {"general": 1.0}}}


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1}, {"optim": {"lr": 0.5}}, {"optim": {"global_batch": 32}}, {"optim": {"dtype": "bf16"}},
        {"adapter": {"name": "lora", "rank": 9}}, {"adapter": {"name": "mole"}}, {"init_from": "abc"},
        {"data": {"mixture": {"general": 2.0}}}, {"data": {"mixture": {"general": 1.0}, "samples": 9}},
        {"eval": {"split": "val"}},
    ],
)  # fmt: skip
def test_what_changes_a_number_changes_the_fingerprint(change):
    assert fingerprint(from_tree(GOOD)) != fingerprint(from_tree({**GOOD, **change}))


@pytest.mark.parametrize(
    "change",
    [{"name": "other"}, {"execution": {"workers": 2, "zero_stage": 2, "micro_batch": 3, "threads": 2}}],
)
def test_where_a_run_happens_leaves_the_fingerprint(change):
    assert fingerprint(from_tree(GOOD)) == fingerprint(from_tree({**GOOD, **change}))


def test_the_order_of_keys_leaves_the_fingerprint():
    one = from_tree({**GOOD, "data": {"mixture": {"general": 1.0, "document": 2.0}}})
    two = from_tree({**GOOD, "data": {"mixture": {"document": 2.0, "general": 1.0}}})
    assert fingerprint(one) == fingerprint(two)
