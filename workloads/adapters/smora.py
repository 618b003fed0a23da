"""SMoRA: every rank of a LoRA is an expert, of which each token visits the k that the linear's router prefers.

Source:  Zhao et al. 2025, SMoRA, arXiv:2501.15103, and its released tuner; loss-free balancing, arXiv:2408.15664.
Routing: once per linear from the linear's input: a = sigmoid(W_r x) + bias, without any balance loss. The bias of
         a rank rises by `bias_step` where the rank got fewer tokens than the mean rank, and falls where more.
Scale:   alpha / top_k times the gates, which sum to top_k (`scaled`, as released: k a_i / sum of the chosen a).
Trace:   of each decoder block the first adapted linear (q_proj by default) reports a / sum(a) and its best rank.
Differs: the bias moves once per optimizer step by the valid tokens of all workers, not at every forward; it is
         kept as a whole number of steps, exact in every dtype. As released it enters the gates too. A dense
         masked product takes the place of indexed kernels. The other router gradients divide alpha between the
         ranks as follows: `hard` 1/k to each chosen one, routers frozen at their random start; `dense` a / sum(a)
         to all; `straight_through` as `hard` with the gradient of `dense`. Logits shared by several ranks are
         left out.

Shape letters: B batch, T tokens, R ranks, I inputs, O outputs, N adapted linears.
"""

from collections.abc import Callable, Mapping, Sequence
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
    """SMoRA's settings; the gates of the chosen ranks sum to top_k and are scaled by alpha / top_k."""

    name: str = "smora"
    # Ranks to choose from.
    rank_total: int = 32
    # Ranks that a token visits.
    top_k: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    router_grad: routing.RouterGrad = "scaled"
    # Change of a rank's bias at an optimizer step; 0 turns balancing off.
    bias_step: float = 1e-5
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
        require(self.bias_step >= 0, "adapter.bias_step", self.bias_step, "0 or more")
        check_lora(self.alpha, self.dropout, self.targets)


class RankExperts(nn.Module):
    """A frozen linear plus alpha sum_i weight_i B_i (A_i . dropout(x)) over ranks i, weights from its own router."""

    bias_steps: Tensor
    visits: Tensor
    pending: Tensor

    def __init__(self, base: nn.Linear, config: Config, trace: Trace, spot: Spot) -> None:
        super().__init__()
        self.base_layer = base
        self.config = config
        self.trace = trace
        self.spot = spot
        ranks, like = config.rank_total, base.weight
        self.router = kaiming_A(ranks, base.in_features, like=like)
        self.router.requires_grad_(config.router_grad != "hard")
        self.ranks_A = kaiming_A(ranks, base.in_features, like=like)
        zeros_RO = torch.zeros(ranks, base.out_features, dtype=like.dtype, device=like.device)
        self.ranks_B = nn.Parameter(zeros_RO)
        zeros_R = torch.zeros(ranks, dtype=torch.int64, device=like.device)
        # The bias in units of bias_step; whole numbers survive a model's cast to bf16.
        self.register_buffer("bias_steps", zeros_R)
        # Valid tokens of each rank: in the last training forward, and in this optimizer step so far.
        self.register_buffer("visits", zeros_R.clone(), persistent=False)
        self.register_buffer("pending", zeros_R.clone(), persistent=False)

    def forward(self, x_BTI: Tensor) -> Tensor:
        a_BTR = routing.linear_scores(x_BTI, self.router).sigmoid()
        a_BTR = a_BTR + self.config.bias_step * self.bias_steps.to(a_BTR.dtype)
        best_BTK = a_BTR.topk(self.config.top_k, dim=-1).indices
        chosen_BTR = torch.zeros_like(a_BTR, dtype=torch.bool).scatter(-1, best_BTK, True)
        self._report(a_BTR, best_BTK[..., 0], chosen_BTR)
        weights_BTR = rank_weights(a_BTR, chosen_BTR, self.config.router_grad)
        dropout = self.config.dropout
        dropped_BTI = F.dropout(x_BTI, dropout, self.training) if dropout else x_BTI
        inner_BTR = F.linear(dropped_BTI, self.ranks_A)
        weighted_BTR = inner_BTR * (weights_BTR * self.config.alpha).to(x_BTI.dtype)
        return self.base_layer(x_BTI) + weighted_BTR @ self.ranks_B

    def _report(self, a_BTR: Tensor, best_BT: Tensor, chosen_BTR: Tensor) -> None:
        """Tell the trace of the routing, and in training count the valid tokens of every rank.

        The counts replace those of the forward before, so that recomputation does not count twice.
        """
        if self.spot.leads:
            shares_BTR = a_BTR / a_BTR.sum(dim=-1, keepdim=True)
            self.trace.routes.append(Route(layer=self.spot.layer, probs_BTE=shares_BTR, choice_BT=best_BT))
        if self.training:
            assert self.trace.token_mask_BT is not None
            self.visits = (chosen_BTR & self.trace.token_mask_BT.unsqueeze(-1)).sum(dim=(0, 1))


def rank_weights(a_BTR: Tensor, chosen_BTR: Tensor, router_grad: routing.RouterGrad) -> Tensor:
    """How alpha is divided between the ranks (B, T, R): sums to 1 for every token."""
    if router_grad == "scaled":
        kept_BTR = a_BTR * chosen_BTR
        return kept_BTR / kept_BTR.sum(dim=-1, keepdim=True)
    even_BTR = chosen_BTR.to(a_BTR.dtype) / chosen_BTR.sum(dim=-1, keepdim=True)
    if router_grad == "hard":
        return even_BTR
    shares_BTR = a_BTR / a_BTR.sum(dim=-1, keepdim=True)
    if router_grad == "dense":
        return shares_BTR
    assert router_grad == "straight_through", router_grad
    return even_BTR + (shares_BTR - shares_BTR.detach())


def attach(model: nn.Module, config: Config, trace: Trace) -> Attached:
    """Freeze `model` and make every rank of a LoRA on its target linears an expert."""
    freeze(model)
    placed = place(model, config.targets, lambda base, spot: RankExperts(base, config, trace, spot))
    linears = list(placed.values())
    frozen = config.router_grad == "hard"
    saved = ("bias_steps", "router") if frozen else ("bias_steps",)
    num_weights = count(model.parameters())
    num_routers = count(linear.router for linear in linears)
    visited = config.rank_total if config.router_grad == "dense" else config.top_k
    return Attached(
        capabilities=Capabilities(routing="token", stateful=True, router_hears_task_loss=not frozen),
        num_weights=num_weights,
        num_active=num_routers + (num_weights - num_routers) * visited // config.rank_total,
        losses=lambda trace: _count(linears, trace),
        state=frozenset(f"{path}.{name}" for path in placed for name in saved),
        after_step=lambda reduce_sum: _balance(linears, reduce_sum),
        as_lora="smora chooses its ranks anew for every token",
    )


def _count(linears: Sequence[RankExperts], trace: Trace) -> Mapping[str, Tensor]:
    """Add a training micro-batch to the counts of the step; there is no loss."""
    for linear in linears:
        if linear.training and trace.counted:
            linear.pending += linear.visits
    return {}


def _balance(linears: Sequence[RankExperts], reduce_sum: Callable[[Tensor], Tensor]) -> None:
    """Move every bias one step towards a balanced load, by the counts of all workers."""
    counts_NR = reduce_sum(torch.stack([linear.pending for linear in linears]))
    # sign(mean - count) in whole numbers.
    signs_NR = (counts_NR.sum(dim=-1, keepdim=True) - counts_NR.shape[-1] * counts_NR).sign()
    for linear, sign_R in zip(linears, signs_NR, strict=True):
        linear.bias_steps += sign_R.to(torch.int64)
        linear.pending.zero_()
