"""What a source holds, split by split: counts, bad records by reason, duplicates, lengths, and samples to look at."""

import base64
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from PIL import Image

from workloads.config import DataConfig
from workloads.data import images, sources, vetting
from workloads.data.vetting import Verdict
from workloads.llava.prompt import Prompter

SPLITS = ("train", "val", "test")
MISSING = "image: missing"
PERCENTILES = (50, 90, 99, 100)
_NO_LIMIT = 2**31
_NUM_EXAMPLES, _NUM_REJECTED = 8, 20
_SIDE = 180


@dataclass(frozen=True, kw_only=True)
class Example:
    """One usable sample as a page shows it."""

    id: str
    # Thumbnails as data URIs.
    pictures: tuple[str, ...]
    system: str
    turns: tuple[tuple[str, str], ...]
    answers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """One split of one domain."""

    domain: str
    split: str
    num_records: int
    # Kind of fault -> number of records.
    faults: dict[str, int]
    num_duplicates: int
    # Percentile -> tokens; empty without a model. How many records are longer than `data.max_length`.
    lengths: dict[int, int]
    num_too_long: int
    examples: tuple[Example, ...]
    # The first bad records: id and reason.
    rejected: tuple[tuple[str, str], ...]

    @property
    def num_bad(self) -> int:
        """Records that cannot be used."""
        return sum(self.faults.values())


def inspect(data: DataConfig, prompter: Prompter | None) -> Iterator[Inspected]:
    """All splits of all domains; every picture is decoded. Raises `UserError` on files that cannot be read."""
    source = sources.of(data)
    for split in SPLITS:
        for domain in source.domains(split):
            rows = vetting.plain(source.load(domain, split))
            yield _inspected(domain, split, rows, prompter, data.max_length)


def kind_of(fault: str) -> str:
    """The part of a fault that many records share."""
    return MISSING if fault == MISSING else re.split(r"[:\d'\"]", fault, maxsplit=1)[0].strip()


def _inspected(
    domain: str, split: str, rows: datasets.Dataset, prompter: Prompter | None, max_length: int
) -> Inspected:
    found = vetting.vet(rows, prompter, _NO_LIMIT)
    good = [i for i, verdict in enumerate(found) if not verdict.fault]
    bad = [i for i, verdict in enumerate(found) if verdict.fault]
    chosen = [good[k * len(good) // _NUM_EXAMPLES] for k in range(min(_NUM_EXAMPLES, len(good)))]
    return Inspected(
        domain=domain,
        split=split,
        num_records=len(rows),
        faults=dict(Counter(kind_of(found[i].fault) for i in bad).most_common()),
        num_duplicates=len(good) - len({found[i].digest for i in good}),
        lengths=_percentiles([found[i] for i in good]) if prompter else {},
        num_too_long=sum(found[i].length > max_length for i in good),
        examples=tuple(_example(dict(rows[i])) for i in dict.fromkeys(chosen)),
        rejected=tuple((str(rows[i]["id"]), found[i].fault) for i in bad[:_NUM_REJECTED]),
    )


def _percentiles(found: Sequence[Verdict]) -> dict[int, int]:
    """Lengths that so many per cent of the records do not exceed."""
    lengths = [verdict.length for verdict in found]
    if not lengths:
        return {}
    return {p: int(np.percentile(lengths, p, method="inverted_cdf")) for p in PERCENTILES}


def _example(row: Mapping[str, Any]) -> Example:
    turns = vetting.turns_of(row)
    return Example(
        id=str(row["id"]),
        pictures=tuple(thumbnail(images.read(image)) for image in vetting.images_of(row)),
        system=row.get("system", ""),
        turns=tuple((turn.question, turn.answer) for turn in turns),
        answers=tuple(row.get("answers") or [turns[-1].answer]),
    )


def thumbnail(data: bytes) -> str:
    """A small JPEG of an image as a data URI."""
    picture = Image.fromarray(images.decode(data))
    picture.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
