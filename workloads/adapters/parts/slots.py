"""LoRA slots of one linear, one for each task: made, listed, and switched so that one of them trains.

The factors are weights of their own, since some are frozen while another trains. They belong to the module whose
forward reads them, as ZeRO-3 needs.

Shape letters: K slots, R rank of one slot, I inputs, O outputs.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from workloads.adapters.base import kaiming_A


def add_slots(module: nn.Module, base: nn.Linear, num_slots: int, rank: int) -> None:
    """Give `module` A (R, I) and B (O, R) for each slot, fit for `base`; the first slot trains."""
    like = base.weight
    for slot in range(num_slots):
        module.register_parameter(f"slot{slot}_A", kaiming_A(rank, base.in_features, like=like))
        zeros_OR = torch.zeros(base.out_features, rank, dtype=like.dtype, device=like.device)
        module.register_parameter(f"slot{slot}_B", nn.Parameter(zeros_OR))
    train_slot(module, num_slots, 0)


def train_slot(module: nn.Module, num_slots: int, current: int) -> None:
    """Let the slot `current` train and no other."""
    for slot in range(num_slots):
        for factor in ("A", "B"):
            module.get_parameter(f"slot{slot}_{factor}").requires_grad_(slot == current)


def all_A(module: nn.Module, slots: Iterable[int]) -> list[Tensor]:
    """A (R, I) of each of the slots."""
    return [module.get_parameter(f"slot{slot}_A") for slot in slots]


def all_B(module: nn.Module, slots: Iterable[int]) -> list[Tensor]:
    """B (O, R) of each of the slots."""
    return [module.get_parameter(f"slot{slot}_B") for slot in slots]


def stacked(module: nn.Module, slots: Iterable[int]) -> tuple[Tensor, Tensor]:
    """A (slots * R, I) and B (O, slots * R): the sum of slots is one LoRA of their ranks' sum."""
    chosen = list(slots)
    return torch.cat(all_A(module, chosen)), torch.cat(all_B(module, chosen), dim=1)


def names(module: nn.Module, path: str) -> set[str]:
    """Names, below `path`, of all factors of `module`, also of those that do not train."""
    return {f"{path}.{name}" for name, _ in module.named_parameters(recurse=False) if name.startswith("slot")}
