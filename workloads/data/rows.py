"""Rows: the one form that the records of all formats take, good ones and bad ones with their fault.

A row has an id, images (bytes, or a path as in `workloads.data.images`), a system text, turns of question and
answer, references for the last answer, and a question type. `<image>` stands in the questions where an image
goes, in the images' order. A row with a `fault` is a record that cannot be used; accepted and rejected rows are all
records that there are.
"""

from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets

from workloads.data.images import placed

# Stands in a question where an image goes.
IMAGE = "<image>"
# Stands for bytes that are not UTF-8 while a file is parsed; no text holds it, since it is no character.
NOT_UTF8 = "\uffff"
MAX_IMAGES = 64
_TEXT = datasets.Value("string")
ROW = datasets.Features(
    {
        "id": _TEXT,
        "images": datasets.List({"bytes": datasets.Value("binary"), "path": _TEXT}),
        "system": _TEXT,
        "turns": datasets.List({"question": _TEXT, "answer": _TEXT}),
        "answers": datasets.List(_TEXT),
        "question_type": _TEXT,
        "fault": _TEXT,
    }
)
Row = dict[str, Any]
_ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
_ID_KEYS = ("question_id", "id")
_TYPE_KEYS = ("question_type", "category")


def checked(name: str, make: Callable[[], Row]) -> Row:
    """The row that `make` makes, or one with the reason of its `ValueError`."""
    try:
        return make()
    except ValueError as error:
        return faulty(name, str(error))


def faulty(name: str, reason: str) -> Row:
    """The row of a record that cannot be used."""
    return {
        "id": name,
        "images": [],
        "system": "",
        "turns": [],
        "answers": [],
        "question_type": "",
        "fault": reason,
    }


def row(
    name: str,
    images: Sequence[dict[str, Any]],
    turns: Sequence[tuple[str, str]],
    *,
    system: str = "",
    answers: Sequence[str] = (),
    question_type: str = "",
) -> Row:
    """A usable row; raises `ValueError` when places and images do not fit.

    Images without any place stand in front of the first question. References are by default the last answer.
    """
    places = sum(question.count(IMAGE) for question, _ in turns)
    if images and not places:
        first, *rest = turns
        turns = [(f"{IMAGE}\n" * len(images) + first[0], first[1]), *rest]
    elif places != len(images):
        raise ValueError(f"image: {places} places for {len(images)} images")
    return {
        **faulty(name, ""),
        "images": list(images),
        "system": system,
        "turns": [{"question": question, "answer": answer} for question, answer in turns],
        "answers": list(answers) or [turns[-1][1]],
        "question_type": question_type or "all",
    }


def conversation(name: str, record: Mapping[str, Any], images: Sequence[dict[str, Any]]) -> Row:
    """The row of a record with `conversations`: an optional system turn, then human and gpt in turns."""
    talk = record.get("conversations")
    if not isinstance(talk, Sequence) or isinstance(talk, str) or len(talk) == 0:
        raise ValueError("conversations: not a list of turns")
    said = [_said(turn) for turn in talk]
    system = text(record["system"], "system") if record.get("system") else ""
    if said[0][0] == "system":
        system, said = said[0][1], said[1:]
    roles = [role for role, _ in said]
    if not roles or roles != ["human", "gpt"] * (len(roles) // 2):
        raise ValueError(f"roles: {', '.join(roles[:6]) or 'none'}; human and gpt take turns")
    words = [value for _, value in said]
    turns = list(zip(words[::2], words[1::2], strict=True))
    return row(name, images, turns, system=system, question_type=type_of(record))


def _said(turn: Any) -> tuple[str, str]:
    """Role and text of one turn."""
    if not isinstance(turn, Mapping) or not isinstance(turn.get("from"), str):
        raise ValueError("conversations: a turn is no object with `from` and `value`")
    role = _ROLES.get(turn["from"])
    if role is None:
        raise ValueError(f"roles: {text(turn['from'], 'roles')[:40]!r}; human, gpt or system")
    return role, text(turn.get("value"), "value")


def images_of(record: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The images that a record names under `image`: none, one path, or a list of them."""
    named = record.get("image")
    names = [] if named is None or named == "" else named if isinstance(named, list) else [named]
    if len(names) > MAX_IMAGES:
        raise ValueError(f"image: {len(names)} images, at most {MAX_IMAGES}")
    if not all(isinstance(each, str) for each in names):
        raise ValueError("image: not a path or a list of paths")
    return [placed(folder, text(each, "image")) for each in names]


def name_of(record: Any, position: int) -> str:
    """The record's id; without one, its place in the file."""
    for key in _ID_KEYS:
        value = record.get(key) if isinstance(record, Mapping) else None
        if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip():
            return str(value).encode(errors="replace").decode()
    return f"#{position}"


def type_of(record: Mapping[str, Any]) -> str:
    """The record's own question type, where it has one."""
    found = next((record[key] for key in _TYPE_KEYS if isinstance(record.get(key), str)), "")
    return text(found, "question_type")


def text(value: Any, key: str) -> str:
    """A text or a number as text; raises `ValueError` about `key` on anything else and on what is not UTF-8."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise ValueError(f"{key}: not a text")
    found = str(value)
    if NOT_UTF8 in found or not _is_unicode(found):
        raise ValueError(f"{key}: not UTF-8")
    return found


def _is_unicode(found: str) -> bool:
    """Whether all of it can be written: JSON can hold half of a surrogate pair."""
    try:
        found.encode()
    except UnicodeEncodeError:
        return False
    return True
