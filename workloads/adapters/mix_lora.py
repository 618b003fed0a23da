"""MixLoRA: every sample assembles its own LoRA of each linear from two pools of rank-1 factors.

Source:  Shen et al. 2024, conditional mixture of LoRA, arXiv:2402.15896, and its released selector.
Routing: once per sample and linear from the mean x of the linear's input over the prompt, before dropout.
         IFS: the A factors are the top k of router_A x, the B factors the top k of router_B x.
         CFS: the B factors are the top k of softmax(router_AB concat(chosen A)) + ifs_weight softmax(router_B x).
         The m-th best A factor pairs with the m-th best B factor.
Scale:   alpha / top_k, where top_k is the rank of the assembled LoRA (alpha is 2 rank_total in the scripts).
Trace:   of each decoder block the first adapted linear (q_proj by default) reports its A factors at every token:
         their probabilities and the best one.
Differs: `hard` is as released: no loss reaches the routers, which are frozen at their random start and saved as
         state. The paper is silent on gradients; ours weigh pair m by p_A p_B, the probabilities of its factors
         (softmax of the scores; for CFS the sum above / (1 + ifs_weight)): `scaled` the chosen pairs, `dense`
         all pairs, `straight_through` 1 for the chosen ones with the gradient of `dense`. Padding, and the answer
         where the trace tells of it, are left out of the mean, and the selection of prefill is kept for decoding.
         `ifs_weight` is read as weighing the IFS term. The projector is trained in full instead of adapted. No
         (O, I) product of a sample is formed.

Shape letters: B batch, T tokens, E factors of a pool, K chosen factors, M pairs in use (K or E), I inputs, O outputs.
"""

from dataclasses import dataclass, field
from typing import Literal

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
from workloads.adapters.parts.pooling import prompt_mask
from workloads.config import AdapterConfig
from workloads.errors import require

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Config(AdapterConfig):
    """MixLoRA's settings; the assembled LoRA is scaled by alpha / top_k."""

    name: str = "mix_lora"
    # Factors of each pool.
    rank_total: int = 16
    # Factors that a sample chooses of each pool: the rank of its LoRA.
    top_k: int = 4
    alpha: float = 32.0
    dropout: float = 0.0
    # Whether the choice of B factors hears of the chosen A factors.
    selection: Literal["ifs", "ifs_cfs"] = "ifs_cfs"
    # Weight of the input's say beside that of the chosen A factors.
    ifs_weight: float = 1.0
    router_grad: routing.RouterGrad = "hard"
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
        require(self.rank_total >= 1, "adapter.rank_total", self.rank_total, "a whole number of 1 or more")
        require(
            1 <= self.top_k <= self.rank_total,
            "adapter.top_k",
            self.top_k,
            f"from 1 to adapter.rank_total ({self.rank_total})",
        )
        require(self.ifs_weight >= 0, "adapter.ifs_weight", self.ifs_weight, "0 or more")
        check_lora(self.alpha, self.dropout, self.targets)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The factors of every sample, best pair first, and what the trace hears of them."""

    index_A_BM: Tensor
    index_B_BM: Tensor
    gates_BM: Tensor
    probs_A_BE: Tensor


class FactorPools(nn.Module):
    """A frozen linear plus (alpha / K) sum_m gate_m b_m (a_m . dropout(x)) over a sample's pairs m."""

    router_AB: nn.Parameter | None

    def __init__(self, base: nn.Linear, config: Config, trace: Trace, spot: Spot) -> None:
        super().__init__()
        self.base_layer = base
        self.config = config
        self.trace = trace
        self.spot = spot
        self.kept: Selection | None = None
        size, like = config.rank_total, base.weight
        self.factors_A = kaiming_A(size, base.in_features, like=like)
        zeros_EO = torch.zeros(size, base.out_features, dtype=like.dtype, device=like.device)
        self.factors_B = nn.Parameter(zeros_EO)
        self.router_A = kaiming_A(size, base.in_features, like=like)
        self.router_B = kaiming_A(size, base.in_features, like=like)
        conditional = config.selection == "ifs_cfs"
        self.router_AB = kaiming_A(size, config.top_k * base.in_features, like=like) if conditional else None
        for router in self.routers().values():
            router.requires_grad_(config.router_grad != "hard")

    def routers(self) -> dict[str, nn.Parameter]:
        """The linear's two or three routers by name."""
        both = {"router_A": self.router_A, "router_B": self.router_B}
        return both if self.router_AB is None else {**both, "router_AB": self.router_AB}

    def forward(self, x_BTI: Tensor) -> Tensor:
        chosen = self._selection(x_BTI)
        if self.spot.leads:
            probs_BTE = chosen.probs_A_BE.unsqueeze(1).expand(-1, x_BTI.shape[1], -1)
            choice_BT = chosen.index_A_BM[:, :1].expand(x_BTI.shape[:2])
            self.trace.routes.append(Route(layer=self.spot.layer, probs_BTE=probs_BTE, choice_BT=choice_BT))
        config = self.config
        dropped_BTI = F.dropout(x_BTI, config.dropout, self.training) if config.dropout else x_BTI
        inner_BTM = dropped_BTI @ self.factors_A[chosen.index_A_BM].mT
        scales_BM = (chosen.gates_BM * (config.alpha / config.top_k)).to(x_BTI.dtype)
        return (
            self.base_layer(x_BTI) + (inner_BTM * scales_BM.unsqueeze(1)) @ self.factors_B[chosen.index_B_BM]
        )

    def _selection(self, x_BTI: Tensor) -> Selection:
        """This forward's selection; the one of prefill while decoding."""
        if self.trace.phase == "decode":
            assert self.kept is not None, "decoding without a prefill"
            return self.kept
        mean_BI = self._mean(x_BTI)
        # No gradient passes whole choices, so the hard mode builds no graph.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.router_grad != "hard"):
            selection = self._select(mean_BI)
        # Kept only where decoding follows: a selection made in training holds its graph.
        self.kept = selection if self.trace.phase == "prefill" else None
        return selection

    def _mean(self, x_BTI: Tensor) -> Tensor:
        """Mean over the prompt's tokens (B, I), in at least fp32."""
        dtype = torch.promote_types(x_BTI.dtype, torch.float32)
        mask_B1T = prompt_mask(self.trace).to(dtype).unsqueeze(1)
        return (mask_B1T @ x_BTI.to(dtype)).squeeze(1) / mask_B1T.sum(dim=-1).clamp(min=1)

    def _select(self, mean_BI: Tensor) -> Selection:
        config = self.config
        scores_A_BE = routing.linear_scores(mean_BI, self.router_A)
        scores_B_BE = routing.linear_scores(mean_BI, self.router_B)
        order_A_BE = scores_A_BE.argsort(dim=-1, descending=True, stable=True)
        probs_A_BE, probs_B_BE = scores_A_BE.softmax(dim=-1), scores_B_BE.softmax(dim=-1)
        if self.router_AB is not None:
            chosen_BD = self.factors_A[order_A_BE[:, : config.top_k]].flatten(1)
            heard_BE = routing.linear_scores(chosen_BD, self.router_AB).softmax(dim=-1)
            scores_B_BE = heard_BE + config.ifs_weight * probs_B_BE
            probs_B_BE = scores_B_BE / (1 + config.ifs_weight)
        order_B_BE = scores_B_BE.argsort(dim=-1, descending=True, stable=True)
        pairs_BE = probs_A_BE.gather(1, order_A_BE) * probs_B_BE.gather(1, order_B_BE)
        gates_BM = pair_gates(pairs_BE, config.top_k, config.router_grad)
        num_pairs = gates_BM.shape[1]
        return Selection(
            index_A_BM=order_A_BE[:, :num_pairs],
            index_B_BM=order_B_BE[:, :num_pairs],
            gates_BM=gates_BM,
            probs_A_BE=probs_A_BE,
        )


def pair_gates(pairs_BE: Tensor, top_k: int, router_grad: routing.RouterGrad) -> Tensor:
    """Weight of every pair in use (B, K or E) from the pairs' probabilities, best pair first."""
    if router_grad == "hard":
        return torch.ones_like(pairs_BE[:, :top_k])
    if router_grad == "scaled":
        return pairs_BE[:, :top_k]
    if router_grad == "dense":
        return pairs_BE
    assert router_grad == "straight_through", router_grad
    chosen_E = torch.arange(pairs_BE.shape[1], device=pairs_BE.device) < top_k
    return chosen_E.to(pairs_BE.dtype) + (pairs_BE - pairs_BE.detach())


def attach(model: nn.Module, config: Config, trace: Trace) -> Attached:
    """Freeze `model` and put pools of rank-1 factors on its target linears."""
    freeze(model)
    placed = place(model, config.targets, lambda base, spot: FactorPools(base, config, trace, spot))
    frozen = config.router_grad == "hard"
    names = [f"{path}.{name}" for path, pools in placed.items() for name in pools.routers()]
    num_weights = count(model.parameters())
    num_routers = count(router for pools in placed.values() for router in pools.routers().values())
    visited = config.rank_total if config.router_grad == "dense" else config.top_k
    return Attached(
        capabilities=Capabilities(routing="sample", stateful=frozen, router_hears_task_loss=not frozen),
        num_weights=num_weights,
        num_active=num_routers + (num_weights - num_routers) * visited // config.rank_total,
        state=frozenset(names) if frozen else frozenset(),
        as_lora="mix_lora assembles its factors anew for every sample",
    )
