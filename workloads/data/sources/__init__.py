"""Sources of samples: packaged sets by name, or files; and the check of a configuration against a source's size."""

import importlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import datasets

from workloads.config import DataConfig, RunConfig
from workloads.data import mixture
from workloads.data.hashes import hash_files
from workloads.errors import require, require_known

_DEFAULT_SCORER = "exact"


class Source(Protocol):
    """What all sources can say and give."""

    def domains(self, split: str) -> list[str]:
        """Names of the domains that have this split; reads nothing."""
        ...

    def size(self, domain: str, split: str) -> int:
        """Number of usable samples of a domain and split."""
        ...

    def digest(self, domain: str, split: str) -> str:
        """Version and content that the samples of a domain and split follow from."""
        ...

    def place(self, domain: str) -> str:
        """Where pictures are that are read from files of their own; empty when there are none."""
        ...

    def load(self, domain: str, split: str) -> datasets.Dataset:
        """All samples of a domain and split."""
        ...

    def scorer(self, domain: str) -> str:
        """Name of the domain's scorer."""
        ...


@dataclass(frozen=True, kw_only=True)
class Packaged:
    """A set that comes with the package: a module that needs no settings."""

    module: Any

    def domains(self, split: str) -> list[str]:
        """All domains have all splits."""
        return sorted(self.module.available(split))

    def size(self, domain: str, split: str) -> int:
        """Number of samples of a domain and split."""
        return self.module.available(split)[domain]

    def digest(self, domain: str, split: str) -> str:
        """The set's version and the hash of its raw files, the same for all of its parts."""
        return self._whole

    def place(self, domain: str) -> str:
        """Its pictures are in its rows."""
        return ""

    def load(self, domain: str, split: str) -> datasets.Dataset:
        """All samples of a domain and split."""
        return self.module.load(domain, split)

    def scorer(self, domain: str) -> str:
        """Answers are compared exactly."""
        return _DEFAULT_SCORER

    @cached_property
    def _whole(self) -> str:
        return f"{self.module.VERSION}-{hash_files(self.module.files())}"


def find(name: str) -> Any:
    """The module of a data source; raises `UserError` naming the nearest when there is none."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__")
    require(name in names, "data.source", name, f"sources: {', '.join(names)}", names)
    return importlib.import_module(f"workloads.data.sources.{name}")


def of(data: DataConfig) -> Source:
    """The source that `data` names; raises `UserError` when there is none, or on mistakes in `data.domains`."""
    module = find(data.source)
    return module.of(data) if hasattr(module, "of") else Packaged(module=module)


def evaluated(config: RunConfig) -> list[str]:
    """The domains that a run is scored on."""
    return sorted(set(config.eval.domains or of(config.data).domains(config.eval.split)))


def check(config: RunConfig) -> None:
    """Raise `UserError` on unknown sources and domains, on budgets larger than the data, and on tasks untold."""
    source, data = of(config.data), config.data
    require_known("data.mixture.", data.mixture, source.domains("train"))
    used = mixture.domains(data)
    mixture.check(data, {d: source.size(d, "train") if d in used else 0 for d in data.mixture})
    available = source.domains(config.eval.split)
    for domain in config.eval.domains:
        require(domain in available, "eval.domains", domain, f"domains: {', '.join(available)}", available)
    for domain in evaluated(config):
        size = source.size(domain, config.eval.split)
        allowed = f"{domain} has {size} in its {config.eval.split} split"
        require(config.eval.samples <= size, "eval.samples", config.eval.samples, allowed)
    _check_told(config)


def _check_told(config: RunConfig) -> None:
    """Raise `UserError` where a method has to be told the task of a sample that is none of its tasks.

    In a stage of a stream, samples of other domains count as the stage's task: `lineage.with_tasks`.
    """
    when = config.adapter.told_tasks()
    if when == "never":
        return
    tasks: list[str] = getattr(config.adapter, "tasks", [])
    known = f"{config.adapter.name} is told each sample's task, one of adapter.tasks: {', '.join(tasks)}"
    if own := config.continual.task:
        require(own in tasks, "continual.task", own, known, tasks)
        return
    for domain in mixture.domains(config.data):
        require(domain in tasks, "data.mixture", domain, known, tasks)
    for domain in evaluated(config) if when == "always" else ():
        require(domain in tasks, "eval.domains", domain, f"{known}; name it there or leave it out", tasks)
