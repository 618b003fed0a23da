"""Pools: a source's samples of one domain and split, vetted once; bad samples are counted, named, set aside."""

import hashlib
import io
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image
from torch import Tensor

from workloads import record
from workloads.data import sources
from workloads.data.cache import ENVIRONMENT_KEY, cache_dir
from workloads.data.features import Features
from workloads.data.mixture import Slot
from workloads.errors import UserError
from workloads.identity import data_hash
from workloads.llava.prompt import IMAGE, Prompter, Turn

MAX_PIXELS = 64_000_000


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A sample that is not used, and why."""

    id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What vetting found of one sample: a fault, or the hash of its decoded content."""

    id: str
    fault: str = ""
    digest: str = ""


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
    # Every image is replaced by mid-grey: the blind baseline.
    blind: bool = False
    # What the vision tower says of the images, where that is cached; the images are not decoded then.
    features: Features | None = None

    def sample(self, index: int) -> Sample:
        """Sample `index`, decoded."""
        row: dict[str, Any] = self.rows[index]
        turns = turns_of(row)
        images = () if self.features else tuple(self._image(image) for image in images_of(row))
        return Sample(
            id=row["id"],
            domain=self.domain,
            images_HWC=images,
            system=row.get("system", ""),
            turns=turns,
            answers=tuple(row.get("answers") or [turns[-1].answer]),
            question_type=row["question_type"],
            features_LPD=self.features.read(index) if self.features else None,
        )

    def _image(self, image: Mapping[str, Any]) -> np.ndarray:
        image_HWC = decode(image["bytes"] or Path(image["path"]).read_bytes())
        return np.full_like(image_HWC, 128) if self.blind else image_HWC


def turns_of(row: Mapping[str, Any]) -> tuple[Turn, ...]:
    """The turns of a row; the short form (image, question, answer) is one turn with its image in front."""
    if "turns" not in row:
        return (Turn(question=f"{IMAGE}\n{row['question']}", answer=row["answer"]),)
    return tuple(Turn(question=turn["question"], answer=turn["answer"]) for turn in row["turns"])


def images_of(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The images of a row in either form, each with its bytes or its path."""
    return row["images"] if "images" in row else [row["image"]]


def asked(turns: Sequence[Turn]) -> str:
    """The last turn's question, without the places of images."""
    return turns[-1].question.replace(IMAGE, "").strip()


def last_turns(rows: datasets.Dataset) -> tuple[list[str], list[str]]:
    """Question and answer of every row's last turn; images are not read."""
    if "turns" not in rows.column_names:
        texts = rows.select_columns(["question", "answer"])
        return list(texts["question"]), list(texts["answer"])
    turns = [turns_of(dict(row)) for row in rows.select_columns(["turns"])]
    return [asked(each) for each in turns], [each[-1].answer for each in turns]


def decode(data: bytes) -> np.ndarray:
    """PNG or JPEG bytes to uint8 RGB (H, W, 3); raises `ValueError` on anything that is not a whole image."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"image of {image.width} x {image.height} pixels")
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"image: {error}") from None


def load(
    source_name: str, domain: str, split: str, prompter: Prompter, max_length: int, blind: bool = False
) -> Pool:
    """A vetted pool; verdicts and digests are cached under a key of the data and the tokenizer.

    Raises `UserError` when the cache cannot be written.
    """
    rows: datasets.Dataset = sources.find(source_name).load(domain, split)
    rows = rows.cast_column("image", datasets.Image(decode=False))
    settings = f"{data_hash(source_name)} {prompter.version} {max_length}".encode()
    key = f"{source_name}-{domain}-{split}-{hashlib.sha256(settings).hexdigest()[:16]}"
    path = cache_dir() / "vetted" / f"{key}.json"
    if not path.is_file():
        _keep(path, vet(rows, prompter, max_length))
    verdicts = [Verdict(**tree) for tree in json.loads(path.read_text(encoding="utf-8"))]
    return Pool(
        key=f"{key}-blind" if blind else key,
        domain=domain,
        rows=rows,
        accepted=[i for i, verdict in enumerate(verdicts) if not verdict.fault],
        rejected=[Rejected(id=v.id, reason=v.fault) for v in verdicts if v.fault],
        digests=[verdict.digest for verdict in verdicts],
        blind=blind,
    )


def _keep(path: Path, verdicts: list[Verdict]) -> None:
    try:
        record.write_json(path, [asdict(verdict) for verdict in verdicts])
    except OSError as error:
        reason = f"cannot write in {path.parent}: {error.strerror}; name a folder that can be written"
        raise UserError(f"{ENVIRONMENT_KEY}: {reason}") from None


def vet(rows: datasets.Dataset, prompter: Prompter, max_length: int) -> list[Verdict]:
    """The verdict on every sample: a bad image, an empty answer and too many tokens are faults."""
    return [_verdict(dict(row), prompter, max_length) for row in rows]


def _verdict(row: dict[str, Any], prompter: Prompter, max_length: int) -> Verdict:
    name, image = str(row["id"]), row["image"] or {}
    if not image.get("bytes"):
        return Verdict(id=name, fault="image: missing")
    if not row["answer"].strip():
        return Verdict(id=name, fault="answer: empty")
    try:
        length = len(prompter.encode(turns_of(row)).ids)
        if length > max_length:
            return Verdict(id=name, fault=f"length: {length} tokens, at most {max_length}")
        pixels = decode(image["bytes"])
    except ValueError as error:
        return Verdict(id=name, fault=str(error))
    content = f"{row['question']}\0{row['answer']}\0".encode() + pixels.tobytes()
    return Verdict(id=name, digest=hashlib.sha256(content).hexdigest()[:16])


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
