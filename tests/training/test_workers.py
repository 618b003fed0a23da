"""Two workers take the same steps as one, at every ZeRO stage, and write one whole folder."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.runs import do, small
from workloads import adapters, record

ROOT = Path(__file__).parent.parent.parent
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

for stage in STAGES:
    config = small("mole", execution={"workers": 2, "zero_stage": stage, "micro_batch": 2}, **UNEVEN)
    do(config, Path(sys.argv[1]) / str(stage))
"""


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory):
    """The folder that two processes filled, one sub-folder a ZeRO stage; a hang is ended after 240 s."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", CHILD, str(folder)]
    workers = [
        subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        ends = [worker.communicate(timeout=240) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], ends[0][1][-3000:] + ends[1][1][-3000:]
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
