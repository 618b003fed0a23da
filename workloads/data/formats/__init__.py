"""Formats of instruction data, one file each: how the records of one split of one domain become rows.

A format has a `VERSION`, `files(part)`, whose contents decide the rows, and `rows(part)`, a stream of
`workloads.data.rows` in which bad records stand as faults; where a split may be a slice of its files, `extent(part)`
tells which.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workloads.config import DomainConfig
from workloads.errors import UserError, require


@dataclass(frozen=True, kw_only=True)
class Part:
    """One split of one domain, with the places of its files."""

    domain: str
    split: str
    config: DomainConfig
    root: Path

    @property
    def named(self) -> str:
        """What the configuration says of the split: a path, or a name."""
        return str(getattr(self.config, self.split))

    def file(self, key: str = "") -> Path:
        """The existing file or folder under `key`, by default the split's own; raises `UserError` otherwise."""
        key = key or self.split
        named = str(getattr(self.config, key))
        path = self.root / Path(named).expanduser()
        if not path.exists():
            raise UserError(f"data.domains.{self.domain}.{key}: {named!r}: no such file in {self._place}")
        return path

    @property
    def images(self) -> Path:
        """The folder that image paths start from, resolved."""
        folder = self.root / Path(self.config.images).expanduser()
        if not folder.is_dir():
            key, named = f"data.domains.{self.domain}.images", self.config.images
            raise UserError(f"{key}: {named!r}: no such folder in {self._place}")
        return folder.resolve()

    @property
    def _place(self) -> str:
        """The root as messages name it."""
        here = self.root == Path()
        return "the working folder; data.root is not set" if here else str(self.root)

    def refuse(self, *keys: str) -> None:
        """Raise `UserError` when one of `keys` is given: this format does not read it."""
        for key in keys:
            value = getattr(self.config, key)
            allowed = f"format {self.config.format} does not read it"
            require(not value, f"data.domains.{self.domain}.{key}", value, allowed)


def names() -> list[str]:
    """Names of all formats: the files of this folder."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__")


def find(name: str, key: str = "format") -> Any:
    """The module of a format; raises `UserError` about `key` that names the nearest when there is none."""
    require(name in names(), key, name, f"formats: {', '.join(names())}", names())
    return importlib.import_module(f"workloads.data.formats.{name}")
