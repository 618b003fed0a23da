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
from workloads.evaluation.scorers import SCORERS, majority, score_rows
from workloads.llava.build import base_name
from workloads.llava.kinds import Shape
from workloads.record import Cost, DomainScore, RunRecord
from workloads.training import checkpoint, engine
from workloads.training.loop import Trained


def domain_scores(config: RunConfig, answered: Answered) -> dict[str, DomainScore]:
    """Scores of each domain, beside the score of always giving the usual training answer."""
    scores: dict[str, DomainScore] = {}
    for domain, group in answered.groups.items():
        rows = [row for row in answered.predictions if row["domain"] == domain]
        scores[domain] = DomainScore(
            score=group.score,
            num_items=group.num_items,
            loss=answered.losses[domain],
            by_type=group.by_type,
            majority=_majority(config, domain, rows, group.scorer),
            scorer=group.scorer,
            scorer_version=group.version,
            scale=group.scale,
            error=group.error,
        )
    return scores


def _majority(config: RunConfig, domain: str, rows: Sequence[Mapping[str, Any]], scorer: str) -> float | None:
    """The score of always giving the usual training answer; None without training answers, and for captions."""
    source = sources.of(config.data)
    if domain not in source.domains("train") or SCORERS[scorer].corpus is not None:
        return None
    usual = majority(*pool.last_turns(source.load(domain, "train")))
    given = [{"raw": usual.get(row["prompt"], ""), "answer": row["answer"]} for row in rows]
    return score_rows(scorer, given).total


def selection(answered: Answered, tasks: Mapping[str, str]) -> dict[str, Any]:
    """The fields of a record that say how well a method that looks for a sample's task found it.

    Counts items of the `tasks` learned so far, which stand by domain.
    """
    rows = [row for row in answered.predictions if row["domain"] in tasks and "selected" in row]
    pairs = [(tasks[row["domain"]], row["selected"]) for row in rows]
    counts: dict[str, dict[str, int]] = {task: {} for task, _ in pairs}
    for task, found in pairs:
        counts[task][found] = counts[task].get(found, 0) + 1
    accuracy = sum(task == found for task, found in pairs) / len(pairs) if pairs else None
    return {"selected": counts, "selector_accuracy": accuracy}


def eval_metrics(
    scores: Mapping[str, DomainScore], step: int, selector_accuracy: float | None
) -> dict[str, float | int | str]:
    """The `eval` event: the mean score or why there is none, score and loss by domain and question type.

    A method that looks for a sample's task adds how often it found it.
    """
    metrics: dict[str, float | int | str] = {"event": "eval", "step": step}
    mean = record.mean_score(scores)
    if mean is None:
        metrics[record.NO_MEAN] = record.no_mean({domain: score.scale for domain, score in scores.items()})
    else:
        metrics["score"] = mean
    for domain, score in scores.items():
        metrics[f"score/{domain}"] = score.score
        if score.scale != "fraction":
            metrics[f"{record.SCALE_OF}{domain}"] = score.scale
        metrics[f"eval_loss/{domain}"] = score.loss
        metrics |= {f"score/{domain}/{kind}": value for kind, (value, _) in score.by_type.items()}
    if selector_accuracy is not None:
        metrics["selector_accuracy"] = selector_accuracy
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
    seconds: Mapping[str, float],
) -> Cost:
    """What the run took; `shape` is that of the base model, `seconds` are a Cost's fields for all but training."""
    return Cost(
        **seconds,
        train_seconds=outcome.seconds,
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
