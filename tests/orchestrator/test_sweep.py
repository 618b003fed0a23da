"""A sweep on a local Ray: actors are reused, failures stay alone, and neither Ctrl-C nor kill -9 loses work."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator.store import Store
from orchestrator.sweep import _stop
from orchestrator.tracking import make_client, tracking_uri
from workloads.record import load, read_events

REPO = Path(__file__).parents[2]


def _rows(store: Store, name: str) -> dict[str, dict]:
    return {row["arm"]: row for row in store.read_study(name)["trials"]}


def _children(store: Store, name: str) -> dict[str, object]:
    client = make_client(tracking_uri(store.study_folder(name)))
    experiment = client.get_experiment_by_name(name)
    runs = client.search_runs([experiment.experiment_id], "tags.kind = 'trial'")
    return {run.data.tags["arm"]: run for run in runs}


def test_a_failing_trial_stays_alone_and_the_others_share_an_actor(write_study, command, tmp_path):
    study = write_study(
        arms={
            "broken": {"method": "lora", "set": {"init_from": "0123456789abcdef"}},
            "lora": {},
            "mole": {"set": {"adapter.num_experts": 2, "adapter.rank_per_expert": 2}},
        },
        resources={"slots": 1},
    )
    store = Store(tmp_path / "studies")
    code, out, err, _ = command("sweep", study, "--root", store.root)
    assert code == 1, err
    assert "init_from: '0123456789abcdef' is not allowed" in out
    assert "Traceback" not in out + err
    rows = _rows(store, "tiny")
    assert {arm: row["status"] for arm, row in rows.items()} == {
        "broken": "failed",
        "lora": "finished",
        "mole": "finished",
    }
    assert rows["lora"]["where"] == rows["mole"]["where"] != ""
    assert "Traceback" in (store.run_folder(rows["broken"]["fingerprint"]) / "error.txt").read_text()
    used = store.read_study("tiny")["time"]
    seconds = [load(store.run_folder(rows[arm]["fingerprint"])).cost.seconds for arm in ("lora", "mole")]
    assert used["run_seconds"] == pytest.approx(sum(seconds))
    assert 0 <= used["ahead_seconds"] < 1
    spent = used["wall_seconds"] - used["ahead_seconds"]
    assert used["overhead"] == pytest.approx((spent - sum(seconds)) / sum(seconds))
    children = _children(store, "tiny")
    assert {arm: run.info.status for arm, run in children.items()} == {
        "broken": "FAILED",
        "lora": "FINISHED",
        "mole": "FINISHED",
    }
    assert children["broken"].data.tags["error"] == rows["broken"]["error"]
    assert (store.study_folder("tiny") / "report.html").is_file()
    # A warm actor starts training at once: the second run's first event comes soon after the first run's end.
    first = next(read_events(store.run_folder(rows["mole"]["fingerprint"])))
    assert first["time"] - rows["lora"]["ended"] < 10


def _start(study: Path, root: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "orchestrator", "sweep", str(study), "--root", str(root)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=REPO, env=dict(os.environ), **quiet)


def _wait(condition, process: subprocess.Popen, seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)


def test_ctrl_c_and_kill_9_in_mid_run_lose_nothing_that_was_recorded(write_study, command, tmp_path):
    study = write_study(
        arms={"lora": {}, "mole": {"set": {"adapter.num_experts": 2, "adapter.rank_per_expert": 2}}},
        set={"data.samples": 128, "execution.checkpoint_every": 4},
        resources={"slots": 1},
    )
    store = Store(tmp_path / "studies")

    def steps(arm: str) -> int:
        path = store.study_folder("tiny") / "study.json"
        row = _rows(store, "tiny").get(arm) if path.is_file() else None
        events = read_events(store.run_folder(row["fingerprint"])) if row else ()
        return max((event["step"] for event in events), default=0)

    process = _start(study, store.root)
    _wait(lambda: steps("lora") >= 6, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert process.stderr.read().strip() == "interrupted; what is recorded is kept, the same command goes on"
    assert {arm: row["status"] for arm, row in _rows(store, "tiny").items()} == {
        "lora": "interrupted",
        "mole": "pending",
    }
    process = _start(study, store.root)
    _wait(lambda: steps("mole") >= 6, process)
    process.kill()
    process.wait()
    rows = _rows(store, "tiny")
    assert (rows["lora"]["status"], rows["mole"]["status"]) == ("finished", "running")
    record = store.run_folder(rows["lora"]["fingerprint"]) / "record.json"
    before = record.stat().st_mtime_ns
    code, _, err, _ = command("sweep", study, "--root", store.root)
    assert code == 0, err
    assert record.stat().st_mtime_ns == before
    rows = _rows(store, "tiny")
    children = _children(store, "tiny")
    for arm in ("lora", "mole"):
        folder = store.run_folder(rows[arm]["fingerprint"])
        assert rows[arm]["status"] == "finished"
        assert load(folder).num_resumes == 1
        told = [event["loss"] for event in read_events(folder) if event["event"] == "train"]
        assert len(told) == 24
        client = make_client(tracking_uri(store.study_folder("tiny")))
        history = client.get_metric_history(children[arm].info.run_id, "loss")
        assert [m.value for m in sorted(history, key=lambda m: m.step)] == told
        assert children[arm].info.status == "FINISHED"
    sync = json.loads((store.study_folder("tiny") / "sync.json").read_text())
    assert len(sync["uris"]) == 1


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.default_int_handler])
def test_sigterm_writes_the_state_down_and_ends_a_sweep_even_where_a_script_ignores_ctrl_c(handler):
    written = []
    before = signal.signal(signal.SIGINT, handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            _stop(SimpleNamespace(interrupt=written.append))
    finally:
        signal.signal(signal.SIGINT, before)
    assert written == [pytest.approx(time.time(), abs=60)]


def test_a_search_draws_equal_points_for_all_arms_and_seeds_and_stops_some_early(
    write_study, command, tmp_path
):
    search = {"space": "learning_rate", "trials_per_arm": 2, "scheduler": "asha", "seeds": [1000, 1001]}
    study = write_study(
        arms=["lora", "mole"],
        set={"eval.domains": ["general"], "data.mixture": "general_only"},
        search={**search, "metric": "loss", "mode": "min"},
        resources={"slots": 2},
    )
    store = Store(tmp_path / "studies")
    code, _, err, _ = command("sweep", study, "--root", store.root)
    assert code == 0, err
    rows = store.read_study("tiny")["trials"]
    drawn = {
        (arm, seed): [r["point"]["optim.lr"] for r in rows if r["arm"].startswith(arm) and r["seed"] == seed]
        for arm in ("lora", "mole")
        for seed in (1000, 1001)
    }
    first = sorted(drawn["lora", 1000])
    assert len(set(first)) == 2
    assert all(sorted(points) == first for points in drawn.values())
    assert all(2e-4 <= point <= 2e-2 for point in first)
    states = {row["status"] for row in rows}
    assert "finished" in states
    assert states <= {"finished", "stopped"}
    for row in rows:
        folder = store.run_folder(row["fingerprint"])
        assert store.finished(row["fingerprint"]) == (row["status"] == "finished")
        assert any(event["event"] == "train" for event in read_events(folder))
