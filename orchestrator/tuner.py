"""Ray Tune at work: one Tuner over a list of runs, or one per arm of a search, and who watches them."""

import dataclasses
import json
import time
from typing import Any

from ray import tune
from ray.tune import Callback
from ray.tune.experiment import Trial as TuneTrial

from orchestrator.plan import samples
from orchestrator.progress import Progress
from orchestrator.schedulers import generator, sampled, scheduler
from orchestrator.store import ERROR, Ledger, Store
from orchestrator.study import Resources, Study
from orchestrator.sweep import SCRATCH
from orchestrator.trial import FAILED, READY, WAITING, Place, resolve, run_trial, spec_of
from orchestrator.trials import Trial, arm_tree, row, space_of
from orchestrator.worker import DRIVER_CPU
from workloads.errors import require

# A trial that could not say what went wrong: its process is gone.
_DIED = (
    "the worker process died",
    "The process was killed or crashed; Ray's account is in driver.log.\n",
)


def run_list(study: Study, trials: list[Trial], store: Store, watcher: "Watcher", slots: int) -> None:
    """One Tuner over all runs, so that every actor is warm after its first trial; they start in the order given."""
    place = Place(root=str(store.root), study=study.name, spread=study.resources.spread)
    specs = tune.grid_search([spec_of(trial) for trial in trials])
    space = {"spec": specs, "place": dataclasses.asdict(place)}
    threads = trials[0].config.execution.threads
    config = tune.TuneConfig(
        search_alg=generator(slots),
        reuse_actors=True,
        trial_dirname_creator=_dirname,
        trial_name_creator=_dirname,
    )
    _fit(space, config, study.resources, threads, watcher)


def run_search(study: Study, store: Store, watcher: "Watcher", slots: int) -> None:
    """One Tuner per arm, each with equally many trials."""
    search = study.search
    assert search is not None
    metric = search.metric if search.scheduler != "none" else ""
    for arm in study.arms:
        tree = arm_tree(study, arm)
        spec = {
            "arm": arm.name,
            "seed": tune.grid_search(list(search.seeds)),
            "base": json.dumps(tree),
            "point": sampled(space_of(study, arm)),
        }
        first = resolve({**spec, "seed": search.seeds[0], "point": {}})
        place = Place(root=str(store.root), study=study.name, spread=study.resources.spread, metric=metric)
        config = tune.TuneConfig(
            search_alg=generator(slots),
            scheduler=scheduler(search, 0 if search.scheduler == "none" else _num_steps(first)),
            num_samples=search.trials_per_arm,
            reuse_actors=True,
            trial_dirname_creator=_dirname,
            trial_name_creator=_dirname,
        )
        space = {"spec": spec, "place": dataclasses.asdict(place)}
        _fit(space, config, study.resources, first.config.execution.threads, watcher)
        if watcher.interrupted():
            return


def _fit(
    space: dict[str, Any], config: tune.TuneConfig, resources: Resources, threads: int, watcher: "Watcher"
) -> None:
    need: dict[str, float] = {"CPU": DRIVER_CPU} if resources.workers > 1 else {"CPU": threads}
    if resources.workers == 1 and resources.gpus_per_worker:
        need["GPU"] = resources.gpus_per_worker
    scratch = watcher.ledger.path.parent / SCRATCH
    run_config = tune.RunConfig(name="tune", storage_path=str(scratch), callbacks=[watcher], verbose=0)
    trainable = tune.with_resources(run_trial, need)
    tune.Tuner(trainable, param_space=space, tune_config=config, run_config=run_config).fit()


def _num_steps(trial: Trial) -> int:
    """Optimizer steps of a run; raises `UserError` on a budget in tokens, whose steps nobody knows before."""
    tokens = trial.config.data.tokens
    require(
        tokens == 0, "data.tokens", tokens, "asha compares runs at equal steps; give data.samples instead"
    )
    return max(1, samples(trial.config) // trial.config.optim.global_batch)


def _dirname(trial: TuneTrial) -> str:
    return trial.trial_id


class Watcher(Callback):
    """Follows every trial on the driver: its state goes into study.json, its events onto the live line."""

    def __init__(self, ledger: Ledger, store: Store, progress: Progress) -> None:
        self.ledger = ledger
        self.store = store
        self.progress = progress
        # Fingerprints of the runs that finished in this sweep.
        self.ended: list[str] = []
        self._open: set[str] = set()
        # Fingerprint -> one line and the traceback of what went wrong.
        self._errors: dict[str, tuple[str, str]] = {}
        self._trials: dict[str, Trial] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its callbacks for a restore, which study.json takes the place of."""
        return {}

    def interrupted(self) -> bool:
        """Whether a Tuner has returned with trials still open, as it does after Ctrl-C."""
        return bool(self._open)

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        ours = self._ours(trial)
        self._open.add(trial.trial_id)
        self.ledger.add(row(ours))
        self.ledger.mark(ours.fingerprint, "running", time.time())
        self.progress.begin(ours.fingerprint)

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        ours, event = self._ours(trial), result["run_event"]
        if event.get("event") == WAITING:
            return
        if event.get("event") == "finished":
            self.ended.append(ours.fingerprint)
        if event.get("event") == FAILED:
            self._errors[ours.fingerprint] = (event["error"], event["traceback"])
            return
        if event.get("event") == READY:
            # Its time counts from here, not from when it began to wait.
            self.ledger.mark(ours.fingerprint, "running", time.time())
        self.ledger.place(ours.fingerprint, f"{result['hostname']}:{result['pid']}")
        self.progress.event(ours.fingerprint, event)

    def on_trial_complete(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        ours = self._ours(trial)
        self._open.discard(trial.trial_id)
        done = self.store.finished(ours.fingerprint)
        self.ledger.mark(ours.fingerprint, "finished" if done else "stopped", time.time())
        self.progress.end(ours.fingerprint, ours.config.name)

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        ours = self._ours(trial)
        self._open.discard(trial.trial_id)
        short, full = self._errors.get(ours.fingerprint, _DIED)
        folder = self.store.run_folder(ours.fingerprint)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ERROR).write_text(full, encoding="utf-8")
        self.ledger.mark(ours.fingerprint, "failed", time.time(), short)
        self.progress.end(ours.fingerprint, ours.config.name, f"{short} ({folder / ERROR})")

    def _ours(self, trial: TuneTrial) -> Trial:
        if trial.trial_id not in self._trials:
            self._trials[trial.trial_id] = resolve(trial.config["spec"])
        return self._trials[trial.trial_id]
