"""Fingerprints: what changes a number changes them, where a run happens does not."""

import pytest

from workloads.config import from_tree
from workloads.errors import UserError
from workloads.identity import fingerprint, model_hash

GOOD = {"adapter": {"name": "lora"}, "data": {"mixture": {"general": 1.0}}}


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1}, {"optim": {"lr": 0.5}}, {"optim": {"global_batch": 32}}, {"optim": {"dtype": "bf16"}},
        {"adapter": {"name": "lora", "rank": 9}}, {"adapter": {"name": "mole"}}, {"init_from": "a" * 16},
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


def test_layout_enters_the_fingerprint_exactly_when_numbers_depend_on_it():
    two = {"execution": {"workers": 2}}
    for adapter, matters in (
        ({"name": "lora"}, False),
        ({"name": "lora", "dropout": 0.1}, True),
        ({"name": "mole"}, False),
        ({"name": "mole", "balance_form": "switch"}, True),
    ):
        tree = {**GOOD, "adapter": adapter}
        assert (fingerprint(from_tree(tree)) != fingerprint(from_tree({**tree, **two}))) == matters


def test_a_changed_chat_template_changes_the_models_hash_and_a_card_does_not(tmp_path):
    for name in ("config.json", "chat_template.jinja", "card.json"):
        (tmp_path / name).write_text("{}")
    first = model_hash(str(tmp_path))
    (tmp_path / "card.json").write_text('{"seconds": 1}')
    assert model_hash(str(tmp_path)) == first
    (tmp_path / "chat_template.jinja").write_text("changed")
    assert model_hash(str(tmp_path)) != first


def test_the_order_of_keys_leaves_the_fingerprint():
    one = from_tree({**GOOD, "data": {"mixture": {"general": 1.0, "document": 2.0}}})
    two = from_tree({**GOOD, "data": {"mixture": {"document": 2.0, "general": 1.0}}})
    assert fingerprint(one) == fingerprint(two)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"data": {"mixture": {"general": 1.0}, "max_rejected": 0.5}}, {}),
        ({"data": {"mixture": {"general": 1.0, "document": 0.0}}}, {}),
        ({"eval": {"domains": ["general", "document"]}}, {"eval": {"domains": ["document", "general"]}}),
        ({"eval": {"domains": ["general", "general"]}}, {"eval": {"domains": ["general"]}}),
        ({"eval": {"domains": ["document", "general", "biomedical"]}}, {}),
    ],
)
def test_other_spellings_of_the_same_numbers_leave_the_fingerprint(one, two):
    assert fingerprint(from_tree({**GOOD, **one})) == fingerprint(from_tree({**GOOD, **two}))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"eval": {"domains": ["general"]}}, {"eval": {"domains": ["document"]}}),
        ({"eval": {"domains": ["general"]}}, {}),
        ({"data": {"mixture": {"general": 1.0, "document": 0.001}}}, {}),
    ],
)
def test_domains_that_are_trained_on_or_scored_are_in_the_fingerprint(one, two):
    assert fingerprint(from_tree({**GOOD, **one})) != fingerprint(from_tree({**GOOD, **two}))


def test_an_unknown_source_has_no_fingerprint_and_the_nearest_is_named():
    with pytest.raises(UserError, match="did you mean 'pocket'"):
        fingerprint(from_tree({**GOOD, "data": {"mixture": {"general": 1.0}, "source": "poket"}}))
