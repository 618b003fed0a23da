"""`plan` sizes a study by formula, with the model's config.json alone; `--set` changes a study where it may."""

import json

import pytest
from rich.console import Console

from orchestrator import sizing
from orchestrator.study import load
from orchestrator.trials import fixed
from tests.test_footprint import CONFIG
from workloads import footprint
from workloads.errors import UserError


def text_of(table):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(table)
    return console.export_text()


@pytest.fixture
def seven(tmp_path, write_study):
    """A study of two arms whose model is a 7B config.json."""
    folder = tmp_path / "seven"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    arms = {
        "lora": {"set": {"adapter.rank": 32}},
        "mole": {"set": {"adapter.num_experts": 3, "adapter.rank_per_expert": 32}},
    }
    settings = {
        "model.name_or_path": str(folder), "optim.dtype": "bf16", "execution.zero_stage": 2,
        "execution.gradient_checkpointing": True, "execution.micro_batch": 8, "execution.eval_batch": 8,
        "data.samples": 500, "execution.checkpoint_every": 10,
    }  # fmt: skip
    return write_study(arms=arms, set=settings, resources={"workers": 8, "gpus_per_worker": 1.0})


def test_the_table_is_of_the_arm_with_most_weights_under_every_stage(seven, monkeypatch):
    assert not any(line.startswith("time:") for line in sizing.sizing(load(str(seven))).lines)
    monkeypatch.setattr(sizing, "_WORTH_SAYING", 0.0)
    study = load(str(seven))
    found = sizing.sizing(study)
    config = next(trial.config for trial in fixed(study) if trial.arm == "mole")
    counts, text = footprint.counts(config), text_of(found.memory)
    assert "mole, 8 samples of 128 tokens" in text
    for stage in range(4):
        for dtype, again in (("bf16", False), ("bf16", True), ("fp32", False), ("fp32", True)):
            chosen = sizing.with_settings(config, stage, dtype, again)
            total = footprint.memory(chosen, counts).total
            assert f"{total / 1e9:.2f}" in next(line for line in text.splitlines() if f"│ {stage} " in line)
    lines = "\n".join(found.lines)
    assert "as set (stage 2, bf16, checkpointed): weights 14.47 GB, optimizer 291.2 MB" in lines
    assert "weights: 194.13 M train, 7042.45 M are frozen" in lines
    assert "disk: an adapter of at most 388.3 MB a run; checkpoints of 5.44 GB while it trains" in lines
    hours = sum(footprint.hours(t.config, footprint.counts(t.config), 1500, "A100") for t in fixed(study))
    assert f"to train all runs at most {hours:.3g} h on 8 A100 or" in lines


def test_the_command_prints_it_without_any_weights(seven, command, tmp_path):
    code, out, err, _ = command(
        "plan", seven, "--root", tmp_path / "studies", "--set", "execution.zero_stage=3"
    )
    assert (code, err) == (0, "")
    assert "as set (stage 3, bf16, checkpointed): weights 1.81 GB" in out
    assert "not measured" in out


def test_a_missing_model_or_data_is_one_line(seven, command, tmp_path):
    (tmp_path / "empty").mkdir()
    for change, words in (
        (f"model.name_or_path={tmp_path / 'empty'}", "has no config.json"),
        ("model.name_or_path=nobody/nothing", "its config.json is not to be had"),
    ):
        code, _, err, _ = command("plan", seven, "--set", change)
        assert code == 2
        assert len(err.splitlines()) == 1
        assert words in err
    code, _, err, _ = command("check", "llava-7b-twice-the-samples")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "no such file in the working folder; data.root is not set" in err


def test_set_goes_over_the_study_and_its_profiles_and_into_its_tree(write_study):
    path = write_study(set={"data.samples": 8}, profiles={"smoke": {"set": {"data.samples": 4, "seed": 3}}})
    for profile in ("full", "smoke"):
        study = load(str(path), profile, ["data.samples=16", "data.mixture.general=2"])
        (trial,) = fixed(study)
        assert trial.config.data.samples == 16
        assert trial.config.data.mixture == {"general": 2}
        assert study.tree["set"]["data.samples"] == 16
    assert load(str(path)).tree == load(str(path), "full", []).tree


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("adapter.rank=4", "--set adapter.rank: 4 is not allowed; the arm lora sets it; edit the study"),
        ("optim.lr=1", "--set optim.lr: 1 is not allowed; the grid varies it; edit the study"),
        ("optim", "override: 'optim' is not allowed; write key=value"),
        ("data.sample=1", "unknown key"),
    ],
)
def test_set_never_touches_what_tells_runs_apart(change, words, write_study):
    arms = {"lora": {"set": {"adapter.rank": 2}}}
    path = write_study(arms=arms, grid={"optim.lr": [0.1, 0.2]})
    with pytest.raises(UserError, match=words):
        fixed(load(str(path), "full", [change]))
