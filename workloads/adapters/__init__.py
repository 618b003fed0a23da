"""Adapter methods: one file each, found by name; the folder an adapter is saved in; merging and PEFT export."""

import importlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from workloads.adapters.base import Attached, Trace
from workloads.adapters.parts import folders
from workloads.adapters.parts.folders import CONFIG, PREFIX, PROJECTOR, WEIGHTS
from workloads.config import SCHEMA_VERSION, AdapterConfig, from_tree
from workloads.errors import UserError
from workloads.llava import vce

# Path of a linear -> A (R, I), B (O, R), scale.
Plain = Mapping[str, tuple[Tensor, Tensor, float]]


def attach(model: nn.Module, config: AdapterConfig, trace: Trace) -> Attached:
    """Put the method that `config` names on `model`, whose other weights are frozen."""
    return _method(config.name).attach(model, config, trace)


def config_from_tree(tree: Mapping[str, Any]) -> AdapterConfig:
    """The checked configuration of one adapter from plain values with a `name`; raises `UserError`."""
    # The mixture stands for the parts of a run that an adapter has nothing to do with.
    return from_tree({"adapter": dict(tree), "data": {"mixture": {"any": 1.0}}}).adapter


def save(
    folder: Path, weights: dict[str, Tensor], config: AdapterConfig, attached: Attached, base: str
) -> None:
    """Write `weights` (`saved_names`, by name in the model) and the configuration to `folder`.

    A method that leaves another method's modules behind names it as `method` in `attached.exported`.
    """
    tree = {
        "schema_version": SCHEMA_VERSION,
        "base_model_name_or_path": base,
        "method": asdict(config),
        "capabilities": asdict(attached.capabilities),
        **attached.exported,
    }
    tree["method_version"] = _method(tree["method"]["name"]).VERSION
    write(folder, weights, tree)


def saved_names(model: nn.Module, attached: Attached) -> set[str]:
    """What an adapter folder holds: names of all that is trained and of the method's state."""
    return {name for name, w in model.named_parameters() if w.requires_grad} | attached.state


def weights_of(model: nn.Module, attached: Attached) -> dict[str, Tensor]:
    """What an adapter folder holds, by name; `model` is whole on this worker."""
    own = _own(model)
    return {name: own[name].detach() for name in sorted(saved_names(model, attached))}


def read(folder: Path) -> dict[str, Tensor]:
    """The weights of an adapter folder by name in the model."""
    return folders.tensors(folder, str(folder))


def settings(folder: Path) -> dict[str, Any]:
    """The adapter's configuration as it stands in its folder."""
    return folders.settings(folder, str(folder))


def check_names(given: set[str], wanted: set[str], where: str) -> None:
    """Raise `UserError` naming weights that are missing from or unknown to the model."""
    for kind, names in (("lacks", wanted - given), ("has unknown", given - wanted)):
        if names:
            raise UserError(
                f"{where}: the adapter {kind} {', '.join(sorted(names)[:3])} ({len(names)} in all)"
            )


@torch.no_grad()
def put(model: nn.Module, weights: Mapping[str, Tensor], names: set[str], where: str) -> None:
    """Copy `weights`, which have to be exactly `names`, into parameters and buffers of a whole `model`."""
    check_names(set(weights), names, where)
    own = _own(model)
    for name, tensor in weights.items():
        if own[name].shape != tensor.shape:
            raise UserError(f"{where}: {name} has shape {tuple(tensor.shape)}, not {tuple(own[name].shape)}")
        own[name].copy_(tensor)


def load(model: nn.Module, folder: Path) -> tuple[Attached, Trace]:
    """Restore the adapter in `folder` on the fresh base `model`: method, projector, VCE and all state.

    Folders that PEFT wrote for a plain LoRA are read as `lora`. The trace is already watching `model`.
    Raises `UserError` on other versions, and on missing, unknown or misshapen weights.
    """
    tree = settings(folder)
    weights = read(folder)
    if "method" in tree:
        config = config_from_tree(tree["method"])
        ours, theirs = _method(config.name).VERSION, tree.get("method_version")
        if theirs != ours:
            raise UserError(f"{folder}: written by {config.name} version {theirs}; this is version {ours}")
    else:
        plain = folders.read_lora(folder, "adapter", model)
        rank, scale, loras = _uniform(plain.linears)
        weights = {**loras, **plain.projector}
        leaves = sorted({path.rsplit(".", 1)[-1] for path in plain.linears})
        config = config_from_tree({"name": "lora", "rank": rank, "alpha": scale * rank, "targets": leaves})
    trace = Trace()
    attached = attach(model, config.without_files(), trace)
    trace.watch(model)
    if any(name.startswith(PROJECTOR) for name in weights):
        model.get_submodule(PROJECTOR).requires_grad_(True)
    if "vce" in tree:
        vce.restore(model, tree["vce"], str(folder))
    put(model, weights, saved_names(model, attached), str(folder))
    return attached, trace


@torch.no_grad()
def merge(model: nn.Module, attached: Attached, task: str | None = None) -> None:
    """Fold the attached method into the linears of `model`, in place; where tasks matter, for `task`.

    Raises `UserError` with the reason where the method is not a plain LoRA.
    """
    plain = _plain(attached, task, "merged")
    wrappers = [(path, module) for path, module in model.named_modules() if hasattr(module, "base_layer")]
    assert set(plain) <= {path for path, _ in wrappers}, "the method adapts other linears than it says"
    for path, wrapper in wrappers:
        base: Any = wrapper.get_submodule("base_layer")
        if path in plain:
            A_RI, B_OR, scale = plain[path]
            exact = torch.promote_types(base.weight.dtype, torch.float32)
            base.weight.copy_(base.weight.to(exact) + scale * (B_OR.to(exact) @ A_RI.to(exact)))
        parent, leaf = path.rsplit(".", 1)
        setattr(model.get_submodule(parent), leaf, base)


@torch.no_grad()
def export(folder: Path, model: nn.Module, attached: Attached, base: str, task: str | None = None) -> None:
    """Write the attached method as one plain LoRA in PEFT's format, with the projector where it is trained.

    Ranks and scales that differ between linears are made equal with zeros and by scaling B.
    Raises `UserError` with the reason where PEFT could not give the same outputs.
    """
    if any(name.startswith(vce.PATH) for name, _ in model.named_parameters()):
        raise UserError("adapter: cannot be exported: PEFT has no place for the model's VCE")
    plain = _plain(attached, task, "exported")
    rank, scale, weights = _uniform(plain)
    trained = {name: w for name, w in model.named_parameters() if w.requires_grad}
    projector = {name: w for name, w in trained.items() if name.startswith(PROJECTOR)}
    tree = {
        "schema_version": SCHEMA_VERSION,
        "base_model_name_or_path": base,
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(plain),
        **({} if task is None else {"task": task}),
    }
    write(folder, {**weights, **projector}, tree)


def _own(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _method(name: str) -> Any:
    """The file of a method."""
    return importlib.import_module(f"workloads.adapters.{name}")


def _plain(attached: Attached, task: str | None, verb: str) -> Plain:
    if isinstance(attached.as_lora, str):
        raise UserError(f"adapter: cannot be {verb}: {attached.as_lora}")
    return attached.as_lora(task)


def _uniform(plain: Plain) -> tuple[int, float, dict[str, Tensor]]:
    """One rank and scale for all linears, and their weights by PEFT's names; products stay as they are."""
    rank = max(len(A_RI) for A_RI, _, _ in plain.values())
    scale = next(iter(plain.values()))[2]
    weights: dict[str, Tensor] = {}
    for path, (A_RI, B_OR, own) in plain.items():
        missing = rank - len(A_RI)
        weights[f"{path}.lora_A.weight"] = F.pad(A_RI, (0, 0, 0, missing))
        weights[f"{path}.lora_B.weight"] = F.pad(B_OR * (own / scale), (0, missing))
    return rank, scale, weights


def write(folder: Path, weights: Mapping[str, Tensor], tree: Mapping[str, Any]) -> None:
    """The two files of an adapter; parts that PEFT trains in full stand under `modules_to_save`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps({**tree, **_in_full(weights)}, indent=1)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def _in_full(names: Iterable[str]) -> dict[str, list[str]]:
    modules = sorted({name.split(".")[1] for name in names if name.startswith(PROJECTOR)})
    return {"modules_to_save": modules} if modules else {}
