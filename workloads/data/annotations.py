"""Reference answers that benchmarks keep apart from their questions, by question id.

Three forms: ScienceQA's folder (`problems.json`, `pid_splits.json`), whose answers are option letters; a VQA file
(a list, or one under `data` or `annotations`) with ten answers a question; a COCO file with captions by image id.
"""

import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workloads.data import json_stream
from workloads.data.rows import text
from workloads.errors import UserError

_PROBLEMS, _SPLITS = "problems.json", "pid_splits.json"
_IDS = ("question_id", "image_id", "id")


def files(path: Path) -> list[Path]:
    """The files behind a path of annotations; raises `UserError` when one is missing."""
    found = [path / _PROBLEMS, path / _SPLITS] if path.is_dir() else [path]
    for file in found:
        if not file.is_file():
            raise UserError(f"{file}: no such file; a folder of annotations holds {_PROBLEMS} and {_SPLITS}")
    return found


def read(path: Path, split: str) -> dict[str, tuple[str, ...]]:
    """Question id -> its references; raises `UserError` on a file that is none of the three forms."""
    if path.is_dir():
        problems, splits = files(path)
        return _letters(problems, splits, split)
    answers: dict[str, list[str]] = {}
    for position, entry in enumerate(json_stream.items(path, _key(path))):
        try:
            name, found = _entry(entry)
        except ValueError as error:
            raise UserError(f"{path}: entry {position}: {error}") from None
        answers.setdefault(name, []).extend(found)
    return {name: tuple(found) for name, found in answers.items()}


def _letters(problems: Path, splits: Path, split: str) -> dict[str, tuple[str, ...]]:
    """ScienceQA: the letter of the right option of each problem of the split."""
    trees = [_object(problems), _object(splits)]
    chosen = trees[1].get(split)
    if not isinstance(chosen, list):
        raise UserError(f"{splits}: {split!r}: no such split; it has {', '.join(map(str, trees[1]))}")
    found: dict[str, tuple[str, ...]] = {}
    for name in map(str, chosen):
        problem = trees[0].get(name)
        answer = problem.get("answer") if isinstance(problem, Mapping) else None
        if not isinstance(answer, int) or not 0 <= answer < len(string.ascii_uppercase):
            raise UserError(f"{problems}: problem {name!r} has no answer that is an option's number")
        found[name] = (string.ascii_uppercase[answer],)
    return found


def _object(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: not an object")
    return tree


def _key(path: Path) -> str:
    """The key of the list of answers; none for a file that is a list."""
    with path.open("rb") as file:
        head = file.read(1 << 16).lstrip(b"\xef\xbb\xbf \t\r\n")
    if not head.startswith(b"{") or path.suffix.lower() in json_stream.LINES:
        return ""
    try:
        next(json_stream.items(path, "annotations"), None)
    except UserError:
        return "data"
    return "annotations"


def _entry(entry: Any) -> tuple[str, list[str]]:
    """Question id and references of one entry; raises `ValueError`."""
    if not isinstance(entry, Mapping):
        raise ValueError(entry.reason if isinstance(entry, json_stream.Fault) else "not an object")
    name = next((entry[key] for key in _IDS if entry.get(key) is not None), None)
    found = next((entry[key] for key in ("answers", "caption", "answer") if key in entry), None)
    if name is None or found is None:
        raise ValueError("no `question_id` or `image_id`, or no `answers`, `caption` or `answer`")
    several = found if isinstance(found, list) else [found]
    words = [each.get("answer") if isinstance(each, Mapping) else each for each in several]
    if not words:
        raise ValueError("no answers")
    return text(name, "id"), [text(word, "answers") for word in words]
