"""Sets of the Hugging Face Hub by name, or a set's folder on disk: `name`, its `subset`, and names of its splits.

`datasets` downloads and keeps them; no set brings code. What identifies a set is the content of its Arrow files, and of
a slice of a split what it takes of them. A process asks for a split once: its rows are those of its identity, also when
the set changes on the hub or on disk.
"""

import functools
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa
from huggingface_hub.constants import HF_HUB_CACHE

from workloads.data import tables
from workloads.data.formats import Part
from workloads.data.rows import Row
from workloads.errors import UserError, require

VERSION = "1"
# Records in memory at once; they hold their images.
_BATCH = 64


def files(part: Part) -> list[Path]:
    """The Arrow files that `datasets` keeps of the split."""
    part.refuse("annotations", "images")
    return [Path(file["filename"]) for file in _loaded(part).cache_files]


def extent(part: Part) -> str:
    """What the split takes of its files, where that is not all: `train[:80%]`."""
    return part.named if "[" in part.named else ""


def rows(part: Part) -> Iterator[Row]:
    """The rows of the split; images are not decoded."""
    found, folder = _loaded(part), _folder(part) or Path(HF_HUB_CACHE).resolve()
    columns = tables.chosen(part, found.column_names)
    read = found.select_columns(list(dict.fromkeys(columns.values()))).with_format("arrow")
    position = 0
    for batch in read.iter(_BATCH):
        assert isinstance(batch, pa.Table)
        for record in tables.records(batch):
            yield tables.row_under(columns, record, position, folder)
            position += 1


def _folder(part: Part) -> Path | None:
    """The set's folder, where it is on disk."""
    path = part.root / Path(part.config.name).expanduser()
    return path.resolve() if path.is_dir() else None


def _loaded(part: Part) -> datasets.Dataset:
    """The split as `datasets` has it; raises `UserError` when it cannot be had."""
    config, key = part.config, f"data.domains.{part.domain}"
    require(bool(config.name), f"{key}.name", config.name, "name of a set on the hub, or its folder")
    where = str(_folder(part) or config.name)
    try:
        return _set(where, config.subset, part.named)
    except (
        Exception
    ) as error:  # of datasets, of the hub's client, of the file's format: they share no base class
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{key}.name: {config.name!r} ({part.named}) cannot be loaded: {reason}") from None


@functools.cache
def _set(where: str, subset: str, split: str) -> datasets.Dataset:
    """A split as it is kept: a cast would write a copy, whose content tells the folder that the set came from."""
    return datasets.load_dataset(where, subset or None, split=split)
