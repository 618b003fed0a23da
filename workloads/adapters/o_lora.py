"""O-LoRA: one LoRA slot per task; a new slot learns in directions orthogonal to those of the past ones.

Source:  Wang et al. 2023, O-LoRA, arXiv:2310.14152; Prism and MCITlib for multimodal models. While task t trains,
         L += weight * sum over linears and past slots i of sum |A_t A_i^T|; past slots are frozen.
Routing: none. The model is W + (alpha / R) sum_i B_i A_i over all slots; slots that nothing was learned in have
         B = 0. A run without tasks in order trains the first slot, which is plain LoRA.
Differs: `train_with_past` chooses whether past slots take part in training's forward pass (as in the paper) or
         the current one alone does (as in the ports). The paper's optional L2 term on the new slot is left out.

Shape letters: B batch, T tokens, R rank of one slot, I inputs, O outputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads.adapters.base import ATTENTION, MLP, Attached, Capabilities, Trace, count, freeze
from workloads.adapters.parts import slots
from workloads.adapters.parts.placing import check_lora, place
from workloads.adapters.parts.tasks import check_tasks, task_index
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
        check_tasks(self.tasks)
        rank, weight = self.rank_per_expert, self.orthogonality_weight
        require(rank >= 1, "adapter.rank_per_expert", rank, "a whole number of 1 or more")
        require(weight >= 0, "adapter.orthogonality_weight", weight, "0 or more")
        check_lora(self.alpha, self.dropout, self.targets)


class Slots(nn.Module):
    """The LoRAs of all tasks on one linear; `current` is the slot that trains, those before it are the past."""

    def __init__(self, base: nn.Linear, config: Config) -> None:
        super().__init__()
        self.num_slots = len(config.tasks)
        self.with_past = config.train_with_past
        self.penalised = config.orthogonality_weight > 0
        slots.add_slots(self, base, self.num_slots, config.rank_per_expert)
        self.current = 0

    def start(self, current: int) -> None:
        """Train the slot `current` and no other."""
        self.current = current
        slots.train_slot(self, self.num_slots, current)

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


class SlotLinear(nn.Module):
    """A frozen linear plus (alpha / R) sum_i B_i A_i dropout(x)."""

    def __init__(self, base: nn.Linear, config: Config) -> None:
        super().__init__()
        self.base_layer = base
        self.slots = Slots(base, config)
        self.scale, self.dropout = config.alpha / config.rank_per_expert, config.dropout
        # Of the last forward pass with a gradient; recomputation replaces it after it was read.
        self.penalty: Tensor | None = None

    def forward(self, x_BTI: Tensor) -> Tensor:
        dropped_BTI = F.dropout(x_BTI, self.dropout, self.training) if self.dropout else x_BTI
        update_BTO, self.penalty = self.slots(dropped_BTI)
        return self.base_layer(x_BTI) + update_BTO * self.scale


def on_task_start(model: nn.Module, config: Config, task: str) -> None:
    """Let the slot of `task` train and freeze all others; called before the optimizer of the task is made.

    Raises `UserError` for a task that is not in `config.tasks`.
    """
    current = task_index(config.tasks, task)
    for module in model.modules():
        if isinstance(module, Slots):
            module.start(current)


def attach(model: nn.Module, config: Config, trace: Trace) -> Attached:
    """Freeze `model` and put one LoRA slot per task on its target linears; the first slot trains."""
    freeze(model)
    placed = place(model, config.targets, lambda linear, spot: SlotLinear(linear, config))
    num_weights = count(model.parameters())
    names = {name for path, m in placed.items() for name in slots.names(m.slots, f"{path}.slots")}

    def as_lora(task: str | None) -> Mapping[str, tuple[Tensor, Tensor, float]]:
        """All slots at once, whatever the task."""
        with torch.no_grad():
            return {
                path: (*slots.stacked(linear.slots, range(linear.slots.num_slots)), linear.scale)
                for path, linear in placed.items()
            }

    return Attached(
        capabilities=Capabilities(mergeable=True, stateful=True),
        num_weights=num_weights,
        num_active=num_weights,
        losses=lambda trace: _losses(list(placed.values()), config),
        state=frozenset(names),
        on_task_start=lambda task: on_task_start(model, config, task),
        as_lora=as_lora,
    )


def _losses(adapted: list[SlotLinear], config: Config) -> Mapping[str, Tensor]:
    """The weighted penalty summed over linears; none while the first task trains, which has no past."""
    penalties = [linear.penalty for linear in adapted if linear.penalty is not None]
    if not penalties:
        return {}
    return {"orthogonality_loss": config.orthogonality_weight * torch.stack(penalties).sum()}
