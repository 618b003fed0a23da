"""The fingerprint of a run: a hash of everything that changes a number, and of nothing of where it runs."""

import hashlib
import importlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from workloads.config import SCHEMA_VERSION, ModelConfig, RunConfig, to_tree
from workloads.data import sources
from workloads.errors import UserError
from workloads.llava.folder import POCKET, image_processor, resolve

# Parts of the configuration that name or place a run without changing its numbers.
_NOT_IDENTITY = ("name", "execution", "schema_version")
# Fields of a model that enter by what they lead to: files by their hash, a backend by the image processor's name.
_PLACES = ("hub", "language_model", "vision_tower", "projector", "image_backend")
# Files beside a model that are about it and decide no number.
_ABOUT_A_MODEL = ("card.json", "README.md", "LICENSE", ".gitattributes")


def fingerprint(config: RunConfig) -> str:
    """16 hex digits, equal for two configurations exactly when their numbers are the same by definition."""
    tree = _reduced(config)
    if config.adapter.layout_matters():
        tree["layout"] = [config.execution.workers, config.execution.micro_batch]
    text = json.dumps({"schema": SCHEMA_VERSION, "config": tree, **identity(config)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _reduced(config: RunConfig) -> dict[str, Any]:
    """The configuration without what changes no number, and with one spelling of what can be spelled in several."""
    tree = {key: value for key, value in to_tree(config).items() if key not in _NOT_IDENTITY}
    tree["model"] = _reduced_model(config.model, tree["model"])
    tree["adapter"] = {**asdict(config.adapter.without_files()), **config.adapter.identity()}
    tree["adapter_files"] = _hash_adapter_files(config.adapter.files())
    del tree["data"]["max_rejected"]  # decides whether a run goes on, not what it computes
    tree["data"]["mixture"] = {domain: weight for domain, weight in config.data.mixture.items() if weight > 0}
    available = sources.find(config.data.source).available(config.eval.split)
    tree["eval"]["domains"] = sorted(set(config.eval.domains or available))
    return tree


def _reduced_model(model: ModelConfig, tree: dict[str, Any]) -> dict[str, Any]:
    """The model's part without places (its files' hash stands for them) and without later fields at their defaults."""
    tree = {key: value for key, value in tree.items() if key not in _PLACES}
    tree["name_or_path"] = (
        model.name_or_path if model.name_or_path == POCKET and not model.language_model else ""
    )
    default = ModelConfig()
    for key in ("attention", "image_aspect"):
        if tree[key] == getattr(default, key):
            del tree[key]
    return {key: value for key, value in tree.items() if model.vce or not key.startswith("vce")}


def _hash_adapter_files(paths: list[Path]) -> str:
    for path in paths:
        if not path.is_file():
            raise UserError(f"adapter: {path}: no such file")
    return hash_files(paths)


def identity(config: RunConfig) -> dict[str, str]:
    """Versions and content hashes behind the names in `config`: model, data, method, scorer, image processor, VCE."""
    from workloads.evaluation.scorers import SCORER_VERSION

    method = importlib.import_module(f"workloads.adapters.{config.adapter.name}")
    return {
        "model": model_hash(config.model),
        "data": data_hash(config.data.source),
        "method": f"{config.adapter.name}-{method.VERSION}",
        "scorer": SCORER_VERSION,
        "image_processor": image_processor(config.model),
        **({"vce": _vce(config.model)} if config.model.vce else {}),
    }


def _vce(model: ModelConfig) -> str:
    """Version and settings of VCE."""
    from workloads.llava.vce import VERSION

    return f"{VERSION} levels {model.vce_levels} heads {model.vce_heads} points {model.vce_points}"


def model_hash(model: ModelConfig) -> str:
    """Hash of the base model's files, or of its parts': configuration, tokenizer, chat template, weights."""
    if not model.language_model:
        return hash_files(_model_files(resolve(model.name_or_path, model.hub)))
    places = [Path(place) for place in (model.language_model, model.vision_tower, model.projector) if place]
    for place in places:
        if not place.exists():
            raise UserError(f"model: {place}: no such file or folder")
    parts = [_model_files(place) if place.is_dir() else [place] for place in places]
    return " ".join(hash_files(files) for files in parts)


def _model_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_file() and p.name not in _ABOUT_A_MODEL)


def data_hash(source: str) -> str:
    """The source's own version and the hash of its raw files; raises `UserError` when there is no such source."""
    module = sources.find(source)
    return f"{module.VERSION}-{hash_files(module.files())}"


def hash_files(paths: Iterable[Path]) -> str:
    """16 hex digits over names and contents, in the order given."""
    total = hashlib.sha256()
    for path in paths:
        total.update(path.name.encode() + b"\0" + bytes.fromhex(sha256(path)))
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
