"""Records of tables (Parquet, sets of the hub): columns under our names, images as bytes or paths.

A record has its text as `conversations` (LLaVA's turns), as `turns` of question and answer (as `orchestrator data
convert` writes them), or as `question` and `answer` or `answers`; and `image` or `images`: bytes, a path, a struct
of both, or a list of those.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from workloads.data import rows
from workloads.data.formats import Part
from workloads.data.images import placed
from workloads.data.rows import Row
from workloads.errors import require, require_known

COLUMNS = (
    "id", "question_id", "image", "images", "system", "conversations", "turns", "question", "answer", "answers",
    "question_type",
)  # fmt: skip


def chosen(part: Part, there: Sequence[str]) -> dict[str, str]:
    """Our name -> the table's name of every column that is read; raises `UserError` on columns that are not there."""
    key, named = f"data.domains.{part.domain}.columns", part.config.columns
    require_known(f"{key}.", named, COLUMNS)
    for ours, theirs in named.items():
        require(theirs in there, f"{key}.{ours}", theirs, f"columns: {', '.join(there)}", there)
    columns = {**{name: name for name in COLUMNS if name in there}, **named}
    has_text = {"conversations", "turns", "question"} & columns.keys()
    allowed = f"none of conversations, turns, question; columns: {', '.join(there)}"
    require(bool(has_text), key, named, allowed)
    return columns


def records(batch: pa.RecordBatch | pa.Table) -> Iterator[dict[str, Any] | str]:
    """The records of a batch under the table's names, or what is wrong with one."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for place in range(batch.num_rows):
            try:
                yield batch.slice(place, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield "record: not UTF-8"


def row_under(
    columns: Mapping[str, str], record: Mapping[str, Any] | str, position: int, folder: Path
) -> Row:
    """The row of what `records` gave, by the `columns` that are `chosen`."""
    if isinstance(record, str):
        return rows.faulty(f"#{position}", record)
    return row_of({ours: record[theirs] for ours, theirs in columns.items()}, position, folder)


def row_of(record: Mapping[str, Any], position: int, folder: Path) -> Row:
    """The row of one record under our names; image paths start at `folder`."""
    name = rows.name_of(record, position)
    return rows.checked(name, lambda: _row(name, record, folder))


def _row(name: str, record: Mapping[str, Any], folder: Path) -> Row:
    images = list(_images(record, folder))
    if len(images) > rows.MAX_IMAGES:
        raise ValueError(f"image: {len(images)} images, at most {rows.MAX_IMAGES}")
    if record.get("conversations") is not None:
        return rows.conversation(name, record, images)
    system = rows.text(record["system"], "system") if record.get("system") else ""
    kind = rows.type_of(record)
    references = _several(record.get("answers")) or _several(record.get("answer"))
    answers = [rows.text(each, "answer") for each in references]
    if record.get("turns") is not None:
        turns = [_turn(turn) for turn in _several(record["turns"])]
        if not turns:
            raise ValueError("turns: none")
        return rows.row(name, images, turns, system=system, answers=answers, question_type=kind)
    question = rows.text(record.get("question"), "question")
    if not answers:
        raise ValueError("answer: missing")
    return rows.row(
        name, images, [(question, answers[0])], system=system, answers=answers, question_type=kind
    )


def _turn(turn: Any) -> tuple[str, str]:
    if not isinstance(turn, Mapping):
        raise ValueError("turns: a turn is no struct of `question` and `answer`")
    return rows.text(turn.get("question"), "question"), rows.text(turn.get("answer"), "answer")


def _several(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _images(record: Mapping[str, Any], folder: Path) -> Iterable[dict[str, Any]]:
    for image in [*_several(record.get("image")), *_several(record.get("images"))]:
        data = image.get("bytes") if isinstance(image, Mapping) else image
        path = image.get("path") if isinstance(image, Mapping) else image
        if isinstance(data, bytes) and data:
            yield {"bytes": data, "path": None}
        elif isinstance(path, str) and path:
            inside = Path(path).is_absolute() and Path(path).is_relative_to(folder)
            yield placed(folder, str(Path(path).relative_to(folder)) if inside else rows.text(path, "image"))
        elif image is not None:
            raise ValueError("image: neither bytes nor a path")
