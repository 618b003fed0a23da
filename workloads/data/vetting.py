"""Vetting: every row of a pool is looked at once; it is usable, with its digest and length, or has a named fault.

What was found is kept in the cache. Faults of pictures are looked at again each time, since the files that were
missing may have come; a picture that is replaced by another one keeps its digest until the cache is emptied.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from workloads import record
from workloads.data import images
from workloads.data.arrow import locked
from workloads.data.cache import ENVIRONMENT_KEY
from workloads.data.rows import IMAGE
from workloads.errors import UserError, reason_of
from workloads.llava.prompt import Prompter, Turn

_BATCH = 64
_MAX_THREADS = 8
_NO_DIGEST = "-" * 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What vetting found of one row: a fault, or the hash of its decoded content and its tokens."""

    fault: str = ""
    digest: str = ""
    length: int = 0


def plain(rows: datasets.Dataset) -> datasets.Dataset:
    """The rows with images that are not decoded."""
    return rows.cast_column("image", datasets.Image(decode=False)) if "image" in rows.column_names else rows


def turns_of(row: Mapping[str, Any]) -> tuple[Turn, ...]:
    """The turns of a row; the short form (image, question, answer) is one turn with its image in front."""
    if "turns" not in row:
        return (Turn(question=f"{IMAGE}\n{row['question']}", answer=row["answer"]),)
    return tuple(Turn(question=turn["question"], answer=turn["answer"]) for turn in row["turns"])


def images_of(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The images of a row in either form, each with its bytes or its path."""
    return row["images"] if "images" in row else [row["image"] or {"bytes": None, "path": None}]


def verdicts(path: Path, rows: datasets.Dataset, prompter: Prompter, max_length: int) -> list[Verdict]:
    """The verdicts on all rows, those kept in `path` or new ones; raises `UserError` when they cannot be kept."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            with locked(path):
                if not path.is_file():
                    _keep(path, vet(rows, prompter, max_length))
        found = _kept(path)
        again = [i for i, verdict in enumerate(found) if verdict.fault.startswith("image: ")]
        for i, verdict in zip(again, vet(rows.select(again), prompter, max_length), strict=True):
            found[i] = verdict
    except OSError as error:
        reason = f"cannot write in {path.parent}: {reason_of(error)}; name a folder that can be written"
        raise UserError(f"{ENVIRONMENT_KEY}: {reason}") from None
    return found


def vet(rows: datasets.Dataset, prompter: Prompter | None, max_length: int) -> list[Verdict]:
    """The verdict on every row: what its format found, bad images, empty answers and too many tokens are faults.

    Without a prompter lengths are not known, and are 0.
    """
    found: list[Verdict] = []
    with ThreadPoolExecutor(min(_MAX_THREADS, len(os.sched_getaffinity(0)))) as threads:
        for start in range(0, len(rows), _BATCH):
            batch = [dict(rows[i]) for i in range(start, min(start + _BATCH, len(rows)))]
            # Texts are encoded here, since a prompter keeps what it rendered; pictures are decoded in threads.
            said = [_of_text(row, prompter, max_length) for row in batch]
            found += threads.map(_of_images, batch, said)
    return found


def _of_text(row: Mapping[str, Any], prompter: Prompter | None, max_length: int) -> Verdict:
    """The fault of a row's text, or its length."""
    if row.get("fault"):
        return Verdict(fault=row["fault"])
    turns = turns_of(row)
    if any(not turn.answer.strip() for turn in turns):
        return Verdict(fault="answer: empty")
    if any(IMAGE in turn.answer for turn in turns):
        return Verdict(fault=f"answer: holds {IMAGE}")
    if any(not turn.question.strip() for turn in turns):
        return Verdict(fault="question: empty")
    try:
        # Tokens of an image may follow from its size, which its header tells.
        tiled = prompter is not None and prompter.tiles is not None
        sizes = [images.size(images.read(image)) for image in images_of(row)] if tiled else []
        length = len(prompter.encode(turns, row.get("system", ""), sizes).ids) if prompter else 0
    except ValueError as error:
        return Verdict(fault=str(error))
    if length > max_length:
        return Verdict(fault=f"length: {length} tokens, at most {max_length}")
    return Verdict(length=length)


def _of_images(row: Mapping[str, Any], said: Verdict) -> Verdict:
    """The fault of a row's images, or its digest."""
    if said.fault:
        return said
    try:
        pixels = [images.decode(images.read(image)) for image in images_of(row)]
    except ValueError as error:
        return Verdict(fault=str(error))
    return Verdict(digest=_digest(row, pixels), length=said.length)


def _digest(row: Mapping[str, Any], pixels: Sequence[np.ndarray]) -> str:
    """16 hex digits over text and pixels; the file that held them changes nothing."""
    if "turns" in row:
        words = [row["system"], *(word for t in row["turns"] for word in (t["question"], t["answer"]))]
        shapes = [str(image_HWC.shape) for image_HWC in pixels]
        total = hashlib.sha256(json.dumps([words, row["answers"], shapes]).encode())
    else:
        total = hashlib.sha256(f"{row['question']}\0{row['answer']}\0".encode())
    for image_HWC in pixels:
        total.update(image_HWC.tobytes())
    return total.hexdigest()[:16]


def _keep(path: Path, found: Sequence[Verdict]) -> None:
    """Write all verdicts in a few long values, which are read back fast."""
    tree = {
        "digests": "".join(verdict.digest or _NO_DIGEST for verdict in found),
        "lengths": [verdict.length for verdict in found],
        "faults": {str(i): verdict.fault for i, verdict in enumerate(found) if verdict.fault},
    }
    record.write_json(path, tree)


def _kept(path: Path) -> list[Verdict]:
    tree = json.loads(path.read_text(encoding="utf-8"))
    faults: dict[str, str] = tree["faults"]
    digests: Iterator[str] = _pieces(tree["digests"])
    return [
        Verdict(fault=faults[str(i)]) if str(i) in faults else Verdict(digest=digest, length=length)
        for i, (digest, length) in enumerate(zip(digests, tree["lengths"], strict=True))
    ]


def _pieces(text: str) -> Iterator[str]:
    width = len(_NO_DIGEST)
    indices: Iterable[int] = range(0, len(text), width)
    return (text[i : i + width] for i in indices)
