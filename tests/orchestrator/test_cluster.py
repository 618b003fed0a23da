"""The same sweep on clusters: two workers on two nodes take one worker's steps, and a job on a running head ends."""

import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator.store import Store
from workloads.record import load, read_events

RAY = Path(sys.executable).parent / "ray"


@pytest.fixture
def two_nodes():
    """Two real raylets with one CPU each; yields the address of their head."""
    from ray.cluster_utils import Cluster

    options = {
        "num_cpus": 1,
        "include_dashboard": True,
        "dashboard_host": "127.0.0.1",
        "dashboard_port": _port(),
    }
    cluster = Cluster(initialize_head=True, head_node_args=options)
    try:
        cluster.add_node(num_cpus=1)
        yield cluster.address
    finally:
        cluster.shutdown()


def test_two_workers_on_two_nodes_take_the_steps_of_one(write_study, command, two_nodes, tmp_path):
    import json

    settings = {"execution.zero_stage": 2, "execution.micro_batch": 8}
    resources = {"workers": 2, "slots": 1, "spread": True}
    study = write_study(set=settings, resources=resources)
    pair, alone = Store(tmp_path / "two"), Store(tmp_path / "one")
    code, _, err, _ = command("sweep", study, "--root", pair.root, "--address", two_nodes)
    assert code == 0, err
    assert "Failed to query Ray Train Controller" not in (pair.root / "tiny" / "driver.log").read_text()
    one = ["execution.zero_stage=2", "execution.micro_batch=8"]
    code, _, err, _ = command("run", study.parent / "recipe.yaml", *one, "--root", alone.root)
    assert code == 0, err
    (two_folder,), (one_folder,) = (tuple((s.root / "runs").iterdir()) for s in (pair, alone))
    assert two_folder.name == one_folder.name
    workers = json.loads((two_folder / "workers.json").read_text())
    assert [worker["rank"] for worker in workers] == [0, 1]
    assert len({worker["node"] for worker in workers}) == 2
    two_events, one_events = list(read_events(two_folder)), list(read_events(one_folder))
    curves = [[e["loss"] for e in events if e["event"] == "train"] for events in (two_events, one_events)]
    assert len(curves[0]) == len(curves[1]) == 6
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) < 1e-4
    share = two_events[-1]["optimizer_bytes"] / one_events[-1]["optimizer_bytes"]
    assert share == pytest.approx(0.5, abs=0.01)
    assert load(two_folder).stream_hash == load(one_folder).stream_hash


def _port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def head(monkeypatch):
    """A Ray head as `ray start --head` makes it, on loopback, guarded by a token; yields its dashboard."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    port, dashboard = _port(), _port()
    words = ["start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=2"]
    words += [
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}",
        "--dashboard-agent-listen-port=0",
    ]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    process = subprocess.Popen([str(RAY), *words], env=dict(os.environ), **quiet)
    try:
        deadline = time.monotonic() + 90
        while not _listens(dashboard):
            assert time.monotonic() < deadline, "Ray's head did not start"
            assert process.poll() is None, "Ray's head ended"
            time.sleep(0.2)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def test_a_submitted_study_runs_on_a_started_head_and_status_follows_it(
    write_study, command, head, tmp_path, monkeypatch
):
    study, root = write_study(), tmp_path / "studies"
    code, out, err, _ = command("submit", study, "--root", root, "--address", head)
    assert code == 0, err
    assert "Submitted tiny" in out
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    code, out, _, _ = command("status", "tiny", "--root", root)
    assert (code, "RAY_AUTH_MODE=token" in out) == (0, True)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    states = []
    deadline = time.monotonic() + 150
    while not states or states[-1] in ("PENDING", "RUNNING"):
        assert time.monotonic() < deadline, states
        code, out, err, seconds = command("status", "tiny", "--root", root)
        assert code == 0, err
        states.append(re.search(r"^job tiny_\S+ at \S+: (\w+)", out)[1])
        time.sleep(1)
    _, log, _, _ = command("status", "tiny", "--root", root, "--logs")
    assert states[-1] == "SUCCEEDED", log
    assert "tiny: 1 of 1 trials finished" in log
    store = Store(root)
    (row,) = store.read_study("tiny")["trials"]
    assert row["status"] == "finished"
    assert store.finished(row["fingerprint"])
    assert (root / "tiny" / "report.html").is_file()
