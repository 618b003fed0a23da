"""Keys of what runs look up: equal where the same features serve, other where anything that decides one differs."""

from dataclasses import replace

import pytest

from tests.llava import checkpoints
from tests.training.runs import small
from workloads import meeting
from workloads.data.cache import ENVIRONMENT_KEY

CACHED = {"execution": {"feature_cache": True}}


def key(adapter="lora", **sections):
    return meeting.key(small(adapter, **sections))


def test_what_steers_training_and_names_a_run_leaves_the_key_as_it_is():
    for sections in (
        {"optim": {"lr": 0.1}}, {"execution": {"micro_batch": 2}}, {"name": "other"}, {"init_from": "0" * 16},
        {"continual": {"task": "x"}}, {"model": {"train_projector": False}},
    ):  # fmt: skip
        assert key(**sections) == key("mole")


@pytest.mark.parametrize(
    "sections",
    [
        {"seed": 1}, {"data": {"samples": 31}}, {"data": {"blind": True}}, {"eval": {"samples": 7}},
        {"data": {"mixture": {"general": 1.0}}}, {"eval": {"split": "test"}}, {"optim": {"dtype": "bf16"}},
        {"model": {"image_aspect": "pad"}}, {"model": {"vce": True}}, {"data": {"max_length": 100}},
        {"execution": {"gpus_per_worker": 1.0}},
    ],
)  # fmt: skip
def test_what_decides_rows_or_which_are_met_decides_the_key(sections):
    assert key(**sections) != key()


def test_the_contents_of_the_base_decide_the_key(tmp_path):
    checkpoints.write(tmp_path)
    model = {"name_or_path": str(tmp_path)}
    first = key(model=model)
    about = tmp_path / "preprocessor_config.json"
    about.write_text(about.read_text().replace("0.48145466", "0.4"))
    assert key(model=model) != first


def test_of_runs_that_look_up_the_same_one_is_left_and_none_without_a_cache():
    runs = [small(name, **CACHED) for name in ("lora", "mole")]
    runs += [small(), replace(runs[0], seed=5)]
    assert list(meeting.distinct(runs).values()) == [runs[0], runs[3]]


def test_notes_are_of_one_cache_and_go_with_its_features(tmp_path, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_KEY, str(tmp_path))
    assert meeting.lacking(["a", "b"]) == {"a", "b"}
    meeting.note(["a"])
    assert meeting.lacking(["a", "b"]) == {"b"}
    (tmp_path / "features").rename(tmp_path / "gone")
    assert meeting.lacking(["a", "b"]) == {"a", "b"}
