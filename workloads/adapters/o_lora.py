"""O-LoRA: one LoRA slot per task; a new slot learns in directions orthogonal to those of the past ones.

Source:  Wang et al. 2023, O-LoRA, arXiv:2310.14152; Prism and MCITlib for multimodal models. While task t trains,
         L += weight * sum over linears and past slots i of sum |A_t A_i^T|; past slots are frozen.
Routing: none. The model is W + (alpha / R) sum_i B_i A_i over all slots; slots that nothing was learned in have
         B = 0. A run without tasks in order trains the first slot, which is plain LoRA.
Differs: `train_with_past` chooses whether past slots take part in training's forward pass (as in the paper) or
         the current one alone does (as in the ports). The paper's optional L2 term on the new slot is left out.

Shape letters: B batch, T tokens, R rank of one slot, I inputs, O outputs.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads.adapters.base import ATTENTION, MLP, Attached, Trace, freeze
from workloads.adapters.parts import slots
from workloads.adapters.parts.placing import place
from workloads.adapters.parts.slots import SlotLinear, TaskSlots
from workloads.config import AdapterConfig
from workloads.errors import require

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Config(AdapterConfig):
    """O-LoRA's settings; every slot is scaled by alpha / rank_per_expert."""

    name: str = "o_lora"
    # Names of the tasks in the order in which they are learned, one slot each.
    tasks: list[str] = field(default_factory=list)
    # Rank of one slot.
    rank_per_expert: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    orthogonality_weight: float = 0.5
    train_with_past: bool = True
    # Last path components of the adapted linears.
    targets: list[str] = field(default_factory=lambda: [*ATTENTION, *MLP])

    def layout_matters(self) -> bool:
        """Dropout masks depend on how a global batch is cut."""
        return self.dropout > 0

    def training_only(self) -> set[str]:
        """Fields that steer training and leave what given weights compute as it is."""
        return {"dropout", "orthogonality_weight", "train_with_past"}

    def check(self) -> None:
        """Raise `UserError` on values out of range."""
        slots.check_slots(self.tasks, self.rank_per_expert, self.alpha, self.dropout, self.targets)
        weight = self.orthogonality_weight
        require(weight >= 0, "adapter.orthogonality_weight", weight, "0 or more")


class Slots(TaskSlots):
    """The slots of one linear, of which the one that trains pays for directions that it shares with the past."""

    def __init__(self, base: nn.Linear, config: Config) -> None:
        super().__init__(base, len(config.tasks), config.rank_per_expert)
        self.with_past = config.train_with_past
        self.penalised = config.orthogonality_weight > 0

    def forward(self, x_BTI: Tensor) -> tuple[Tensor, Tensor | None]:
        """The unscaled update (B, T, O), and in training sum_i sum |A_t A_i^T| over past slots where there are any."""
        past = range(self.current)
        used: Sequence[int] = range(self.num_slots)
        if self.training:
            used = [*past, self.current] if self.with_past else [self.current]
        A_SI, B_OS = slots.stacked(self, used)
        update_BTO = F.linear(F.linear(x_BTI, A_SI), B_OS)
        if not (past and self.penalised and torch.is_grad_enabled()):
            return update_BTO, None
        dtype = torch.promote_types(A_SI.dtype, torch.float32)
        past_SI = torch.cat(slots.all_A(self, past)).to(dtype)
        (own_RI,) = slots.all_A(self, [self.current])
        return update_BTO, F.linear(own_RI.to(dtype), past_SI).abs().sum()


def adapted(base: nn.Linear, config: Config) -> SlotLinear:
    """The linear with its slots."""
    return SlotLinear(base, Slots(base, config), config.alpha / config.rank_per_expert, config.dropout)


def attach(model: nn.Module, config: Config, trace: Trace) -> Attached:
    """Freeze `model` and put one LoRA slot per task on its target linears; the first slot trains."""
    freeze(model)
    placed = place(model, config.targets, lambda base, spot: adapted(base, config))
    return slots.summed(model, placed, config.tasks, lambda trace: _losses(placed.values(), config))


def _losses(linears: Iterable[SlotLinear], config: Config) -> Mapping[str, Tensor]:
    """The weighted penalty summed over linears; none while the first task trains, which has no past."""
    penalty = slots.penalty(linears)
    return {} if penalty is None else {"orthogonality_loss": config.orthogonality_weight * penalty}
