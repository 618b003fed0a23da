"""Which runs look up the same features, told from configurations alone, and notes in the cache of what is made."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path

from workloads.config import DataConfig, ModelConfig, RunConfig
from workloads.data.cache import cache_dir
from workloads.identity import data_hash, model_hash

# Fields of a model that leave prompts and what the tower says as they are.
_UNSEEN = ("hub", "projector", "train_projector", "vce", "vce_levels", "vce_heads", "vce_points")


def cues(model: ModelConfig) -> list[int]:
    """Levels of the tower that are read beside the projector's own."""
    return model.vce_levels if model.vce else []


def base(config: RunConfig) -> str:
    """Equal for runs with the same tower, image processing and prompts, computed in the same way."""
    model = {key: value for key, value in asdict(config.model).items() if key not in _UNSEEN}
    return json.dumps([model, config.optim.dtype, config.execution.gpus_per_worker > 0], sort_keys=True)


def held(data: DataConfig) -> str:
    """Equal for data sections that have the same samples to choose from."""
    parts = (data.source, data.root, {name: asdict(domain) for name, domain in data.domains.items()})
    return json.dumps([*parts, data.max_length, data.blind], sort_keys=True)


def distinct(configs: Iterable[RunConfig]) -> dict[str, RunConfig]:
    """Key -> one run, of all runs with a feature cache that look up the same."""
    found: dict[str, RunConfig] = {}
    for config in configs:
        if config.execution.feature_cache:
            found.setdefault(key(config), config)
    return found


def key(config: RunConfig) -> str:
    """16 hex digits over all that decides what a run looks up, contents of files included."""
    parts = [base(config), cues(config.model), config.seed, asdict(config.data), asdict(config.eval)]
    parts += [model_hash(config.model), data_hash(config), _versions()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@cache
def _versions() -> str:
    return f"{version('torch')} {version('transformers')}"


def lacking(keys: Iterable[str]) -> set[str]:
    """Those of `keys` that nobody has noted in this machine's cache."""
    folder = _notes()
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set[str]()
    return {key for key in keys if key not in there}


def note(keys: Iterable[str]) -> None:
    """Note that all is made; raises `OSError`. Notes go with the features, where those are deleted."""
    for each in keys:
        _notes().mkdir(parents=True, exist_ok=True)
        (_notes() / each).touch()


def _notes() -> Path:
    return cache_dir() / "features" / "made"
