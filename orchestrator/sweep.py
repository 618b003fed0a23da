"""A study from start to end: skip what is finished, run the rest on Ray, tell study.json and MLflow."""

import shutil
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from orchestrator import cluster, tracking
from orchestrator.progress import Progress
from orchestrator.store import Ledger, Store
from orchestrator.streams import expanded
from orchestrator.study import Study
from orchestrator.trials import Trial, distinct, foreseen, row, search_points
from orchestrator.uploader import Uploader
from workloads.record import load

SCRATCH = ".tune"


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a study is run, as given on the command line."""

    # An existing Ray cluster; empty starts a local one.
    address: str = ""
    tracking_uri: str = ""
    # The command, kept in study.json.
    command: str = ""


def sweep(study: Study, store: Store, console: Console, options: Options) -> Path:
    """Run the study and return its folder; raises `KeyboardInterrupt` when stopped."""
    if options.tracking_uri:
        # First, since expanding a study loads the methods and takes seconds.
        tracking.probe(options.tracking_uri)
    if options.address:
        cluster.probe(options.address)
    points = search_points(study) if study.search else []
    trials = [] if study.search else expanded(study)
    threads = (points or trials)[0].config.execution.threads
    with store.only_driver(study.name) as folder:
        ledger = open_ledger(folder, study, trials, store, options.command)
        uri = tracking.tracking_uri(folder, options.tracking_uri)
        total, done = len(points or distinct(trials)), sum(store.finished(key) for key in distinct(trials))
        with Progress(console, total, done) as progress:
            uploader = Uploader(tracking.Tracker(store, study.name, uri), progress.say)
            uploader.start()
            try:
                _train(study, trials, threads, store, ledger, progress, options)
            except BaseException:
                ledger.interrupt(time.time())
                uploader.close()
                raise
            _write_page(folder, store.root)
            uploader.close()
    if any(row["status"] == "interrupted" for row in ledger.rows):
        raise KeyboardInterrupt
    return folder


def open_ledger(folder: Path, study: Study, trials: list[Trial], store: Store, command: str) -> Ledger:
    """study.json at the start of a sweep: what an earlier one did is kept."""
    old = store.read_study(study.name) if study.name in store.studies() else {}
    known = {_key(line): line for line in old.get("trials", [])}
    # A search draws its trials as it goes: those that it has drawn before are kept.
    rows = old.get("trials", []) if study.search and old.get("tree") == study.tree else []
    for line in rows:
        line["status"] = line["status"] if line["status"] in ("finished", "stopped") else "pending"
    for trial in trials:
        line = row(trial)
        line |= known.get(_key(line), {})
        done = store.finished(trial.fingerprint)
        line.update(status="finished" if done else "pending", error="")
        rows.append(line)
    tree = {
        "schema_version": 1,
        "name": study.name,
        "hypothesis": study.hypothesis,
        "profile": study.profile,
        "command": command,
        "created": old.get("created", time.time()),
        "comparison": study.comparison,
        "tree": study.tree,
        "trials": rows,
        "time": old.get("time", {"wall_seconds": 0.0, "slots": 0, "run_seconds": 0.0, "overhead": 0.0}),
    }
    ledger = Ledger(folder, tree)
    ledger.write()
    return ledger


def _key(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells two lines of study.json apart; a shared stage has a line in each of its orders."""
    keys = ("arm", "seed", "fingerprint", "order", "stage")
    return tuple(line.get(key, default) for key, default in zip(keys, ("", 0, "", "", 0), strict=True))


def _train(
    study: Study,
    trials: list[Trial],
    threads: int,
    store: Store,
    ledger: Ledger,
    progress: Progress,
    options: Options,
) -> None:
    """Run what is left to run, and write down where the time went."""
    todo = [trial for key, trial in distinct(trials).items() if not store.finished(key)]
    if not todo and not study.search:
        return
    from orchestrator import ahead
    from orchestrator.tuner import Watcher, run_list, run_search

    watcher = Watcher(ledger, store, progress)
    begin = time.time()

    before = signal.signal(signal.SIGTERM, lambda *_: _stop(ledger))
    slots, made = 0, 0.0
    try:
        with cluster.connected(
            study.resources, threads, options.address, ledger.path.parent / "driver.log"
        ) as slots:
            configs, start = foreseen(study, todo), time.time()
            try:
                ahead.build(configs, study.resources, slots, progress, is_local=not options.address)
            finally:
                made = time.time() - start
            if study.search:
                run_search(study, store, watcher, slots)
            else:
                run_list(study, todo, store, watcher, slots)
    finally:
        signal.signal(signal.SIGTERM, before)
        ledger.interrupt(time.time())
        _account(ledger, store, watcher.ended, time.time() - begin, made, slots)
        shutil.rmtree(ledger.path.parent / SCRATCH, ignore_errors=True)


def _stop(ledger: Ledger) -> None:
    """End the sweep as ctrl-C does."""
    # Whoever sends SIGTERM, as Ray Jobs does, may not wait for Tune to end: write the state down first.
    ledger.interrupt(time.time())
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a job that a script put in the background
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)


def _account(ledger: Ledger, store: Store, ended: list[str], wall: float, made: float, slots: int) -> None:
    """Add this sweep's seconds to the study's time, `made` of which went into features ahead of the runs.

    Overhead is ((wall - ahead) x slots - run times) / run times.
    """
    used = ledger.tree["time"]
    used["wall_seconds"] += wall
    used["ahead_seconds"] = used.get("ahead_seconds", 0.0) + made
    used["slots"] = slots
    used["run_seconds"] += sum(load(store.run_folder(key)).cost.seconds for key in ended)
    run = used["run_seconds"]
    spent = (used["wall_seconds"] - used["ahead_seconds"]) * slots
    used["overhead"] = (spent - run) / run if run else 0.0
    ledger.write()


def _write_page(folder: Path, root: Path) -> None:
    from dashboards.page import write

    write(folder, root)
