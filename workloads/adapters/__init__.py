"""Adapter methods: one file each, found by name; and the folder that an adapter is saved in."""

import importlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from workloads.adapters.base import Attached, Trace
from workloads.config import SCHEMA_VERSION, AdapterConfig
from workloads.errors import UserError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
# PEFT's prefix of every weight name.
_PREFIX = "base_model.model."


def attach(model: nn.Module, config: AdapterConfig, trace: Trace) -> Attached:
    """Put the method that `config` names on `model`, whose other weights are frozen."""
    module: Any = importlib.import_module(f"workloads.adapters.{config.name}")
    return module.attach(model, config, trace)


def save(
    folder: Path, weights: dict[str, Tensor], config: AdapterConfig, attached: Attached, base: str
) -> None:
    """Write `weights` (all that was trained, by name in the model) and the configuration to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {_PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    modules = sorted(
        {name.split(".")[1] for name in weights if name.startswith("model.multi_modal_projector")}
    )
    tree = {
        "schema_version": SCHEMA_VERSION,
        "base_model_name_or_path": base,
        "method": asdict(config),
        "capabilities": asdict(attached.capabilities),
        **attached.exported,
        **({"modules_to_save": modules} if modules else {}),
    }
    (folder / CONFIG).write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> dict[str, Tensor]:
    """The weights of an adapter folder by name in the model."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return {name.removeprefix(_PREFIX): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def check_names(given: set[str], wanted: set[str], where: str) -> None:
    """Raise `UserError` naming weights that are missing from or unknown to the model."""
    for kind, names in (("lacks", wanted - given), ("has unknown", given - wanted)):
        if names:
            raise UserError(
                f"{where}: the adapter {kind} {', '.join(sorted(names)[:3])} ({len(names)} in all)"
            )
