"""MLflow's run of a trial with stages: scores after each stage, the accuracy matrix, and whose stages it shares."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import stages
from orchestrator.stages import Chain, Row
from workloads.evaluation import forms, predictions
from workloads.evaluation.continual import aggregates, one_scale
from workloads.evaluation.matrix_file import as_tree
from workloads.record import PREDICTIONS, load, read_events

if TYPE_CHECKING:
    from orchestrator.tracking import Tracker

MATRIX = "matrix.json"


def push_chain(tracker: "Tracker", study: Mapping[str, Any], chain: Chain, is_over: bool) -> None:
    """Upload what is new of one trial and its stages; `is_over` says that nobody works on the study now."""
    status, before = chain.status(is_over), _before(tracker, study, chain)
    known, key = tracker.mine.setdefault("chains", {}), f"{chain.name}/{chain.last}"
    state = known.get(key, {"run": "", "status": "", "scored": [], "shared": {}, "told": []})
    told = [status, before, *(row["status"] for row in chain.rows)]
    if status == "pending" or (state["told"] == told and status != "running"):
        return
    old = json.dumps(state)
    if not state["run"]:
        state["run"] = _run_of(tracker, study["name"], chain)
        known[key] = state
        tracker.save()
    for row in chain.rows:
        _push_stage(tracker, study["name"], row, state)
    for row in chain.rows:
        if row["status"] == "finished" and row["task"] not in state["scored"]:
            _log_scores(tracker, row, state)
    if status == "finished":
        _log_matrix(tracker, chain, state["run"], before)
    state["told"] = told
    ends = [row["ended"] for row in chain.rows]
    error = next((row["error"] for row in chain.rows if row["error"]), "")
    tracker.set_status(state, status, max(ends), error)
    if json.dumps(state) != old:
        tracker.save()


def _before(tracker: "Tracker", study: Mapping[str, Any], chain: Chain) -> str:
    """Fingerprint of the finished run that the comparison names as the model before any training; or empty."""
    role, (_, mark, point) = study.get("comparison", {}).get("before", ""), chain.arm.partition("@")
    wanted = (f"{role}{mark}{point}", chain.seed)
    keys = [row["fingerprint"] for row in study["trials"] if (row["arm"], row["seed"]) == wanted]
    return next((key for key in keys if tracker.store.finished(key)), "")


def _run_of(tracker: "Tracker", study: str, chain: Chain) -> str:
    """The trial's run: the one that carries its tags, or a new one under the study's."""
    first = chain.rows[0]
    own = {"kind": "trial", "arm": chain.arm, "seed": str(chain.seed)}
    own |= {"last_stage": chain.last, **({"order": chain.order} if chain.order else {})}
    tasks = ", ".join(str(row["task"]) for row in chain.rows)
    rest = {"study": study, "method": first["config"]["adapter"]["name"], "tasks": tasks}
    start = min((row["started"] for row in chain.rows if row["started"]), default=0)
    tags = {**own, **rest, "mlflow.parentRunId": tracker.mine["parent"]}
    return tracker.find_or_create(own, tags, chain.name, start).info.run_id


def _push_stage(tracker: "Tracker", study: str, row: Row, state: dict[str, Any]) -> None:
    """Upload a stage, or name the run that it has under the trial that it is shared with."""
    stage, task = tracker.push_run(study, row, state["run"]), str(row["task"])
    if stage["run"] and stage["parent"] != state["run"] and task not in state["shared"]:
        tracker.connected.set_tag(state["run"], f"shared/{task}", stage["run"])
        state["shared"][task] = stage["run"]


def _log_scores(tracker: "Tracker", row: Row, state: dict[str, Any]) -> None:
    """The scores after a stage, with the stage as step; of a task trained alone, those on itself."""
    folder = tracker.store.run_folder(row["fingerprint"])
    if not state["scored"]:
        tracker.log_methods(state["run"], folder)
    own = set(stages.trained_on(row))
    events = [event for event in read_events(folder) if event.get("event") == "eval"]
    for event in events[-1:]:
        told = [
            (name, value) for name, value in _scores(event) if row["order"] or own & {*name.split("/")[1:2]}
        ]
        tracker.log_metrics(
            state["run"], [(name, value, event["time"], row["stage"]) for name, value in told]
        )
    state["scored"].append(row["task"])


def _scores(event: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in event.items():
        if name.split("/")[0] in ("score", "eval_loss") and isinstance(value, float):
            yield name, value


def _log_matrix(tracker: "Tracker", chain: Chain, run: str, before: str) -> None:
    """The matrix as an artifact that `orchestrator metrics` reads, and its aggregates as metrics."""
    if not chain.order:
        return
    folders = [tracker.store.run_folder(row["fingerprint"]) for row in chain.rows]
    scores = [load(folder).scores for folder in folders]
    start = load(tracker.store.run_folder(before)).scores if before else None
    found = stages.matrix(chain, scores, start)
    if found is None:
        tracker.connected.set_tag(run, "matrix", "none: a stage was not scored on a task that it has seen")
        return
    tracker.connected.log_dict(run, as_tree(found), MATRIX)
    if not one_scale(found):
        tracker.connected.set_tag(run, "aggregates", "none: the scales of the tasks' scores differ")
    values = {name: value for name, value in aggregates(found).items() if value is not None}
    values |= _mif(chain, folders[-1])
    time = _last_time(folders[-1])
    tracker.log_metrics(run, [(name, value, time, len(chain.rows)) for name, value in values.items()])


def _mif(chain: Chain, folder: Path) -> dict[str, float]:
    """MIF from the predictions of the last stage, where the forms of all tasks' answers are known."""
    known = forms.of(chain.rows[-1]["config"]["data"])
    if not known:
        return {}
    parts = {str(row["task"]): stages.trained_on(row) for row in chain.rows}
    value = forms.mean(forms.shares(known, predictions.read(folder / PREDICTIONS)), parts)
    return {} if value is None else {"mif": value}


def _last_time(folder: Path) -> float:
    return max((event["time"] for event in read_events(folder)), default=0.0)
