"""Images of rows: paths that stay inside their folder, files read only there, bytes decoded or refused.

A row's path is `FOLDER/./NAME`, as rsync writes paths whose part after the dot counts: every reader can tell that
a symbolic link leads out of FOLDER.
"""

import io
import os
import posixpath
import stat
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from workloads.errors import reason_of

MAX_PIXELS = 64_000_000
MAX_BYTES = 256_000_000
FORMATS = ("PNG", "JPEG", "GIF", "WEBP")
_MARK = "/./"
# `warnings.catch_warnings` changes the process, and images are decoded in threads.
_OPENING = threading.Lock()


def placed(folder: Path, name: str) -> dict[str, Any]:
    """The image `name` of `folder` as a row holds it; raises `ValueError` when the name leads elsewhere.

    `folder` is resolved already. Whether the file exists is found when it is read.
    """
    if not name or "\0" in name:
        raise ValueError(f"image: {name!r} is no path")
    if name.startswith("/") or PureWindowsPath(name).drive:
        raise ValueError(f"image: {name!r} is absolute")
    clean = posixpath.normpath(name)
    if clean in (".", "..") or clean.startswith("../"):
        raise ValueError(f"image: {name!r} leaves the image folder")
    return {"bytes": None, "path": f"{folder}{_MARK}{clean}"}


def read(image: Mapping[str, Any]) -> bytes:
    """The bytes of an image of a row; raises `ValueError` when there are none, or when they are not its own."""
    if image["bytes"]:
        return bytes(image["bytes"])
    if not image["path"]:
        raise ValueError("image: missing")
    folder, mark, _ = image["path"].partition(_MARK)
    try:
        real = Path(os.path.realpath(image["path"]))
        if mark and not real.is_relative_to(os.path.realpath(folder)):
            raise ValueError("image: a symbolic link leaves the image folder")
        state = real.stat()
        if not stat.S_ISREG(state.st_mode):
            raise ValueError("image: not a file")
        if state.st_size > MAX_BYTES:
            raise ValueError(f"image: {state.st_size} bytes, at most {MAX_BYTES}")
        return real.read_bytes()
    except FileNotFoundError:
        raise ValueError("image: missing") from None
    except OSError as error:
        raise ValueError(f"image: cannot be read: {reason_of(error)}") from None


def decode(data: bytes) -> np.ndarray:
    """Bytes in one of `FORMATS` to uint8 RGB (H, W, 3), of a moving picture the first frame.

    Raises `ValueError` on anything that is not a whole image.
    """
    try:
        return np.asarray(_opened(data).convert("RGB"))
    except Exception as error:  # on malformed files Pillow raises many kinds, which share no base class
        raise ValueError(f"image: {error}") from None


def size(data: bytes) -> tuple[int, int]:
    """Height and width by the header alone; raises `ValueError` when it is not one that `decode` would take."""
    try:
        image = _opened(data)
    except Exception as error:
        raise ValueError(f"image: {error}") from None
    return image.height, image.width


def _opened(data: bytes) -> Image.Image:
    with _OPENING, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:  # its words hold an address of memory
            raise ValueError(f"none of {', '.join(FORMATS)}, or broken in its header") from None
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, at most {MAX_PIXELS}")
    return image
