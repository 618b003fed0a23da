"""MTL-LoRA: one A for all tasks, a transformation of the low-rank space per task, and a mixture of several B's.

Source:  Yang et al. 2024, MTL-LoRA, arXiv:2410.09437, and its released code:
         y = W x + (alpha / R) (sum_e softmax(w_t / tau)_e B_e) Lambda_t A x for a sample of task t.
Routing: by task alone; all B's, weighted by a softmax that every task learns per linear. The trace's route of a
         decoder block is that of its first adapted linear.
Differs: w starts from a normal distribution of standard deviation tau (the paper's start is not known): from
         equal weights, the B's, which start at 0, would stay equal for ever. Adapts all linears of the language
         model by default, as LLaVA does; the paper's placement is `targets: [q_proj, k_proj, v_proj, o_proj]`.

Shape letters: B batch, T tokens, N tasks, E B's, R rank, I inputs, O outputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads.adapters.base import (
    ATTENTION,
    MLP,
    Attached,
    Capabilities,
    Route,
    Trace,
    count,
    freeze,
    kaiming_A,
)
from workloads.adapters.parts.placing import Spot, check_lora, place
from workloads.adapters.parts.tasks import TaskIds, check_tasks, task_index
from workloads.config import AdapterConfig
from workloads.errors import require

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Config(AdapterConfig):
    """MTL-LoRA's settings; the update is scaled by alpha / rank_per_expert."""

    name: str = "mtl_lora"
    # Names of all tasks; needed for every sample, in training and at inference.
    tasks: list[str] = field(default_factory=list)
    # Number of B's.
    num_experts: int = 3
    # Rank of the shared A and of every B.
    rank_per_expert: int = 8
    alpha: float = 16.0
    # Temperature of the weights of the B's.
    tau: float = 0.1
    dropout: float = 0.0
    # Last path components of the adapted linears.
    targets: list[str] = field(default_factory=lambda: [*ATTENTION, *MLP])

    def layout_matters(self) -> bool:
        """Dropout masks depend on how a global batch is cut."""
        return self.dropout > 0

    def training_only(self) -> set[str]:
        """Fields that steer training and leave what given weights compute as it is."""
        return {"dropout"}

    def told_tasks(self) -> Literal["never", "in training", "always"]:
        """Every sample is computed with its task's matrix and mixture."""
        return "always"

    def check(self) -> None:
        """Raise `UserError` on values out of range."""
        check_tasks(self.tasks)
        for key in ("num_experts", "rank_per_expert"):
            value = getattr(self, key)
            require(value >= 1, f"adapter.{key}", value, "a whole number of 1 or more")
        require(self.tau > 0, "adapter.tau", self.tau, "a number above 0")
        check_lora(self.alpha, self.dropout, self.targets)


class TaskLoRA(nn.Module):
    """A frozen linear plus (alpha / R) (sum_e weight_te B_e) Lambda_t A dropout(x) for samples of task t."""

    def __init__(self, base: nn.Linear, config: Config, trace: Trace, task_ids: TaskIds, spot: Spot) -> None:
        super().__init__()
        tasks, experts, rank = len(config.tasks), config.num_experts, config.rank_per_expert
        like = base.weight
        self.base_layer = base
        self.scale, self.tau, self.dropout = config.alpha / rank, config.tau, config.dropout
        self.lora_A = kaiming_A(rank, base.in_features, like=like)
        eye_RR = torch.eye(rank, dtype=like.dtype, device=like.device)
        self.task_Lambda = nn.Parameter(eye_RR.repeat(tasks, 1, 1))
        mix_NE = torch.empty(tasks, experts, dtype=like.dtype, device=like.device)
        self.task_mix = nn.Parameter(mix_NE.normal_(std=config.tau))
        self.experts_B = nn.Parameter(
            torch.zeros(experts, rank, base.out_features, dtype=like.dtype, device=like.device)
        )
        self.trace, self.task_ids, self.spot = trace, task_ids, spot

    def weights(self) -> Tensor:
        """Weight (N, E) of every B for every task, in at least fp32."""
        mix_NE = self.task_mix.to(torch.promote_types(self.task_mix.dtype, torch.float32))
        return (mix_NE / self.tau).softmax(dim=-1)

    def forward(self, x_BTI: Tensor) -> Tensor:
        ids_B = self.task_ids(len(x_BTI), x_BTI.device)
        weights_BE = self.weights()[ids_B]
        if self.spot.leads:
            probs_BTE = weights_BE.unsqueeze(1).expand(-1, x_BTI.shape[1], -1)
            choice_BT = probs_BTE.argmax(dim=-1)
            self.trace.routes.append(Route(layer=self.spot.layer, probs_BTE=probs_BTE, choice_BT=choice_BT))
        dropped_BTI = F.dropout(x_BTI, self.dropout, self.training) if self.dropout else x_BTI
        inner_BTR = F.linear(dropped_BTI, self.lora_A) @ self.task_Lambda[ids_B].mT
        gates_B1E1 = (weights_BE * self.scale).to(x_BTI.dtype)[:, None, :, None]
        weighted_BTER = inner_BTR.unsqueeze(-2) * gates_B1E1
        return self.base_layer(x_BTI) + weighted_BTER.flatten(-2) @ self.experts_B.flatten(0, 1)

    def plain(self, task: int) -> tuple[Tensor, Tensor, float]:
        """This linear's LoRA for one task: A (R, I), B (O, R), scale."""
        weights_E = self.weights()[task].to(self.experts_B.dtype)
        B_RO = torch.einsum("e,ero->ro", weights_E, self.experts_B)
        return self.task_Lambda[task] @ self.lora_A, B_RO.T, self.scale


def attach(model: nn.Module, config: Config, trace: Trace) -> Attached:
    """Freeze `model` and put a multi-task LoRA on its target linears."""
    freeze(model)
    task_ids = TaskIds(trace, config.tasks)
    placed = place(
        model, config.targets, lambda linear, spot: TaskLoRA(linear, config, trace, task_ids, spot)
    )
    num_weights = count(model.parameters())
    # A sample meets the Lambda and the mixture of its own task alone.
    per_task = config.rank_per_expert**2 + config.num_experts
    num_others = len(placed) * (len(config.tasks) - 1) * per_task

    def as_lora(task: str | None) -> Mapping[str, tuple[Tensor, Tensor, float]]:
        index = task_index(config.tasks, task)
        with torch.no_grad():
            return {path: adapted.plain(index) for path, adapted in placed.items()}

    return Attached(
        capabilities=Capabilities(
            needs_task_id_train=True,
            needs_task_id_infer=True,
            mergeable=True,
            routing="task",
            router_hears_task_loss=True,
        ),
        num_weights=num_weights,
        num_active=num_weights - num_others,
        as_lora=as_lora,
    )
