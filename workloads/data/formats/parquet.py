"""Parquet as the Hugging Face Hub keeps it: images as structs of bytes and path, or as bytes, beside their text.

A split is a file, a folder of `*.parquet` files, or a pattern. `columns` says what a column is called there when its
name is not ours (`workloads.data.tables`).
"""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from workloads.data import tables
from workloads.data.formats import Part
from workloads.data.rows import Row
from workloads.errors import UserError

VERSION = "1"
# Records in memory at once; they hold their images.
_BATCH = 64


def files(part: Part) -> list[Path]:
    """The Parquet files of the split in the order of their names."""
    part.refuse("annotations", "name", "subset")
    if any(sign in part.named for sign in "*?["):
        found = sorted(part.root.glob(part.named))
    else:
        path = part.file()
        found = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not found:
        raise UserError(f"data.domains.{part.domain}.{part.split}: {part.named!r}: no Parquet files there")
    return found


def rows(part: Part) -> Iterator[Row]:
    """The rows of all files, file by file."""
    position, folder = 0, part.images
    for path in files(part):
        try:
            with parquet.ParquetFile(path) as file:
                columns = tables.chosen(part, file.schema_arrow.names)
                for batch in file.iter_batches(_BATCH, columns=list(dict.fromkeys(columns.values()))):
                    for record in tables.records(batch):
                        yield tables.row_under(columns, record, position, folder)
                        position += 1
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: not readable as Parquet: {' '.join(str(error).split())}") from None
