"""run(config, report, folder): the story of one run on one page: build, attach, train, answer, record."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from workloads import adapters, environment, identity, meeting, record, results
from workloads.adapters.base import Attached, Trace, count
from workloads.config import RunConfig, to_tree
from workloads.data import pool, sources
from workloads.data.mixture import Slot
from workloads.data.pool import Pool, Rejected
from workloads.errors import UserError, reason_of, require
from workloads.evaluation.answer import answer
from workloads.llava import tower, vce
from workloads.llava.build import Llava, build, projector_weights, train_projector
from workloads.record import RunRecord
from workloads.training import checkpoint, engine, past
from workloads.training.loop import Loop
from workloads.training.past import Past, lineage
from workloads.training.past.lineage import Course, Stage

Metrics = dict[str, float | int | str]
Report = Callable[[Metrics, Path | None], None]
# Gives the vetted pool of a domain and split.
Read = Callable[[str, str], Pool]


@dataclass(frozen=True, kw_only=True)
class Material:
    """The samples that a run trains on and is scored on."""

    course: Course
    eval_pools: dict[str, Pool]
    # Domain -> indices of the evaluation items.
    items: dict[str, list[int]]
    rejected: list[Rejected]

    def met(self, config: RunConfig) -> list[tuple[Pool, list[int]]]:
        """Every pool, those of training first, with the indices whose pictures the run sees."""
        slots, pools = self.course.met(config), self.course.pools
        train = [
            (each, sorted({slot.index for slot in slots if slot.domain == d})) for d, each in pools.items()
        ]
        return [*train, *((each, self.items[domain]) for domain, each in self.eval_pools.items())]

    def eval_hash(self) -> str:
        """Hash of the decoded evaluation items."""
        slots = [Slot(domain=domain, index=i) for domain, indices in self.items.items() for i in indices]
        return pool.content_hash(self.eval_pools, slots)


@engine.contained()
def run(config: RunConfig, report: Report, folder: Path) -> RunRecord:
    """Do one run, or go on with the one that `folder` holds; returns its record.

    `report(metrics, None)` is called by every rank equally often with metrics reduced over ranks, and
    `report(metrics, folder)` once at the end. Only rank 0 writes to `folder`, which all ranks must see.
    Raises `UserError` on mistakes of the user, before anything is written.
    """
    began = time.monotonic()
    sources.check(config)
    torch.set_num_threads(config.execution.threads)
    environment.reset_peak()
    engine.join()
    if _finished(config, folder):
        return record.load(folder)
    stages = lineage.of(config, folder.parent)
    described = environment.describe()
    llava = _base(config)
    seen = _material(config, llava, stages)
    trace = Trace()
    attached = _attached(config, llava, trace)
    looked_back = _looked_back(config, llava, attached, trace, seen.course, folder)
    num_trained = _num_trained(config, llava)
    _start_folder(config, folder, seen.rejected)
    looked_back.save(folder)
    emit = _Events(folder, report)
    trained_engine = _engine(config, llava)
    try:
        pools, stream = seen.course.pools, seen.course.stream
        loop = Loop(config, llava, attached, trace, trained_engine, pools, stream, looked_back)
        trained = loop.run(folder / record.CHECKPOINT, emit)
        if config.continual.task:
            attached.on_task_end(config.continual.task)
        weights = checkpoint.weights_of(llava.model, attached)
        # Where training was kept, evaluation is: beside the weights that answer.
        kept = checkpoint.latest(folder / record.CHECKPOINT) if config.execution.checkpoint_every else None
        answered = answer(config, llava, trace, seen.eval_pools, seen.items, kept, attached.selected)
        optimizer_bytes = trained_engine.optimizer_bytes()
    finally:
        trained_engine.close()
        trace.clear()  # a step cut short leaves its graph there, and the graph holds the model
    scores = results.domain_scores(config, answered)
    selection = results.selection(answered, lineage.task_by_domain(config, stages))
    metrics = results.eval_metrics(scores, trained.num_steps, selection["selector_accuracy"])
    emit({**metrics, "optimizer_bytes": optimizer_bytes})
    spent = time.monotonic() - began
    seconds = {"seconds": spent, "eval_seconds": answered.seconds, "past_seconds": looked_back.seconds}
    result = RunRecord(
        **results.described(config, attached, described),
        **results.trained(trained, pools, stream),
        **lineage.described(seen.course),
        **selection,
        num_rejected=len(seen.rejected),
        eval_hash=seen.eval_hash(),
        scores=scores,
        routing=answered.routing,
        cost=results.cost(trained, attached, llava.model.config, num_trained, seconds),
    )
    results.write(config, folder, result, weights, attached, answered.predictions)
    report({"event": "finished", "step": trained.num_steps, "seconds": result.cost.seconds}, folder)
    return result


def _finished(config: RunConfig, folder: Path) -> bool:
    """Whether `folder` holds this run's record; the same answer on every rank."""
    workers = config.execution.workers
    allowed = f"this process group has {engine.world_size()} worker(s)"
    require(workers == engine.world_size(), "execution.workers", workers, allowed)
    path = checkpoint.latest(folder / record.CHECKPOINT)
    views = engine.gather_objects((record.is_finished(folder), path and path.name))
    if len(set(views)) > 1:
        raise UserError(f"{folder}: the workers see different files; put it where all nodes share it")
    if views[0][0]:
        wanted, found = identity.fingerprint(config), record.load(folder).fingerprint
        require(found == wanted, str(folder), found, f"it holds another run; this one is {wanted}")
    return bool(views[0][0])


class _Events:
    """Appends every report to events.jsonl once, also when a resumed run computes some of them again."""

    def __init__(self, folder: Path, report: Report) -> None:
        self.folder, self.report = folder, report
        seen = {(event["event"], event["step"]) for event in record.read_events(folder)}
        self.seen: set[tuple[object, object]] = engine.gather_objects(seen)[0]

    def __call__(self, metrics: Mapping[str, float | int | str]) -> None:
        if (metrics["event"], metrics["step"]) in self.seen:
            return
        event: Metrics = {"time": time.time(), **metrics}
        if engine.rank() == 0:
            record.append_event(self.folder, event)
        self.report(event, None)


def _base(config: RunConfig) -> Llava:
    """The base model, whole or partitioned, where it computes."""
    sharded = engine.sharded_init(config.execution.zero_stage, config.optim.dtype)
    llava = build(config.model, config.optim.dtype, sharded)
    check_base(config, llava)
    llava.model.to(engine.device())  # pyright: ignore[reportArgumentType]
    return llava


def choose(config: RunConfig, stages: Sequence[Stage], read: Read) -> Material:
    """What a run after `stages` trains on and is scored on; raises `UserError` on too many bad or too few samples."""
    pools = {domain: read(domain, "train") for domain in lineage.domains(config, stages)}
    eval_pools = {domain: read(domain, config.eval.split) for domain in sources.evaluated(config)}
    rejected = pool.check_rejected([*pools.values(), *eval_pools.values()], config.data.max_rejected)
    course = lineage.course(config, stages, pools)
    items = {domain: _first(config, domain, each) for domain, each in eval_pools.items()}
    return Material(course=course, eval_pools=eval_pools, items=items, rejected=rejected)


def _material(config: RunConfig, llava: Llava, stages: Sequence[Stage]) -> Material:
    """What the run sees; of an image the tower's features alone where those are cached."""
    seen = choose(config, stages, lambda d, split: pool.load(config.data, d, split, llava.prompter))
    if config.execution.feature_cache:
        seen = _seen_once(config, llava, seen)
    return replace(seen, eval_pools=lineage.with_tasks(config, stages, seen.eval_pools))


def _seen_once(config: RunConfig, llava: Llava, seen: Material) -> Material:
    """The same with the tower's features of all images that the run meets; a stand-in takes the tower's place."""
    levels = tower.levels_of(llava, meeting.cues(config.model))
    pools, met = zip(*seen.met(config), strict=True)
    world, rank = engine.world_size(), engine.rank()
    with engine.gathered(tower.tower_of(llava).parameters()):
        opened = tower.with_features(llava, pools, levels)
        for part, indices in zip(opened, met, strict=True):
            tower.fill(llava, part, indices[rank::world], levels)
        engine.barrier()
        if world > 1:  # what the other ranks have put on other nodes
            for part, indices in zip(opened, met, strict=True):
                tower.fill(llava, part, indices, levels)
    tower.stand_in(llava, levels)
    train, evaluation = opened[: len(seen.course.pools)], opened[len(seen.course.pools) :]
    course = replace(seen.course, pools=dict(zip(seen.course.pools, train, strict=True)))
    return replace(seen, course=course, eval_pools=dict(zip(seen.eval_pools, evaluation, strict=True)))


def _attached(config: RunConfig, llava: Llava, trace: Trace) -> Attached:
    """The method on the base, fresh."""
    torch.manual_seed(config.seed)
    attached = adapters.attach(llava.model, config.adapter, trace)
    trace.watch(llava.model)
    model = config.model
    if model.train_projector:
        train_projector(llava.model)
    if model.vce:
        settings = vce.attach(llava.model, model.vce_levels, model.vce_heads, model.vce_points)
        attached = replace(attached, exported={**attached.exported, "vce": settings})
    if config.execution.gradient_checkpointing:
        llava.model.activation_checkpointing_enable({"use_reentrant": False})
        # Without re-entrance inputs need no gradient; with one, backward would go through all of the frozen tower.
        llava.model.disable_input_require_grads()
    return attached


def _looked_back(
    config: RunConfig, llava: Llava, attached: Attached, trace: Trace, course: Course, folder: Path
) -> Past:
    """The start: weights of the stage before, what is made of the past, the task, and this run's checkpoint."""
    if course.stages:
        past.start(config, llava, attached, course.stages[-1])
    made = past.make(config, llava, attached, trace, course, folder)
    if config.continual.task:
        attached.on_task_start(config.continual.task)
    if path := checkpoint.latest(folder / record.CHECKPOINT):
        checkpoint.load_adapter(path, llava.model, attached)
    return made


def _num_trained(config: RunConfig, llava: Llava) -> int:
    """Number of weights that train; raises `UserError` when none does."""
    found = count(llava.model.parameters())
    allowed = "nothing of it trains; set model.train_projector or choose another method"
    require(found > 0, "adapter.name", config.adapter.name, allowed)
    return found


def _engine(config: RunConfig, llava: Llava) -> engine.Engine:
    """The engine that trains; from here on, ranks draw different dropout masks."""
    torch.manual_seed(config.seed + 1_000_003 * (engine.rank() + 1))
    return engine.Engine(llava.model, config.optim, config.execution, projector_weights(llava.model))


def check_base(config: RunConfig, llava: Llava) -> None:
    """Raise `UserError` when VCE does not fit, or prompts and answers may be longer than the model's context."""
    if config.model.vce:
        vce.check(llava.model, config.model.vce_levels, config.model.vce_heads, config.model.vce_points)
    text: Any = llava.model.config.text_config
    context: int = text.max_position_embeddings
    length = config.data.max_length
    require(length <= context, "data.max_length", length, f"at most the model's context of {context} tokens")
    room = context - config.eval.max_new_tokens
    allowed = f"less than the model's context of {context} tokens, prompt included"
    require(room >= length, "eval.max_new_tokens", config.eval.max_new_tokens, allowed)


def _first(config: RunConfig, domain: str, items: Pool) -> list[int]:
    """The first usable items of a domain; the same for every run."""
    allowed = f"{len(items.accepted)} items of {domain} are usable"
    require(config.eval.samples <= len(items.accepted), "eval.samples", config.eval.samples, allowed)
    return items.accepted[: config.eval.samples]


def _start_folder(config: RunConfig, folder: Path, rejected: list[Rejected]) -> None:
    """Write what is known before training: the configuration and the rejected samples; all ranks learn of a failure."""
    fault = ""
    if engine.rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            record.write_json(folder / record.CONFIG, to_tree(config))
            if rejected:
                text = "".join(json.dumps(asdict(bad)) + "\n" for bad in rejected)
                (folder / record.REJECTED).write_text(text, encoding="utf-8")
        except OSError as error:
            fault = f"{folder}: cannot be written: {reason_of(error)}"
    if fault := engine.gather_objects(fault)[0]:
        raise UserError(fault)
