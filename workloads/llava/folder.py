"""Where base models are and how they see images; loads without torch, so that fingerprints are cheap."""

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from workloads.data.cache import cache_dir
from workloads.errors import UserError, first_line
from workloads.schema import ModelConfig

POCKET = "pocket"
# Bases that `orchestrator prepare` makes in the cache -> blocks of their language model.
PREPARED = {"smol": 8, "smol-30": 30}
_POCKET = Path(__file__).parent.parent / "assets" / "base"
# What is fetched of a model on the hub: no code, and no weights that could hold code.
_FETCHED = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt")


def resolve(name_or_path: str, hub: bool = False) -> Path:
    """The folder of a base model: packaged (`pocket`), prepared in the cache, local, or the hub's copy on this machine.

    `hub` lets the hub be asked for what is not here. Raises `UserError` when there is no such model.
    """
    if name_or_path in PREPARED:
        return _prepared(name_or_path)
    folder = _POCKET if name_or_path == POCKET else Path(name_or_path)
    if (folder / "config.json").is_file():
        return folder
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", name_or_path):
        return _from_hub(name_or_path, hub)
    if folder.is_dir():
        raise UserError(f"model.name_or_path: {name_or_path} has no config.json")
    raise UserError(
        f"model.name_or_path: {name_or_path!r} is not allowed; 'pocket', 'smol' or a model folder"
    )


def prepared_home() -> Path:
    """Where prepared bases are: a folder for each, and for each name a file that holds its folder's name."""
    return cache_dir() / "smol"


def name_prepared(name: str, folder: Path) -> None:
    """Let `name` lead to `folder`, which is in `prepared_home`; raises `OSError`."""
    pointer = prepared_home() / f"{name}.txt"
    part = pointer.with_name(f".{name}-{os.getpid()}.part")
    part.write_text(folder.name, encoding="utf-8")
    part.replace(pointer)


def _prepared(name: str) -> Path:
    """The folder that `orchestrator prepare` made last under a name."""
    pointer = prepared_home() / f"{name}.txt"
    folder = prepared_home() / pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else pointer
    if not (folder / "config.json").is_file():
        depth = f" --layers {PREPARED[name]}" if name != "smol" else ""
        raise UserError(f"model.name_or_path: {name!r} is not here yet; `orchestrator prepare smol{depth}`")
    return folder


@cache
def _from_hub(name: str, fetch: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(name, allow_patterns=list(_FETCHED), local_files_only=not fetch)
        )  # the newest revision that is known here
    except (OSError, ValueError) as error:
        hint = "" if fetch else "; set model.hub to true to fetch it"
        reason = first_line(error)
        raise UserError(
            f"model.name_or_path: {name!r} is no folder and its config.json is not to be had: {reason}{hint}"
        ) from None
    if not (folder / "config.json").is_file():
        raise UserError(f"model.name_or_path: {name!r} has no config.json")
    return folder


def image_processor(model: ModelConfig) -> str:
    """Name of the class that turns images into pixels.

    The backend is named in it, since the automatic choice depends on whether torchvision is installed.
    """
    folder = Path(model.vision_tower) if model.vision_tower else resolve(model.name_or_path, model.hub)
    nested = _json(folder / "processor_config.json").get("image_processor", {})
    about = nested or _json(folder / "preprocessor_config.json")
    given = about.get("image_processor_type") or about.get("feature_extractor_type", "CLIPImageProcessor")
    plain = re.sub("(Fast|Pil)$", "", str(given).replace("FeatureExtractor", "ImageProcessor"))
    return plain + ("Pil" if model.image_backend == "pil" else "")


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path}: not valid JSON") from None
    return tree if isinstance(tree, dict) else {}
