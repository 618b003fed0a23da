"""run(config, report, folder): the story of one run on one page: build, attach, train, answer, record."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from workloads import adapters, environment, identity, record, results
from workloads.adapters.base import Attached, Trace
from workloads.config import RunConfig, to_tree
from workloads.data import mixture, pool
from workloads.data.mixture import Slot
from workloads.data.pool import Pool, Rejected
from workloads.errors import UserError, require
from workloads.evaluation.answer import answer
from workloads.llava.build import Llava, build, projector_weights, train_projector
from workloads.record import RunRecord
from workloads.training import checkpoint, engine
from workloads.training.loop import Loop

Metrics = dict[str, float | int | str]
Report = Callable[[Metrics, Path | None], None]


def run(config: RunConfig, report: Report, folder: Path) -> RunRecord:
    """Do one run, or go on with the one that `folder` holds; returns its record.

    `report(metrics, None)` is called by every rank equally often with metrics reduced over ranks, and
    `report(metrics, folder)` once at the end. Only rank 0 writes to `folder`.
    Raises `UserError` on mistakes of the user, before anything is written.
    """
    began = time.monotonic()
    if record.is_finished(folder):
        return record.load(folder)
    check_data(config)
    torch.set_num_threads(config.execution.threads)
    environment.reset_peak()
    engine.join()
    trace = Trace()
    llava, attached = _attached(config, trace, folder)
    pools = _train_pools(config, llava)
    rejected = pool.check_rejected(list(pools.values()), config.data.max_rejected)
    stream = mixture.stream(config.data, {d: p.accepted for d, p in pools.items()}, config.seed)
    _start_folder(config, folder, rejected)
    emit = _Events(folder, report)
    trained_engine = engine.Engine(
        llava.model, config.optim, config.execution, projector_weights(llava.model)
    )
    trained = Loop(config, llava, attached, trace, trained_engine, pools, stream).run(
        folder / record.CHECKPOINT, emit
    )
    weights = checkpoint.trained_weights(llava.model)
    mark = time.monotonic()
    eval_pools, items = _eval_items(config, llava)
    answered = answer(config, llava, trace, eval_pools, items)
    eval_seconds = time.monotonic() - mark
    optimizer_bytes = trained_engine.optimizer_bytes()
    trained_engine.close()
    scores = results.domain_scores(config, answered)
    emit({**results.eval_metrics(scores, trained.num_steps), "optimizer_bytes": optimizer_bytes})
    result = RunRecord(
        fingerprint=identity.fingerprint(config),
        name=config.name,
        seed=config.seed,
        config=to_tree(config),
        identity=identity.identity(config),
        environment=environment.describe(),
        capabilities=asdict(attached.capabilities),
        stream_hash=pool.content_hash(pools, stream),
        eval_hash=pool.content_hash(eval_pools, [Slot(domain=d, index=i) for d in items for i in items[d]]),
        sample_shares=trained.sample_shares,
        token_shares=trained.token_shares,
        num_steps=trained.num_steps,
        num_samples=len(stream),
        num_rejected=len(rejected),
        train_loss=trained.train_loss,
        scores=scores,
        routing=answered.routing,
        cost=results.cost(trained, attached, weights, eval_seconds, time.monotonic() - began),
        num_resumes=trained.num_resumes,
    )
    results.write(config, folder, result, weights, attached, answered.predictions)
    report({"event": "finished", "step": trained.num_steps, "seconds": result.cost.seconds}, folder)
    return result


def check_data(config: RunConfig) -> None:
    """Raise `UserError` on unknown sources and domains and on budgets larger than the data."""
    source = pool.source(config.data.source)
    mixture.check(config.data, source.available("train"))
    available: Mapping[str, int] = source.available(config.eval.split)
    for domain in config.eval.domains:
        require(domain in available, "eval.domains", domain, f"domains: {', '.join(available)}", available)
    for domain in config.eval.domains or available:
        allowed = f"{domain} has {available[domain]} in its {config.eval.split} split"
        require(config.eval.samples <= available[domain], "eval.samples", config.eval.samples, allowed)


class _Events:
    """Appends every report to events.jsonl once, also when a resumed run computes some of them again."""

    def __init__(self, folder: Path, report: Report) -> None:
        self.folder, self.report = folder, report
        last = max((int(e["step"]) for e in record.read_events(folder) if e["event"] == "train"), default=0)
        self.last = int(engine.gather_objects(last)[0])

    def __call__(self, metrics: Mapping[str, float | int | str]) -> None:
        if metrics["event"] == "train" and int(metrics["step"]) <= self.last:
            return
        event: Metrics = {"time": time.time(), **metrics}
        if engine.rank() == 0:
            record.append_event(self.folder, event)
        self.report(event, None)


def _attached(config: RunConfig, trace: Trace, folder: Path) -> tuple[Llava, Attached]:
    """The base with the method on it; fresh, from another run's adapter, or from this run's checkpoint."""
    llava = build(config.model, config.optim.dtype, engine.sharded_init(config.execution.zero_stage))
    llava.model.to(engine.device())  # pyright: ignore[reportArgumentType]
    torch.manual_seed(config.seed)
    attached = adapters.attach(llava.model, config.adapter, trace)
    trace.watch(llava.model)
    if config.model.train_projector:
        train_projector(llava.model)
    if config.execution.gradient_checkpointing:
        llava.model.gradient_checkpointing_enable({"use_reentrant": False})
    if path := checkpoint.latest(folder / record.CHECKPOINT):
        checkpoint.load_adapter(path, llava.model)
    elif config.init_from:
        start = folder.parent / config.init_from / record.ADAPTER
        require(
            start.is_dir(),
            "init_from",
            config.init_from,
            f"the fingerprint of a finished run in {folder.parent}",
        )
        checkpoint.load_weights(llava.model, adapters.read(start), f"init_from {config.init_from}")
    return llava, attached


def _train_pools(config: RunConfig, llava: Llava) -> dict[str, Pool]:
    data = config.data
    return {
        domain: pool.load(data.source, domain, "train", llava.prompter, data.max_length, data.blind)
        for domain in mixture.counts(data)
    }


def _eval_items(config: RunConfig, llava: Llava) -> tuple[dict[str, Pool], dict[str, list[int]]]:
    """The first usable items of every domain's split; the same for every run."""
    data, split = config.data, config.eval.split
    domains = sorted(config.eval.domains or pool.source(data.source).available(split))
    pools = {
        d: pool.load(data.source, d, split, llava.prompter, data.max_length, data.blind) for d in domains
    }
    return pools, {d: p.accepted[: config.eval.samples] for d, p in pools.items()}


def _start_folder(config: RunConfig, folder: Path, rejected: list[Rejected]) -> None:
    """Write what is known before training: the configuration and the rejected samples."""
    if engine.rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            record.write_json(folder / record.CONFIG, to_tree(config))
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
        if rejected:
            text = "".join(json.dumps(asdict(bad)) + "\n" for bad in rejected)
            (folder / record.REJECTED).write_text(text, encoding="utf-8")
    engine.barrier()
