"""Pools: a source's samples of one domain and split, vetted once; bad samples are counted, named, set aside."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch import Tensor

from workloads.config import DataConfig
from workloads.data import sources, vetting
from workloads.data.cache import cache_dir
from workloads.data.features import Features
from workloads.data.images import decode, read
from workloads.data.mixture import Slot
from workloads.data.rows import IMAGE
from workloads.data.vetting import images_of, turns_of
from workloads.errors import UserError
from workloads.llava.prompt import Prompter, Turn


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A sample that is not used, and why."""

    id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One decoded sample: a conversation of at least one turn over any number of images."""

    id: str
    domain: str
    # uint8 RGB, in the order of their places in the questions; empty where features stand for the image.
    images_HWC: tuple[np.ndarray, ...]
    system: str = ""
    turns: tuple[Turn, ...]
    # References that the answer to the last turn is scored against.
    answers: tuple[str, ...]
    question_type: str
    # What the vision tower says of the one image, where that is cached.
    features_LPD: Tensor | None = None
    # The task that the sample belongs to; empty: its domain.
    task: str = ""

    @property
    def question(self) -> str:
        """The last turn's question, without the places of images."""
        return asked(self.turns)

    @property
    def answer(self) -> str:
        """The last turn's answer."""
        return self.turns[-1].answer


@dataclass(frozen=True, kw_only=True)
class Pool:
    """All samples of one domain and split; `accepted` holds the usable indices."""

    # Names what the samples are and how they were vetted.
    key: str
    domain: str
    rows: datasets.Dataset
    accepted: list[int]
    rejected: list[Rejected]
    # Hash of every sample's decoded pixels and text; empty for a rejected one.
    digests: list[str]
    # Tokens of every sample; 0 for a rejected one.
    lengths: Sequence[int] = ()
    # Every image is replaced by mid-grey: the blind baseline.
    blind: bool = False
    # What the vision tower says of the images, where that is cached; the images are not decoded then.
    features: Features | None = None
    # The task that its samples belong to; empty: the domain.
    task: str = ""

    def sample(self, index: int) -> Sample:
        """Sample `index`, decoded; raises `UserError` when an image cannot be read any more."""
        row: dict[str, Any] = self.rows[index]
        turns = turns_of(row)
        images = () if self.features else tuple(self._image(row["id"], image) for image in images_of(row))
        return Sample(
            id=row["id"],
            domain=self.domain,
            images_HWC=images,
            system=row.get("system", ""),
            turns=turns,
            answers=tuple(row.get("answers") or [turns[-1].answer]),
            question_type=row["question_type"],
            features_LPD=self.features.read(index) if self.features else None,
            task=self.task,
        )

    def _image(self, name: str, image: Mapping[str, Any]) -> np.ndarray:
        try:
            image_HWC = decode(read(image))
        except ValueError as error:
            reason = f"{error}; it could be read when it was vetted"
            raise UserError(f"data: {self.domain} {name}: {reason}") from None
        return np.full_like(image_HWC, 128) if self.blind else image_HWC


def asked(turns: Sequence[Turn]) -> str:
    """The last turn's question, without the places of images."""
    return turns[-1].question.replace(IMAGE, "").strip()


def last_turns(rows: datasets.Dataset) -> tuple[list[str], list[str]]:
    """Question and answer of every row's last turn; images are not read."""
    if "turns" not in rows.column_names:
        texts = rows.select_columns(["question", "answer"])
        return list(texts["question"]), list(texts["answer"])
    turns = [turns_of(dict(row)) for row in rows.select_columns(["turns"]) if dict(row)["turns"]]
    return [asked(each) for each in turns], [each[-1].answer for each in turns]


def load(data: DataConfig, domain: str, split: str, prompter: Prompter) -> Pool:
    """A vetted pool; verdicts are cached under a key of the samples, their pictures' place and the tokenizer.

    Raises `UserError` when the cache cannot be written.
    """
    rows = vetting.plain(sources.of(data).load(domain, split))
    key = _key(data, domain, split, prompter)
    verdicts = vetting.verdicts(_kept(key), rows, prompter, data.max_length)
    faults = [(i, verdict.fault) for i, verdict in enumerate(verdicts) if verdict.fault]
    return Pool(
        key=f"{key}-blind" if data.blind else key,
        domain=domain,
        rows=rows,
        accepted=[i for i, verdict in enumerate(verdicts) if not verdict.fault],
        rejected=[Rejected(id=str(rows[i]["id"]), reason=fault) for i, fault in faults],
        digests=[verdict.digest for verdict in verdicts],
        lengths=[verdict.length for verdict in verdicts],
        blind=data.blind,
    )


def is_vetted(data: DataConfig, domain: str, split: str, prompter: Prompter) -> bool:
    """Whether the verdicts on a pool are in the cache."""
    return _kept(_key(data, domain, split, prompter)).is_file()


def _key(data: DataConfig, domain: str, split: str, prompter: Prompter) -> str:
    """Names the samples of a domain and split, their pictures' place and the tokenizer."""
    source = sources.of(data)
    held = f"{source.digest(domain, split)} {source.place(domain)}".strip()
    settings = f"{held} {prompter.version} {data.max_length}".encode()
    return f"{data.source}-{domain}-{split}-{hashlib.sha256(settings).hexdigest()[:16]}"


def _kept(key: str) -> Path:
    return cache_dir() / "verdicts" / f"{key}.json"


def content_hash(pools: Mapping[str, Pool], slots: Iterable[Slot]) -> str:
    """Hash over the decoded samples of a stream, in order."""
    total = hashlib.sha256()
    for slot in slots:
        total.update(pools[slot.domain].digests[slot.index].encode())
    return total.hexdigest()[:16]


def check_rejected(pools: list[Pool], max_rejected: float) -> list[Rejected]:
    """All rejected samples; raises `UserError` when their share is above `max_rejected`."""
    rejected = [bad for pool in pools for bad in pool.rejected]
    total = sum(len(pool.rows) for pool in pools)
    if len(rejected) > max_rejected * total:
        first = rejected[0]
        raise UserError(
            f"data.max_rejected: {len(rejected)} of {total} samples are bad, more than {max_rejected:.2%}; "
            f"the first is {first.id}: {first.reason}"
        )
    return rejected
