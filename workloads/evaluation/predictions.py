"""Scores prediction rows, and reads predictions.jsonl back to compute its scores again from that file alone.

A row is a JSON object with `id`, `domain`, `question_type`, `raw` and `answer` (one string, or several
references); `scorer` (a scorer's name or version) and `score` say what the run recorded, or `value` where only a
domain as a whole has a score: the row's part in it.
"""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workloads.errors import UserError, nearest, reason_of
from workloads.evaluation.scorers import DEFAULT, SCORERS, Scale, Scored, find, score_rows, standard_error

_TEXTS = ("id", "domain", "question_type", "raw")
# How far a recorded score may lie from the recomputed one: rounding, no more.
_CLOSE = 1e-9


@dataclass(frozen=True, kw_only=True)
class Group:
    """The rows of one domain that one scorer scores."""

    domain: str
    scorer: str
    version: str
    scale: Scale
    # On the scale.
    score: float
    num_items: int
    # Standard error of the score over the items; None for a single one.
    error: float | None
    # Question type -> (score, number of items); the mean of its rows' scores, which may depend on the whole domain.
    by_type: dict[str, tuple[float, int]]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A row whose recorded score is another one."""

    domain: str
    id: str
    recorded: float
    recomputed: float


@dataclass(frozen=True, kw_only=True)
class Rescored:
    """All scores of a file, and how they compare with the recorded ones."""

    groups: tuple[Group, ...]
    # Mean over domains; None when the domains' scores lie on different scales.
    mean: float | None
    num_items: int
    # Rows whose recorded score could be compared.
    num_compared: int
    differences: tuple[Difference, ...]
    # Versions in the file that are no longer those of the scorers here.
    outdated: tuple[str, ...]


def read(path: Path) -> list[dict[str, Any]]:
    """All rows; raises `UserError` that names the line of the first one that is cut off, malformed or repeated."""
    rows: list[dict[str, Any]] = []
    first: dict[tuple[str, str], int] = {}
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = _row(line)
        except ValueError as error:
            raise UserError(f"{path} line {number}: {error}") from None
        earlier = first.setdefault((row["domain"], row["id"]), number)
        if earlier != number:
            known = f"item {row['id']!r} of {row['domain']!r}"
            raise UserError(f"{path} line {number}: {known} is there twice, first on line {earlier}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: no predictions")
    return rows


def scored(rows: Sequence[Mapping[str, Any]], scorer: str) -> tuple[Group, list[dict[str, Any]]]:
    """The scores of all rows of one domain, and the rows with what a file keeps: normalised answer, score, scorer."""
    group, found = _group(rows[0]["domain"], scorer, rows)
    key = "score" if found.rows is not None else "value"
    version, normalise = SCORERS[scorer].version, SCORERS[scorer].normalise
    kept = [
        {**row, "normalised": normalise(row["raw"]), key: value, "scorer": version}
        for row, value in zip(rows, found.values, strict=True)
    ]
    return group, kept


def rescore(rows: Sequence[Mapping[str, Any]], scorer: str = "") -> Rescored:
    """Score rows of `read` again, all with `scorer` or each with its own; raises `UserError` for unknown scorers."""
    if scorer:
        find(scorer, "--scorer")
    parts: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        parts.setdefault((row["domain"], scorer or _name(row.get("scorer", DEFAULT))), []).append(row)
    groups: list[Group] = []
    compared: list[Difference] = []
    for (domain, name), members in sorted(parts.items()):
        group, found = _group(domain, name, members)
        groups.append(group)
        compared += _compared(name, members, found)
    versions = {row["scorer"] for row in rows if "scorer" in row and not scorer}
    return Rescored(
        groups=tuple(groups),
        mean=_mean(groups),
        num_items=len(rows),
        num_compared=len(compared),
        differences=tuple(d for d in compared if not math.isclose(d.recorded, d.recomputed, abs_tol=_CLOSE)),
        outdated=tuple(sorted(v for v in versions if v not in (_name(v), SCORERS[_name(v)].version))),
    )


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield _decoded(line, f"{path} line {number}")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {reason_of(error)}") from None


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8") from None


def _row(line: str) -> dict[str, Any]:
    """One row with checked fields; raises `ValueError` that says what is wrong with it."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("not a JSON object, or cut off") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    for key in (*_TEXTS, "answer", *(["scorer"] if "scorer" in row else [])):
        if key not in row:
            raise ValueError(f"no '{key}'")
        values = row[key] if key == "answer" and isinstance(row[key], list) else [row[key]]
        if not values or not all(_is_text(value) for value in values):
            several = " or a list of strings" if key == "answer" else ""
            raise ValueError(f"'{key}' is not a string{several}")
    for key in ("score", "value"):
        if not _is_number(row.get(key, 0.0)):
            raise ValueError(f"'{key}' is not a number")
    if "scorer" in row and _name(row["scorer"]) not in SCORERS:
        raise ValueError(f"unknown scorer {row['scorer']!r}{nearest(row['scorer'], SCORERS)}")
    return row


def _is_text(value: object) -> bool:
    """Whether `value` is a string that can be written: JSON can hold half of a surrogate pair."""
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def _name(scorer: str) -> str:
    """The scorer's name from its name or its version."""
    return scorer if scorer in SCORERS else scorer.rpartition("-")[0]


def _group(domain: str, name: str, rows: Sequence[Mapping[str, Any]]) -> tuple[Group, Scored]:
    """The scores of a group, and of its rows."""
    found = score_rows(name, rows)
    by_type: dict[str, tuple[float, int]] = {}
    for kind in sorted({row["question_type"] for row in rows}):
        places = [place for place, row in enumerate(rows) if row["question_type"] == kind]
        if found.rows is None:
            total = score_rows(name, [rows[place] for place in places]).total
        else:
            total = sum(found.rows[place] for place in places) / len(places)
        by_type[kind] = (total, len(places))
    group = Group(
        domain=domain,
        scorer=name,
        version=SCORERS[name].version,
        scale=found.scale,
        score=found.total,
        num_items=len(rows),
        error=standard_error(found.values),
        by_type=by_type,
    )
    return group, found


def _compared(name: str, rows: Sequence[Mapping[str, Any]], found: Scored) -> Iterator[Difference]:
    """Recorded beside recomputed, for the rows that have both by the same scorer."""
    key = "score" if found.rows is not None else "value"
    for row, value in zip(rows, found.values, strict=True):
        if key in row and _name(row.get("scorer", name)) == name:
            yield Difference(domain=row["domain"], id=row["id"], recorded=float(row[key]), recomputed=value)


def _mean(groups: Iterable[Group]) -> float | None:
    """Mean over domains, of each domain over its items; None for several scales."""
    by_domain: dict[str, list[Group]] = {}
    for group in groups:
        by_domain.setdefault(group.domain, []).append(group)
    if len({group.scale for parts in by_domain.values() for group in parts}) > 1:
        return None
    means = [
        sum(group.score * group.num_items for group in parts) / sum(group.num_items for group in parts)
        for parts in by_domain.values()
    ]
    return sum(means) / len(means)
