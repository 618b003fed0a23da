"""A whole run in this process: deterministic, resumable to the bit, and complete on disk."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.adapters.minimal import make_config
from tests.training.runs import do, small
from workloads import adapters, record
from workloads.errors import UserError
from workloads.evaluation import answer as answer_module
from workloads.evaluation.scorers import exact, normalise
from workloads.llava.build import build
from workloads.run import run

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
    other, others = do(small("mole", seed=1), tmp_path / "other")
    assert other.stream_hash != first.stream_hash
    assert losses(others) != losses(reports)


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
    assert result.environment["adapter_backend"] == "dense_mask"
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


class Killed(Exception):
    """Stands for the end of the process."""


def test_a_run_killed_while_it_answers_goes_on_there_with_the_same_record_and_predictions(
    tmp_path, monkeypatch
):
    config = small("mole", execution={"checkpoint_every": 5, "eval_batch": 5})
    whole, reports = do(config, tmp_path / "whole")
    generate, calls = answer_module._generate, []

    def dies(*given):
        if len(calls) == 3:
            raise Killed
        calls.append(given)
        return generate(*given)

    folder = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(answer_module, "_generate", dies)
        with pytest.raises(Killed):
            do(config, folder)
    assert [path.name for path in (folder / record.CHECKPOINT).iterdir()] == ["step-00000012"]
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(answer_module, "_generate", lambda *given: calls.append(given) or generate(*given))
        resumed, rest = do(config, folder)
    assert len(calls) == 2  # of five batches
    assert [r["event"] for r in rest] == ["eval", "finished"]  # nothing is trained again
    assert numbers(resumed) == numbers(whole)
    assert (resumed.num_resumes, whole.num_resumes) == (1, 0)
    names = [tmp_path / name / record.PREDICTIONS for name in ("whole", "killed")]
    assert names[0].read_bytes() == names[1].read_bytes()
    assert losses([*record.read_events(folder)]) == losses(reports)
    assert resumed.cost.train_seconds > 0.1
    assert resumed.cost.samples_per_second == pytest.approx(96 / resumed.cost.train_seconds)


def test_nothing_of_an_evaluation_is_kept_unless_training_is(tmp_path, monkeypatch):
    monkeypatch.setattr(
        answer_module, "_joined", lambda *given: pytest.fail(str([*tmp_path.rglob("answers*")]))
    )
    with pytest.raises(pytest.fail.Exception, match=r"^\[\]"):
        do(small("lora", data={"samples": 2}), tmp_path)


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
    do(config, tmp_path / "follow")
    before, after = (adapters.read(path / record.ADAPTER) for path in (folder, tmp_path / "follow"))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-8)
    with pytest.raises(UserError, match="init_from"):
        do(replace(config, init_from="0" * 16), tmp_path / "none")


@pytest.mark.parametrize(
    ("method", "fields", "words"),
    [
        ("mole", {"alpha": 8.0}, ["adapter.alpha: 8.0 is not allowed", "init_from", "has 4.0"]),
        ("mole", {"router_grad": "scaled"}, ["adapter.router_grad: 'scaled' is not allowed", "has 'hard'"]),
        ("mole", {"rank_per_expert": 4}, ["adapter.rank_per_expert: 4 is not allowed", "has 2"]),
        ("lora", {}, ["init_from", "mole-", "lora-"]),
    ],
)
def test_an_adapter_that_would_compute_something_else_is_refused(method, fields, words, finished, tmp_path):
    folder, result, _ = finished
    (tmp_path / result.fingerprint).symlink_to(folder)
    config = replace(small(method, adapter_fields=fields), init_from=result.fingerprint)
    with pytest.raises(UserError) as error:
        do(config, tmp_path / "follow")
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "follow").exists()


def test_settings_of_training_alone_may_differ_from_the_adapter_started_from(finished, tmp_path):
    folder, result, _ = finished
    (tmp_path / result.fingerprint).symlink_to(folder)
    fields = {
        "dropout": 0.1,
        "balance_weight": 0.5,
        "balance_form": "switch",
        "router_grad": "straight_through",
    }
    config = replace(small("mole", adapter_fields=fields), init_from=result.fingerprint)

    def stop(metrics, folder):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, stop, tmp_path / "follow")


def test_a_diverged_run_is_told_in_one_line(tmp_path):
    config = small("lora", optim={"lr": 1e30, "clip": 0.0})
    with pytest.raises(UserError, match=r"optim\.lr: 1e\+30: training diverged at step"):
        do(config, tmp_path)


def test_a_folder_of_another_run_is_refused(finished):
    folder, _, _ = finished
    with pytest.raises(UserError, match="it holds another run"):
        do(small("mole", seed=7), folder)


def test_more_workers_than_there_are_is_told(tmp_path):
    with pytest.raises(UserError, match=r"execution\.workers: 2 is not allowed"):
        do(small("lora", execution={"workers": 2}), tmp_path)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_first_bf16_step_is_adams(stage, tmp_path):
    """Adam moves every weight by the learning rate at its first step, whatever the gradient's size."""
    config = small("lora", data={"samples": 2}, optim={"dtype": "bf16", "lr": 0.25, "warmup_ratio": 0.0})
    config = replace(config, execution=replace(config.execution, zero_stage=stage))
    do(config, tmp_path)
    weights = adapters.read(tmp_path / record.ADAPTER)
    moved = [w.float().abs() for name, w in weights.items() if "lora_B" in name]
    assert all(w.dtype == torch.bfloat16 for w in weights.values())
    biggest = max(float(w.max()) for w in moved)
    assert biggest == pytest.approx(0.25, rel=0.01)


@pytest.mark.parametrize(("stage", "dtype"), [(0, "bf16"), (2, "fp32"), (3, "fp32")])
def test_an_interrupted_run_resumes_to_the_bit_at_every_stage(stage, dtype, tmp_path):
    def config_of():
        return small(
            "mole",
            optim={"dtype": dtype},
            execution={"checkpoint_every": 4, "zero_stage": stage, "gradient_checkpointing": stage == 3},
            adapter_fields={"dropout": 0.1},
        )

    def stop(metrics, folder):
        if metrics["step"] >= 6:
            raise KeyboardInterrupt

    whole, _ = do(config_of(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(config_of(), stop, tmp_path / "broken")
    resumed, _ = do(config_of(), tmp_path / "broken")
    assert resumed.num_resumes == 1
    assert numbers(resumed) == numbers(whole)


def test_state_that_is_not_trained_is_saved_and_resumed_to_the_bit(tmp_path):
    """smora's biases move after every step, by the tokens that each rank of the LoRA got."""
    config = small("smora", adapter_fields={"bias_step": 0.05}, execution={"checkpoint_every": 4})

    def stop(metrics, folder):
        if metrics["step"] >= 6:
            raise KeyboardInterrupt

    whole, reports = do(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(config, stop, tmp_path / "broken")
    resumed, rest = do(config, tmp_path / "broken")
    assert resumed.num_resumes == 1
    assert numbers(resumed) == numbers(whole)
    assert losses(rest)[-1] == losses(reports)[-1]
    first, second = (adapters.read(tmp_path / name / record.ADAPTER) for name in ("whole", "broken"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    steps = [tensor for name, tensor in first.items() if name.endswith("bias_steps")]
    assert steps
    assert any(bool(tensor.any()) for tensor in steps), "the biases moved"
    assert whole.cost.trainable == sum(t.numel() for n, t in first.items() if not n.endswith("bias_steps"))


def test_a_run_that_trains_nothing_is_refused_in_one_line(tmp_path):
    config = small("lora")
    model = replace(config.model, train_projector=False)
    adapter = make_config("icm_lora", tmp_path / "files", lambda: build(model, "fp32").model)
    with pytest.raises(UserError, match=r"adapter\.name: 'icm_lora' is not allowed; nothing of it trains"):
        do(replace(config, adapter=adapter, model=model), tmp_path / "run")
    assert not (tmp_path / "run").exists()


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
        ({"data": {"max_length": 1000}}, "data.max_length"),
        ({"eval": {"max_new_tokens": 1000}}, "eval.max_new_tokens"),
        ({"data": {"mixture": {"general": 0.0001}}}, "data.mixture.general"),
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
