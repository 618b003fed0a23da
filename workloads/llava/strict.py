"""Strict checkpoints: exactly the model's weights, by the headers of their safetensors files alone.

Read before loading, since the loader that partitions weights for ZeRO-3 drops unknown ones without a word and
tells only the first worker of wrong shapes.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from workloads.errors import UserError

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Buffers that older checkpoints hold and that are computed now.
_COMPUTED = (r"(^|\.)position_ids$", r"rotary_emb\.inv_freq$")


def weight_files(folder: Path, key: str) -> list[Path]:
    """The safetensors files of a model folder; raises `UserError` about `key` when there are none or one is missing."""
    if (folder / _WHOLE).is_file():
        return [folder / _WHOLE]
    if (folder / _INDEX).is_file():
        names = sorted(set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        for name in names:
            if not (folder / name).is_file() or "/" in name:
                raise UserError(f"{key}: {folder} lacks {name}, which its index names")
        return [folder / name for name in names]
    found = next((path.name for path in sorted(folder.glob("*.bin"))), "")
    why = f"{found} can hold code and is not read; convert it" if found else "no weights"
    raise UserError(f"{key}: {folder} has no safetensors files ({why})")


def shapes(files: list[Path], key: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all weights in safetensors files, from their headers."""
    found: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{key}: {path} is not a whole safetensors file: {error}") from None
    return found


def check(folder: Path, model: PreTrainedModel) -> None:
    """Raise `UserError` unless `folder` holds exactly the weights of `model`, which may be on the meta device."""
    key = "model.name_or_path"
    wanted = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    found = shapes(weight_files(folder, key), key)
    given: dict[str, tuple[int, ...]] = {}
    for name, (own, converted) in own_names(found, model).items():
        # What several weights are fused into has another shape than each.
        given[own] = wanted.get(own, found[name]) if converted else found[name]
    ignored = re.compile("|".join([*_COMPUTED, *(model._keys_to_ignore_on_load_unexpected or ())]))
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    unexpected = {name for name in given.keys() - wanted.keys() if not ignored.search(name)}
    mismatched = {name for name in given if name in wanted and given[name] != wanted[name]}
    told(key, folder, "missing keys", wanted.keys() - given.keys() - tied)
    told(key, folder, "unexpected keys", unexpected)
    told(key, folder, "mismatched keys", mismatched)


def own_names(names: Iterable[str], model: PreTrainedModel) -> dict[str, tuple[str, bool]]:
    """Name in a checkpoint -> the name of the model's own weight, and whether several weights are fused into that."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    wanted, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, tuple[str, bool]] = {}
    for name in names:
        own, fused = rename_source_key(name, renamings, converters, prefix, wanted)
        found[name] = own, bool(fused)
    return found


def loaded(key: str, folder: Path, report: Mapping[str, Iterable[Any]], ignored: str = "") -> None:
    """Raise `UserError` about `key` when a loader's report names weights that are missing, unknown or of other shapes.

    Names with `ignored` in them do not count.
    """
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = {name for name in map(str, report[kind]) if not ignored or ignored not in name}
        told(key, folder, kind.replace("_", " "), names)


def told(key: str, folder: Path, kind: str, names: set[str]) -> None:
    """Raise `UserError` about `key` with the first of `names`, if there are any."""
    if names:
        raise UserError(f"{key}: {folder} has {kind}: {', '.join(sorted(names)[:5])}")
