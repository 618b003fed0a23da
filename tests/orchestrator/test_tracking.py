"""MLflow gets every metric, parameter and artifact exactly once, through outages and resumed runs."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import asdict
from pathlib import Path

import pytest

from dashboards.load import compare
from orchestrator.store import Store
from orchestrator.tracking import SYNC, Tracker, make_client, numbers, probe, tracking_uri
from orchestrator.uploader import Uploader
from workloads.adapters.base import Capabilities
from workloads.errors import UserError
from workloads.record import append_event, write_json

STEPS = 30
TOLD = Capabilities(needs_task_id_train=True, needs_task_id_infer=True, routing="task")


class Study:
    """A study folder with runs whose events are written by hand."""

    def __init__(self, root: Path, fingerprints: tuple[str, ...] = ("aaaa", "bbbb")) -> None:
        self.store = Store(root)
        self.folder = self.store.study_folder("tiny")
        self.folder.mkdir(parents=True)
        config = {"adapter": {"name": "lora", "rank": 2}, "seed": 0, "init_from": ""}
        self.rows = [
            {"arm": f"arm_{key}", "seed": 0, "point": {}, "fingerprint": key, "config": config,
             "status": "pending", "error": "", "started": 1000.0, "ended": 0.0}
            for key in fingerprints
        ]  # fmt: skip
        self.write()

    def write(self) -> None:
        tree = {"name": "tiny", "hypothesis": "h", "created": 999.0, "trials": self.rows}
        write_json(self.folder / "study.json", tree)

    def train(self, key: str, first: int, last: int) -> None:
        """Append train events of steps first..last, each with values that follow from its step."""
        folder = self.store.run_folder(key)
        folder.mkdir(parents=True, exist_ok=True)
        for step in range(first, last + 1):
            values = {"loss": 1 / step, "loss/general": 2 / step, "num_steps": STEPS}
            append_event(folder, {"event": "train", "time": 1000.0 + step, "step": step, **values})
        self.state(key, "running")

    def finish(self, key: str) -> None:
        folder = self.store.run_folder(key)
        append_event(
            folder, {"event": "eval", "time": 2000.0, "step": STEPS, "score": 0.5, "score/general": 0.5}
        )
        (folder / "record.json").write_text(json.dumps({"capabilities": asdict(TOLD)}))
        (folder / "predictions.jsonl").write_text("{}")
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_config.json").write_text("{}")
        self.state(key, "finished")

    def state(self, key: str, status: str) -> None:
        for row in self.rows:
            if row["fingerprint"] == key:
                row.update(status=status, ended=2000.0 if status == "finished" else 0.0)
        self.write()


def _everything_once(uri: str, keys: tuple[str, ...]) -> None:
    """Compare all that MLflow holds with what the events say, value by value."""
    client = make_client(uri)
    experiment = client.get_experiment_by_name("tiny")
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if run.data.tags["kind"] == "study"]
    children = {run.data.tags["fingerprint"]: run for run in runs if run.data.tags["kind"] == "trial"}
    assert len(parents) == 1
    assert len(runs) == 1 + len(keys)
    assert set(children) == set(keys)
    for key, run in children.items():
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
        assert (run.data.tags["arm"], run.data.tags["method"]) == (f"arm_{key}", "lora")
        assert (run.data.tags["routes by"], run.data.tags["task id"]) == ("task", "always")
        assert run.data.params == {"adapter.name": "lora", "adapter.rank": "2", "seed": "0", "init_from": ""}
        for name, factor in (("loss", 1), ("loss/general", 2)):
            history = client.get_metric_history(run.info.run_id, name)
            got = sorted((m.step, m.value, m.timestamp) for m in history)
            assert got == [(s, factor / s, (1000 + s) * 1000) for s in range(1, STEPS + 1)]
        (score,) = client.get_metric_history(run.info.run_id, "score")
        assert (score.step, score.value, score.timestamp) == (STEPS, 0.5, 2_000_000)
        files = {item.path for item in client.list_artifacts(run.info.run_id)}
        assert files == {"record.json", "predictions.jsonl", "adapter"}


def test_scales_and_words_in_place_of_a_mean_are_tags_that_compare_reads(tmp_path):
    study = Study(tmp_path, ("aaaa", "bbbb"))
    for key in ("aaaa", "bbbb"):
        study.train(key, 1, STEPS)
    told = {"score/flickr": 1.25, "score/general": 0.5, "scale/flickr": "cider", "no_mean": "no mean, since"}
    append_event(study.store.run_folder("aaaa"), {"event": "eval", "time": 1999.0, "step": STEPS, **told})
    tracker = Tracker(study.store, "tiny", tracking_uri(study.folder))
    tracker.push()
    study.finish("bbbb")
    tracker.push(final=True)
    rows = {row.fingerprint: row for row in compare(["tiny"], study.store.root)}
    assert rows["aaaa"].scales == {"flickr": "cider"}
    assert rows["bbbb"].scales == {}
    assert rows["aaaa"].metrics["score/flickr"] == 1.25
    assert "score" not in rows["aaaa"].metrics
    (run,) = tracker.client.search_runs([tracker.mine["experiment"]], "tags.fingerprint = 'aaaa'")
    assert run.data.tags["no_mean"] == "no mean, since"


def test_pushing_again_and_again_adds_nothing(tmp_path):
    study = Study(tmp_path)
    tracker = Tracker(study.store, "tiny", tracking_uri(study.folder))
    study.train("aaaa", 1, 10)
    tracker.push()
    study.train("aaaa", 11, STEPS)
    tracker.push()
    study.finish("aaaa")
    study.train("bbbb", 1, STEPS)
    study.finish("bbbb")
    for _ in range(3):
        tracker.push(final=True)
    _everything_once(tracker.uri, ("aaaa", "bbbb"))
    assert Path(tmp_path / "tiny" / "artifacts").is_dir()
    assert not Path("mlruns").exists()
    assert not Path("mlflow.db").exists()


def test_a_lost_ledger_finds_its_runs_again_by_their_tags(tmp_path):
    study = Study(tmp_path)
    uri = tracking_uri(study.folder)
    study.train("aaaa", 1, 20)
    Tracker(study.store, "tiny", uri).push()
    (study.folder / SYNC).unlink()
    study.train("aaaa", 21, STEPS)
    study.finish("aaaa")
    study.train("bbbb", 1, STEPS)
    study.finish("bbbb")
    Tracker(study.store, "tiny", uri).push(final=True)
    _everything_once(uri, ("aaaa", "bbbb"))


def test_steps_that_a_resumed_run_reports_again_count_once(tmp_path):
    study = Study(tmp_path, ("aaaa",))
    tracker = Tracker(study.store, "tiny", tracking_uri(study.folder))
    study.train("aaaa", 1, 20)
    tracker.push()
    study.state("aaaa", "interrupted")
    tracker.push(final=True)
    folder = study.store.run_folder("aaaa")
    append_event(folder, {"event": "train", "time": 1500.0, "step": 15, "loss": 1 / 15, "num_steps": STEPS})
    study.train("aaaa", 21, STEPS)
    study.finish("aaaa")
    Tracker(study.store, "tiny", tracker.uri).push(final=True)
    _everything_once(tracker.uri, ("aaaa",))


def test_a_push_that_fails_half_way_is_made_up_for(tmp_path, monkeypatch):
    study = Study(tmp_path, ("aaaa",))
    tracker = Tracker(study.store, "tiny", tracking_uri(study.folder))
    study.train("aaaa", 1, 10)
    tracker.push()
    study.train("aaaa", 11, STEPS)
    study.finish("aaaa")
    real = tracker.client.log_batch

    def broken(run, **batch):
        real(run, metrics=batch["metrics"][:5])
        raise ConnectionError("gone")

    monkeypatch.setattr(tracker.client, "log_batch", broken)
    with pytest.raises(ConnectionError):
        tracker.push()
    monkeypatch.undo()
    tracker.push(final=True)
    _everything_once(tracker.uri, ("aaaa",))


def test_only_measured_values_are_metrics():
    event = {"event": "train", "step": 3, "time": 1.0, "schema_version": 1, "loss": 0.5, "ok": True, "n": 4}
    assert dict(numbers(event)) == {"loss": 0.5, "n": 4.0}


@pytest.mark.parametrize("uri", ["ftp://x", "http://", "nowhere", "sqlite:////no/such/folder/mlflow.db"])
def test_a_uri_that_cannot_work_is_one_line(uri):
    with pytest.raises(UserError, match=r"^--tracking-uri: [^\n]+$"):
        probe(uri)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _serve(folder: Path, port: int) -> subprocess.Popen:
    """A real MLflow server on loopback, answering."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}", "--workers", "1"]
    command += ["--artifacts-destination", str(folder / "stored")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=environment, start_new_session=True, cwd=folder, **quiet)
    for _ in range(300):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
        except OSError:
            time.sleep(0.2)
        else:
            return process
    raise AssertionError("the MLflow server did not start")


def _kill(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_server_killed_in_mid_study_gets_everything_once_from_sync(tmp_path):
    port = _free_port()
    (tmp_path / "server").mkdir()
    study = Study(tmp_path / "studies")
    uri = f"http://127.0.0.1:{port}"
    said: list[str] = []
    server = _serve(tmp_path / "server", port)
    try:
        probe(uri)
        uploader = Uploader(Tracker(study.store, "tiny", uri), said.append, every=0.1)
        uploader.start()
        study.train("aaaa", 1, 12)
        deadline = time.monotonic() + 60
        while not (study.folder / SYNC).is_file() or '"train": 12' not in (study.folder / SYNC).read_text():
            assert time.monotonic() < deadline, "the first steps did not arrive"
            time.sleep(0.1)
    finally:
        _kill(server)
    study.train("aaaa", 13, STEPS)
    study.finish("aaaa")
    study.train("bbbb", 1, STEPS)
    study.finish("bbbb")
    assert not uploader.close()
    (line,) = said
    assert "training goes on" in line
    assert "orchestrator sync tiny" in line
    with pytest.raises(UserError, match="no MLflow server answers"):
        probe(uri)
    server = _serve(tmp_path / "server", port)
    try:
        for _ in range(2):
            Tracker(study.store, "tiny", uri).push(final=True)
        _everything_once(uri, ("aaaa", "bbbb"))
    finally:
        _kill(server)


def test_two_uris_have_ledgers_of_their_own(tmp_path):
    study = Study(tmp_path, ("aaaa",))
    study.train("aaaa", 1, STEPS)
    study.finish("aaaa")
    first, second = tracking_uri(study.folder), f"sqlite:///{tmp_path / 'other.db'}"
    for uri in (first, second):
        Tracker(study.store, "tiny", uri).push(final=True)
        _everything_once(uri, ("aaaa",))
    assert set(json.loads((study.folder / SYNC).read_text())["uris"]) == {first, second}
