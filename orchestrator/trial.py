"""What happens inside one Ray Tune trial: wait for the stage before, take the run's folder, run it, report its events.

A trial's configuration is plain values: `spec` and `place`. The spec of a trial from a list holds its whole
configuration as JSON; that of a search holds the arm's tree, and the point that was drawn.
"""

import json
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.store import Store, run_lock
from orchestrator.streams import wait
from orchestrator.trials import Spot, Trial, build
from workloads.config import from_tree, to_tree
from workloads.errors import UserError
from workloads.identity import fingerprint
from workloads.record import read_events

FAILED = "failed"
# A trial waits for the stage before, and begins after it.
WAITING, READY = "waiting", "ready"


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a trial has to know besides its configuration."""

    root: str
    study: str
    spread: bool = False
    # The value a scheduler watches; empty without one.
    metric: str = ""


def spec_of(trial: Trial) -> dict[str, Any]:
    """A trial from a list as plain values; `resolve` is the inverse."""
    values = {"arm": trial.arm, "seed": trial.seed, "point": trial.point, "spot": asdict(trial.spot)}
    return {**values, "config": json.dumps(to_tree(trial.config))}


def resolve(spec: Mapping[str, Any]) -> Trial:
    """The trial behind a Tune configuration; the driver and the actor come to the same one."""
    if "config" in spec:
        config = from_tree(json.loads(spec["config"]))
        values = {key: spec[key] for key in ("arm", "seed", "point")}
        return Trial(**values, config=config, fingerprint=fingerprint(config), spot=Spot(**spec["spot"]))
    return build(json.loads(spec["base"]), spec["arm"], spec["seed"], spec["point"])


def run_trial(config: dict[str, Any]) -> None:
    """The function trainable. With one worker the run happens right here, in a reused actor."""
    trial = resolve(config["spec"])
    place = Place(**config["place"])
    store = Store(Path(place.root))
    folder = store.run_folder(trial.fingerprint)
    reporter = Reporter(place.metric)
    try:
        if wait(trial, store, place.study, lambda: reporter({"event": WAITING}, None)):
            reporter({"event": READY}, None)
        with run_lock(folder):
            _run_or_find(trial, place, folder, reporter)
    except Exception as error:
        # Tune tells its callbacks that a trial failed before it tells them why.
        short, full = explain(error)
        reporter({"event": FAILED, "error": short, "traceback": full}, None)
        raise


def _run_or_find(trial: Trial, place: Place, folder: Path, reporter: "Reporter") -> None:
    if place.metric:
        # A scheduler that starts anew hears what was recorded before, and comes to the same rungs.
        for event in read_events(folder):
            reporter(event, None)
    if Store(Path(place.root)).finished(trial.fingerprint):
        reporter({"event": "found"}, folder)
    elif trial.config.execution.workers == 1:
        from workloads.run import run

        run(trial.config, reporter, folder)
    else:
        from orchestrator.worker import run_group

        run_group(trial.config, folder, place.spread)


def explain(error: BaseException) -> tuple[str, str]:
    """One line about what went wrong, as deep as a worker's own exception, and the whole traceback."""
    full = "".join(traceback.format_exception(error))
    cause: Any = error
    while True:
        failures = getattr(cause, "worker_failures", None) or {}
        inner = getattr(cause, "cause", None) or next(iter(failures.values()), None)
        if not isinstance(inner, BaseException):
            break
        cause = inner
    lines = str(cause).strip().splitlines() or [""]
    return (lines[0] if isinstance(cause, UserError) else f"{type(cause).__name__}: {lines[0]}"), full


class Reporter:
    """`report` for a run inside a Tune trial: hands every event to the driver."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.last: dict[str, Any] = {}

    def __call__(self, metrics: Mapping[str, Any], folder: Path | None) -> None:
        from ray import tune

        tune.report(envelope(metrics, self.metric, self.last))


def envelope(metrics: Mapping[str, Any], metric: str, last: dict[str, Any]) -> dict[str, Any]:
    """An event as Tune wants it: whole under `run_event`, with step and watched value beside it.

    `last` carries step and value from earlier events to those that have none.
    """
    for key in ("step", metric):
        if key in metrics:
            last[key] = metrics[key]
    return {"run_event": dict(metrics), **last}
