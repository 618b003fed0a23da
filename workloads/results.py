"""From answers to a record: scores by domain and question type, metrics for reports, cost, and the files of a run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from workloads import adapters, environment, identity, record
from workloads.adapters.base import Attached
from workloads.adapters.parts import iso
from workloads.config import RunConfig, to_tree
from workloads.data import pool, sources
from workloads.data.mixture import Slot
from workloads.data.pool import Pool
from workloads.evaluation.answer import Answered
from workloads.evaluation.scorers import exact, majority
from workloads.llava.build import base_name
from workloads.llava.kinds import Shape
from workloads.record import Cost, DomainScore, RunRecord
from workloads.training import checkpoint, engine
from workloads.training.loop import Trained


def domain_scores(config: RunConfig, answered: Answered) -> dict[str, DomainScore]:
    """Mean scores of each domain, beside the score of always giving the usual training answer."""
    source = sources.of(config.data)
    trained = source.domains("train")
    scores: dict[str, DomainScore] = {}
    for domain, loss in answered.losses.items():
        rows = [row for row in answered.predictions if row["domain"] == domain]
        known = pool.last_turns(source.load(domain, "train")) if domain in trained else ([], [])
        usual = majority(*known)
        types = sorted({row["question_type"] for row in rows})
        groups = {t: [row["score"] for row in rows if row["question_type"] == t] for t in types}
        scores[domain] = DomainScore(
            score=sum(row["score"] for row in rows) / len(rows),
            num_items=len(rows),
            loss=loss,
            by_type={t: (sum(values) / len(values), len(values)) for t, values in groups.items()},
            majority=sum(exact(usual.get(row["prompt"], ""), row["answer"]) for row in rows) / len(rows),
        )
    return scores


def eval_metrics(scores: Mapping[str, DomainScore], step: int) -> dict[str, float | int | str]:
    """The `eval` event: mean score, and score and loss by domain and question type."""
    metrics: dict[str, float | int | str] = {"event": "eval", "step": step}
    metrics["score"] = sum(s.score for s in scores.values()) / len(scores)
    for domain, score in scores.items():
        metrics[f"score/{domain}"] = score.score
        metrics[f"eval_loss/{domain}"] = score.loss
        metrics |= {f"score/{domain}/{kind}": value for kind, (value, _) in score.by_type.items()}
    return {**metrics, "peak_bytes": environment.peak_bytes()}


def described(config: RunConfig, attached: Attached, environment_: dict[str, str]) -> dict[str, Any]:
    """The fields of a record that say what was run, on what."""
    backend = attached.backend()
    return {
        "fingerprint": identity.fingerprint(config),
        "name": config.name,
        "seed": config.seed,
        "config": to_tree(config),
        "identity": identity.identity(config),
        "environment": {**environment_, **({"adapter_backend": backend} if backend else {})},
        "capabilities": asdict(attached.capabilities),
    }


def trained(outcome: Trained, pools: Mapping[str, Pool], stream: Sequence[Slot]) -> dict[str, Any]:
    """The fields of a record that say what training saw and how it ended."""
    return {
        "stream_hash": pool.content_hash(pools, stream),
        "sample_shares": outcome.sample_shares,
        "token_shares": outcome.token_shares,
        "num_steps": outcome.num_steps,
        "num_samples": len(stream),
        "train_loss": outcome.train_loss,
        "num_resumes": outcome.num_resumes,
    }


def cost(
    outcome: Trained,
    attached: Attached,
    shape: Shape,
    num_trained: int,
    eval_seconds: float,
    seconds: float,
) -> Cost:
    """What the run took; `shape` is that of the base model."""
    return Cost(
        seconds=seconds,
        train_seconds=outcome.seconds,
        eval_seconds=eval_seconds,
        samples_per_second=outcome.samples_per_second,
        tokens_per_second=outcome.tokens_per_second,
        peak_bytes=environment.peak_bytes(),
        trainable=num_trained,
        adapter_weights=attached.num_weights,
        adapter_active=attached.num_active,
        iso_total=iso.rank_of(shape, attached.num_weights),
        iso_active=iso.rank_of(shape, attached.num_active),
    )


def write(
    config: RunConfig,
    folder: Path,
    result: RunRecord,
    weights: dict[str, torch.Tensor],
    attached: Attached,
    predictions: list[dict[str, Any]],
) -> None:
    """Rank 0 writes adapter and predictions, then the record that marks the run as finished, and drops checkpoints."""
    if engine.rank() == 0:
        adapters.save(folder / record.ADAPTER, weights, config.adapter, attached, base_name(config.model))
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions)
        (folder / record.PREDICTIONS).write_text(text, encoding="utf-8")
        record.save(result, folder)
        checkpoint.remove_all(folder / record.CHECKPOINT)
    engine.barrier()
