"""The stages that a run's adapter comes from: found through `init_from` in the records on disk, never carried along."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from workloads import identity, record
from workloads.config import DataConfig, RunConfig, from_tree
from workloads.data import mixture, pool, replay
from workloads.data.mixture import Slot
from workloads.data.pool import Pool
from workloads.errors import UserError, require
from workloads.record import Ancestor, RunRecord


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A finished earlier stage."""

    fingerprint: str
    folder: Path
    config: RunConfig
    stream_hash: str

    @property
    def task(self) -> str:
        """Name of its task; empty: it was no stage of a stream."""
        return self.config.continual.task


@dataclass(frozen=True, kw_only=True)
class Course:
    """What a run learns from, and what was learned before it."""

    stages: Sequence[Stage]
    pools: Mapping[str, Pool]
    # Own samples, with kept ones of earlier stages among them.
    stream: Sequence[Slot]
    # The own samples of every earlier stage; empty where the run makes no use of them.
    earlier: Sequence[Sequence[Slot]]
    num_replayed: int

    def examples(self, place: int, num: int) -> Sequence[Slot]:
        """The first `num` samples of an earlier stage's own stream."""
        return self.earlier[place][:num]

    def met(self, config: RunConfig) -> list[Slot]:
        """All places whose pictures the run may see."""
        num = config.continual.fisher_samples if config.continual.regulariser == "ewc" else 0
        return [*self.stream, *(slot for k in range(len(self.earlier)) for slot in self.examples(k, num))]


def of(config: RunConfig, runs: Path) -> list[Stage]:
    """The stages before a run, the first one first, from the folder of all runs.

    Raises `UserError` unless all are there and finished, and the last one's adapter computes the same in this run.
    """
    stages: list[Stage] = []
    wanted = config.init_from
    while wanted:
        folder = runs / wanted
        given = (
            config.init_from if wanted == config.init_from else f"{config.init_from} (which needs {wanted})"
        )
        allowed = f"the fingerprint of a finished run in {runs}"
        require(record.is_finished(folder), "init_from", given, allowed)
        found = record.load(folder)
        if not stages:
            _check_start(config, found)
        theirs = from_tree(found.config)
        stages.append(Stage(fingerprint=wanted, folder=folder, config=theirs, stream_hash=found.stream_hash))
        wanted = theirs.init_from
    return stages[::-1]


def _check_start(config: RunConfig, other: RunRecord) -> None:
    """Raise `UserError` unless the adapter of the run `other` computes the same in this run."""
    mine = identity.identity(config)
    for part in ("model", "method", "vce"):
        own, found = mine.get(part, "none"), other.identity.get(part, "none")
        allowed = f"a run with this {part} ({own}, not {found})"
        require(own == found, "init_from", config.init_from, allowed)
    task = other.config.get("continual", {}).get("task", "")
    allowed = f"init_from is the stage {task!r} of a stream; name this one's task"
    require(config.continual.task != "" or not task, "continual.task", config.continual.task, allowed)
    theirs = from_tree(other.config).adapter
    free = config.adapter.training_only() & theirs.training_only()
    for key, value in asdict(config.adapter).items():
        given = getattr(theirs, key)
        allowed = f"the run that init_from names has {given!r}"
        require(key in free or value == given, f"adapter.{key}", value, allowed)


def described(course: Course) -> dict[str, Any]:
    """The fields of a record that say what the run comes from."""
    lineage = [Ancestor(fingerprint=stage.fingerprint, task=stage.task) for stage in course.stages]
    return {"lineage": lineage, "num_replayed": course.num_replayed}


def domains(config: RunConfig, stages: Sequence[Stage]) -> list[str]:
    """The domains whose training samples the run reads: its own, and earlier stages' where it looks back at them."""
    read = stages if _looks_back(config) else []
    for stage in read:
        _check_data(config.data, stage)
    earlier = [domain for stage in read for domain in mixture.domains(stage.config.data)]
    return sorted({*mixture.domains(config.data), *earlier})


def _looks_back(config: RunConfig) -> bool:
    """Whether the run sees samples of earlier stages."""
    return config.continual.replay != "none" or config.continual.regulariser == "ewc"


def _check_data(data: DataConfig, stage: Stage) -> None:
    """Raise `UserError` unless a domain has the same usable samples in both runs."""
    for key in ("source", "blind", "max_length"):
        own, theirs = getattr(data, key), getattr(stage.config.data, key)
        require(own == theirs, f"data.{key}", own, f"the earlier stage {stage.fingerprint} has {theirs!r}")


def course(config: RunConfig, stages: Sequence[Stage], pools: Mapping[str, Pool]) -> Course:
    """The run's stream, with what is replayed; raises `UserError` where earlier samples are no longer the same."""
    lengths = {domain: each.lengths for domain, each in pools.items()}
    accepted = {domain: each.accepted for domain, each in pools.items()}

    def stream_of(one: RunConfig) -> list[Slot]:
        slots = mixture.stream(one.data, accepted, one.seed, lengths)
        task = one.continual.task
        return [replace(slot, task=task) for slot in slots] if task else slots

    own = stream_of(config)
    earlier = [stream_of(stage.config) for stage in stages] if _looks_back(config) else []
    for place in range(len(earlier)):
        stage = stages[place]
        seen, _ = _with_replay(stage.config, earlier[place], earlier[:place])
        if pool.content_hash(pools, seen) != stage.stream_hash:
            raise UserError(
                f"init_from: the samples that the stage {stage.fingerprint} saw are no longer there"
            )
    stream, num_replayed = _with_replay(config, own, earlier)
    return Course(stages=stages, pools=pools, stream=stream, earlier=earlier, num_replayed=num_replayed)


def _with_replay(
    config: RunConfig, own: list[Slot], earlier: Sequence[Sequence[Slot]]
) -> tuple[list[Slot], int]:
    """A stage's whole stream, and how many samples of it are replayed."""
    part, total = config.continual, sum(map(len, earlier))
    if part.replay == "none" or not earlier:
        return own, 0
    old = replay.kept(earlier, part.replay, part.replay_share, config.seed)
    allowed = f"at least one of the {total} earlier samples"
    require(bool(old), "continual.replay_share", part.replay_share, allowed)
    return replay.mixed(own, old, config.seed), len(old)


def task_by_domain(config: RunConfig, stages: Sequence[Stage]) -> dict[str, str]:
    """The task that each domain learned so far belongs to: its namesake, or else the first that trained on it."""
    learned = [stage.config for stage in stages] + [config]
    found: dict[str, str] = {}
    for one in learned:
        for domain in mixture.domains(one.data):
            found.setdefault(domain, one.continual.task or domain)
    named = {one.continual.task for one in learned}
    return {domain: domain if domain in named else task for domain, task in found.items()}


def with_tasks(config: RunConfig, stages: Sequence[Stage], pools: Mapping[str, Pool]) -> dict[str, Pool]:
    """Evaluation pools that know their tasks; of a stage, what no task has trained on counts as the present one.

    A domain that the method itself knows as a task stays what it is.
    """
    if not config.continual.task:
        return dict(pools)
    known = {name: name for name in getattr(config.adapter, "tasks", [])}
    tasks = {**known, **task_by_domain(config, stages)}
    own = config.continual.task
    return {domain: replace(each, task=tasks.get(domain, own)) for domain, each in pools.items()}
