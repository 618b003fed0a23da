"""Data formats: one file each, found by name; and the check of a configuration against a source's size."""

import importlib
from pathlib import Path
from typing import Any

from workloads.config import RunConfig
from workloads.data import mixture
from workloads.errors import require


def find(name: str) -> Any:
    """The module of a data source; raises `UserError` naming the nearest when there is none."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__")
    require(name in names, "data.source", name, f"sources: {', '.join(names)}", names)
    return importlib.import_module(f"workloads.data.sources.{name}")


def check(config: RunConfig) -> None:
    """Raise `UserError` on unknown sources and domains and on budgets larger than the data."""
    source = find(config.data.source)
    mixture.check(config.data, source.available("train"))
    available: dict[str, int] = source.available(config.eval.split)
    for domain in config.eval.domains:
        require(domain in available, "eval.domains", domain, f"domains: {', '.join(available)}", available)
    for domain in config.eval.domains or available:
        allowed = f"{domain} has {available[domain]} in its {config.eval.split} split"
        require(config.eval.samples <= available[domain], "eval.samples", config.eval.samples, allowed)
