"""A task's samples as an Arrow-backed data set, built once and shared by all processes of a machine."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from workloads.data import arrow, rows
from workloads.data.pocket_tasks.composing import compose


def _png(image_HWC: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _rows(task: str, split: str, size: int, types: Sequence[str]) -> Iterator[rows.Row]:
    for index in range(size):
        asked = compose(task, split, 0, index, types)
        name = f"{task}-{split}-{index}"
        yield rows.row(
            name,
            [{"bytes": _png(asked.image), "path": f"{name}.png"}],
            [(asked.question, asked.answer)],
            question_type=asked.question_type,
        )


def pool(task: str, split: str, size: int, types: Sequence[str], path: Path) -> datasets.Dataset:
    """The first `size` samples of a task and split as `workloads.data.rows`, kept in `path`; types in equal shares.

    Any number of processes may ask for the same pool at once; `path` has to name all that decides its content.
    Raises UserError for an unknown task, split or type, or when the cache cannot be written.
    """
    compose(task, split, 0, 0, types)  # refuses bad arguments before anything is written
    return arrow.dataset(path, lambda: _rows(task, split, size, types))
