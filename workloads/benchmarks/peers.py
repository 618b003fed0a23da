"""What methods are compared with: PEFT's plain LoRA, and the same updates in the obvious way.

Source:  the loop is what the released LLaVA-MoLE code is described to do (each expert looks for its tokens, gathers
         them, and its outputs are scattered back); the stack is the textbook mixture of all experts' outputs.

Shape letters: B batch, T tokens, N = B * T, n an expert's tokens, E experts, R rank, I inputs, O outputs, D width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from workloads import routing
from workloads.adapters.base import MLP, Route
from workloads.adapters.moe_lora import MixedExperts
from workloads.adapters.mole import LoRAExperts, MoLEBlock
from workloads.errors import UserError


def peft_lora(mlp: nn.Module, rank: int) -> nn.Module:
    """`mlp` with PEFT's plain LoRA on its linears; raises `UserError` when peft is not installed."""
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError:
        raise UserError(
            "bench: peft is not installed; `pip install 'peft>=0.18'` or the extra [bench]"
        ) from None
    anything: Any = mlp
    settings = LoraConfig(r=rank, lora_alpha=16, lora_dropout=0.0, bias="none", target_modules=list(MLP))
    return get_peft_model(anything, settings).get_base_model()


class _Experts(nn.Module):
    """A frozen linear with experts as linears of their own, of the values that a method stacks."""

    def __init__(self, base: nn.Linear, A_ERI: Tensor, B_ERO: Tensor, scale: float) -> None:
        super().__init__()
        self.base_layer = base
        self.scale = scale
        self.experts_A = nn.ParameterList([nn.Parameter(A_RI.detach().clone()) for A_RI in A_ERI])
        self.experts_B = nn.ParameterList([nn.Parameter(B_RO.detach().clone()) for B_RO in B_ERO])

    def expert(self, e: int, x: Tensor) -> Tensor:
        """The scaled update (..., O) of one expert for inputs (..., I)."""
        return (x @ self.experts_A[e].T) @ self.experts_B[e] * self.scale


class LoopLinear(_Experts):
    """Every expert looks for its tokens, gathers them, and adds its outputs in their places."""

    def forward(self, x_BTI: Tensor, choice_BT: Tensor) -> Tensor:
        out_BTO = self.base_layer(x_BTI)
        x_NI, choice_N = x_BTI.flatten(0, 1), choice_BT.flatten()
        update_NO = torch.zeros_like(out_BTO).flatten(0, 1)
        for e in range(len(self.experts_A)):
            (places_n,) = torch.where(choice_N == e)
            update_NO.index_add_(0, places_n, self.expert(e, x_NI.index_select(0, places_n)))
        return out_BTO + update_NO.view_as(out_BTO)


class LoopBlock(nn.Module):
    """MoLE (`hard`) with a loop over experts in each linear; starts with the values of `block`."""

    def __init__(self, block: MoLEBlock) -> None:
        super().__init__()
        assert block.config.router_grad == "hard", block.config.router_grad
        self.gate_proj, self.up_proj, self.down_proj = (
            _looped(linear) for linear in (block.gate_proj, block.up_proj, block.down_proj)
        )
        self.act_fn, self.router, self.trace = block.act_fn, block.router, block.trace

    def forward(self, x_BTD: Tensor) -> Tensor:
        probs_BTE, choice_BT = routing.top1(self.router(x_BTD))
        self.trace.routes.append(Route(layer=0, probs_BTE=probs_BTE, choice_BT=choice_BT))
        hidden_BTF = self.act_fn(self.gate_proj(x_BTD, choice_BT)) * self.up_proj(x_BTD, choice_BT)
        return self.down_proj(hidden_BTF, choice_BT)


class StackLinear(_Experts):
    """MoELoRA (`dense`) that forms every expert's output and weighs them by a router of its own."""

    def __init__(self, mixed: MixedExperts) -> None:
        super().__init__(mixed.base_layer, mixed.experts_A, mixed.experts_B, mixed.scale)
        assert mixed.router_grad == "dense", mixed.router_grad
        self.router = nn.Parameter(mixed.router.detach().clone())

    def forward(self, x_BTI: Tensor) -> Tensor:
        probs_BTE = routing.probabilities(routing.linear_scores(x_BTI, self.router))
        outputs_BTEO = torch.stack([self.expert(e, x_BTI) for e in range(len(self.experts_A))], dim=2)
        return self.base_layer(x_BTI) + (outputs_BTEO * probs_BTE.unsqueeze(-1)).sum(dim=2)


class StackBlock(nn.Module):
    """A Llama MLP of `StackLinear`s; starts with the values of the MoELoRA in `mlp`."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        mixed: Any = mlp
        self.gate_proj, self.up_proj, self.down_proj = (StackLinear(getattr(mixed, name)) for name in MLP)
        self.act_fn = mixed.act_fn

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


def _looped(linear: LoRAExperts) -> LoopLinear:
    return LoopLinear(linear.base_layer, linear.experts_A, linear.experts_B, linear.scale)
