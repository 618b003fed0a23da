"""Prism's task dicts: a file that says where a task's records, annotations and images are.

A split names that file: one dict, or a list of them, in which the domain's `name` chooses the task. Paths in
it start at `data.root` and stay inside; absolute ones have to lead there too.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from workloads.data import tasks
from workloads.data.formats import Part
from workloads.data.rows import Row
from workloads.errors import UserError, require

VERSION = "1"
_KEYS = {"train": "train_data_path", "val": "test_data_path", "test": "test_data_path"}


def files(part: Part) -> list[Path]:
    """The task's records, and its answers where they are kept apart."""
    part.refuse("annotations", "images", "subset", "columns")
    return tasks.files(_led(part))


def rows(part: Part) -> Iterator[Row]:
    """The rows of a task."""
    return tasks.read(_led(part), "answer_bbox", "answer")


def _led(part: Part) -> Part:
    """The part with the places that its task dict names."""
    path = part.file()
    task = _task(path, part.config.name, f"data.domains.{part.domain}.name")
    data = _place(part.root, path, task, _KEYS[part.split])
    # Where the questions hold the answers, Prism names the same file twice.
    apart = task.get("eval_annotation_path") not in (None, "", task.get("test_data_path"))
    config = replace(
        part.config,
        name="",
        **{part.split: data},
        images=_place(part.root, path, task, "image_folder") if task.get("image_folder") else "",
        annotations=_place(part.root, path, task, "eval_annotation_path") if apart else "",
    )
    return replace(part, config=config)


def _task(path: Path, name: str, key: str) -> Mapping[str, Any]:
    """The dict of the task called `name`, or the only one."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {' '.join(str(error).split())}") from None
    found = tree if isinstance(tree, list) else [tree]
    if not all(isinstance(task, dict) for task in found):
        raise UserError(f"{path}: not a task dict, or a list of them")
    known = [str(task.get("name", "")) for task in found]
    if not name and len(found) == 1:
        return found[0]
    require(name in known, key, name, f"tasks: {', '.join(known)}", known)
    return found[known.index(name)]


def _place(root: Path, path: Path, task: Mapping[str, Any], key: str) -> str:
    """A path of the dict; raises `UserError` when it is missing or leads out of `root`."""
    named = task.get(key)
    if not isinstance(named, str) or not named or "\0" in named:
        raise UserError(f"{path}: {key}: {named!r} is not a path")
    if not (root / named).resolve().is_relative_to(root.resolve()):
        raise UserError(f"{path}: {key}: {named!r} leaves data.root ({root})")
    return named
