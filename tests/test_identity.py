"""Fingerprints: what changes a number changes them, where a run happens does not."""

import shutil
from pathlib import Path

import pytest

from tests.llava.sentences import write_encoder
from workloads.config import ModelConfig, from_tree
from workloads.errors import UserError
from workloads.identity import _reduced, fingerprint, identity, model_hash

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
    model = ModelConfig(name_or_path=str(tmp_path))
    first = model_hash(model)
    (tmp_path / "card.json").write_text('{"seconds": 1}')
    assert model_hash(model) == first
    (tmp_path / "chat_template.jinja").write_text("changed")
    assert model_hash(model) != first


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


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return Path(write_encoder(tmp_path_factory.mktemp("encoder")))


def lora_folder(folder, text="weights"):
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_text(text)
    return str(folder)


def test_what_a_method_starts_from_counts_by_its_content_and_not_by_its_place(tmp_path):
    def of(folder):
        return fingerprint(
            from_tree({**GOOD, "adapter": {"name": "moa", "tasks": ["a"], "folders": {"a": folder}}})
        )

    one, same = (lora_folder(tmp_path / name) for name in ("one", "same"))
    assert of(one) == of(same)
    assert of(one) != of(lora_folder(tmp_path / "other", text="changed"))
    with pytest.raises(UserError, match="missing/adapter_config.json: no such file"):
        of(str(tmp_path / "missing"))


def test_a_generators_content_is_in_the_fingerprint_and_its_place_is_not(tmp_path):
    def of(name, text):
        (tmp_path / name).mkdir()
        for file in ("generator.json", "generator.safetensors"):
            (tmp_path / name / file).write_text(text)
        adapter = {"name": "icm_lora", "generator": str(tmp_path / name), "task": "a"}
        return fingerprint(from_tree({**GOOD, "adapter": adapter}))

    assert of("one", "x") == of("two", "x") != of("three", "y")


@pytest.mark.parametrize(
    ("used", "unused"),
    [
        ({"name": "smolora"}, {"num_instruction": 0, "rank_total": 64}),
        ({"name": "branch_lora", "task_routers": True, "tasks": ["a"]}, {"task_routers": False}),
    ],
)
def test_a_sentence_encoder_counts_by_its_content_where_it_is_used(used, unused, encoder, tmp_path):
    def of(folder, extra=None):
        return fingerprint(from_tree({**GOOD, "adapter": {**used, "encoder": str(folder), **(extra or {})}}))

    same, other = tmp_path / "same", tmp_path / "other"
    for folder in (same, other):
        shutil.copytree(encoder, folder)
    (other / "vocab.txt").write_text("changed")
    assert of(encoder) == of(same) != of(other)
    assert of(encoder, unused) == of(other, unused) == of("/nowhere", unused)


def test_visual_cues_count_with_their_settings_only_when_they_are_on():
    def of(**model):
        return fingerprint(from_tree({**GOOD, "model": model}))

    assert of() == of(vce_heads=2) != of(vce=True) != of(vce=True, vce_heads=2)
    assert "vce" not in identity(from_tree(GOOD))
    assert identity(from_tree({**GOOD, "model": {"vce": True}}))["vce"].startswith("1 ")


def test_what_a_model_can_be_told_adds_nothing_to_its_identity_until_it_is_told():
    tree = _reduced(from_tree(GOOD))["model"]
    assert tree == {"name_or_path": "pocket", "train_projector": True}
    assert identity(from_tree(GOOD))["image_processor"] == "CLIPImageProcessorPil"


def continual(init_from="a" * 16, **fields):
    return fingerprint(from_tree({**GOOD, "init_from": init_from, "continual": fields}))


EWC = {"regulariser": "ewc"}
LWF = {"regulariser": "lwf"}
REPLAY = {"replay": "reservoir", "replay_share": 0.1}


def test_a_stream_adds_nothing_to_an_identity_until_it_is_told():
    assert "continual" not in _reduced(from_tree(GOOD))
    assert "continual" not in _reduced(from_tree({**GOOD, "continual": {"weight": 3.0, "temperature": 9.0}}))
    assert _reduced(from_tree({**GOOD, "continual": {"task": "a"}}))["continual"] == {"task": "a"}


@pytest.mark.parametrize("past", [EWC, LWF, REPLAY, {**EWC, **REPLAY}])
def test_a_first_stage_has_no_past(past):
    assert continual("", task="a") == continual("", task="a", **past) != continual("", task="b")
    assert continual(task="a") != continual(task="a", **past)


@pytest.mark.parametrize(
    ("used", "change"),
    [
        (EWC, {"weight": 2.0}), (EWC, {"fisher_samples": 9}), (LWF, {"weight": 2.0}), (LWF, {"temperature": 3.0}),
        (REPLAY, {"replay_share": 0.2}), (REPLAY, {"replay": "balanced"}), (REPLAY, EWC), (EWC, LWF),
    ],
)  # fmt: skip
def test_what_the_past_is_made_with_is_in_the_fingerprint(used, change):
    assert continual(**used) != continual(**{**used, **change})


@pytest.mark.parametrize(
    ("used", "change"),
    [
        ({}, {"weight": 2.0, "fisher_samples": 9, "temperature": 3.0, "replay_share": 0.2}),
        (EWC, {"temperature": 3.0, "replay_share": 0.2}), (LWF, {"fisher_samples": 9, "replay_share": 0.2}),
        (REPLAY, {"weight": 2.0, "fisher_samples": 9, "temperature": 3.0}),
    ],
)  # fmt: skip
def test_what_is_not_read_of_a_stream_leaves_the_fingerprint(used, change):
    assert continual(**used) == continual(**{**used, **change})
