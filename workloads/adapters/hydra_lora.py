"""HydraLoRA: one A for all tokens and several B's, mixed for every token by the linear's own softmax router.

Source:  Tian et al. 2024, HydraLoRA, arXiv:2404.19245, and its released tuner; for multimodal models Wei et al. 2025,
         AsymLoRA, arXiv:2502.20035: y = W x + (alpha / R) sum_e softmax(W_g x)_e B_e A x.
Routing: once per linear from the linear's input before dropout, by a router without bias; no balance loss.
Trace:   of each decoder block the first adapted linear (q_proj by default) reports its router.
Differs: `router_grad` offers MoLE's top-1 choices beside `dense` (as released); under `hard` no loss reaches the
         routers, so they are frozen at their random start and saved as state. The number of B's is a setting, not
         found by k-means. A x is formed once, so all B's share its dropout mask; as released, each draws its own.
         AsymLoRA's release has one router with bias for the three linears of an MLP, a balance loss, and plain LoRA
         on attention; here every linear is as in HydraLoRA. Rank and alpha default to a quarter of its 32 and 64.

Shape letters: B batch, T tokens, E B's, R rank, I inputs, O outputs.
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
    """HydraLoRA's settings; the mixture is scaled by alpha / rank_per_expert."""

    name: str = "hydra_lora"
    # Number of B's.
    num_experts: int = 3
    # Rank of the shared A and of every B.
    rank_per_expert: int = 8
    alpha: float = 16.0
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
        for key in ("num_experts", "rank_per_expert"):
            value = getattr(self, key)
            require(value >= 1, f"adapter.{key}", value, "a whole number of 1 or more")
        check_lora(self.alpha, self.dropout, self.targets)


class HydraLinear(nn.Module):
    """A frozen linear plus (alpha / R) sum_e gate_e B_e A dropout(x), gates from its own router."""

    def __init__(self, base: nn.Linear, config: Config, trace: Trace, spot: Spot) -> None:
        super().__init__()
        experts, rank, like = config.num_experts, config.rank_per_expert, base.weight
        self.base_layer = base
        self.scale, self.dropout = config.alpha / rank, config.dropout
        self.router_grad: routing.RouterGrad = config.router_grad
        self.trace, self.spot = trace, spot
        self.router = kaiming_A(experts, base.in_features, like=like)
        self.router.requires_grad_(config.router_grad != "hard")
        self.lora_A = kaiming_A(rank, base.in_features, like=like)
        zeros_ERO = torch.zeros(experts, rank, base.out_features, dtype=like.dtype, device=like.device)
        self.experts_B = nn.Parameter(zeros_ERO)

    def forward(self, x_BTI: Tensor) -> Tensor:
        probs_BTE, choice_BT = routing.top1(routing.linear_scores(x_BTI, self.router))
        if self.spot.leads:
            self.trace.routes.append(Route(layer=self.spot.layer, probs_BTE=probs_BTE, choice_BT=choice_BT))
        gates_BTE = (routing.gates(probs_BTE, choice_BT, self.router_grad) * self.scale).to(x_BTI.dtype)
        dropped_BTI = F.dropout(x_BTI, self.dropout, self.training) if self.dropout else x_BTI
        inner_BTR = F.linear(dropped_BTI, self.lora_A)
        # A x is weighed, not the B's: E R numbers a token, where a B of its own would take R O.
        weighted_BTER = gates_BTE.unsqueeze(-1) * inner_BTR.unsqueeze(-2)
        return self.base_layer(x_BTI) + weighted_BTER.flatten(-2) @ self.experts_B.flatten(0, 1)


def attach(model: nn.Module, config: Config, trace: Trace) -> Attached:
    """Freeze `model` and put a shared A with routed B's on its target linears."""
    freeze(model)
    placed = place(model, config.targets, lambda base, spot: HydraLinear(base, config, trace, spot))
    num_weights = count(model.parameters())
    num_B = count(linear.experts_B for linear in placed.values())
    visited = config.num_experts if config.router_grad == "dense" else 1
    frozen = config.router_grad == "hard"
    return Attached(
        capabilities=Capabilities(
            routing="token",
            stateful=frozen,
            router_hears_task_loss=not frozen,
        ),
        num_weights=num_weights,
        num_active=num_weights - num_B + num_B * visited // config.num_experts,
        state=frozenset(f"{path}.router" for path in placed) if frozen else frozenset(),
        as_lora="hydra_lora mixes its B's anew for every token",
    )
