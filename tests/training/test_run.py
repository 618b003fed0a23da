"""A whole run in this process: deterministic, resumable to the bit, and complete on disk."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.training.runs import do, small
from workloads import record
from workloads.errors import UserError
from workloads.evaluation.scorers import exact, normalise

NUMBERS = (
    "stream_hash",
    "eval_hash",
    "train_loss",
    "scores",
    "routing",
    "sample_shares",
    "token_shares",
    "num_steps",
)


def numbers(result):
    return {name: getattr(result, name) for name in NUMBERS}


def losses(reports):
    return [(r["step"], r["loss"]) for r in reports if r["event"] == "train"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished `mole` run: its folder, record and reports."""
    folder = tmp_path_factory.mktemp("mole")
    return folder, *do(small("mole"), folder)


def test_same_seed_gives_bit_equal_losses_and_scores(finished, tmp_path):
    _, first, reports = finished
    again, more = do(small("mole"), tmp_path)
    assert numbers(again) == numbers(first)
    assert losses(more) == losses(reports)
    other, _ = do(small("mole", seed=1), tmp_path / "other")
    assert numbers(other) != numbers(first)


def test_the_folder_holds_everything_and_the_record_what_was_reported(finished):
    folder, result, reports = finished
    assert record.load(folder) == result
    rows = [json.loads(line) for line in (folder / record.PREDICTIONS).read_text().splitlines()]
    assert len(rows) == 24
    for domain, score in result.scores.items():
        mine = [row for row in rows if row["domain"] == domain]
        assert score.score == sum(exact(row["raw"], row["answer"]) for row in mine) / len(mine)
        assert all(row["normalised"] == normalise(row["raw"]) for row in mine)
        assert sum(n for _, n in score.by_type.values()) == score.num_items == 8
    events = list(record.read_events(folder))
    assert [e["event"] for e in events] == ["train"] * 4 + ["eval"]
    assert [r["event"] for r in reports] == ["train"] * 4 + ["eval", "finished"]
    assert {"adapter_model.safetensors", "adapter_config.json"} == {
        p.name for p in (folder / record.ADAPTER).iterdir()
    }
    assert not (folder / record.CHECKPOINT).exists()
    for layers in result.routing.values():
        assert len(layers) == 4
        assert all(abs(sum(layer) - 1) < 1e-12 for layer in layers)


def test_a_finished_folder_is_not_run_again(finished):
    folder, result, _ = finished
    before = (folder / record.RECORD).stat().st_mtime_ns
    again, reports = do(small("mole"), folder)
    assert (again, reports) == (result, [])
    assert (folder / record.RECORD).stat().st_mtime_ns == before


CHILD = """
import sys, time
from pathlib import Path
from tests.training.runs import small
from workloads.run import run

def report(metrics, folder):
    print(metrics["step"], flush=True)
    time.sleep(0.2)

run(small("lora", execution={"checkpoint_every": 4}, adapter_fields={"dropout": 0.1}), report, Path(sys.argv[1]))
"""


def test_killed_in_the_middle_and_resumed_gives_bit_equal_numbers(tmp_path):
    config = small("lora", execution={"checkpoint_every": 4}, adapter_fields={"dropout": 0.1})
    whole, reports = do(config, tmp_path / "whole")
    folder = tmp_path / "killed"
    root = Path(__file__).parent.parent.parent
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder)], stdout=subprocess.PIPE, text=True, cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert child.stdout
    while child.stdout.readline().strip() != "9":
        assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert (folder / record.CHECKPOINT / "step-00000008").is_dir()
    resumed, rest = do(config, folder)
    assert numbers(resumed) == numbers(whole)
    assert resumed.num_resumes == 1
    assert [r["step"] for r in rest if r["event"] == "train"] == [12]
    events = [(e["step"], e["loss"]) for e in record.read_events(folder) if e["event"] == "train"]
    assert events == losses(reports)


def test_a_half_written_checkpoint_is_not_resumed_from(tmp_path):
    config = small("lora")
    (tmp_path / record.CHECKPOINT / ".step-00000004.part").mkdir(parents=True)
    result, _ = do(config, tmp_path)
    assert result.num_resumes == 0


def test_micro_batches_leave_the_curve_unchanged(finished, tmp_path):
    _, _, reports = finished
    _, split = do(small("mole", execution={"micro_batch": 3}), tmp_path)
    for (step, one), (other_step, two) in zip(losses(reports), losses(split), strict=True):
        assert step == other_step
        assert two == pytest.approx(one, abs=1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_leave_the_curve_unchanged(stage, finished, tmp_path):
    _, _, reports = finished
    result, sharded = do(small("mole", execution={"zero_stage": stage, "checkpoint_every": 7}), tmp_path)
    for (_, one), (_, two) in zip(losses(reports), losses(sharded), strict=True):
        assert two == pytest.approx(one, abs=1e-5)
    assert result.cost.trainable == finished[1].cost.trainable


def test_bf16_trains_close_to_fp32(finished, tmp_path):
    _, _, reports = finished
    _, half = do(small("mole", optim={"dtype": "bf16"}, execution={"zero_stage": 1}), tmp_path)
    assert losses(half)[-1][1] == pytest.approx(losses(reports)[-1][1], rel=0.05)


def test_training_lowers_the_loss(finished):
    _, _, reports = finished
    assert losses(reports)[-1][1] < losses(reports)[0][1]


def test_init_from_starts_at_the_other_runs_adapter(finished, tmp_path):
    folder, result, _ = finished
    (tmp_path / result.fingerprint).symlink_to(folder)
    config = replace(small("mole", optim={"lr": 1e-12}), init_from=result.fingerprint)
    follow, _ = do(config, tmp_path / "follow")
    assert {d: asdict(s)["score"] for d, s in follow.scores.items()} == {
        d: s.score for d, s in result.scores.items()
    }
    with pytest.raises(UserError, match="init_from"):
        do(replace(config, init_from="absent"), tmp_path / "none")


def test_blind_runs_see_no_image(tmp_path):
    result, _ = do(small("lora", data={"blind": True}), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / record.PREDICTIONS).read_text().splitlines()]
    answers = {}
    for row in rows:
        answers.setdefault(row["prompt"], set()).add(row["raw"])
    assert all(len(raws) == 1 for raws in answers.values())
    assert result.num_samples == 96


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"data": {"mixture": {"generl": 1.0}}}, "did you mean 'general'"),
        ({"data": {"samples": 10**6}}, "data.samples"),
        ({"eval": {"samples": 10**6}}, "eval.samples"),
        ({"eval": {"domains": ["medical"]}}, "eval.domains"),
        ({"model": {"name_or_path": "/nowhere"}}, "model.name_or_path"),
        ({"data": {"max_length": 70}}, "max_rejected"),
    ],
)
def test_mistakes_are_told_in_one_line_before_anything_is_written(sections, words, tmp_path):
    sections = dict(sections)
    model = sections.pop("model", None)
    config = small("lora", **sections)
    if model:
        config = replace(config, model=replace(config.model, **model))
    with pytest.raises(UserError) as error:
        do(config, tmp_path / "run")
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
