"""The embedded benchmark `pocket` as a data source: three domains, composed from packaged pictures at first use."""

from pathlib import Path

import datasets

from workloads.data.cache import cache_dir
from workloads.data.pocket import DOMAINS, assets
from workloads.data.pocket.pool import pool

VERSION = "1"
# Samples of one domain in each split.
SIZES = {"train": 8000, "val": 600, "test": 600}


def available(split: str) -> dict[str, int]:
    """Domain -> number of samples in `split`."""
    return dict.fromkeys(DOMAINS, SIZES[split])


def files() -> list[Path]:
    """All that the samples follow from: the packaged pictures and texts, and the code that composes them."""
    code = sorted(Path(assets.__file__).parent.glob("*.py"))
    return [*(assets.FOLDER / name for name in assets.FILES), *code, Path(__file__)]


def load(domain: str, split: str) -> datasets.Dataset:
    """All samples of a domain and split: id, image, question, answer, question_type, sources."""
    return pool(domain, split, SIZES[split], cache_dir=cache_dir() / "pocket")
