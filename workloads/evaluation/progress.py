"""What one worker has answered so far: its rows and running sums, kept batch by batch so that a killed run goes on.

The file is JSON lines: the layout that it was written under, then for each batch its rows and the sums after it.
Sums are written exactly, so that a run that goes on has the numbers of one that was never stopped.

Shape letters: L layers that route, E experts.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workloads.training import engine


class Progress:
    """One worker's share of the answers; with a `path`, it starts with the batches that all workers have there."""

    def __init__(self, domains: Sequence[str], path: Path | None, layout: str) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        # Domain -> sum of losses, supervised tokens.
        self.sums = {domain: [0.0, 0.0] for domain in domains}
        # Domain -> tokens on each expert.
        self.experts_LE: dict[str, Tensor] = {}
        kept = _read(path, layout) if path else []
        # Workers answer in step, so that all go on with the same batch.
        self.num_batches = min(engine.gather_objects(max(0, len(kept) - 1)))
        seconds = 0.0
        for tree, _ in kept[1 : self.num_batches + 1]:
            self.rows += tree["rows"]
            self.sums, seconds = tree["sums"], tree["seconds"]
            self.experts_LE = {d: torch.tensor(v, dtype=torch.float64) for d, v in tree["experts"].items()}
        if path:
            with path.open("ab") as file:
                file.truncate(kept[self.num_batches][1] if kept else 0)
            if not kept:
                _append(path, {"layout": layout})
        self._began = time.monotonic() - seconds

    @property
    def seconds(self) -> float:
        """Time taken so far, that of the runs before included."""
        return time.monotonic() - self._began

    def count(self, domain: str, load_LE: Tensor) -> None:
        """Add the tokens that one item of `domain` sends to each expert."""
        self.experts_LE[domain] = self.experts_LE.get(domain, torch.zeros_like(load_LE)) + load_LE

    def add(self, rows: list[dict[str, Any]]) -> None:
        """A batch is done: these are its rows, and the sums hold it."""
        self.rows += rows
        self.num_batches += 1
        if self.path:
            experts = {domain: load_LE.tolist() for domain, load_LE in self.experts_LE.items()}
            state = {"rows": rows, "sums": self.sums, "experts": experts, "seconds": self.seconds}
            _append(self.path, state)


def _append(path: Path, tree: Mapping[str, Any]) -> None:
    """Add a line in a single write, so that a kill leaves whole lines but for the last."""
    with path.open("ab") as file:
        file.write((json.dumps(tree) + "\n").encode())


def _read(path: Path, layout: str) -> list[tuple[dict[str, Any], int]]:
    """The whole lines of `path`, each with the place of its end; none when they were written under another layout."""
    found: list[tuple[dict[str, Any], int]] = []
    end = 0
    if not path.is_file():
        return found
    with path.open("rb") as file:
        for line in file:
            end += len(line)
            tree = _parsed(line)
            if tree is None or (not found and tree != {"layout": layout}):
                break
            found.append((tree, end))
    return found


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A line as it was written; None for one that a kill cut off."""
    if not line.endswith(b"\n"):
        return None
    try:
        return json.loads(line)
    except ValueError:
        return None
