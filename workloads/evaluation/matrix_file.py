"""Accuracy matrices from files: JSON or CSV, a row for each stage and a column for each task.

JSON  {"tasks": ["a", "b"], "before": [0.1, 0.2], "matrix": [[0.7], [0.6, 0.9]]}
CSV   stage,a,b
      before,0.1,0.2
      after a,0.7,
      after b,0.6,0.9

A row ends at the diagonal or goes on to the last task; `before`, scores before any training, may be left out.
`null` or an empty cell above the diagonal or in `before` is a score that nobody measured.

JSON has room for more, each of which may be left out:
      {"never_trained": {"c": [0.3, 0.4]}, "never_before": {"c": 0.2}, "scales": {"a": "percent", "c": "fraction"}}
`never_trained` has the scores, after each stage, on tasks that no stage trains, `never_before` those before any
training; any of them may be `null`. `scales` names the scales that scores lie on (fraction, percent or cider) where
that is known: a mean over several scales is none. `as_tree` writes all of it.
"""

import csv
import io
import json
import reprlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workloads.errors import UserError, reason_of, require, require_known
from workloads.evaluation.continual import Cells, Matrix
from workloads.record import TOP

BEFORE = "before"
NEVER, NEVER_BEFORE, SCALES = "never_trained", "never_before", "scales"
_KEYS = ("tasks", "matrix", BEFORE, NEVER, NEVER_BEFORE, SCALES)
# Scores beyond this could overflow when summed.
_TOO_LARGE = 1e300


@dataclass(frozen=True, kw_only=True)
class _Table:
    """What a file holds, before any cell is checked."""

    tasks: Any
    rows: Any
    before: Any
    # `never_trained`, `never_before` and `scales`, where they are given.
    more: dict[str, Any] = field(default_factory=dict)


def as_tree(matrix: Matrix) -> dict[str, Any]:
    """The matrix as JSON has it; nothing is left out, and `read` gives the same."""
    more = {
        BEFORE: None if matrix.before is None else list(matrix.before),
        NEVER: {name: list(column) for name, column in matrix.never_trained.items()},
        NEVER_BEFORE: dict(matrix.never_before),
        SCALES: dict(matrix.scales),
    }
    known = {key: value for key, value in more.items() if value is not None and value != {}}
    return {"tasks": list(matrix.tasks), "matrix": [list(row) for row in matrix.rows], **known}


def read(path: Path) -> Matrix:
    """The matrix in a `.json` or `.csv` file; raises `UserError` that names file, row and column."""
    suffix = path.suffix.lower()
    require(suffix in (".json", ".csv"), "matrix", str(path), "a .json or .csv file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {reason_of(error)}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    try:
        if not text.strip():
            raise UserError("the file is empty")
        return _matrix(_from_json(text) if suffix == ".json" else _from_csv(text))
    except UserError as error:
        # A key or a message of the parser may hold line breaks.
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None


def _from_json(text: str) -> _Table:
    try:
        # Whole numbers become floats at once: an int of any length would outgrow one later.
        tree = json.loads(text, parse_int=float, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{reprlib.repr(tree)} is not an object with the keys {', '.join(_KEYS)}")
    require_known("", tree, _KEYS)
    for key in ("tasks", "matrix"):
        if key not in tree:
            raise UserError(f"no key '{key}'")
    more = {key: tree[key] for key in (NEVER, NEVER_BEFORE, SCALES) if tree.get(key) is not None}
    return _Table(tasks=tree["tasks"], rows=tree["matrix"], before=tree.get(BEFORE), more=more)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        require(keys.count(key) == 1, "key", key, "each key once")
    return dict(pairs)


def _from_csv(text: str) -> _Table:
    try:
        lines = [line for line in csv.reader(io.StringIO(text), strict=True) if line]
    except csv.Error as error:
        raise UserError(f"not valid CSV: {error}") from None
    header, *rows = lines
    labels = [row[0].strip().lower() for row in rows]
    if BEFORE in labels[1:]:
        raise UserError(f"row {labels.index(BEFORE, 1) + 1} is '{BEFORE}'; it can only be the first")
    cells = [[_from_text(cell.strip()) for cell in row[1:]] for row in rows]
    has_before = labels[:1] == [BEFORE]
    return _Table(
        tasks=[name.strip() for name in header[1:]],
        rows=cells[1:] if has_before else cells,
        before=cells[0] if has_before else None,
    )


def _from_text(cell: str) -> float | str | None:
    """A CSV cell as a number if it is one, as `None` if it is empty, else as it is."""
    try:
        # Python reads 1_0 as 10; a file means something else.
        return cell if "_" in cell else float(cell)
    except ValueError:
        return cell or None


def _matrix(table: _Table) -> Matrix:
    tasks = _tasks(table.tasks)
    rows = _list(table.rows, "matrix")
    if not rows:
        raise UserError("the matrix is empty")
    full = [_row(row, stage, tasks) for stage, row in enumerate(rows[: len(tasks)], start=1)]
    if len(rows) != len(tasks):
        raise UserError(f"{len(rows)} rows for {len(tasks)} tasks; allowed: one row after each task's stage")
    before = None
    if table.before is not None:
        cells = _list(table.before, f"row '{BEFORE}'")
        if len(cells) != len(tasks):
            raise UserError(f"row '{BEFORE}': {len(cells)} scores; allowed: {len(tasks)}, one for each task")
        before = _cells(cells, f"row '{BEFORE}'", tasks)
    never = {
        name: _cells(
            _column(column, name, tasks), _never(name), [f"after stage {t + 1}" for t in range(len(tasks))]
        )
        for name, column in _object(table.more, NEVER, tasks, others=True)
    }
    first = {
        name: _cells([cell], _never(name), [BEFORE])[0]
        for name, cell in _object(table.more, NEVER_BEFORE, never)
    }
    scales = dict(_object(table.more, SCALES, [*tasks, *never]))
    for name, scale in scales.items():
        known = isinstance(scale, str) and scale in TOP
        require(known, f"{SCALES}.{name}", scale, f"one of {', '.join(TOP)}", TOP)
    return Matrix(
        tasks=tasks, rows=tuple(full), before=before, never_trained=never, never_before=first, scales=scales
    )


def _object(
    more: Mapping[str, Any], key: str, names: Collection[str], others: bool = False
) -> list[tuple[str, Any]]:
    """The entries of one of the objects by task; their keys are all of `names`, or with `others` none of them."""
    tree = more.get(key, {})
    if not isinstance(tree, dict):
        raise UserError(f"{key}: {reprlib.repr(tree)} is not an object")
    for name in tree:
        if not name.strip():
            raise UserError(f"{key}: {name!r} is not the name of a task")
        allowed = "a task that no stage trains" if others else f"tasks: {', '.join(names)}"
        require((name in names) != others, key, name, allowed, () if others else names)
    return list(tree.items())


def _never(name: str) -> str:
    return f"task {reprlib.repr(name)}, never trained"


def _column(column: Any, name: str, tasks: Sequence[str]) -> list[Any]:
    cells = _list(column, _never(name))
    if len(cells) != len(tasks):
        raise UserError(f"{_never(name)}: {len(cells)} scores; allowed: {len(tasks)}, one after each stage")
    return cells


def _tasks(names: Any) -> tuple[str, ...]:
    listed = _list(names, "tasks")
    if not listed:
        raise UserError("no tasks")
    for column, name in enumerate(listed, start=1):
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"column {column}: {reprlib.repr(name)} is not the name of a task")
        if listed.index(name) + 1 < column:
            first = listed.index(name) + 1
            raise UserError(f"task {reprlib.repr(name)} is there twice, in columns {first} and {column}")
    return tuple(listed)


def _row(row: Any, stage: int, tasks: tuple[str, ...]) -> Cells:
    """The row after `stage`, counted from 1, with a cell for each task."""
    where, num_tasks = f"row {stage}", len(tasks)
    given = _list(row, where)
    if stage < len(given) < num_tasks or len(given) > num_tasks:
        allowed = f"{stage} (to the diagonal) or {num_tasks}" if stage < num_tasks else num_tasks
        raise UserError(f"{where}: {len(given)} scores; allowed: {allowed}")
    cells = _cells([*given, *[None] * (num_tasks - len(given))], where, tasks)
    if None in cells[:stage]:
        column = reprlib.repr(tasks[cells.index(None)])
        raise UserError(f"{where}, column {column}: no score; only cells above the diagonal may be absent")
    return cells


def _cells(values: list[Any], where: str, columns: Sequence[str]) -> Cells:
    for value, column in zip(values, columns, strict=True):
        if value is None:
            continue
        cell = f"{where}, column {reprlib.repr(column)}: {reprlib.repr(value)}"
        if not isinstance(value, float):
            raise UserError(f"{cell} is not a number")
        if not abs(value) < _TOO_LARGE:
            raise UserError(f"{cell} is not a finite score")
    return tuple(values)


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{what}: {reprlib.repr(value)} is not a list")
    return value
