"""Records of continual-tuning benchmarks: conversations to train on, and questions whose answers are scored.

A test record has `question_id`, `image`, `text` and `answer`, one string or several references. Where the answers
are kept apart, `annotations` has them by question id, and decides.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from workloads.data import annotations, json_stream, rows
from workloads.data.formats import Part
from workloads.data.rows import Row


def files(part: Part) -> list[Path]:
    """The file of records, and what its answers are read from."""
    part.refuse("name", "subset", "columns")
    return [part.file(), *(annotations.files(part.file("annotations")) if _apart(part) else [])]


def read(part: Part, *keys: str) -> Iterator[Row]:
    """The rows of a split whose records are conversations or questions.

    A question's references stand under the first of `keys` that its record has.
    """
    known = annotations.read(part.file("annotations"), part.split) if _apart(part) else None
    return records(part.file(), part.images, keys, known)


def conversations(path: Path, folder: Path) -> Iterator[Row]:
    """The rows of a file of records with `conversations`."""
    return _rows(path, lambda name, record: _conversation(name, record, folder))


def records(
    path: Path, folder: Path, keys: tuple[str, ...], known: Mapping[str, tuple[str, ...]] | None
) -> Iterator[Row]:
    """The rows of a file of records of both kinds; `known` answers decide where there are any."""

    def make(name: str, record: Mapping[str, Any]) -> Row:
        if "conversations" in record:
            found = _conversation(name, record, folder)
            return found if known is None else {**found, "answers": list(_known(name, known))}
        answers = _own(record, keys) if known is None else _known(name, known)
        question = rows.text(record.get("text"), "text")
        images, kind = rows.images_of(record, folder), rows.type_of(record)
        return rows.row(name, images, [(question, answers[0])], answers=answers, question_type=kind)

    return _rows(path, make)


def _apart(part: Part) -> bool:
    """Whether the answers of this split are kept apart from its questions."""
    return bool(part.config.annotations) and part.split != "train"


def _rows(path: Path, make: Callable[[str, Mapping[str, Any]], Row]) -> Iterator[Row]:
    """One row for each record of a file."""
    for position, record in enumerate(json_stream.items(path)):
        name = rows.name_of(record, position)
        if isinstance(record, json_stream.Fault):
            yield rows.faulty(name, record.reason)
        elif not isinstance(record, Mapping):
            yield rows.faulty(name, "record: not an object")
        else:
            yield rows.checked(name, lambda name=name, record=record: make(name, record))


def _conversation(name: str, record: Mapping[str, Any], folder: Path) -> Row:
    return rows.conversation(name, record, rows.images_of(record, folder))


def _own(record: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[str, ...]:
    """The references that a record holds itself."""
    value = next((record[key] for key in keys if record.get(key) is not None), None)
    several = value if isinstance(value, list) else [value]
    if value is None or not several:
        raise ValueError("answer: missing")
    return tuple(rows.text(each, "answer") for each in several)


def _known(name: str, known: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    if name not in known:
        raise ValueError("answer: the annotations have none for this id")
    return known[name]
