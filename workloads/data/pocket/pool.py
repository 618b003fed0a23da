"""A domain's samples as an Arrow-backed data set, built once and shared by all processes of a machine."""

import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image

from workloads.data.pocket.assets import version
from workloads.data.pocket.composing import compose
from workloads.errors import UserError, require

FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "image": datasets.Image(),
        "question": datasets.Value("string"),
        "answer": datasets.Value("string"),
        "question_type": datasets.Value("string"),
        "sources": datasets.List(datasets.Value("string")),
    }
)
BATCH = 500


def _png(image_HWC: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _row(domain: str, split: str, seed: int, index: int) -> dict[str, object]:
    """Sample `index` with the one question that its picture was drawn for."""
    scene = compose(domain, split, seed, index)
    asked = next(pair for pair in scene.qa if pair.question_type == scene.focus)
    identity = f"{domain}-{split}-{seed}-{index}"
    return {
        "id": identity,
        "image": {"bytes": _png(scene.image), "path": f"{identity}.png"},
        "question": asked.question,
        "answer": asked.answer,
        "question_type": asked.question_type,
        "sources": list(scene.sources),
    }


def _batches(domain: str, split: str, size: int, seed: int) -> Iterator[pa.RecordBatch]:
    schema = FEATURES.arrow_schema
    for start in range(0, size, BATCH):
        rows = [_row(domain, split, seed, index) for index in range(start, min(start + BATCH, size))]
        yield pa.RecordBatch.from_pylist(rows, schema=schema)


def _build(path: Path, domain: str, split: str, size: int, seed: int) -> None:
    """Write the pool into a folder of its own, then rename: readers see a whole file or none."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".building-") as folder:
        partial = Path(folder) / path.name
        with partial.open("wb") as sink, pa.ipc.new_stream(sink, FEATURES.arrow_schema) as writer:
            for batch in _batches(domain, split, size, seed):
                writer.write_batch(batch)
        partial.replace(path)


def pool(domain: str, split: str, size: int, seed: int = 0, *, cache_dir: Path) -> datasets.Dataset:
    """The first `size` samples of a domain's split and seed, one question each, types in equal shares.

    Columns: id, image (PNG), question, answer, question_type, sources. A larger pool begins with the smaller
    one. Built at first use into `cache_dir`; any number of processes may ask for the same pool at once.
    Raises UserError for an unknown domain or split, a size below 1, a negative seed or an unwritable cache.
    """
    require(isinstance(size, int) and size >= 1, "size", size, "a pool holds at least 1 sample")
    compose(domain, split, seed, 0)  # refuses bad arguments before anything is written
    path = cache_dir / f"{domain}-{split}-{seed}-{size}-{version()}.arrow"
    if not path.is_file():
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            _build(path, domain, split, size, seed)
        except OSError as error:
            raise UserError(f"cache_dir: cannot write the data set to {cache_dir}: {error}") from error
    return datasets.Dataset.from_file(str(path))
