"""SMoLoRA: one half of the LoRA experts is chosen by what the sample shows, the other by its instruction.

Source:  SMoLoRA 2024, arXiv:2411.13949 (ICCV 2025), and its released tuner.
Routing: once per sample and linear, one expert of each half: the visual router sees the mean of the linear's input,
         the instruction router the sentence vector of the question's text. The halves' outputs are added with
         weights softmax([I_visual . y_visual, I_instruction . y_instruction]) of each token.
Scale:   alpha / rank_total, inside the halves' outputs; an expert has rank rank_total / number of experts.
Trace:   of each decoder block gate_proj reports its visual router (its instruction router where there is no other).
Start:   fusion is 1/2 and 1/2 while B = 0, so an update begins at half of plain LoRA's.
Differs: no task id: the vector is computed from the text of the question. Padding, and the answer where the trace
         tells of it, are left out of the mean, and the choice of prefill is kept for decoding (`compat` does neither,
         as released). `router_grad` lets the task loss reach the routers: with `frozen_hash` (as released) they
         stay at their random start and are saved as state. Where the paper is silent: `scaled` multiplies an
         expert's output by its softmax probability over the half; N(0, .01) of A is read as a standard deviation.
         Only the chosen experts are computed (all under `straight_through`, whose gradient needs them); fusion is
         done in rank space, so neither half's output is formed.

Shape letters: B batch, T tokens, N experts, H halves, n experts in use (N or H), R rank, I inputs, O outputs, S text.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads import routing
from workloads.adapters.base import MLP, Attached, Capabilities, Route, Trace, count, freeze, kaiming_A
from workloads.adapters.parts.placing import check_lora, place
from workloads.adapters.parts.pooling import Pool
from workloads.config import AdapterConfig
from workloads.errors import require
from workloads.llava import sentence
from workloads.llava.sentence import SentenceEncoder

VERSION = 1
_MODES: dict[str, routing.RouterGrad] = {
    "frozen_hash": "hard",
    "straight_through": "straight_through",
    "scaled": "scaled",
}


@dataclass(frozen=True, kw_only=True)
class Config(AdapterConfig):
    """SMoLoRA's settings; every expert is scaled by alpha / rank_total."""

    name: str = "smolora"
    # Experts of the visual and of the instruction half; 0 leaves the half out.
    num_visual: int = 4
    num_instruction: int = 4
    # Rank of all experts together.
    rank_total: int = 64
    alpha: float = 128.0
    # Drawn for each expert.
    dropout: float = 0.0
    router_grad: Literal["frozen_hash", "straight_through", "scaled"] = "frozen_hash"
    # `mean` holds the weights of the halves at 1/2.
    fusion: Literal["learned", "mean"] = "learned"
    # Adapt the projector's linears too, as released; meant for model.train_projector: false.
    projector: bool = False
    # Folder of the sentence encoder; empty: the packaged all-MiniLM-L6-v2.
    encoder: str = ""
    # Pool over padding and, in decoding, over the current token alone, as released.
    compat: bool = False

    def layout_matters(self) -> bool:
        """Dropout masks, and padding under `compat`, depend on how a global batch is cut."""
        return self.dropout > 0 or self.compat

    def training_only(self) -> set[str]:
        """Fields that steer training; `frozen_hash` and `straight_through` differ in their gradients alone."""
        same_values = {"router_grad"} if self.router_grad in ("frozen_hash", "straight_through") else set()
        return {"dropout"} | same_values

    def identity(self) -> dict[str, str]:
        """The content of the sentence encoder, where one is used."""
        used = self.num_instruction > 0
        return {
            "encoder": sentence.content_hash(sentence.find(self.encoder, "adapter.encoder")) if used else ""
        }

    def check(self) -> None:
        """Raise `UserError` on values out of range."""
        for key in ("num_visual", "num_instruction"):
            require(
                getattr(self, key) >= 0, f"adapter.{key}", getattr(self, key), "a whole number of 0 or more"
            )
        n = self.num_visual + self.num_instruction
        require(n >= 1, "adapter.num_visual", self.num_visual, "one half needs an expert")
        fits = self.rank_total >= n and self.rank_total % n == 0
        require(fits, "adapter.rank_total", self.rank_total, f"a multiple of the number of experts ({n})")
        check_lora(self.alpha, self.dropout, MLP)

    def halves(self) -> list[int]:
        """Experts of each half that has any."""
        return [size for size in (self.num_visual, self.num_instruction) if size]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What all linears use in one forward pass."""

    trace: Trace
    pool: Pool
    encoder: SentenceEncoder | None

    def texts(self, num_samples: int, device: torch.device) -> Tensor:
        """Sentence vectors (B, S) of the batch's questions."""
        assert self.encoder is not None
        questions = self.trace.questions
        assert len(questions) == num_samples, f"{len(questions)} questions for {num_samples} samples"
        return self.encoder.vectors(questions).to(device)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The expert of each half (counted over all experts), all experts' gates, the first half's probabilities."""

    expert_BH: Tensor
    gates_BN: Tensor
    probs_BE: Tensor


class SMoLoRALinear(nn.Module):
    """A frozen linear plus sum_h w_h (alpha / rank_total) gate_h B_h A_h dropout(x), one expert h of each half."""

    halves_nH: Tensor
    router_visual: Tensor
    router_instruction: Tensor

    def __init__(
        self, base: nn.Linear, config: Config, sample: Sample, layer: int | None, leads: bool
    ) -> None:
        """`layer` is None in the projector, whose input has patches instead of tokens."""
        super().__init__()
        self.config, self.sample, self.layer, self.leads = config, sample, layer, leads
        self.base_layer = base
        sizes = config.halves()
        experts, self.rank = sum(sizes), config.rank_total // sum(sizes)
        like = base.weight
        options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        A_NRI = torch.empty(experts, self.rank, base.in_features, **options).normal_(std=0.01)
        self.experts_A = nn.Parameter(A_NRI)
        self.experts_B = nn.Parameter(torch.zeros(experts, self.rank, base.out_features, **options))
        self.learned = config.fusion == "learned" and len(sizes) == 2
        self.scale = config.alpha / config.rank_total / (1 if self.learned else len(sizes))
        if self.learned:
            self.fusion_HO = kaiming_A(2, base.out_features, like=like)
        if config.num_visual:
            self._add_router("router_visual", kaiming_A(config.num_visual, base.in_features, like=like))
        if sample.encoder is not None:
            self._add_router(
                "router_instruction", kaiming_A(config.num_instruction, sample.encoder.width, like=like)
            )
        self.dense = config.router_grad == "straight_through"
        halves_NH = torch.eye(len(sizes)).repeat_interleave(torch.tensor(sizes if self.dense else 1), dim=0)
        # Which half each expert in use belongs to.
        self.register_buffer("halves_nH", halves_NH.to(like.device), persistent=False)
        self.kept: Choice | None = None

    def _add_router(self, name: str, weight: nn.Parameter) -> None:
        # A buffer cannot be switched on together with the projector that the linear may be part of.
        if self.config.router_grad == "frozen_hash":
            self.register_buffer(name, weight.detach())
        else:
            self.register_parameter(name, weight)

    def forward(self, x_BTI: Tensor) -> Tensor:
        choice = self._choice(x_BTI)
        if self.leads:
            assert self.layer is not None
            probs_BTE = choice.probs_BE.unsqueeze(1).expand(-1, x_BTI.shape[1], -1)
            route = Route(layer=self.layer, probs_BTE=probs_BTE, choice_BT=probs_BTE.argmax(dim=-1))
            self.sample.trace.routes.append(route)
        A, B, gates_Bn = self.experts_A, self.experts_B, choice.gates_BN
        if not self.dense:
            # Picking by a product with ones and zeros has a gradient whose sums have a fixed order.
            pick_BHN = F.one_hot(choice.expert_BH, len(A)).to(x_BTI.dtype)
            A = (pick_BHN @ A.flatten(1)).unflatten(-1, A.shape[1:])
            B = (pick_BHN @ B.flatten(1)).unflatten(-1, B.shape[1:])
            gates_Bn = choice.gates_BN.gather(1, choice.expert_BH)
        scaled_Bn = (gates_Bn * self.scale).to(x_BTI.dtype)
        inner_BTnR = self._inner(x_BTI, A) * scaled_Bn[:, None, :, None]
        if self.learned:
            inner_BTnR = inner_BTnR * self._fusion(inner_BTnR, B).to(x_BTI.dtype).unsqueeze(-1)
        return self.base_layer(x_BTI) + inner_BTnR.flatten(-2) @ B.flatten(-3, -2)

    def _inner(self, x_BTI: Tensor, A: Tensor) -> Tensor:
        """A dropout(x) (B, T, n, R) for A (n, R, I) of all samples or (B, n, R, I) of each."""
        p = self.config.dropout
        if not (p and self.training):
            return (x_BTI @ A.flatten(-3, -2).mT).unflatten(-1, A.shape[-3:-1])
        drawn = [F.dropout(x_BTI, p) @ A[..., i, :, :].mT for i in range(A.shape[-3])]
        return torch.stack(drawn, dim=-2)

    def _fusion(self, inner_BTnR: Tensor, B: Tensor) -> Tensor:
        """Weight (B, T, n) of every expert in use: its half's, in at least fp32; I . (B u) is taken as (I B) . u."""
        dtype = torch.promote_types(inner_BTnR.dtype, torch.float32)
        halves_nH = self.halves_nH.to(dtype)
        heard = B.to(dtype) @ (halves_nH @ self.fusion_HO.to(dtype)).unsqueeze(-1)
        scores_BTn = (inner_BTnR.to(dtype) * heard.squeeze(-1).unsqueeze(-3)).sum(dim=-1)
        return (scores_BTn @ halves_nH).softmax(dim=-1) @ halves_nH.T

    def _choice(self, x_BTI: Tensor) -> Choice:
        """This forward's choice; the one of prefill while decoding."""
        if self.sample.trace.phase == "decode" and not self.config.compat:
            assert self.kept is not None, "decoding without a prefill"
            return self.kept
        scores: list[Tensor] = []
        if self.config.num_visual:
            whole = self.layer is None or self.config.compat
            seen_BI = self._mean(x_BTI) if whole else self.sample.pool(x_BTI)
            scores.append(routing.linear_scores(seen_BI, self.router_visual))
        if self.config.num_instruction:
            dtype = torch.promote_types(x_BTI.dtype, torch.float32)
            text_BS = self.sample.texts(len(x_BTI), x_BTI.device).to(dtype)
            scores.append(routing.linear_scores(text_BS, self.router_instruction))
        mode = _MODES[self.config.router_grad]
        routed = [routing.top1(scores_BE) for scores_BE in scores]
        gates = [routing.gates(probs_BE, best_B, mode) for probs_BE, best_B in routed]
        starts = [0, self.config.num_visual] if len(routed) == 2 else [0]
        choice = Choice(
            expert_BH=torch.stack(
                [best_B + at for (_, best_B), at in zip(routed, starts, strict=True)], dim=1
            ),
            gates_BN=torch.cat(gates, dim=-1),
            probs_BE=routed[0][0].detach(),
        )
        self.kept = choice if self.sample.trace.phase == "prefill" else None
        return choice

    def _mean(self, x_BTI: Tensor) -> Tensor:
        return x_BTI.mean(dim=1, dtype=torch.promote_types(x_BTI.dtype, torch.float32))


def attach(model: nn.Module, config: Config, trace: Trace) -> Attached:
    """Freeze `model` and put the experts of both halves on every MLP block and, if asked for, on the projector."""
    freeze(model)
    encoder = sentence.load(config.encoder, "adapter.encoder") if config.num_instruction else None
    sample = Sample(trace=trace, pool=Pool(trace, "mean_valid", model), encoder=encoder)
    placed = place(model, MLP, lambda base, spot: SMoLoRALinear(base, config, sample, spot.layer, spot.leads))
    if config.projector:
        path = "model.multi_modal_projector"
        projector = model.get_submodule(path)
        for name, base in list(projector.named_children()):
            if isinstance(base, nn.Linear):
                adapted = SMoLoRALinear(base, config, sample, None, leads=False).train(base.training)
                placed[f"{path}.{name}"] = adapted
                setattr(projector, name, adapted)
    frozen = config.router_grad == "frozen_hash"
    names = [
        f"{path}.{name}" for path, linear in placed.items() for name, _ in linear.named_buffers(recurse=False)
    ]
    num_weights = count(model.parameters())
    num_experts = sum(config.halves())
    num_factors = count(w for linear in placed.values() for w in (linear.experts_A, linear.experts_B))
    return Attached(
        capabilities=Capabilities(routing="sample", stateful=frozen, router_hears_task_loss=not frozen),
        num_weights=num_weights,
        num_active=num_weights - num_factors + num_factors * len(config.halves()) // num_experts,
        state=frozenset(name for name in names if not name.endswith("halves_nH")),
        as_lora="the experts are chosen anew for every sample",
        exported={} if encoder is None else {"sentence_encoder": encoder.described()},
    )
