"""Fair ranks: the plain LoRA whose number of weights is nearest to a method's.

`iso_total` compares all that is trained, `iso_active` what one token meets. Everything is counted on
the meta device: no memory, no numbers, LLaVA-7B in about a second.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import AutoConfig

from workloads import adapters
from workloads.adapters.base import ATTENTION, MLP, Attached, Trace
from workloads.config import AdapterConfig
from workloads.data.pocket import DOMAINS
from workloads.llava.folder import resolve
from workloads.llava.kinds import Model, Shape, empty


def shape_of(name_or_path: str) -> Shape:
    """The sizes of a base model: `pocket` or a model folder."""
    shape: Any = AutoConfig.from_pretrained(resolve(name_or_path), local_files_only=True)
    return shape


def measured(shape: Shape, config: AdapterConfig) -> Attached:
    """The method on a model of these sizes: its capabilities and counts; folders that it starts from are not read."""
    return put(empty(shape), config)


def put(model: Model, config: AdapterConfig) -> Attached:
    """The method on an empty model, for counting; folders that it starts from are not read."""
    return adapters.attach(model, config.without_files(), Trace())


def on_pocket(name: str, settings: Mapping[str, Any]) -> Attached:
    """A method on the pocket model; where it wants tasks, they are the benchmark's domains."""
    kind = importlib.import_module(f"workloads.adapters.{name}").Config
    wants_tasks = "tasks" in {field.name for field in dataclasses.fields(kind)}
    tasks = {"tasks": list(DOMAINS)} if wants_tasks else {}
    return measured(shape_of("pocket"), kind(**{**tasks, **settings}))


def iso_total(shape: Shape, config: AdapterConfig) -> int:
    """Rank, 1 or more, of the plain LoRA on all linears whose weights come nearest to all that the method trains."""
    return rank_of(shape, measured(shape, config).num_weights)


def iso_active(shape: Shape, config: AdapterConfig) -> int:
    """Rank, 1 or more, of the plain LoRA on all linears whose weights come nearest to those that a token meets."""
    return rank_of(shape, measured(shape, config).num_active)


def rank_of(shape: Shape, num_weights: int) -> int:
    """Rank, 1 or more, of the plain LoRA on all linears whose number of weights is nearest to `num_weights`."""
    return max(1, round(num_weights / _per_rank(shape)))


def _per_rank(shape: Shape) -> int:
    """Weights of a LoRA of rank 1 on every linear of the language model."""
    linears = [
        module
        for name, module in empty(shape).get_submodule("model.language_model").named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in (*ATTENTION, *MLP)
    ]
    return sum(linear.in_features + linear.out_features for linear in linears)
