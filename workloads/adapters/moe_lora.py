"""MoELoRA: every token mixes all LoRA experts of a linear by that linear's own softmax router.

Source:  Chen et al. 2024, CoIN, arXiv:2403.08350, and its released tuner.
Routing: once per linear from the linear's input, by a router without bias; no balance loss.
Scale:   alpha / rank_total, whatever the number of experts; an expert has rank rank_total / num_experts.
Trace:   of each decoder block the first adapted linear (q_proj by default) reports its router.
Differs: `router_grad` offers MoLE's top-1 choices beside `dense` (as released); under `hard` no loss reaches the
         routers, so they are frozen at their random start and saved as state. N(0, .01) of A is read as a
         standard deviation of 0.01. The experts' factors are stacked: two matrix products for all experts.

Shape letters: B batch, T tokens, E experts, R rank of an expert, I inputs, O outputs.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads import routing
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
from workloads.config import AdapterConfig
from workloads.errors import require

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Config(AdapterConfig):
    """MoELoRA's settings; the mixture is scaled by alpha / rank_total."""

    name: str = "moe_lora"
    num_experts: int = 4
    # Rank of all experts together.
    rank_total: int = 16
    alpha: float = 32.0
    # Drawn for each expert.
    dropout: float = 0.0
    router_grad: routing.RouterGrad = "dense"
    # Last path components of the adapted linears.
    targets: list[str] = field(default_factory=lambda: [*ATTENTION, *MLP])

    def layout_matters(self) -> bool:
        """Dropout masks depend on how a global batch is cut."""
        return self.dropout > 0

    def training_only(self) -> set[str]:
        """Fields that steer training; `hard` and `straight_through` differ in their gradients alone."""
        return {"dropout"} | routing.same_values(self.router_grad)

    def check(self) -> None:
        """Raise `UserError` on values out of range."""
        require(self.num_experts >= 1, "adapter.num_experts", self.num_experts, "a whole number of 1 or more")
        require(
            self.rank_total >= 1 and self.rank_total % self.num_experts == 0,
            "adapter.rank_total",
            self.rank_total,
            f"a multiple of adapter.num_experts ({self.num_experts})",
        )
        check_lora(self.alpha, self.dropout, self.targets)


class MixedExperts(nn.Module):
    """A frozen linear plus (alpha / rank_total) sum_e gate_e B_e A_e dropout_e(x), gates from its own router."""

    def __init__(self, base: nn.Linear, config: Config, trace: Trace, spot: Spot) -> None:
        super().__init__()
        experts, rank = config.num_experts, config.rank_total // config.num_experts
        self.base_layer = base
        self.scale = config.alpha / config.rank_total
        self.dropout = config.dropout
        self.router_grad: routing.RouterGrad = config.router_grad
        self.trace = trace
        self.spot = spot
        like = base.weight
        self.router = kaiming_A(experts, base.in_features, like=like)
        self.router.requires_grad_(config.router_grad != "hard")
        start_ERI = torch.empty(experts, rank, base.in_features, dtype=like.dtype, device=like.device)
        self.experts_A = nn.Parameter(start_ERI.normal_(std=0.01))
        zeros_ERO = torch.zeros(experts, rank, base.out_features, dtype=like.dtype, device=like.device)
        self.experts_B = nn.Parameter(zeros_ERO)

    def forward(self, x_BTI: Tensor) -> Tensor:
        gates_BTE = self._gates(x_BTI).to(x_BTI.dtype)
        inner_BTER = self._inner(x_BTI).unflatten(-1, self.experts_A.shape[:2])
        weighted_BTER = inner_BTER * (gates_BTE * self.scale).unsqueeze(-1)
        return self.base_layer(x_BTI) + weighted_BTER.flatten(-2) @ self.experts_B.flatten(0, 1)

    def _gates(self, x_BTI: Tensor) -> Tensor:
        """Weights (B, T, E) of the experts' outputs; the preferred expert is looked for only where it is asked for."""
        probs_BTE = routing.probabilities(routing.linear_scores(x_BTI, self.router))
        if self.router_grad == "dense" and not self.spot.leads:
            return probs_BTE
        choice_BT = probs_BTE.argmax(dim=-1)
        if self.spot.leads:
            self.trace.routes.append(Route(layer=self.spot.layer, probs_BTE=probs_BTE, choice_BT=choice_BT))
        return routing.gates(probs_BTE, choice_BT, self.router_grad)

    def _inner(self, x_BTI: Tensor) -> Tensor:
        """A_e dropout_e(x) of all experts, stacked on the last axis."""
        if not (self.dropout and self.training):
            return F.linear(x_BTI, self.experts_A.flatten(0, 1))
        return torch.cat([F.linear(F.dropout(x_BTI, self.dropout), A_RI) for A_RI in self.experts_A], dim=-1)


def attach(model: nn.Module, config: Config, trace: Trace) -> Attached:
    """Freeze `model` and put routed experts on its target linears."""
    freeze(model)
    placed = place(model, config.targets, lambda base, spot: MixedExperts(base, config, trace, spot))
    num_weights = count(model.parameters())
    num_routers = count(module.router for module in placed.values())
    visited = config.num_experts if config.router_grad == "dense" else 1
    frozen = config.router_grad == "hard"
    return Attached(
        capabilities=Capabilities(
            routing="token",
            stateful=frozen,
            router_hears_task_loss=not frozen,
        ),
        num_weights=num_weights,
        num_active=num_routers + (num_weights - num_routers) * visited // config.num_experts,
        state=frozenset(f"{path}.router" for path in placed) if frozen else frozenset(),
        as_lora="moe_lora mixes its experts anew for every token",
    )
