"""Puts a method's own module in the place of every target linear of the language model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn

from workloads.adapters.base import ATTENTION, MLP, LoRALinear
from workloads.errors import require

LANGUAGE_MODEL = "model.language_model"
Adapted = TypeVar("Adapted", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Spot:
    """Where a linear is: its path in the model, its decoder block, and whether it is the first adapted one there."""

    path: str
    layer: int
    leads: bool


def check_lora(alpha: float, dropout: float, targets: Sequence[str] = (*ATTENTION, *MLP)) -> None:
    """Raise `UserError` on values out of range of the settings that LoRA-like methods share."""
    require(alpha > 0, "adapter.alpha", alpha, "a number above 0")
    require(0 <= dropout < 1, "adapter.dropout", dropout, "from 0 to below 1")
    require(bool(targets), "adapter.targets", list(targets), "name at least one linear")
    known = (*ATTENTION, *MLP)
    for target in targets:
        require(target in known, "adapter.targets", target, f"linears: {', '.join(known)}", known)


def place(
    model: nn.Module, targets: Sequence[str], make: Callable[[nn.Linear, Spot], Adapted]
) -> dict[str, Adapted]:
    """Replace each linear whose last path component is in `targets` by `make(linear, spot)`; new modules by path."""
    found = [
        (f"{LANGUAGE_MODEL}.{name}", module)
        for name, module in model.get_submodule(LANGUAGE_MODEL).named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in targets
    ]
    require(bool(found), "adapter.targets", list(targets), "the language model has no such linear")
    placed: dict[str, Adapted] = {}
    led: set[int] = set()
    for path, linear in found:
        layer = int(path.removeprefix(f"{LANGUAGE_MODEL}.layers.").split(".")[0])
        # New modules are in training mode; the model may not be.
        placed[path] = make(linear, Spot(path=path, layer=layer, leads=layer not in led)).train(
            linear.training
        )
        led.add(layer)
        parent, leaf = path.rsplit(".", 1)
        setattr(model.get_submodule(parent), leaf, placed[path])
    return placed


def put_lora(
    model: nn.Module, targets: Sequence[str], rank: int, alpha: float, dropout: float
) -> dict[str, LoRALinear]:
    """Replace every target linear of the language model by a LoRALinear; the new modules by path, in order."""
    return place(model, targets, lambda base, spot: LoRALinear(base, rank, alpha, dropout))


def plain_form(
    placed: Mapping[str, LoRALinear],
) -> Callable[[str | None], Mapping[str, tuple[Tensor, Tensor, float]]]:
    """`Attached.as_lora` of what `put_lora` placed: the LoRA itself, whatever the task."""
    return lambda task: {
        path: (linear.lora_A.weight.detach(), linear.lora_B.weight.detach(), linear.scale)
        for path, linear in placed.items()
    }
