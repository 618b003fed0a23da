"""Reads one finished run's folder: record, item scores and learning curves, checked against each other."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workloads import record as records
from workloads.errors import UserError
from workloads.evaluation import forms

# Domain -> points (samples of that domain seen, mean loss of the steps since the point before).
Curves = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True, kw_only=True)
class Question:
    """What an item asks: the same for all runs of a study, or their scores cannot be paired."""

    question_type: str
    prompt: str
    # Several references are a list.
    answer: str | list[str]


# (domain, item id) -> question.
Questions = dict[tuple[str, str], Question]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One finished run."""

    record: records.RunRecord
    # Domain -> item id -> score on the domain's scale.
    items: Mapping[str, Mapping[str, float]]
    # Domains whose items have no scores but parts in the score of all, which stand in `items`.
    whole: frozenset[str]
    curves: Curves


def read_run(folder: Path, fingerprint: str, questions: Questions) -> Run:
    """Read a run whose folder has a record; raises `UserError` when its files contradict each other.

    New questions are added to `questions`; one that is there already must be the same.
    """
    record = _record(folder, fingerprint)
    items, whole = _items(folder / records.PREDICTIONS, record, questions)
    return Run(record=record, items=items, whole=whole, curves=_curves(folder, record))


def read_stage(folder: Path, fingerprint: str) -> Run:
    """Read the record and curves of a stage, of which a study has many; its items are left where they are."""
    record = _record(folder, fingerprint)
    return Run(record=record, items={}, whole=frozenset(), curves=_curves(folder, record))


def form_shares(folder: Path, record: records.RunRecord) -> dict[str, float]:
    """Domain -> share of the run's outputs that have the form of the domain's answers, where one is known."""
    known = forms.of(record.config.get("data", {}))
    return forms.shares(known, _json_lines(folder / records.PREDICTIONS)) if known else {}


def _record(folder: Path, fingerprint: str) -> records.RunRecord:
    path = folder / records.RECORD
    try:
        record = records.load(folder)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a record of this version: {error}") from None
    if record.fingerprint != fingerprint:
        raise UserError(f"{path}: the record of {record.fingerprint!r} in the folder of {fingerprint}")
    return record


def _items(
    path: Path, record: records.RunRecord, questions: Questions
) -> tuple[dict[str, dict[str, float]], frozenset[str]]:
    """Item scores by domain, and the domains in which they are parts of one score."""
    out: dict[str, dict[str, float]] = {domain: {} for domain in record.scores}
    whole: set[str] = set()
    for row in _json_lines(path):
        key = (str(row["domain"]), str(row["id"]))
        question = Question(question_type=row["question_type"], prompt=row["prompt"], answer=row["answer"])
        if questions.setdefault(key, question) != question:
            raise UserError(f"{path}: item {key[1]!r} asks something else than in the study's other runs")
        if key[0] not in out or key[1] in out[key[0]]:
            raise UserError(f"{path}: item {key[1]!r} of {key[0]!r} is there twice, or of no scored domain")
        if "score" not in row:
            whole.add(key[0])
        out[key[0]][key[1]] = float(row["score"] if "score" in row else row["value"])
    for domain, score in record.scores.items():
        count, mean = len(out[domain]), sum(out[domain].values()) / max(len(out[domain]), 1)
        if count != score.num_items or not math.isclose(mean, score.score, abs_tol=1e-6):
            own, told = f"{count} items of mean {mean:.4f}", f"{score.num_items} of mean {score.score:.4f}"
            raise UserError(f"{path}: {domain} has {own}, but the record says {told}")
    return out, frozenset(whole)


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from (json.loads(line) for line in file)
    except FileNotFoundError:
        raise UserError(f"{path}: missing, though the run has a record") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON lines: {error}") from None


def _curves(folder: Path, record: records.RunRecord) -> Curves:
    """Training loss of each domain; a resumed run repeats steps, and the later report counts."""
    by_step = {event["step"]: event for event in records.read_events(folder) if event.get("event") == "train"}
    per_step = record.num_samples / max(record.num_steps, 1)
    out: Curves = {}
    for domain, share in record.sample_shares.items():
        key = f"loss/{domain}"
        points = [(step * per_step * share, float(e[key])) for step, e in sorted(by_step.items()) if key in e]
        if points:
            out[domain] = points
    return out
