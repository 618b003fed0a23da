"""What two workers make of the past is what one makes of it, up to rounding: Fisher, teacher, losses and weights."""

import shutil

import pytest
from safetensors.torch import load_file

from tests.training.runs import do, do_stages, stages, two_processes
from workloads import adapters, record
from workloads.identity import fingerprint

PARTS = {task: {task: 1.0} for task in ("general", "document", "biomedical")}
# Regulariser -> its settings, and the ZeRO stage of the two workers.
CASES = {
    "ewc": ({"regulariser": "ewc", "weight": 50.0, "fisher_samples": 5}, 1),
    "ewc_stage_2": ({"regulariser": "ewc", "weight": 50.0, "fisher_samples": 5}, 2),
    "lwf": ({"regulariser": "lwf"}, 1),
    "replay": ({"replay": "balanced", "replay_share": 0.2}, 1),
}

CHILD = """
import sys
from pathlib import Path
from tests.training import test_past_workers

test_past_workers.work(Path(sys.argv[1]))
"""


def configs_of(case, workers):
    """Streams of 17 samples a stage: in the last step, one of two workers has nothing that counts."""
    continual, stage = CASES[case]
    execution = {"workers": workers, "report_every": 1}
    execution |= {"zero_stage": stage, "micro_batch": 2} if workers == 2 else {}
    return stages(
        PARTS, continual, data={"samples": 17}, optim={"clip": 0.0, "lr": 0.01},
        eval={"samples": 2, "max_new_tokens": 2}, execution=execution,
    )  # fmt: skip


def work(folder):
    """As one of two workers, the last two stages of every case."""
    for case in CASES:
        for config in configs_of(case, 2)[1:]:
            do(config, folder / case / fingerprint(config))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of the runs of one worker and of two, whose first stages are the same runs."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for case in CASES:
        do_stages(configs_of(case, 1), one / case)
        first = fingerprint(configs_of(case, 1)[0])
        shutil.copytree(one / case / first, two / case / first)
    two_processes(CHILD, two)
    return one, two


def curves(folder):
    """Every loss of every step."""
    events = [event for event in record.read_events(folder) if event["event"] == "train"]
    return [{k: v for k, v in event.items() if "loss" in k} for event in events]


@pytest.mark.parametrize("place", [1, 2])
@pytest.mark.parametrize("case", sorted(CASES))
def test_two_workers_take_the_steps_of_one(case, place, folders):
    config = configs_of(case, 1)[place]
    alone, shared = (folder / case / fingerprint(config) for folder in folders)
    wanted, given = curves(alone), curves(shared)
    assert len(given) == len(wanted) >= 3
    terms = {"ewc": {"ewc_loss"}, "lwf": {"lwf_loss"}, "replay": set()}[case.partition("_")[0]]
    assert terms <= wanted[0].keys()
    for one, two in zip(wanted, given, strict=True):
        assert two == pytest.approx(one, abs=1e-4)
    first, second = (adapters.read(folder / record.ADAPTER) for folder in (alone, shared))
    start = adapters.read(folders[0] / case / config.init_from / record.ADAPTER)
    for name, weight in first.items():
        travelled = float((weight - start[name]).norm())
        assert float((second[name] - weight).norm()) < 0.05 * travelled + 1e-6, name
    ours, theirs = record.load(alone), record.load(shared)
    assert theirs.stream_hash == ours.stream_hash
    assert theirs.num_replayed == ours.num_replayed
    assert theirs.sample_shares == pytest.approx(ours.sample_shares)


@pytest.mark.parametrize("case", ["ewc", "ewc_stage_2"])
def test_two_workers_leave_the_fisher_of_one_behind(case, folders):
    config = configs_of(case, 1)[1]
    one, two = (load_file(folder / case / fingerprint(config) / record.PAST) for folder in folders)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert float((two[name] - tensor).norm()) <= 1e-4 * float(tensor.norm()), name
