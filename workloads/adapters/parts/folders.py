"""Plain LoRAs from adapter folders, ours or PEFT's, read strictly: every name, shape and setting is checked.

Source:  PEFT's files: `adapter_config.json` and `adapter_model.safetensors`, names under `base_model.model.`.
Differs: settings under which B A is not the whole update, or the base is not the original one, are refused.

Shape letters: E experts, R rank, I inputs, O outputs.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from workloads.errors import UserError, nearest, require

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# PEFT's prefix of every weight name.
PREFIX = "base_model.model."
PROJECTOR = "model.multi_modal_projector"
# PEFT's settings and the values under which the folder holds the plain update (alpha / R) B A of the original base.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "target_parameters": (None, []),
    **dict.fromkeys(
        (
            "use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "layer_replication",
            "trainable_token_indices", "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config",
            "monteclora_config",
        ),
        (None, False),
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PlainLora:
    """One LoRA of a language model as it stands in a folder."""

    # Path of the linear in the model -> (A (R, I), B (O, R), scale).
    linears: Mapping[str, tuple[Tensor, Tensor, float]]
    # Projector weights trained beside it, by name in the model.
    projector: Mapping[str, Tensor]


def read_lora(folder: Path, key: str, model: nn.Module) -> PlainLora:
    """The plain LoRA that `folder` holds for `model`, to which nothing is attached yet.

    Raises `UserError`, which opens with `key` and the folder, on anything missing, unknown or of a wrong shape.
    """
    where = f"{key}: {folder}"
    described = _plain_settings(folder, where)
    modules = model.get_submodule("model.language_model").named_modules(prefix="model.language_model")
    linears = {path: module for path, module in modules if isinstance(module, nn.Linear)}
    known = {name for name, _ in model.named_parameters() if name.startswith(PROJECTOR)}
    pairs: dict[str, dict[str, Tensor]] = {}
    projector: dict[str, Tensor] = {}
    for name, tensor in tensors(folder, where).items():
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise UserError(f"{where}: {PREFIX}{name} is not made of finite numbers")
        path, _, factor = name.partition(".lora_")
        if name in known:
            projector[name] = tensor
        elif path in linears and factor in ("A.weight", "B.weight"):
            pairs.setdefault(path, {})[factor[0]] = tensor
        else:
            raise UserError(f"{where}: unknown weight {name}{nearest(path, linears)}")
    if not pairs:
        raise UserError(f"{where}: holds no LoRA")
    return PlainLora(
        linears={path: _checked(path, pair, linears[path], described, where) for path, pair in pairs.items()},
        projector=projector,
    )


def read_all(
    folders: Mapping[str, str],
    model: nn.Module,
    targets: Sequence[str],
    rank: int,
    drop_projectors: bool,
) -> dict[str, PlainLora]:
    """The LoRAs in `adapter.folders` by name; each has to fit `targets` and `rank`, which may be larger."""
    loras: dict[str, PlainLora] = {}
    for name, folder in folders.items():
        key = f"adapter.folders.{name}"
        lora = read_lora(Path(folder), key, model)
        for path, (A_RI, _, _) in lora.linears.items():
            leaf = path.rsplit(".", 1)[-1]
            if leaf not in targets:
                raise UserError(f"{key}: {folder}: adapts {leaf}; adapter.targets has {', '.join(targets)}")
            if len(A_RI) > rank:
                raise UserError(
                    f"{key}: {folder}: rank {len(A_RI)} at {path}; adapter.rank_per_expert is {rank}"
                )
        if lora.projector and not drop_projectors:
            raise UserError(
                f"{key}: {folder}: holds a projector of its own; train it with model.train_projector=false "
                "or set adapter.drop_projectors=true"
            )
        loras[name] = lora
    return loras


def check_folders(folders: Mapping[str, str], tasks: Sequence[str]) -> None:
    """Raise `UserError` unless every folder belongs to one of `tasks` and has a path."""
    for name, folder in folders.items():
        require(name in tasks, "adapter.folders", name, f"adapter.tasks: {', '.join(tasks)}", tasks)
        require(folder != "", f"adapter.folders.{name}", folder, "the path of an adapter folder")


def adapter_files(folders: Mapping[str, str]) -> list[Path]:
    """The files behind `folders` in the order of their names; what they hold decides numbers, their places do not."""
    return [Path(folders[name]) / file for name in sorted(folders) for file in (CONFIG, WEIGHTS)]


@torch.no_grad()
def fill(
    experts_A: Tensor, experts_B: Tensor, expert: int, linear: tuple[Tensor, Tensor, float], scale: float
) -> None:
    """Put a LoRA in one place of stacks A (E, R, I) and B (E, R, O) that the method multiplies by `scale`.

    Ranks that the LoRA does not have keep their B, which has to be 0.
    """
    A_RI, B_OR, own_scale = linear
    experts_A[expert, : len(A_RI)] = A_RI.to(experts_A)
    experts_B[expert, : len(A_RI)] = (B_OR.T * (own_scale / scale)).to(experts_B)


def settings(folder: Path, where: str) -> dict[str, Any]:
    """An adapter's `adapter_config.json` as it stands."""
    try:
        tree = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{where}: has no readable {CONFIG}") from None
    except ValueError:
        raise UserError(f"{where}: {CONFIG} is not valid JSON") from None
    if not isinstance(tree, dict):
        raise UserError(f"{where}: {CONFIG} is not a mapping")
    return tree


def tensors(folder: Path, where: str) -> dict[str, Tensor]:
    """All weights of an adapter folder by name in the model."""
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{where}: has no {WEIGHTS}; no other format is read")
    try:
        found = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{where}: {WEIGHTS} cannot be read: {' '.join(str(error).split())}") from None
    for name in found:
        if not name.startswith(PREFIX):
            raise UserError(f"{where}: unknown weight {name}; names begin with {PREFIX}")
    return {name.removeprefix(PREFIX): tensor for name, tensor in found.items()}


def _plain_settings(folder: Path, where: str) -> dict[str, Any]:
    """The settings of a folder, once they are known to describe a plain LoRA."""
    tree = settings(folder, where)
    kind = tree.get("peft_type", "none")
    if kind != "LORA":
        raise UserError(f"{where}: peft_type {kind!r} is not allowed; a plain LoRA has 'LORA'")
    for name, allowed in _PLAIN.items():
        value = tree.get(name, allowed[0])
        if value not in allowed:
            raise UserError(f"{where}: {name} {value!r} is not allowed in a plain LoRA; {allowed[0]!r} is")
    for name in ("r", "lora_alpha"):
        value = tree.get(name)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"{where}: {name} {value!r} is not allowed; a number above 0")
    return tree


def _checked(
    path: str, pair: dict[str, Tensor], linear: nn.Linear, described: dict[str, Any], where: str
) -> tuple[Tensor, Tensor, float]:
    """A, B and scale of one linear; rank and alpha are those that the folder describes."""
    for factor in ("A", "B"):
        if factor not in pair:
            raise UserError(f"{where}: lacks {path}.lora_{factor}.weight")
    rank = int(_of(described, "rank_pattern", path, described["r"], where))
    alpha = float(_of(described, "alpha_pattern", path, described["lora_alpha"], where))
    for factor, wanted in (("A", (rank, linear.in_features)), ("B", (linear.out_features, rank))):
        if tuple(pair[factor].shape) != wanted:
            shape = tuple(pair[factor].shape)
            raise UserError(f"{where}: {path}.lora_{factor}.weight has shape {shape}, not {wanted}")
    scale = alpha / (math.sqrt(rank) if described.get("use_rslora") else rank)
    return pair["A"], pair["B"], scale


def _of(described: dict[str, Any], patterns: str, path: str, default: float, where: str) -> float:
    """The value of the first of PEFT's patterns that the path ends in, else `default`."""
    table = described.get(patterns) or {}
    if not isinstance(table, dict):
        raise UserError(f"{where}: {patterns} is not a mapping")
    for pattern, value in table.items():
        try:
            fits = re.match(rf"(.*\.)?({pattern})$", path)
        except re.error:
            raise UserError(f"{where}: {patterns} {pattern!r} is not a regular expression") from None
        if fits:
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise UserError(
                    f"{where}: {patterns} {pattern!r}: {value!r} is not allowed; a number above 0"
                )
            return value
    return default
