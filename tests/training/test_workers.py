"""Two workers take the same steps as one, at every ZeRO stage, resume to the bit, and write one whole folder."""

import json

import pytest

from tests.training.runs import do, small, two_processes
from workloads import adapters, record
from workloads.evaluation import answer as answer_module
from workloads.run import run
from workloads.training import engine

STAGES = (0, 1, 2, 3)
# 17 samples a domain: the last step has 3 samples for two workers and a micro-batch of 2.
# 7 items a domain: two workers answer 21 items.
UNEVEN = {
    "data": {"samples": 17},
    "eval": {"samples": 7},
    "optim": {"clip": 0.0},
    "adapter_fields": {"router_grad": "scaled"},
}

CHILD = """
import sys
from pathlib import Path
from tests.training.runs import do, small
from tests.training.test_workers import STAGES, UNEVEN

# The one worker of these tests sees images; the two read cached features, which stage 3 makes with a partitioned tower.
for stage in reversed(STAGES):
    execution = {"workers": 2, "zero_stage": stage, "micro_batch": 2, "feature_cache": True}
    config = small("mole", execution=execution, **UNEVEN)
    do(config, Path(sys.argv[1]) / str(stage))
"""


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory):
    """The folder that two processes filled, one sub-folder a ZeRO stage."""
    folder = tmp_path_factory.mktemp("two")
    two_processes(CHILD, folder)
    return folder


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    result, _ = do(small("mole", **UNEVEN), folder)
    return folder, result


def curve(folder):
    return [event["loss"] for event in record.read_events(folder) if event["event"] == "train"]


@pytest.mark.parametrize("stage", STAGES)
def test_two_workers_give_the_curve_of_one(stage, one_worker, two_workers):
    alone, result = one_worker
    folder = two_workers / str(stage)
    assert curve(folder) == pytest.approx(curve(alone), abs=1e-4)
    shared = record.load(folder)
    assert shared.stream_hash == result.stream_hash
    assert shared.token_shares == pytest.approx(result.token_shares)
    assert shared.train_loss == pytest.approx(result.train_loss, abs=1e-4)
    for domain, score in result.scores.items():
        assert shared.scores[domain].loss == pytest.approx(score.loss, abs=1e-3)
        for ours, theirs in zip(shared.routing[domain], result.routing[domain], strict=True):
            assert ours == pytest.approx(theirs, abs=0.02)


@pytest.mark.parametrize("stage", STAGES)
def test_the_gathered_adapter_is_whole(stage, one_worker, two_workers):
    alone, _ = one_worker
    wanted = adapters.read(alone / record.ADAPTER)
    given = adapters.read(two_workers / str(stage) / record.ADAPTER)
    assert {k: v.shape for k, v in given.items()} == {k: v.shape for k, v in wanted.items()}
    for name, tensor in wanted.items():
        # B starts at 0, so its norm is the distance that it travelled; what A learns is as large.
        travelled = wanted[name.replace("_A", "_B")].norm() if "_A" in name else tensor.norm()
        assert float((given[name] - tensor).norm()) < 0.05 * float(travelled), name


@pytest.mark.parametrize("stage", STAGES)
def test_every_item_is_answered_once_and_in_order(stage, one_worker, two_workers):
    alone, _ = one_worker
    ids = [
        [json.loads(line)["id"] for line in (folder / record.PREDICTIONS).read_text().splitlines()]
        for folder in (alone, two_workers / str(stage))
    ]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_each_worker_holds_half_of_the_optimizer(stage, two_workers):
    def held(of_stage):
        events = list(record.read_events(two_workers / str(of_stage)))
        return events[-1]["optimizer_bytes"]

    assert held(stage) == pytest.approx(held(0) / 2, rel=0.05)


RESUMED_STAGES = (0, 2, 3)


def resumable(stage):
    """4 steps, the last on 3 samples; dropout makes every rank draw random numbers of its own."""
    return small(
        "mole",
        execution={
            "workers": 2, "zero_stage": stage, "micro_batch": 4, "checkpoint_every": 2, "report_every": 1,
        },
        data={"samples": 9},
        eval={"samples": 1, "max_new_tokens": 2},
        adapter_fields={"dropout": 0.2},
    )  # fmt: skip


def stop_at_step_3(metrics, folder):
    if metrics["step"] == 3:
        raise KeyboardInterrupt


def break_off(folder):
    """Run until every worker is stopped at the same step, one after the last checkpoint."""
    for stage in RESUMED_STAGES:
        try:
            run(resumable(stage), stop_at_step_3, folder / f"broken-{stage}")
        except KeyboardInterrupt:
            continue
        raise AssertionError("the run was not stopped")


def go_on(folder):
    """Resume what was broken off, and do the same runs in one go."""
    for stage in RESUMED_STAGES:
        for name in ("broken", "whole"):
            do(resumable(stage), folder / f"{name}-{stage}")


def answering():
    """Two workers that answer 21 items in batches of 2."""
    execution = {"workers": 2, "micro_batch": 4, "checkpoint_every": 2, "eval_batch": 2}
    tree = {"data": {"samples": 4}, "eval": {"samples": 7, "max_new_tokens": 2}}
    return small("mole", execution=execution, **tree)


def die_answering(folder):
    """The first worker is gone after four batches, the second after two."""
    generate, calls = answer_module._generate, []

    def dies(*given):
        if len(calls) == (4, 2)[engine.rank()]:
            raise KeyboardInterrupt
        calls.append(given)
        return generate(*given)

    answer_module._generate = dies
    try:
        do(answering(), folder / "killed")
    except KeyboardInterrupt:
        return
    raise AssertionError("the run was not stopped")


def go_on_answering(folder):
    """Finish what was broken off, and do the same run in one go."""
    generate, calls = answer_module._generate, []
    answer_module._generate = lambda *given: calls.append(given) or generate(*given)
    do(answering(), folder / "killed")
    assert len(calls) == 4, "six batches, of which both workers had two"
    do(answering(), folder / "whole")


CALL = """
import sys
from pathlib import Path
from tests.training import test_workers

test_workers.{function}(Path(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Runs broken off in two processes and finished in two others, beside uninterrupted ones."""
    folder = tmp_path_factory.mktemp("resumed")
    for function in ("break_off", "go_on"):
        two_processes(CALL.format(function=function), folder)
    return folder


@pytest.mark.parametrize("stage", RESUMED_STAGES)
def test_two_workers_resume_to_the_bit(stage, resumed):
    broken, whole = (resumed / f"{name}-{stage}" for name in ("broken", "whole"))
    assert curve(broken) == curve(whole)
    assert len(curve(whole)) == 4
    one, two = record.load(broken), record.load(whole)
    assert (one.num_resumes, two.num_resumes) == (1, 0)
    for name in ("stream_hash", "train_loss", "scores", "routing", "sample_shares", "token_shares"):
        assert getattr(one, name) == getattr(two, name), name
    weights = adapters.read(whole / record.ADAPTER)
    assert all(tensor.equal(weights[name]) for name, tensor in adapters.read(broken / record.ADAPTER).items())


def test_two_workers_go_on_answering_with_the_batch_that_both_have(tmp_path):
    for function in ("die_answering", "go_on_answering"):
        two_processes(CALL.format(function=function), tmp_path)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert (killed / record.PREDICTIONS).read_bytes() == (whole / record.PREDICTIONS).read_bytes()
    one, two = record.load(killed), record.load(whole)
    assert (one.scores, one.routing, one.train_loss) == (two.scores, two.routing, two.train_loss)
    assert (one.num_resumes, two.num_resumes) == (1, 0)
