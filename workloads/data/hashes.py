"""Hashes of files: over their contents; a file that did not change is read once on a machine.

Digests of large files are kept in the cache under path, size, inode and times of change. What is kept is believed
only when it is whole; a cache that cannot be read or written costs time and nothing else.
"""

import hashlib
import json
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from os import stat_result
from pathlib import Path

from workloads import record
from workloads.data.cache import cache_dir

# Bytes from which reading a digest is faster than hashing the file.
_LARGE = 1_000_000
# Seconds since its last change from which a file's times tell that it has not changed: clocks of files tick.
_SETTLED = 2.0


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
    place = path.absolute()
    return _digest(place, _state(place.stat()))


def _state(found: stat_result) -> tuple[int, ...]:
    """What changes with a file: size, inode, and the times of its content and of its entry, in nanoseconds.

    The second time cannot be set back, as copies and archives do with the first.
    """
    return (found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns)


@cache
def _digest(path: Path, state: tuple[int, ...]) -> str:
    """Hash of one file in the given state, so that a changed file is read again."""
    if state[0] < _LARGE:
        return _read(path)
    kept = cache_dir() / "digests" / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
    key = json.dumps([str(path), *state])
    found = _kept(kept, key)
    if not found:
        # Before the file is read: a change in the same tick as its times may come while that takes.
        settled = time.time() - max(state[2:]) / 1e9 > _SETTLED
        found = _read(path)
        if settled and _state(path.stat()) == state:
            with suppress(OSError):  # the file is read again next time
                record.write_json(kept, {"key": key, "digest": found, "check": _check(key, found)})
    return found


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _kept(path: Path, key: str) -> str:
    """The digest that is kept under `key`; empty when there is none, or one that is not whole."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        digest = str(tree["digest"])
        return digest if tree["key"] == key and tree["check"] == _check(key, digest) else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _check(key: str, digest: str) -> str:
    return hashlib.sha256(f"{key} {digest}".encode()).hexdigest()
