"""SEFE's RegLoRA: a new LoRA a task, kept small at the entries that were largest in the updates of earlier tasks.

Source:  Chen et al. 2025, SEFE, arXiv:2505.02486 (ICML 2025), and its released code (jinpeng0528/SEFE): after each
         task, mark in every linear the 2 % of entries of B A with the largest magnitude; while a later task trains,
             L += weight * mean over linears of the mean over marked entries (o, i) of |B A|_oi
         for the LoRA that trains; an entry that several tasks marked counts for each of them. weight = 2500.
Routing: none. The model is W + (alpha / R) sum_k B_k A_k; earlier LoRAs are frozen, as merged into W in the source.
Tasks:   a task's start marks what the slots before it have learned; marks follow from those slots, so that they are in
         no folder. Before any start the first slot trains, which is plain LoRA.
Cost:    B A is formed once a linear and earlier task, when a stage starts, block by block of its rows. In training
         marked entries alone are computed, some at a time: 2 R numbers each, nothing of which is kept for backward but
         their signs.
Differs: earlier LoRAs are kept as they are (released: merged in bf16). The other half of SEFE, which rewrites answers
         into several styles, is a matter of data and not here.
Not verified: whether the paper unites marks as sets, where an entry counts once; the released code joins lists.

Shape letters: B batch, T tokens, R rank of one slot, I inputs, O outputs, K tasks, M marks of a task, N marked entries
of all tasks.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from workloads.adapters.base import ATTENTION, MLP, Attached, Trace, freeze
from workloads.adapters.parts import slots
from workloads.adapters.parts.placing import place
from workloads.adapters.parts.slots import SlotLinear, TaskSlots
from workloads.config import AdapterConfig
from workloads.errors import require

VERSION = 1
# Numbers that a block of rows, or of marked entries, may take at a time.
_BLOCK = 2**24


@dataclass(frozen=True, kw_only=True)
class Config(AdapterConfig):
    """RegLoRA's settings; every slot is scaled by alpha / rank_per_expert."""

    name: str = "sefe"
    # Names of the tasks in the order in which they are learned, one slot each.
    tasks: list[str] = field(default_factory=list)
    # Rank of one slot.
    rank_per_expert: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    # Share of a linear's entries that a task marks.
    marked_share: float = 0.02
    marked_weight: float = 2500.0
    # Last path components of the adapted linears.
    targets: list[str] = field(default_factory=lambda: [*ATTENTION, *MLP])

    def layout_matters(self) -> bool:
        """Dropout masks depend on how a global batch is cut."""
        return self.dropout > 0

    def training_only(self) -> set[str]:
        """Fields that steer training and leave what given weights compute as it is."""
        return {"dropout", "marked_weight"}

    def check(self) -> None:
        """Raise `UserError` on values out of range."""
        slots.check_slots(self.tasks, self.rank_per_expert, self.alpha, self.dropout, self.targets)
        share, weight = self.marked_share, self.marked_weight
        require(0 < share <= 1, "adapter.marked_share", share, "above 0, up to 1")
        require(weight >= 0, "adapter.marked_weight", weight, "0 or more")


@torch.no_grad()
def largest_entries(A_RI: Tensor, B_OR: Tensor, num_marks: int) -> Tensor:
    """Places (M) of the largest magnitudes of B A, counted row by row; B A is never there as a whole."""
    dtype = torch.promote_types(A_RI.dtype, torch.float32)
    A_RI, B_OR = A_RI.to(dtype), B_OR.to(dtype)
    width, rows = A_RI.shape[1], max(1, _BLOCK // A_RI.shape[1])
    values = torch.empty(0, dtype=dtype, device=A_RI.device)
    places = torch.empty(0, dtype=torch.long, device=A_RI.device)
    for first in range(0, len(B_OR), rows):
        block = (B_OR[first : first + rows] @ A_RI).abs().flatten()
        values = torch.cat([values, block])
        places = torch.cat([places, torch.arange(len(block), device=places.device) + first * width])
        best = values.topk(min(num_marks, len(values))).indices
        values, places = values[best], places[best]
    return places


class _MarkedMean(Function):
    """Mean of |B A| over marked entries in at least fp32, computed entry by entry in blocks."""

    @staticmethod
    def forward(ctx: Any, A_RI: Tensor, B_OR: Tensor, places_N: Tensor) -> Tensor:
        dtype = torch.promote_types(A_RI.dtype, torch.float32)
        signs, total = [], torch.zeros((), dtype=dtype, device=A_RI.device)
        for row, column in _blocks(places_N, A_RI):
            values = (B_OR[row].to(dtype) * A_RI.T[column].to(dtype)).sum(dim=1)
            signs.append(values.sign().to(torch.int8))
            total = total + values.abs().sum()
        ctx.save_for_backward(A_RI, B_OR, places_N, torch.cat(signs))
        return total / len(places_N)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        A_RI, B_OR, places_N, signs_N = ctx.saved_tensors
        grad_A, grad_B = (torch.zeros_like(w, dtype=grad.dtype) for w in (A_RI.T, B_OR))
        done = 0
        for row, column in _blocks(places_N, A_RI):
            each_N1 = (signs_N[done : done + len(row)] * (grad / len(places_N))).unsqueeze(1)
            grad_B.index_add_(0, row, each_N1 * A_RI.T[column].to(grad.dtype))
            grad_A.index_add_(0, column, each_N1 * B_OR[row].to(grad.dtype))
            done += len(row)
        return grad_A.T.to(A_RI.dtype), grad_B.to(B_OR.dtype), None


def _blocks(places_N: Tensor, A_RI: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Rows and columns of the entries at `places_N`, as many at a time as fit into a block."""
    width = A_RI.shape[1]
    parts = places_N.split(max(1, _BLOCK // len(A_RI)))
    return [(part.long() // width, part.long() % width) for part in parts]


def marked_mean(A_RI: Tensor, B_OR: Tensor, places_N: Tensor) -> Tensor:
    """Mean magnitude (scalar, in at least fp32) of the entries of B A at `places_N`."""
    mean: Tensor = _MarkedMean.apply(A_RI, B_OR, places_N)
    return mean


def marks_of(base: nn.Linear, config: Config) -> int:
    """How many of a linear's entries a task marks."""
    return max(1, int(config.marked_share * base.in_features * base.out_features))


class Slots(TaskSlots):
    """The slots of one linear and the entries that earlier ones marked."""

    marked_N: Tensor

    def __init__(self, base: nn.Linear, config: Config) -> None:
        super().__init__(base, len(config.tasks), config.rank_per_expert)
        self.penalised = config.marked_weight > 0
        self.num_marks = marks_of(base, config)
        # Empty until a task starts that has a past.
        marked_N = torch.empty(0, dtype=torch.int32, device=base.weight.device)
        self.register_buffer("marked_N", marked_N, persistent=False)

    def start(self, current: int) -> None:
        """Train the slot `current` and no other; mark what the slots before it have learned, which have to be whole."""
        super().start(current)
        past = zip(slots.all_A(self, range(current)), slots.all_B(self, range(current)), strict=True)
        marks = [largest_entries(A_RI, B_OR, self.num_marks).int() for A_RI, B_OR in past if B_OR.any()]
        self.marked_N = torch.cat([self.marked_N[:0], *marks])

    def forward(self, x_BTI: Tensor) -> tuple[Tensor, Tensor | None]:
        """The unscaled update (B, T, O), and in training the mean of |B A| over marked entries where there are any."""
        last = self.current + 1 if self.training else self.num_slots
        A_SI, B_OS = slots.stacked(self, range(last))
        update_BTO = F.linear(F.linear(x_BTI, A_SI), B_OS)
        if not (self.training and len(self.marked_N) and self.penalised and torch.is_grad_enabled()):
            return update_BTO, None
        (A_RI,), (B_OR,) = slots.all_A(self, [self.current]), slots.all_B(self, [self.current])
        return update_BTO, marked_mean(A_RI, B_OR, self.marked_N)


def adapted(base: nn.Linear, config: Config) -> SlotLinear:
    """The linear with its slots."""
    return SlotLinear(base, Slots(base, config), config.alpha / config.rank_per_expert, config.dropout)


def attach(model: nn.Module, config: Config, trace: Trace) -> Attached:
    """Freeze `model` and put one LoRA slot per task on its target linears; the first slot trains."""
    freeze(model)
    placed = place(model, config.targets, lambda base, spot: adapted(base, config))
    summed = slots.summed(model, placed, config.tasks, lambda trace: _losses(placed.values(), config))
    marks = sum(marks_of(linear.base_layer, config) for linear in placed.values())
    return replace(summed, formed=(len(config.tasks) - 1) * marks * torch.int32.itemsize)


def _losses(linears: Collection[SlotLinear], config: Config) -> Mapping[str, Tensor]:
    """The weighted penalty, a mean over linears; none while the first task trains, which has no past."""
    penalty = slots.penalty(linears)
    return {} if penalty is None else {"marked_loss": config.marked_weight * penalty / len(linears)}
