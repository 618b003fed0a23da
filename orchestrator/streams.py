"""A study with a stream expanded into trials: every stage a run that starts from the run of the stage before.

The run of stage k names the fingerprint of stage k-1's run in `init_from`, so orders and arms with equal beginnings
share the runs of those stages. An arm `joint` is one run on the data of all stages at once, an arm `alone` one first
stage for each task: the same run as that of an order which begins with the task.

A method that names its tasks is told the whole order in `adapter.tasks`, which is part of every stage's fingerprint:
its stages are shared only where whole orders are the same, or where the study gives `adapter.tasks`.
"""

import importlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from orchestrator.orders import Names, Stream
from orchestrator.store import Store
from orchestrator.study import Arm, Study
from orchestrator.trials import Spot, Trial, arm_tree, fixed, label, naming, points, put, round_point
from workloads.config import RunConfig, check, data_from_tree, from_tree
from workloads.data import sources
from workloads.errors import UserError, nearest, require
from workloads.identity import fingerprint

# Seconds between two looks at the stage before.
_PAUSE = 0.5


@dataclass(frozen=True, kw_only=True)
class _Line:
    """One arm at one point of the grid, standing at the first stage of its stream."""

    arm: str
    kind: str
    point: dict[str, Any]
    config: RunConfig
    # Whether the method's `tasks` follow the order that it learns them in.
    takes_order: bool


def expanded(study: Study) -> list[Trial]:
    """All trials of a study without a search, so that every stage comes after the one that it starts from.

    With a stream they are ordered by seed, then by stage, then by arm, grid point and order. Raises `UserError`.
    """
    if study.stream is None:
        return fixed(study)
    lines = [_line(study, study.stream, arm, point) for arm in study.arms for point in points(study)]
    out: list[Trial] = []
    for seed in study.seeds:
        chains = [chain for line in lines for chain in _chains(line, study.stream, seed)]
        levels = itertools.zip_longest(*chains)
        out += [trial for level in levels for trial in level if trial is not None]
    return out


def _line(study: Study, stream: Stream, arm: Arm, point: Mapping[str, Any]) -> _Line:
    tree = arm_tree(study, arm)
    rounded = {key: round_point(value) for key, value in point.items()}
    for key, value in rounded.items():
        put(tree, key, value)
    name, method = label(arm.name, rounded), tree["adapter"].get("name", "")
    with naming(name):
        data = data_from_tree(tree.get("data", {}))
        _check_tasks(stream, sources.of(data).domains("train"))
        put(tree, "data.mixture", dict(stream.stages[0].mixture))
        given = _given_tasks(study, arm, rounded, method)
        # A run of all stages at once is no stage: its samples are told by their domains.
        names = _domains(stream) if arm.stream == "joint" else stream.names
        takes_order = not given and _has_tasks(method)
        if given or takes_order:
            put(tree, "adapter.tasks", given or list(names))
        config = from_tree(tree)
        for task in stream.names if given and arm.stream != "joint" else ():
            allowed = f"it has to name every stage; {task!r} is missing"
            require(task in given, "adapter.tasks", given, allowed)
    return _Line(arm=name, kind=arm.stream, point=rounded, config=config, takes_order=takes_order)


def _check_tasks(stream: Stream, known: Sequence[str]) -> None:
    for task in (task for stage in stream.stages for task in stage.mixture):
        if task not in known:
            names = ", ".join(known)
            raise UserError(f"stream.stages: unknown task {task!r}; tasks: {names}{nearest(task, known)}")


def _given_tasks(study: Study, arm: Arm, point: Mapping[str, Any], method: str) -> Any:
    """`adapter.tasks` as study or recipe set it; what an arm starts from by default counts as not given."""
    for settings in (point, arm.set, study.set):
        if "adapter.tasks" in settings:
            return settings["adapter.tasks"]
    own = study.recipe.get("adapter", {})
    return own.get("tasks") if own.get("name") == method else None


def _has_tasks(method: str) -> bool:
    """Whether the method's settings name tasks; an unknown method is told by whoever builds it."""
    try:
        kind = importlib.import_module(f"workloads.adapters.{method}").Config
    except ModuleNotFoundError:
        return False
    return any(field.name == "tasks" for field in fields(kind))


def _chains(line: _Line, stream: Stream, seed: int) -> list[list[Trial]]:
    """The runs of one line and seed; each chain is a list in which every run starts from the one before."""
    if line.kind == "joint":
        return [[_trial(line, seed, Spot(), _together(stream), _domains(stream), "")]]
    if line.kind == "alone":
        # In a method's tasks the others follow as the study lists them: its run is that of this one whole order alone.
        firsts = [(name, *(other for other in stream.names if other != name)) for name in stream.names]
        return [_chain(line, stream, seed, "", order)[:1] for order in firsts]
    return [_chain(line, stream, seed, order, names) for order, names in stream.orders.items()]


def _together(stream: Stream) -> dict[str, float]:
    """The mixture of all stages: each domain with its weights' sum."""
    total: dict[str, float] = {}
    for stage in stream.stages:
        for task, weight in stage.mixture.items():
            total[task] = total.get(task, 0.0) + weight
    return total


def _domains(stream: Stream) -> Names:
    """The domains that the stages train on, in the stages' order."""
    return tuple(domain for domain, weight in _together(stream).items() if weight > 0)


def _chain(line: _Line, stream: Stream, seed: int, order: str, names: Names) -> list[Trial]:
    """The stages of one order, each with the fingerprint of the one before."""
    out: list[Trial] = []
    for position, name in enumerate(names if order else names[:1], start=1):
        spot = Spot(order=order, stage=position, task=name)
        before = out[-1].fingerprint if out else ""
        out.append(_trial(line, seed, spot, stream.stage(name).mixture, names, before))
    return out


def _trial(
    line: _Line, seed: int, spot: Spot, mixture: Mapping[str, float], names: Names, before: str
) -> Trial:
    where = f"/{spot.order}/{spot.stage} {spot.task}" if spot.order else f"/{spot.task}" if spot.task else ""
    root = line.config
    adapter = replace(root.adapter, tasks=list(names)) if line.takes_order else root.adapter
    config = replace(
        root,
        seed=seed,
        name=f"{line.arm}/{seed}{where}",
        init_from=before,
        data=replace(root.data, mixture=dict(mixture)),
        adapter=adapter,
        continual=replace(root.continual, task=spot.task),
    )
    with naming(line.arm):
        check(config)
        sources.check(config)
        key = fingerprint(config)
    return Trial(arm=line.arm, seed=seed, point=line.point, config=config, fingerprint=key, spot=spot)


def wait(trial: Trial, store: Store, study: str, tell: Callable[[], None] = lambda: None) -> bool:
    """Return when the run that `trial` starts from is finished, and whether that took any waiting.

    `tell` is called after every look in vain: a trial that reports can be stopped. Raises `UserError` when a stage
    before it has failed in this study.
    """
    if not trial.spot.stage or not trial.config.init_from or store.finished(trial.fingerprint):
        return False
    waited = False
    while not store.finished(trial.config.init_from):
        if failed := _failed(store.read_study(study)["trials"], trial):
            stage, task = failed["stage"], failed["task"]
            raise UserError(f"stage {stage} ({task}) of order {trial.spot.order} failed")
        waited = True
        tell()
        time.sleep(_PAUSE)
    return waited


def _failed(rows: Sequence[Mapping[str, Any]], trial: Trial) -> Mapping[str, Any] | None:
    """The first stage of the trial's own chain that ended without a record."""
    spot, mine = trial.spot, (trial.arm, trial.seed, trial.spot.order)
    earlier = [row for row in rows if (row["arm"], row["seed"], row["order"]) == mine]
    ended = [row for row in earlier if row["stage"] < spot.stage and row["status"] in ("failed", "stopped")]
    return min(ended, key=lambda row: row["stage"], default=None)
