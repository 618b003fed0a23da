"""The fingerprint of a run: a hash of everything that changes a number, and of nothing of where it runs."""

import hashlib
import importlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from workloads.config import SCHEMA_VERSION, ModelConfig, RunConfig, to_tree
from workloads.data import mixture, sources
from workloads.data.hashes import hash_files
from workloads.errors import UserError
from workloads.llava.folder import POCKET, image_processor, resolve
from workloads.schema import DataConfig

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
    tree["data"] = _data(tree["data"], config.data)
    tree["eval"]["domains"] = sources.evaluated(config)
    del tree["continual"]
    return {**tree, **({"continual": part} if (part := _continual(config)) else {})}


def _continual(config: RunConfig) -> dict[str, Any]:
    """What the section `continual` changes: a first stage has no past, and a past is made with its own fields alone."""
    own = config.continual
    used = ["task"] if own.task else []
    if config.init_from and own.regulariser != "none":
        used += ["regulariser", "weight", {"ewc": "fisher_samples", "lwf": "temperature"}[own.regulariser]]
    if config.init_from and own.replay != "none":
        used += ["replay", "replay_share"]
    return {key: getattr(own, key) for key in used}


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


def _data(tree: dict[str, Any], data: DataConfig) -> dict[str, Any]:
    """The section `data` without places, which the hash of their contents stands for, and without what is not used."""
    # `max_rejected` decides whether a run goes on, not what it computes.
    unused = {"root", "domains", "max_rejected", "samples" if data.tokens else "tokens"}
    unused |= {key for key in ("temperature", "caps") if not getattr(data, key)}
    used = mixture.domains(data)
    parts = {"mixture": {domain: data.mixture[domain] for domain in data.mixture if domain in used}}
    if data.caps:
        parts["caps"] = {domain: cap for domain, cap in data.caps.items() if domain in used}
    return {**{key: value for key, value in tree.items() if key not in unused}, **parts}


def _hash_adapter_files(paths: list[Path]) -> str:
    for path in paths:
        if not path.is_file():
            raise UserError(f"adapter: {path}: no such file")
    return hash_files(paths)


def identity(config: RunConfig) -> dict[str, str]:
    """Versions and content hashes behind the names in `config`: model, data, method, scorer, image processor, VCE."""
    method = importlib.import_module(f"workloads.adapters.{config.adapter.name}")
    return {
        "model": model_hash(config.model),
        "data": data_hash(config),
        "method": f"{config.adapter.name}-{method.VERSION}",
        "scorer": _scorers(config),
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


def data_hash(config: RunConfig) -> str:
    """Version and content of all that a run trains on and is scored on; raises `UserError` on unknown names."""
    source, split = sources.of(config.data), config.eval.split
    parts = [(domain, "train") for domain in mixture.domains(config.data)]
    parts += [(domain, split) for domain in sources.evaluated(config)]
    digests = {f"{domain} {split}": source.digest(domain, split) for domain, split in parts}
    if len(set(digests.values())) == 1:  # as of a packaged set, which is one whole
        return next(iter(digests.values()))
    return f"{config.data.source}-{hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:16]}"


def _scorers(config: RunConfig) -> str:
    """The version of the scorer, or of each domain's where there are several."""
    from workloads.evaluation.scorers import find

    source = sources.of(config.data)
    versions = {domain: find(source.scorer(domain)).version for domain in sources.evaluated(config)}
    if len(set(versions.values())) == 1:
        return next(iter(versions.values()))
    return ", ".join(f"{domain} {version}" for domain, version in versions.items())
