"""Features: one memory-mapped file of what the vision tower says of a pool's images, shared by all runs.

Every row has a stamp of its content, so that one that is missing or half written is found and made anew.

Shape letters: N images of the pool, L levels, P tokens of the tower (its class token included), D width.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_STAMP = np.dtype("<i8")


class Features:
    """Rows (L, P, D) by pool index, in files of a fixed size."""

    def __init__(self, folder: Path, num_rows: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Open the files in `folder`, or make them; what was never written takes no disk. Raises `OSError`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.rows, self.stamps = folder / "rows", folder / "stamps"
        size = int(np.prod(shape))
        self.row_bytes = size * dtype.itemsize
        for path, width in ((self.rows, self.row_bytes), (self.stamps, _STAMP.itemsize)):
            if not path.is_file() or path.stat().st_size < num_rows * width:
                with path.open("ab") as file:
                    file.truncate(num_rows * width)
        flat = torch.from_file(str(self.rows), shared=False, size=num_rows * size, dtype=dtype)
        self.rows_NLPD = flat.view(num_rows, *shape)

    def missing(self, indices: Sequence[int]) -> list[int]:
        """Those of `indices` that have no row, or one that its stamp does not fit."""
        stamps = np.fromfile(self.stamps, dtype=_STAMP)
        return [i for i in indices if stamps[i] == 0 or stamps[i] != _stamp(tensor_bytes(self.rows_NLPD[i]))]

    def read(self, index: int) -> Tensor:
        """The row (L, P, D) of a pool index that is not missing."""
        return self.rows_NLPD[index]

    def write(self, index: int, row_LPD: Tensor) -> None:
        """Keep one row, and then its stamp; raises `OSError` when the disk takes no more."""
        data = tensor_bytes(row_LPD)
        assert len(data) == self.row_bytes, "a row of another shape or dtype"
        for path, part in ((self.rows, data), (self.stamps, np.array(_stamp(data), _STAMP).tobytes())):
            with path.open("r+b") as file:
                file.seek(index * len(part))
                file.write(part)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The content of a tensor on CPU, whatever its dtype."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def _stamp(data: memoryview) -> int:
    """CRC-32 of a row and 1, so that 0 stands for no row."""
    return zlib.crc32(data) + 1
