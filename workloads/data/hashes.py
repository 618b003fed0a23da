"""Hashes of files: over their contents; a file that did not change is read once."""

import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path


def hash_files(paths: Iterable[Path]) -> str:
    """16 hex digits over names and contents, in the order given."""
    total = hashlib.sha256()
    for path in paths:
        total.update(path.name.encode() + b"\0" + bytes.fromhex(sha256(path)))
    return total.hexdigest()[:16]


def hash_contents(paths: Iterable[Path]) -> str:
    """16 hex digits over contents alone, in the order given: names and places are free."""
    total = hashlib.sha256()
    for path in paths:
        total.update(bytes.fromhex(sha256(path)))
    return total.hexdigest()[:16]


def sha256(path: Path) -> str:
    """SHA-256 of one file in hex digits; an unchanged file is read once."""
    state = path.stat()
    return _digest(path, state.st_size, state.st_mtime_ns).hex()


@cache
def _digest(path: Path, size: int, changed: int) -> bytes:
    """Hash of one file; size and time of change are the cache's key, so that a changed file is read again."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
