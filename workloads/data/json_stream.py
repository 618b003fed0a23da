"""Records of a JSON or JSON Lines file, one at a time: memory follows the longest record, not the file.

What was whole before the file breaks off is kept. Bytes that are not UTF-8 become `NOT_UTF8`, so that the record
that holds them can be refused and those behind it are still read.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ijson

from workloads.data.rows import NOT_UTF8
from workloads.errors import UserError, reason_of

LINES = (".jsonl", ".ndjson")
MAX_DEPTH = 64
_CHUNK = 1 << 16
_ESCAPED = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Stands for a record that could not be read, and says why."""

    reason: str


def items(path: Path, key: str = "") -> Iterator[Any]:
    """The records of a list, each a plain value or a `Fault`.

    The list is the file itself, or stands in an object under `key`; a file of lines has one record in each.
    Raises `UserError` when the file cannot be read, holds no such list, or is no JSON from some place on.
    """
    try:
        with path.open("rb") as file:
            if path.suffix.lower() in LINES:
                yield from _of_lines(file)
            else:
                yield from _of_list(path, iter(lambda: file.read(_CHUNK), b""), key)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {reason_of(error)}") from None


def _of_lines(lines: Iterable[bytes]) -> Iterator[Any]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield json.loads(_clean(line.decode("utf-8-sig", "surrogateescape")))
            except (ValueError, RecursionError):
                yield Fault(reason=f"line {number}: not JSON, or cut off")


def _of_list(path: Path, chunks: Iterable[bytes], key: str) -> Iterator[Any]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    events: Any = ijson.sendable_list()
    parser = ijson.basic_parse_coro(events)
    found = _List(key)
    done = num_bytes = 0
    problem = ""
    for chunk in chunks:
        num_bytes += len(chunk)
        data = _clean(decoder.decode(chunk)).encode()
        try:
            if data:  # nothing would tell the parser that the file ends
                parser.send(data)
        except ijson.JSONError as error:
            problem = _first_line(error)
        for value in found.take(events):
            done += 1
            yield value
        del events[:]
        if problem:
            where = f"after record {done}, before byte {num_bytes}"
            raise UserError(f"{path}: not JSON {where}: {problem}; records behind that cannot be told apart")
    try:
        parser.close()
    except ijson.JSONError:
        yield Fault(reason=f"file: cut off at byte {num_bytes}, after record {done}")
    else:
        if not found.begun:
            raise UserError(f"{path}: holds no list of records{f' under {key!r}' if key else ''}")


def _clean(decoded: str) -> str:
    """Text with `NOT_UTF8` for each byte that was none."""
    try:
        decoded.encode()
    except UnicodeEncodeError:
        return _ESCAPED.sub(NOT_UTF8, decoded)
    return decoded


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0].split("\\n", 1)[0].removeprefix("b'")


class _List:
    """Puts the events of a JSON parser together into the values of one list."""

    def __init__(self, key: str) -> None:
        self.key = key
        # Open containers before the list begins, and the key that was read last.
        self.outside: list[str] = []
        self.last_key = ""
        self.begun = self.ended = False
        self.open: list[Any] = []
        self.keys: list[str] = []
        self.value: Any = None
        # Containers that are open beyond the greatest depth.
        self.num_too_deep = 0
        self.too_deep = False

    def take(self, events: Iterable[tuple[str, Any]]) -> Iterator[Any]:
        """The values that these events complete."""
        for event, value in events:
            if not self.begun or self.ended:
                self._look(event, value)
            elif event == "end_array" and not self.open and not self.num_too_deep:
                self.ended = True
            elif self._add(event, value):
                yield self._completed()

    def _look(self, event: str, value: Any) -> None:
        """Wait for the list; what stands around it is not kept."""
        here = self.outside == (["start_map"] if self.key else [])
        if event == "start_array" and here and not self.begun and self.last_key == self.key:
            self.begun = True
        elif event.startswith("start"):
            self.outside.append(event)
        elif event.startswith("end") and self.outside:
            self.outside.pop()
        elif event == "map_key":
            self.last_key = value if len(self.outside) == 1 else self.last_key

    def _add(self, event: str, value: Any) -> bool:
        """Add one event to the value that is open; whether that completes it."""
        if event in ("start_map", "start_array"):
            if self.num_too_deep or len(self.open) == MAX_DEPTH:
                self.num_too_deep += 1
                self.too_deep = True
                return False
            self.open.append({} if event == "start_map" else [])
            self.keys.append("")
            return False
        if event in ("end_map", "end_array"):
            if self.num_too_deep:
                self.num_too_deep -= 1
                return False
            self.keys.pop()
            return self._put(self.open.pop())
        if self.num_too_deep:
            return False
        if event == "map_key":
            self.keys[-1] = value
            return False
        return self._put(value)

    def _put(self, value: Any) -> bool:
        """Put a value into the container around it; whether it stands in the list itself."""
        if not self.open:
            self.value = value
            return True
        around = self.open[-1]
        if isinstance(around, list):
            around.append(value)
        else:
            around[self.keys[-1]] = value
        return False

    def _completed(self) -> Any:
        deep, self.too_deep = self.too_deep, False
        value, self.value = self.value, None
        return Fault(reason=f"nested deeper than {MAX_DEPTH}") if deep else value
