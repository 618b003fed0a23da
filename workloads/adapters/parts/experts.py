"""LoRA experts of which every token visits one: three ways to compute the same update, and when each is taken.

dense_mask     the factors of all experts stacked, rows that a token does not visit multiplied by 0 (in the method's own
               file): static shapes, the work of E experts; best while E * R is small or tokens are few
sorted_slices  tokens sorted by expert, once per block, since frozen linears do not care about order; each expert's
               tokens are a slice, whose update is added into the base's output; reads the slices' lengths, so for CPUs
grouped_mm     sorted likewise, one grouped product for all experts; no wait for the device, rows of 16 bytes

Under each of them every expert is in the graph, with a gradient of 0 where no token visits.

Shape letters: B batch, T tokens, N = B * T, E experts, R rank, I inputs, O outputs.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

Backend = Literal["dense_mask", "sorted_slices", "grouped_mm"]
# Largest E * R at which the dense mask is taken, by kind of device.
_DENSE_UP_TO = {"cpu": 32, "cuda": 256}
# Tokens per expert from which sorting pays.
_ENOUGH = 64
# Bytes of which the rows of every operand of a grouped product are a multiple.
_ALIGNED = 16


def choose(device: torch.device, dtype: torch.dtype, num_experts: int, rank: int) -> Backend:
    """How a batch of training is computed on `device`, where each token visits one expert."""
    if num_experts * rank <= _DENSE_UP_TO.get(device.type, num_experts * rank):
        return "dense_mask"
    if device.type == "cpu":
        return "sorted_slices"
    fits = dtype == torch.bfloat16 and rank * dtype.itemsize % _ALIGNED == 0
    return "grouped_mm" if fits else "dense_mask"


def enough(num_tokens: int, num_experts: int) -> bool:
    """Whether a pass has the tokens that make sorting them worth it; decoding has not."""
    return num_tokens >= _ENOUGH * num_experts


@dataclass(frozen=True, kw_only=True)
class Visits:
    """Which token visits which expert, for one pass of one block."""

    order_N: Tensor
    inverse_N: Tensor
    # Where each expert's tokens end in sorted order, as int32.
    ends_E: Tensor
    # Tokens of each expert; None where the update is one grouped product.
    counts: list[int] | None
    # Weight of each token's update in sorted order; None where all are 1.
    weight_N1: Tensor | None

    def sort(self, x_BTI: Tensor) -> Tensor:
        """Tokens (N, I) expert by expert."""
        sorted_NI: Tensor = _Permute.apply(x_BTI.flatten(0, -2), self.order_N, self.inverse_N)
        return sorted_NI

    def restore(self, x_NO: Tensor, like_BTO: Tensor) -> Tensor:
        """Tokens in their own order, in the shape of `like_BTO`."""
        own_NO: Tensor = _Permute.apply(x_NO, self.inverse_N, self.order_N)
        return own_NO.view_as(like_BTO)

    def add(self, base_NO: Tensor, x_NI: Tensor, A_ERI: Tensor, B_ERO: Tensor, scale: float) -> Tensor:
        """base + scale * weight * (B_e A_e x) for each token's expert e, all in sorted order; may reuse `base_NO`."""
        if self.counts is None:
            inner_NR = F.grouped_mm(x_NI, A_ERI.mT, offs=self.ends_E) * scale
            if self.weight_N1 is not None:
                inner_NR = inner_NR * self.weight_N1
            return base_NO + F.grouped_mm(inner_NR, B_ERO, offs=self.ends_E)
        added_NO: Tensor = _AddSlices.apply(base_NO, x_NI, self.weight_N1, A_ERI, B_ERO, self.counts, scale)
        return added_NO


def visits(choice_BT: Tensor, gates_BTE: Tensor, weighted: bool, sliced: bool, dtype: torch.dtype) -> Visits:
    """Sort the tokens by their expert; under `weighted` an update is multiplied by its token's gate, in `dtype`."""
    choice_N = choice_BT.flatten()
    order_N = choice_N.argsort(stable=True)
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    counts_E = F.one_hot(choice_N, gates_BTE.shape[-1]).sum(dim=0)
    weight_N1 = None
    if weighted:
        weight_N1 = gates_BTE.gather(-1, choice_BT.unsqueeze(-1)).flatten(0, 1)[order_N].to(dtype)
    return Visits(
        order_N=order_N,
        inverse_N=inverse_N,
        ends_E=counts_E.cumsum(dim=0).to(torch.int32),
        counts=counts_E.tolist() if sliced else None,
        weight_N1=weight_N1,
    )


class _Permute(Function):
    """Rows in another order; autograd's own backward would add row by row."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_N)
        return x_NI.index_select(0, order_N)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_NI: Tensor
    ) -> tuple[Tensor, None, None]:
        (inverse_N,) = ctx.saved_tensors
        return grad_NI.index_select(0, inverse_N), None, None


class _AddSlices(Function):
    """base += scale * weight * (x_e A_e^T) B_e, slice by slice, in place; slices are never copied."""

    @staticmethod
    def forward(
        ctx: Any,
        base_NO: Tensor,
        x_NI: Tensor,
        weight_N1: Tensor | None,
        A_ERI: Tensor,
        B_ERO: Tensor,
        counts: list[int],
        scale: float,
    ) -> Tensor:
        inner_NR = x_NI.new_empty(len(x_NI), A_ERI.shape[1])
        for x, A_IR, inner in zip(x_NI.split(counts), A_ERI.mT, inner_NR.split(counts), strict=True):
            torch.mm(x, A_IR, out=inner)
        scaled_NR = inner_NR * (scale if weight_N1 is None else scale * weight_N1)
        for scaled, B_RO, out in zip(scaled_NR.split(counts), B_ERO, base_NO.split(counts), strict=True):
            out.addmm_(scaled, B_RO)
        ctx.mark_dirty(base_NO)
        ctx.save_for_backward(x_NI, weight_N1, A_ERI, B_ERO, inner_NR)
        ctx.counts, ctx.scale = counts, scale
        return base_NO

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_NO: Tensor
    ) -> tuple[Tensor | None, ...]:
        x_NI, weight_N1, A_ERI, B_ERO, inner_NR = ctx.saved_tensors
        counts, factor = ctx.counts, ctx.scale if weight_N1 is None else ctx.scale * weight_N1
        grad_scaled_NR, grad_B = torch.empty_like(inner_NR), torch.empty_like(B_ERO)
        outs = zip(grad_scaled_NR.split(counts), grad_B, strict=True)
        scaled_RN = (inner_NR * factor).T
        given = zip(grad_NO.split(counts), B_ERO.mT, scaled_RN.split(counts, dim=1), strict=True)
        for (grad, B_OR, scaled), (out, out_B) in zip(given, outs, strict=True):
            torch.mm(grad, B_OR, out=out)
            torch.mm(scaled, grad, out=out_B)
        grad_weight = None
        if weight_N1 is not None:
            grad_weight = (grad_scaled_NR * inner_NR).sum(dim=1, keepdim=True) * ctx.scale
        grad_NR, grad_x, grad_A = grad_scaled_NR * factor, torch.empty_like(x_NI), torch.empty_like(A_ERI)
        outs = zip(grad_x.split(counts), grad_A, strict=True)
        given = zip(
            grad_NR.split(counts), A_ERI, grad_NR.T.split(counts, dim=1), x_NI.split(counts), strict=True
        )
        for (grad, A_RI, grad_T, x), (out, out_A) in zip(given, outs, strict=True):
            torch.mm(grad, A_RI, out=out)
            torch.mm(grad_T, x, out=out_A)
        return grad_NO, grad_x, grad_weight, grad_A, grad_B, None, None
