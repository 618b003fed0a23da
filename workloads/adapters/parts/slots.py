"""LoRA slots of linears, one for each task: made, listed, switched so that one of them trains, summed or weighed.

The factors are weights of their own, since some are frozen while another trains. They belong to the module whose
forward reads them, as ZeRO-3 needs.

Shape letters: B batch, T tokens, E experts, K slots, R rank of one slot, I inputs, O outputs.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads.adapters.base import Attached, Capabilities, Route, Trace, count, kaiming_A
from workloads.adapters.parts.means import TaskMeans
from workloads.adapters.parts.placing import check_lora
from workloads.adapters.parts.tasks import check_tasks, task_index
from workloads.errors import require


def check_slots(
    tasks: Sequence[str], rank: int, alpha: float, dropout: float, targets: Sequence[str]
) -> None:
    """Raise `UserError` on values out of range of the settings that all methods with slots have."""
    check_tasks(tasks)
    require(rank >= 1, "adapter.rank_per_expert", rank, "a whole number of 1 or more")
    check_lora(alpha, dropout, targets)


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


class TaskSlots(nn.Module):
    """The LoRAs of all tasks on one linear; `current` is the slot that trains, those before it are the past.

    A method's own forward returns the unscaled update (B, T, O), and in training what the slots pay for it or None.
    """

    def __init__(self, base: nn.Linear, num_slots: int, rank: int) -> None:
        super().__init__()
        self.num_slots, self.current = num_slots, 0
        add_slots(self, base, num_slots, rank)

    def start(self, current: int) -> None:
        """Train the slot `current` and no other."""
        self.current = current
        train_slot(self, self.num_slots, current)


class SlotLinear(nn.Module):
    """A frozen linear plus `scale` times the update that its slots make of dropout(x)."""

    def __init__(self, base: nn.Linear, slots: TaskSlots, scale: float, dropout: float) -> None:
        super().__init__()
        self.base_layer, self.slots = base, slots
        self.scale, self.dropout = scale, dropout
        # Of the last forward pass with a gradient; recomputation replaces it after it was read.
        self.penalty: Tensor | None = None

    def forward(self, x_BTI: Tensor) -> Tensor:
        dropped_BTI = F.dropout(x_BTI, self.dropout, self.training) if self.dropout else x_BTI
        update_BTO, self.penalty = self.slots(dropped_BTI)
        return self.base_layer(x_BTI) + update_BTO * self.scale


def penalty(linears: Iterable[SlotLinear]) -> Tensor | None:
    """What the slots of all linears pay for the last forward pass; None where none has to pay."""
    found = [linear.penalty for linear in linears if linear.penalty is not None]
    return torch.stack(found).sum() if found else None


def summed(
    model: nn.Module,
    placed: Mapping[str, SlotLinear],
    tasks: Sequence[str],
    losses: Callable[[Trace], Mapping[str, Tensor]],
) -> Attached:
    """The method that has put `placed` into `model`: W + the sum of all slots' updates, whatever the task."""

    def on_task_start(task: str) -> None:
        """Let the slot of `task` train and freeze all others; raises `UserError` on an unknown task."""
        current = task_index(tasks, task)
        for linear in placed.values():
            linear.slots.start(current)

    def as_lora(task: str | None) -> Mapping[str, tuple[Tensor, Tensor, float]]:
        """All slots at once."""
        with torch.no_grad():
            return {
                path: (*stacked(linear.slots, range(len(tasks))), linear.scale)
                for path, linear in placed.items()
            }

    num_weights = count(model.parameters())
    own = {name for path, linear in placed.items() for name in names(linear.slots, f"{path}.slots")}
    return Attached(
        capabilities=Capabilities(mergeable=True, stateful=True),
        num_weights=num_weights,
        num_active=num_weights,
        losses=losses,
        state=frozenset(own),
        on_task_start=on_task_start,
        as_lora=as_lora,
    )


def route(weights_BK: Tensor, layer: int, num_tokens: int) -> Route:
    """What a block reports whose tokens all have their sample's weights."""
    probs_BTE = weights_BK.unsqueeze(1).expand(-1, num_tokens, -1)
    return Route(layer=layer, probs_BTE=probs_BTE, choice_BT=probs_BTE.argmax(dim=-1))


def weighted(
    model: nn.Module, placed: Mapping[str, nn.Module], means: TaskMeans, name: str, why: str
) -> Attached:
    """The method that has put `placed` into `model`, whose slots are weighed by `means`, anew for every sample.

    `means` become part of the model under `name`; `why` says why the method is no plain LoRA.
    """
    inner: Any = model
    setattr(inner, name, means.train(model.training))  # inference goes by this
    means.watch(inner.model.language_model)

    def on_task_start(task: str) -> None:
        mine = means.start(task)
        for linear in placed.values():
            train_slot(linear, len(means.tasks), mine)

    def losses(trace: Trace) -> Mapping[str, Tensor]:
        """No terms; notes on the way what the task's samples look like."""
        means.note()
        return {}

    num_weights = count(model.parameters())
    own = {key for path, linear in placed.items() for key in names(linear, path)}
    return Attached(
        capabilities=Capabilities(stateful=True, routing="sample"),
        num_weights=num_weights,
        num_active=num_weights,
        losses=losses,
        state=frozenset(own | {f"{name}.{key}" for key in means.state_dict()}),
        on_task_start=on_task_start,
        selected=means.selected,
        after_step=means.after_step,
        as_lora=why,
        exported={"sentence_encoder": means.encoder.described()},
    )
