"""Rows as a memory-mapped Arrow file in the cache: written once, in batches, and renamed when it is whole."""

import fcntl
import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from workloads.data.cache import ENVIRONMENT_KEY
from workloads.data.rows import ROW, Row
from workloads.errors import UserError, reason_of

# A batch is written at so many rows, or bytes of images.
_BATCH, _BATCH_BYTES = 1000, 32_000_000


def dataset(path: Path, rows: Callable[[], Iterable[Row]]) -> datasets.Dataset:
    """The rows in `path`, written there first when nobody has; processes that ask at once wait for one.

    A repeated id gets its place in the file behind it. Raises `UserError` when the cache cannot be written.
    """
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path):
                if not path.is_file():
                    _write(path, rows())
        except OSError as error:
            reason = f"cannot write in {path.parent}: {reason_of(error)}; name a folder with room"
            raise UserError(f"{ENVIRONMENT_KEY}: {reason}") from None
    return datasets.Dataset.from_file(str(path))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock beside `path`; others wait."""
    with path.with_name(f".{path.name}.lock").open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def num_usable(rows: datasets.Dataset) -> int:
    """Rows without a fault."""
    usable = pc.sum(pc.equal(rows.data.column("fault"), ""))  # pyright: ignore[reportAttributeAccessIssue]
    return int(usable.as_py() or 0)


def _write(path: Path, rows: Iterable[Row]) -> None:
    schema = ROW.arrow_schema
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".building-") as folder:
        partial = Path(folder) / path.name
        with partial.open("wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in batches(_distinct(rows)):
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
        partial.replace(path)


def batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows in order, so many together as are written at once."""
    batch: list[Row] = []
    num_bytes = 0
    for row in rows:
        batch.append(row)
        num_bytes += sum(len(image["bytes"] or b"") for image in row["images"])
        if len(batch) == _BATCH or num_bytes > _BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _distinct(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows with ids of their own: predictions are told apart by them."""
    seen: set[bytes] = set()
    for position, row in enumerate(rows):
        name = row["id"]
        while (key := hashlib.blake2b(name.encode(), digest_size=8).digest()) in seen:
            name = f"{name}#{position}"
        seen.add(key)
        yield row if name == row["id"] else {**row, "id": name}
