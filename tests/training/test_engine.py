"""A run that ends early leaves nothing behind: the next one gives the numbers of a fresh process."""

import gc
import json
import os
import subprocess
import sys
import weakref

import pytest
import torch
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from tests.training.runs import ROOT, do, small
from workloads import routing
from workloads import run as run_module
from workloads.errors import UserError
from workloads.run import run
from workloads.training import engine

STAGES = (0, 1, 2, 3)


def config_of(stage, **sections):
    """Three steps of `mole` with dropout, scored on two items a domain."""
    return small(
        "mole",
        data={"samples": 8, **sections.pop("data", {})},
        eval={"samples": 2},
        execution={"zero_stage": stage, "report_every": 1},
        adapter_fields={"dropout": 0.2},
        **sections,
    )


def outcome(stage, folder):
    """All numbers of a run, as JSON keeps them."""
    record, reports = do(config_of(stage), folder)
    losses = [report["loss"] for report in reports if report["event"] == "train"]
    scores = {d: [s.score, s.loss] for d, s in record.scores.items()}
    return json.loads(json.dumps([losses, scores, record.train_loss, record.routing]))


FRESH = """
import json, os, sys
from pathlib import Path
from tests.training.test_engine import STAGES, outcome

for stage in STAGES:
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        continue
    folder = Path(sys.argv[1]) / str(stage)
    (Path(sys.argv[1]) / f"{stage}.json").write_text(json.dumps(outcome(stage, folder)))
    os._exit(0)
"""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """The numbers of every ZeRO stage, each from a process that has done no run before."""
    folder = tmp_path_factory.mktemp("fresh")
    command = [sys.executable, "-c", FRESH, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return {stage: json.loads((folder / f"{stage}.json").read_text()) for stage in STAGES}


@pytest.fixture
def models(monkeypatch):
    """Weak references to all models that runs of this test build."""
    made = []

    def build(*args):
        llava = run_module_build(*args)
        made.append(weakref.ref(llava.model))
        return llava

    run_module_build = run_module.build
    monkeypatch.setattr(run_module, "build", build)
    return made


def stopped(config, folder, error=KeyboardInterrupt, step=2):
    """Do a run whose report raises at `step`, unless something else ends it before."""

    def report(metrics, path):
        if metrics["step"] == step:
            raise error

    try:
        run(config, report, folder)
    except (KeyboardInterrupt, SystemExit, RuntimeError, UserError):
        return
    raise AssertionError("the run came to its end")


def assert_nothing_is_left(models):
    gc.collect()
    assert [model() is None for model in models] == [True] * len(models)
    assert torch.nn.functional.linear is torch._C._nn.linear
    assert not is_deepspeed_zero3_enabled()
    for kind in ("forward_pre", "forward", "backward", "backward_pre"):
        assert not getattr(torch.nn.modules.module, f"_global_{kind}_hooks"), kind


@pytest.mark.parametrize(("stage", "after"), [(0, 0), (1, 1), (2, 2), (3, 3), (3, 0)])
def test_a_run_stopped_between_two_steps_leaves_nothing(stage, after, fresh, models, tmp_path):
    stopped(config_of(stage), tmp_path / "stopped", error=SystemExit if stage % 2 else KeyboardInterrupt)
    assert len(models) == 1
    assert_nothing_is_left(models)
    assert outcome(after, tmp_path / "next") == fresh[after]


@pytest.mark.parametrize(("stage", "after"), [(0, 3), (2, 2), (3, 0)])
def test_a_run_stopped_in_the_middle_of_a_forward_pass_leaves_nothing(
    stage, after, fresh, models, tmp_path, monkeypatch
):
    calls = []

    def interrupted(scores_BTE):
        calls.append(1)
        if len(calls) == 6:  # the second step's second router
            raise KeyboardInterrupt
        return top1(scores_BTE)

    top1 = routing.top1
    monkeypatch.setattr(routing, "top1", interrupted)
    stopped(config_of(stage), tmp_path / "stopped")
    monkeypatch.setattr(routing, "top1", top1)
    assert len(calls) == 6
    assert_nothing_is_left(models)
    assert outcome(after, tmp_path / "next") == fresh[after]


def test_a_mistake_found_after_the_model_is_built_leaves_nothing(fresh, models, tmp_path):
    config = config_of(3, data={"max_length": 70})
    with pytest.raises(UserError, match="max_rejected"):
        do(config, tmp_path / "refused")
    assert len(models) == 1
    assert_nothing_is_left(models)
    assert outcome(0, tmp_path / "next") == fresh[0]


def test_an_engine_that_cannot_be_made_leaves_nothing(models, tmp_path, monkeypatch):
    def fails(**settings):
        raise RuntimeError("no memory")

    monkeypatch.setattr(engine.deepspeed, "initialize", fails)
    stopped(config_of(3), tmp_path / "failed")
    assert len(models) == 1
    assert_nothing_is_left(models)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_ends_well_leaves_nothing(stage, fresh, models, tmp_path):
    assert outcome(stage, tmp_path / "whole") == fresh[stage]
    assert_nothing_is_left(models)
