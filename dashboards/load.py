"""Reads a study back: study.json and run folders into StudyResults, and MLflow into rows for `compare`.

Records on disk are the truth; a trial counts as finished exactly when its run folder has a record. The only
reader of MLflow.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dashboards.methods import COLUMNS
from dashboards.results import (
    BOUNDS,
    FINISHED,
    StudyResults,
    TrialState,
    check_scorers,
    item_scores,
    read_roles,
    seeds_of,
)
from dashboards.runs import Questions, Run, form_shares, read_run, read_stage
from workloads.errors import UserError, first_line, nearest, require
from workloads.record import SCALE_OF, TOP, Scale, is_finished

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

STUDY = "study.json"
STUDY_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class CompareRow:
    """One trial as MLflow has it."""

    study: str
    arm: str
    seed: int
    # Label of the order in which a trial with stages learns its tasks.
    order: str = ""
    method: str
    fingerprint: str
    run_id: str
    status: str
    # What the method needs and can do, one cell for each of `methods.COLUMNS`; empty until the run has finished.
    words: tuple[str, ...] = ()
    # Last value of each metric; scores are on the scales of their domains.
    metrics: dict[str, float] = field(default_factory=dict)
    # Domains whose scores are no fractions.
    scales: dict[str, Scale] = field(default_factory=dict)


def study_results(folder: Path, root: Path) -> StudyResults:
    """Read the study in `folder` and the finished ones of its runs in `root`/runs; raises `UserError`."""
    tree = _study_tree(folder / STUDY)
    trials = [_trial(row, root) for row in tree["trials"]]
    questions: Questions = {}
    runs: dict[str, Run] = {}
    whole = [trial for trial in trials if not trial.stage]
    for trial in [*whole, *trials]:
        if trial.status == FINISHED and trial.fingerprint not in runs:
            path = root / "runs" / trial.fingerprint
            read = read_stage(path, trial.fingerprint) if trial.stage else None
            runs[trial.fingerprint] = read or read_run(path, trial.fingerprint, questions)
    check_scorers(runs)
    arms = dict.fromkeys(trial.arm for trial in whole if trial.status == FINISHED)
    by_arm = {arm: seeds_of(arm, whole) for arm in arms}
    return StudyResults(
        name=str(tree["name"]),
        hypothesis=str(tree.get("hypothesis", "")),
        profile=str(tree.get("profile", "")),
        command=str(tree.get("command", "")),
        created=float(tree.get("created") or 0),
        roles=read_roles(tree.get("comparison") or {}, by_arm, runs),
        bounds={role: str(arm) for role in BOUNDS if (arm := (tree.get("comparison") or {}).get(role))},
        trials=tuple(trials),
        records={fingerprint: run.record for fingerprint, run in runs.items()},
        scores={arm: item_scores(arm, seeds, runs, questions) for arm, seeds in by_arm.items()},
        curves={fingerprint: run.curves for fingerprint, run in runs.items()},
        time={key: value for key, value in (tree.get("time") or {}).items() if value is not None},
        forms={
            key: form_shares(root / "runs" / key, runs[key].record) for key in _ends(trials) if key in runs
        },
    )


def _ends(trials: Sequence[TrialState]) -> set[str]:
    """Runs of a stream whose outputs are looked at: the last stages, and those outside every order."""
    last = {(trial.arm, trial.order, trial.seed): 0 for trial in trials if trial.stage and trial.order}
    if not last:
        return set()
    for trial in trials:
        key = (trial.arm, trial.order, trial.seed)
        last[key] = max(last.get(key, 0), trial.stage)
    return {t.fingerprint for t in trials if not t.order or t.stage == last[t.arm, t.order, t.seed]}


def has_stream(folder: Path) -> bool:
    """Whether the study in `folder` trains tasks one after another."""
    return any(row.get("stage") and row.get("order") for row in _study_tree(folder / STUDY)["trials"])


def compare(references: Sequence[str], root: Path, tracking_uri: str = "") -> list[CompareRow]:
    """Trials of studies (by name) or single runs (by MLflow run id or fingerprint), in the order asked for.

    Without a tracking URI each study is read from its own SQLite file under `root`. Raises `UserError` for a
    reference that is not there and for a server that cannot be read.
    """
    rows = [row for reference in references for row in _compare_one(reference, root, tracking_uri)]
    return list({(row.study, row.run_id): row for row in rows}.values())


def _study_tree(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such study") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    version = tree.get("schema_version") if isinstance(tree, dict) else None
    if version != STUDY_VERSION:
        raise UserError(f"{path}: schema_version: {version!r} is not allowed; only {STUDY_VERSION} is")
    return tree


def _trial(row: Mapping[str, Any], root: Path) -> TrialState:
    fingerprint = str(row["fingerprint"])
    if not re.fullmatch(r"[0-9a-f]{4,64}", fingerprint):
        raise UserError(f"{STUDY}: fingerprint {fingerprint!r} is not allowed; hexadecimal digits only")
    status = str(row["status"])
    if is_finished(root / "runs" / fingerprint):
        status = FINISHED
    elif status == FINISHED:
        status = "lost"
    return TrialState(
        arm=str(row["arm"]),
        seed=int(row["seed"]),
        fingerprint=fingerprint,
        status=status,
        order=str(row.get("order") or ""),
        stage=int(row.get("stage") or 0),
        task=str(row.get("task") or ""),
        domains=_domains(row),
        error=str(row.get("error") or ("its run folder has no record" if status == "lost" else "")),
    )


def _domains(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What a stage trains on."""
    mixture = ((row.get("config") or {}).get("data") or {}).get("mixture") or {}
    return tuple(domain for domain, weight in mixture.items() if weight > 0)


def _compare_one(reference: str, root: Path, tracking_uri: str) -> list[CompareRow]:
    own = root / reference / "mlflow.db"
    is_run = re.fullmatch(r"[0-9a-f]{16}|[0-9a-f]{32}", reference) is not None
    uris = [tracking_uri] if tracking_uri else [f"sqlite:///{own}"] if own.is_file() else []
    if is_run and not uris:
        uris = [f"sqlite:///{path}" for path in sorted(root.glob("*/mlflow.db"))]
    for uri in uris:
        rows = _read_uri(uri, reference, is_run)
        if rows:
            return rows
    names = sorted(path.parent.name for path in root.glob("*/mlflow.db"))
    where = tracking_uri or str(root)
    raise UserError(f"compare: {reference!r} is no study and no run in {where}{nearest(reference, names)}")


def _read_uri(uri: str, reference: str, is_run: bool) -> list[CompareRow]:
    database = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:") and not database.is_file():
        # MLflow would create it.
        raise UserError(f"--tracking-uri: {database} does not exist")
    # The client's own defaults report usage and wait minutes for a server that is away.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name(reference)
        if experiment is not None:
            return _trials(client, [experiment.experiment_id], "tags.kind = 'trial'")
        if not is_run:
            return []
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        key = "tags.fingerprint" if len(reference) == 16 else "attributes.run_id"
        return _trials(client, experiments, f"{key} = '{reference}'")
    except MlflowException as error:
        raise UserError(f"--tracking-uri: cannot read {uri}: {first_line(error)}") from None


def _trials(client: "MlflowClient", experiments: list[str], filter_string: str) -> list[CompareRow]:
    token, rows = None, []
    while True:
        order = ["attributes.start_time"]
        page = client.search_runs(experiments, filter_string, page_token=token, order_by=order)
        rows += [_compare_row(run) for run in page]
        token = page.token
        if not token:
            return rows


def _scales(tags: Mapping[str, str]) -> dict[str, Scale]:
    """The scales that a run's tags name."""
    known: dict[str, Scale] = {scale: scale for scale in TOP}
    found: dict[str, Scale] = {}
    for key, value in tags.items():
        if key.startswith(SCALE_OF):
            require(value in known, f"MLflow tag {key}", value, f"scales: {', '.join(known)}", known)
            found[key.removeprefix(SCALE_OF)] = known[value]
    return found


def _compare_row(run: "MlflowRun") -> CompareRow:
    tags = run.data.tags
    return CompareRow(
        study=tags.get("study", ""),
        arm=tags.get("arm", run.info.run_name or run.info.run_id),
        seed=int(tags.get("seed", 0)),
        order=tags.get("order", ""),
        method=tags.get("method", ""),
        fingerprint=tags.get("fingerprint", ""),
        run_id=run.info.run_id,
        status=str(run.info.status).lower(),
        words=tuple(tags[name] for name in COLUMNS) if COLUMNS[0] in tags else (),
        metrics=dict(run.data.metrics),
        scales=_scales(tags),
    )
