"""The stream `pocket_tasks` as a data source: eight tasks to train on, and two more that are only evaluated."""

from collections.abc import Sequence
from pathlib import Path

import datasets

from workloads.data.cache import cache_dir
from workloads.data.hashes import hash_files
from workloads.data.pocket import assets
from workloads.data.pocket_tasks import NEVER_TRAINED, TRAINED, TYPES
from workloads.data.pocket_tasks.pool import pool

VERSION = "1"
# Samples of one task in each split.
SIZES = {"train": 2000, "val": 300, "test": 300}
_CODE = Path(__file__).parents[1] / "pocket_tasks"


def available(split: str) -> dict[str, int]:
    """Task -> number of samples in `split`; those never trained have no `train`."""
    names = TRAINED if split == "train" else (*TRAINED, *NEVER_TRAINED)
    return dict.fromkeys(names, SIZES[split])


def files() -> list[Path]:
    """All that the samples follow from: the packaged pictures and texts, and the code that composes them."""
    code = [*sorted(Path(assets.__file__).parent.glob("*.py")), *sorted(_CODE.glob("*.py"))]
    return [*(assets.FOLDER / name for name in assets.FILES), *code, Path(__file__)]


def load(domain: str, split: str, types: Sequence[str] = TYPES) -> datasets.Dataset:
    """All samples of a task and split, asked in these types of wording; `question_type` is the type."""
    name = f"{domain}-{split}-{'-'.join(types)}-{VERSION}-{hash_files(files())}.arrow"
    return pool(domain, split, SIZES[split], types, cache_dir() / "pocket_tasks" / name)
