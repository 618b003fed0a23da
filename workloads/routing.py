"""Routers and router losses: pure functions on scores.

Source:  LLaVA-MoLE, arXiv:2401.16160 (top-1 choice, balance loss as released); Switch Transformer,
         arXiv:2101.03961, eq. 4 (`switch` form); straight-through, arXiv:1308.3432.
Differs: both balance forms are offered jointly over layers (as LLaVA-MoLE's code) or per layer.

Shape letters: L layers that route, B batch, T tokens, E experts.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

RouterGrad = Literal["hard", "scaled", "straight_through", "dense"]
BalanceForm = Literal["sample", "switch"]
BalanceScope = Literal["joint", "per_layer"]
ROUTER_GRADS: tuple[str, ...] = get_args(RouterGrad)


def linear_scores(x: Tensor, weight_EI: Tensor) -> Tensor:
    """Scores (..., E) of a router without bias on `x` (..., I), in at least fp32 whatever the model's dtype."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(dtype), weight_EI.to(dtype))


def probabilities(scores_BTE: Tensor) -> Tensor:
    """Router probabilities (B, T, E) in at least fp32."""
    return scores_BTE.to(torch.promote_types(scores_BTE.dtype, torch.float32)).softmax(dim=-1)


def top1(scores_BTE: Tensor) -> tuple[Tensor, Tensor]:
    """Router probabilities (B, T, E) in at least fp32 and the preferred expert (B, T) of every token."""
    probs_BTE = probabilities(scores_BTE)
    return probs_BTE, probs_BTE.argmax(dim=-1)


def gates(probs_BTE: Tensor, choice_BT: Tensor, router_grad: RouterGrad) -> Tensor:
    """Weight (B, T, E) of every expert's output, and with it the path of the task loss to the router.

    hard              1 for the chosen expert; the task loss does not reach the router (as released)
    scaled            the chosen expert's probability; the task loss reaches the router (Switch)
    straight_through  1 for the chosen expert, with the gradient of the probabilities
    dense             all probabilities: every token visits every expert
    """
    if router_grad == "dense":
        return probs_BTE
    chosen_BTE = F.one_hot(choice_BT, probs_BTE.shape[-1]).to(probs_BTE.dtype)
    if router_grad == "hard":
        return chosen_BTE
    if router_grad == "scaled":
        return chosen_BTE * probs_BTE
    assert router_grad == "straight_through", router_grad
    return chosen_BTE + (probs_BTE - probs_BTE.detach())


def same_values(router_grad: str) -> set[str]:
    """The field `router_grad` where changing it to the other of `hard` and `straight_through` moves no output."""
    return {"router_grad"} if router_grad in ("hard", "straight_through") else set()


def balance_loss(
    probs_LBTE: Tensor, choice_LBT: Tensor, mask_BT: Tensor, form: BalanceForm, scope: BalanceScope
) -> Tensor:
    """Scalar balance loss over valid tokens; the gradient flows through the probabilities alone.

    sample  mean over samples of sum_j P_j C_j, where P_j and C_j are a sample's mean probability of and share
            of tokens on expert j (1/E when balanced). A sum over samples, so independent of batching.
    switch  E * sum_j P_j C_j with P and C over all tokens of the batch (1 when balanced). Not a sum over
            samples: it depends on how the global batch is cut into micro-batches.
    joint   P and C are means over layers and tokens together; per_layer: the mean of each layer's loss.
    """
    if scope == "per_layer":
        layers = [
            balance_loss(probs_LBTE[i : i + 1], choice_LBT[i : i + 1], mask_BT, form, "joint")
            for i in range(len(probs_LBTE))
        ]
        return torch.stack(layers).mean()
    num_experts = probs_LBTE.shape[-1]
    mask_LBT1 = mask_BT.to(probs_LBTE.dtype).expand(choice_LBT.shape).unsqueeze(-1)
    chosen_LBTE = F.one_hot(choice_LBT, num_experts).to(probs_LBTE.dtype)
    over = (0, 2) if form == "sample" else (0, 1, 2)
    # A sample without any valid token contributes 0, not 0/0.
    tokens = mask_LBT1.sum(dim=over).clamp(min=1)
    mean_probs = (probs_LBTE * mask_LBT1).sum(dim=over) / tokens
    share = (chosen_LBTE * mask_LBT1).sum(dim=over) / tokens
    product = (mean_probs * share.detach()).sum(dim=-1)
    return product.mean() if form == "sample" else num_experts * product


def load(choice_LBT: Tensor, mask_BT: Tensor, num_experts: int) -> Tensor:
    """Number of valid tokens (L, B, E) that each expert of each layer received, per sample."""
    chosen_LBTE = F.one_hot(choice_LBT, num_experts)
    return (chosen_LBTE * mask_BT.to(chosen_LBTE.dtype).unsqueeze(-1)).sum(dim=2)
