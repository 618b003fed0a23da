"""The only writer of MLflow: study = parent run, trial = its child, stage = the trial's, replayed from the records.

The truth is study.json and each run's events.jsonl and record. `Tracker.push` uploads what MLflow does not
have yet and remembers how far it came in sync.json, per tracking URI. Whatever is interrupted is pushed again
later: runs are looked up by their tags before they are created, and metrics carry the time they were recorded
at, so that MLflow drops what it has already.
"""

import json
import logging
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dashboards.methods import COLUMNS, words
from orchestrator.chain_runs import push_chain
from orchestrator.stages import chains
from orchestrator.store import STUDY, Store
from orchestrator.trials import flat_params
from workloads.errors import UserError
from workloads.record import ADAPTER, NO_MEAN, PREDICTIONS, RECORD, SCALE_OF, read_events, write_json

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

SYNC = "sync.json"
PAGE = "report.html"
# The server's own limits on one batch.
_MAX_METRICS, _MAX_PARAMS = 1000, 100
_STATUS = {"running": "RUNNING", "finished": "FINISHED", "stopped": "FINISHED", "failed": "FAILED"}
# A lost server is noticed in seconds; the client's own default is minutes.
_CLIENT_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}


def tracking_uri(folder: Path, given: str = "") -> str:
    """The URI to write to: the given one, or the SQLite file in the study's folder."""
    return given or f"sqlite:///{folder / 'mlflow.db'}"


def probe(uri: str, seconds: float = 3.0) -> None:
    """Raise `UserError` in one line when `uri` cannot be reached now."""
    parts = urlsplit(uri)
    if parts.scheme == "sqlite":
        database = Path(uri.removeprefix("sqlite:///"))
        if not database.parent.is_dir():
            raise UserError(f"--tracking-uri: the folder of {database} does not exist")
        return
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"--tracking-uri: {uri!r} is not allowed; sqlite:///FILE, http://HOST:PORT or https://HOST"
        )
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname, port), timeout=seconds).close()
    except OSError as error:
        raise UserError(f"--tracking-uri: no MLflow server answers at {uri} ({error})") from None


class Tracker:
    """Uploads one study to one tracking URI; not to be used by two threads at once."""

    def __init__(self, store: Store, name: str, uri: str) -> None:
        self.store = store
        self.folder = store.study_folder(name)
        self.uri = uri
        self.client: MlflowClient | None = None
        self.sync = self._read_sync()

    def push(self, final: bool = False) -> None:
        """Upload everything recorded and not yet uploaded; `final` adds the parent's status and artifacts.

        Raises whatever MLflow raises; a later push goes on where this one stopped.
        """
        study = json.loads((self.folder / STUDY).read_text(encoding="utf-8"))
        client = self._connect(study)
        for row in study["trials"]:
            if not row.get("stage"):
                self.push_run(study["name"], row, self.mine["parent"])
        for chain in chains(study["trials"]):
            push_chain(self, study, chain, final)
        if final:
            for path in (self.folder / STUDY, self.folder / PAGE):
                if path.is_file():
                    client.log_artifact(self.mine["parent"], str(path))
            done = all(row["status"] in ("finished", "stopped") for row in study["trials"])
            client.set_terminated(self.mine["parent"], "FINISHED" if done else "KILLED")

    @property
    def connected(self) -> "MlflowClient":
        """The client of a push that is going on."""
        assert self.client is not None, "push connects first"
        return self.client

    @property
    def mine(self) -> dict[str, Any]:
        """What is known of this URI: experiment, parent run, and per trial its run and last steps."""
        return self.sync["uris"].setdefault(self.uri, {"experiment": "", "parent": "", "trials": {}})

    def _read_sync(self) -> dict[str, Any]:
        path = self.folder / SYNC
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        return {"schema_version": 1, "uris": {}}

    def save(self) -> None:
        write_json(self.folder / SYNC, self.sync)

    def _connect(self, study: Mapping[str, Any]) -> "MlflowClient":
        """The client, with experiment and parent run looked up or created."""
        if self.client is not None:
            return self.client
        client = make_client(self.uri)
        experiment = client.get_experiment_by_name(study["name"])
        if experiment is None:
            local = None if self.uri.startswith("http") else (self.folder / "artifacts").as_uri()
            self.mine["experiment"] = client.create_experiment(study["name"], artifact_location=local)
        else:
            self.mine["experiment"] = experiment.experiment_id
        parents = self._search(client, "tags.kind = 'study'")
        if parents:
            self.mine["parent"] = parents[0].info.run_id
            client.update_run(self.mine["parent"], status="RUNNING")
        else:
            tags = {"kind": "study", "study": study["name"], "hypothesis": study["hypothesis"][:4000]}
            run = client.create_run(
                self.mine["experiment"], int(study["created"] * 1000), tags, run_name=study["name"]
            )
            self.mine["parent"] = run.info.run_id
        self.save()
        self.client = client
        return client

    def _search(self, client: "MlflowClient", filter_string: str) -> list["Run"]:
        return list(client.search_runs([self.mine["experiment"]], filter_string))

    def push_run(self, study: str, row: Mapping[str, Any], parent: str) -> dict[str, Any]:
        """Upload one run under `parent`, unless it is under another; returns what is known of it.

        A stage that several trials share stays under the first of them.
        """
        own = "stage" if row.get("stage") else f"{row['arm']}/{row['seed']}"
        key = f"{own}/{row['fingerprint']}"
        state = self.mine["trials"].get(key, {"run": "", "steps": {}, "status": "", "parent": parent})
        if row["status"] == "pending" or state["status"] == row["status"] != "running":
            return state
        before = json.dumps(state)
        folder = self.store.run_folder(row["fingerprint"])
        events = list(read_events(folder))
        if not state["run"]:
            run = self._child(study, row, parent, events)
            state["run"] = run.info.run_id
            state["parent"] = run.data.tags.get("mlflow.parentRunId", parent)
            self.mine["trials"][key] = state
            self.save()
        if state.get("parent", parent) != parent:
            return state
        self._log_events(state, events)
        if row["status"] == "finished":
            self.log_methods(state["run"], folder)
            _log_artifacts(self.connected, state["run"], folder)
        end = row["ended"] or (events[-1]["time"] if events else 0)
        self.set_status(state, row["status"], end, row["error"])
        if json.dumps(state) != before:
            self.save()
        return state

    def _child(self, study: str, row: Mapping[str, Any], parent: str, events: list[dict[str, Any]]) -> "Run":
        """The run of a trial or stage: the one that carries its tags, or a new one with its parameters."""
        tags = {
            "kind": "trial",
            "study": study,
            "arm": row["arm"],
            "seed": str(row["seed"]),
            "fingerprint": row["fingerprint"],
            "method": row["config"]["adapter"]["name"],
            "mlflow.parentRunId": parent,
        }
        name, wanted = f"{row['arm']}/{row['seed']}", {"kind": "trial", "arm": row["arm"]}
        if row.get("stage"):
            name, wanted = row["config"]["name"], {"kind": "stage"}
            tags |= {"kind": "stage", **{key: str(row[key]) for key in ("order", "stage", "task")}}
        start = row["started"] or (events[0]["time"] if events else 0)
        run = self.find_or_create({**wanted, "fingerprint": row["fingerprint"]}, tags, name, start)
        if not run.data.params:
            _log_params(self.connected, run.info.run_id, flat_params(row["config"]))
        return run

    def find_or_create(
        self, wanted: Mapping[str, str], tags: Mapping[str, str], name: str, start: float
    ) -> "Run":
        """The run that has the tags `wanted`, or a new one with `tags`; `start` is in seconds."""
        key = "fingerprint" if "fingerprint" in wanted else "seed"
        found = self._search(self.connected, f"tags.{key} = '{wanted[key]}'")
        same = [run for run in found if wanted.items() <= run.data.tags.items()]
        if same:
            return same[0]
        experiment = self.mine["experiment"]
        return self.connected.create_run(experiment, int(start * 1000), dict(tags), run_name=name)

    def _log_events(self, state: dict[str, Any], events: list[dict[str, Any]]) -> None:
        """Send the events past the last step sent; a resumed run repeats steps, which are left out.

        What an event says in words of its scores goes first, as tags that `compare` reads.
        """
        from mlflow.entities import RunTag

        last, steps, tags = 0, dict(state["steps"]), []
        sent: list[tuple[str, float, float, int]] = []
        for event in events:
            kind, step = str(event.get("event", "")), int(event.get("step", last))
            last = max(last, step)
            if step <= steps.get(kind, -1):
                continue
            steps[kind] = step
            sent += [(name, value, event["time"], step) for name, value in numbers(event)]
            told = [name for name in event if name == NO_MEAN or name.startswith(SCALE_OF)]
            tags += [RunTag(name, event[name]) for name in told]
        if tags:
            self.connected.log_batch(state["run"], tags=tags)
        self.log_metrics(state["run"], sent)
        state["steps"] = steps

    def log_metrics(self, run: str, values: Iterable[tuple[str, float, float, int]]) -> None:
        """Send (name, value, time in seconds, step) in batches; what MLflow has already changes nothing."""
        from mlflow.entities import Metric

        metrics = [Metric(name, value, int(time * 1000), step) for name, value, time, step in values]
        for start in range(0, len(metrics), _MAX_METRICS):
            self.connected.log_batch(run, metrics=metrics[start : start + _MAX_METRICS])

    def log_methods(self, run: str, folder: Path) -> None:
        """What the run's method needs and can do, as tags that `compare` reads."""
        from mlflow.entities import RunTag

        cells = words(json.loads((folder / RECORD).read_text(encoding="utf-8"))["capabilities"])
        tags = [RunTag(name, cell) for name, cell in zip(COLUMNS, cells, strict=True)]
        self.connected.log_batch(run, tags=tags)

    def set_status(self, state: dict[str, Any], status: str, end: float, error: str) -> None:
        """Tell MLflow what has become of a run, when it ended and why it failed; notes the status in `state`."""
        if status != "running":
            self.connected.set_terminated(state["run"], _STATUS.get(status, "KILLED"), int(end * 1000))
            if error:
                self.connected.set_tag(state["run"], "error", error[:4000])
        elif state["status"] not in ("", "running"):
            self.connected.update_run(state["run"], status="RUNNING")
        state["status"] = status


def numbers(event: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The measured values of an event: its numbers, without step, time and version."""
    for name, value in event.items():
        if name not in ("step", "time", "schema_version") and type(value) in (int, float):
            yield name, float(value)


def make_client(uri: str) -> "MlflowClient":
    """A client that is quiet, sends no telemetry and gives up in seconds."""
    for key, value in _CLIENT_SETTINGS.items():
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _log_params(client: "MlflowClient", run: str, params: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    rows = [Param(key, value) for key, value in params.items()]
    for start in range(0, len(rows), _MAX_PARAMS):
        client.log_batch(run, params=rows[start : start + _MAX_PARAMS])


def _log_artifacts(client: "MlflowClient", run: str, folder: Path) -> None:
    for name in (RECORD, PREDICTIONS):
        if (folder / name).is_file():
            client.log_artifact(run, str(folder / name))
    if (folder / ADAPTER).is_dir():
        client.log_artifacts(run, str(folder / ADAPTER), ADAPTER)
