"""The source `files`: domains whose records lie on disk or on the hub, each in a format of workloads/data/formats.

Records become rows in an Arrow file of the cache, once for each content of their files; images stay where they are.
The identity of a split is its format's version, the content of its files (and what it takes of them, where that is
not all) and the names of its columns; the content of image files is hashed picture by picture when a pool is vetted,
and enters a run's stream and evaluation hashes.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import datasets

from workloads.data import arrow, formats
from workloads.data.cache import cache_dir
from workloads.data.formats import Part
from workloads.data.hashes import hash_contents
from workloads.errors import require, require_known
from workloads.schema import DataConfig, DomainConfig

VERSION = "2"


def of(data: DataConfig) -> "Files":
    """The source that `data` describes; raises `UserError` on unknown formats, scorers and forms."""
    from workloads.evaluation import forms, scorers

    require(bool(data.domains), "data.domains", data.domains, "name at least one domain with its format")
    for name, domain in data.domains.items():
        formats.find(domain.format, f"data.domains.{name}.format")
        scorers.find(domain.scorer, f"data.domains.{name}.scorer")
        forms.check(domain.form, f"data.domains.{name}.form")
    return Files(data=data)


@dataclass(frozen=True, kw_only=True)
class Files:
    """The domains of `data.domains`."""

    data: DataConfig

    def domains(self, split: str) -> list[str]:
        """Names of the domains that have this split."""
        return sorted(name for name, domain in self.data.domains.items() if getattr(domain, split))

    def size(self, domain: str, split: str) -> int:
        """Number of usable records; converts them when they were not yet."""
        return arrow.num_usable(self.load(domain, split))

    def digest(self, domain: str, split: str) -> str:
        """What the rows follow from: versions, columns and the content of files."""
        part = self._part(domain, split)
        found = formats.find(part.config.format)
        extent = [found.extent(part)] if hasattr(found, "extent") else []
        settings = json.dumps([VERSION, part.config.columns, split, *extent], sort_keys=True)
        text = f"{settings} {found.VERSION} {hash_contents(found.files(part))}"
        return f"{part.config.format}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def place(self, domain: str) -> str:
        """Where the domain's pictures are: their verdicts hold for that folder."""
        return str(self.data.root) + "\0" + self._config(domain).images

    def load(self, domain: str, split: str) -> datasets.Dataset:
        """All records of a domain and split as `workloads.data.rows`, bad ones with their fault."""
        part = self._part(domain, split)
        key = hashlib.sha256(f"{self.digest(domain, split)} {self.place(domain)}".encode()).hexdigest()[:16]
        path = cache_dir() / "sources" / f"{domain}-{split}-{key}.arrow"
        return arrow.dataset(path, lambda: formats.find(part.config.format).rows(part))

    def scorer(self, domain: str) -> str:
        """Name of the domain's scorer."""
        return self._config(domain).scorer

    def _config(self, domain: str) -> DomainConfig:
        require_known("data.domains.", [domain], self.data.domains)
        return self.data.domains[domain]

    def _part(self, domain: str, split: str) -> Part:
        config = self._config(domain)
        require(
            bool(getattr(config, split)), f"data.domains.{domain}.{split}", "", "this run needs that split"
        )
        return Part(domain=domain, split=split, config=config, root=Path(self.data.root or ".").expanduser())
