"""MoLE: each token visits the one LoRA expert that its MLP block's router prefers.

Source:  Chen, Jie, Ma 2024, LLaVA-MoLE, arXiv:2401.16160, and its released model code.
Routing: once per MLP block from the block's input, shared by gate, up and down; top-1; balance loss.
         Attention linears carry plain LoRA of the same rank.
Differs: `router_grad` chooses whether the task loss reaches the router (`hard`: it does not, as released).
         All experts' factors are stacked into one matrix and the rows of experts that a token does not visit
         are multiplied by 0, or, from a certain size on, the block runs with its tokens sorted by expert
         (`parts.experts` chooses); so every expert is in the graph on every rank.

Shape letters: B batch, T tokens, N = B * T, D width, F hidden width, E experts, R rank, I inputs, O outputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads import routing
from workloads.adapters.base import (
    ATTENTION,
    Attached,
    Capabilities,
    Route,
    Router,
    Trace,
    count,
    decoder_blocks,
    freeze,
    kaiming_A,
)
from workloads.adapters.parts import experts
from workloads.adapters.parts.placing import check_lora, put_lora
from workloads.config import AdapterConfig
from workloads.errors import require

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Config(AdapterConfig):
    """MoLE's settings; every expert and every attention LoRA is scaled by alpha / rank_per_expert."""

    name: str = "mole"
    num_experts: int = 3
    rank_per_expert: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    router_grad: routing.RouterGrad = "hard"
    balance_weight: float = 0.01
    balance_form: routing.BalanceForm = "sample"
    balance_scope: routing.BalanceScope = "joint"

    def layout_matters(self) -> bool:
        """Dropout masks and the `switch` loss depend on how a global batch is cut."""
        return self.dropout > 0 or self.balance_form == "switch"

    def training_only(self) -> set[str]:
        """Fields that steer training; `hard` and `straight_through` differ in their gradients alone."""
        return {"dropout", "balance_weight", "balance_form", "balance_scope"} | routing.same_values(
            self.router_grad
        )

    def check(self) -> None:
        """Raise `UserError` on values out of range."""
        for key in ("num_experts", "rank_per_expert"):
            require(
                getattr(self, key) >= 1, f"adapter.{key}", getattr(self, key), "a whole number of 1 or more"
            )
        check_lora(self.alpha, self.dropout)
        require(self.balance_weight >= 0, "adapter.balance_weight", self.balance_weight, "0 or more")


class LoRAExperts(nn.Module):
    """A frozen linear plus (alpha / R) sum_e gate_e B_e A_e dropout(x), dropout drawn per expert."""

    def __init__(self, base: nn.Linear, config: Config) -> None:
        super().__init__()
        num_experts, rank = config.num_experts, config.rank_per_expert
        self.base_layer = base
        self.scale = config.alpha / rank
        self.dropout = config.dropout
        self.one_path = config.router_grad in ("hard", "scaled")
        self.experts_A = kaiming_A(num_experts, rank, base.in_features, like=base.weight)
        zeros_ERO = torch.zeros(
            num_experts, rank, base.out_features, dtype=base.weight.dtype, device=base.weight.device
        )
        self.experts_B = nn.Parameter(zeros_ERO)

    def forward(self, x_BTI: Tensor, gates: Tensor | experts.Visits) -> Tensor:
        """Outputs (B, T, O) for gates (B, T, E); (N, O) for inputs (N, I) sorted by whom they visit."""
        if isinstance(gates, experts.Visits):
            return gates.add(self.base_layer(x_BTI), x_BTI, self.experts_A, self.experts_B, self.scale)
        inner_BTER = self._inner(x_BTI).unflatten(-1, self.experts_A.shape[:2])
        weighted_BTER = inner_BTER * (gates.to(x_BTI.dtype) * self.scale).unsqueeze(-1)
        return self.base_layer(x_BTI) + weighted_BTER.flatten(-2) @ self.experts_B.flatten(0, 1)

    def _inner(self, x_BTI: Tensor) -> Tensor:
        """A_e dropout_e(x) of all experts, stacked on the last axis."""
        if not (self.dropout and self.training):
            return F.linear(x_BTI, self.experts_A.flatten(0, 1))
        if (
            self.one_path
        ):  # values and gradients pass one expert a token, so one draw a token is one an expert
            return F.linear(F.dropout(x_BTI, self.dropout), self.experts_A.flatten(0, 1))
        return torch.cat([F.linear(F.dropout(x_BTI, self.dropout), A_RI) for A_RI in self.experts_A], dim=-1)


class MoLEBlock(nn.Module):
    """A Llama MLP whose three linears have experts, with one router for all three."""

    def __init__(self, mlp: nn.Module, config: Config, trace: Trace, layer: int) -> None:
        super().__init__()
        base: Any = mlp
        self.gate_proj = LoRAExperts(base.gate_proj, config)
        self.up_proj = LoRAExperts(base.up_proj, config)
        self.down_proj = LoRAExperts(base.down_proj, config)
        self.act_fn = base.act_fn
        weight = base.gate_proj.weight
        self.router = Router(
            base.gate_proj.in_features, config.num_experts, dtype=weight.dtype, device=weight.device
        )
        # New modules are in training mode; the model may not be.
        self.train(mlp.training)
        self.config = config
        self.trace = trace
        self.layer = layer

    def backend(self) -> experts.Backend:
        """How a batch of training is computed where the weights are now."""
        # With dropout the masks follow the order of tokens, and all experts are needed where all are visited.
        if self.config.router_grad not in ("hard", "scaled") or self.config.dropout:
            return "dense_mask"
        weight = self.router.weight
        return experts.choose(
            weight.device, weight.dtype, self.config.num_experts, self.config.rank_per_expert
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        probs_BTE, choice_BT = routing.top1(self.router(x_BTD))
        self.trace.routes.append(Route(layer=self.layer, probs_BTE=probs_BTE, choice_BT=choice_BT))
        gates_BTE = routing.gates(probs_BTE, choice_BT, self.config.router_grad)
        backend = self.backend()
        if backend == "dense_mask" or not experts.enough(choice_BT.numel(), self.config.num_experts):
            return self._mlp(x_BTD, gates_BTE)
        weighted, sliced = self.config.router_grad == "scaled", backend == "sorted_slices"
        visits = experts.visits(choice_BT, gates_BTE, weighted, sliced, x_BTD.dtype)
        return visits.restore(self._mlp(visits.sort(x_BTD), visits), x_BTD)

    def _mlp(self, x: Tensor, gates: Tensor | experts.Visits) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x, gates)) * self.up_proj(x, gates), gates)


def attach(model: nn.Module, config: Config, trace: Trace) -> Attached:
    """Freeze `model`, put plain LoRA on attention and routed experts on every MLP block."""
    freeze(model)
    put_lora(model, ATTENTION, config.rank_per_expert, config.alpha, config.dropout)
    num_attention = count(model.parameters())
    placed: list[MoLEBlock] = []
    for layer, block in decoder_blocks(model):
        placed.append(MoLEBlock(block.get_submodule("mlp"), config, trace, layer))
        block.mlp = placed[-1]
    num_routers = sum(count(mlp.router.parameters()) for mlp in placed)
    num_weights = count(model.parameters())
    num_experts_weights = num_weights - num_attention - num_routers
    visited = config.num_experts if config.router_grad == "dense" else 1
    return Attached(
        capabilities=Capabilities(routing="token", router_hears_task_loss=config.router_grad != "hard"),
        num_weights=num_weights,
        num_active=num_attention + num_routers + num_experts_weights * visited // config.num_experts,
        losses=lambda trace: _losses(trace, config),
        backend=placed[0].backend,
        as_lora="mole chooses its experts anew for every token",
    )


def _losses(trace: Trace, config: Config) -> Mapping[str, Tensor]:
    """The weighted balance loss over the valid tokens of the last forward pass."""
    assert trace.token_mask_BT is not None
    probs_LBTE = torch.stack([route.probs_BTE for route in trace.routes])
    choice_LBT = torch.stack([route.choice_BT for route in trace.routes])
    loss = routing.balance_loss(
        probs_LBTE, choice_LBT, trace.token_mask_BT, config.balance_form, config.balance_scope
    )
    return {"balance_loss": config.balance_weight * loss}
