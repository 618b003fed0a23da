"""The stream `pocket_tasks` with its training questions in the plain wording alone; it is evaluated on all types.

Beside `pocket_tasks`, on the same pictures and answers, it tells what one type of instruction leaves to be learned.
"""

from pathlib import Path

import datasets

from workloads.data.pocket_tasks import TYPES
from workloads.data.sources import pocket_tasks
from workloads.data.sources.pocket_tasks import VERSION, available

__all__ = ["VERSION", "available", "files", "load"]


def files() -> list[Path]:
    """All that the samples follow from."""
    return [*pocket_tasks.files(), Path(__file__)]


def load(domain: str, split: str) -> datasets.Dataset:
    """All samples of a task and split; those of `train` are asked plainly."""
    return pocket_tasks.load(domain, split, ("plain",) if split == "train" else TYPES)
