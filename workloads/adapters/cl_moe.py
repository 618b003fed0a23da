"""CL-MoE: LoRA experts with a router for tokens and one for tasks, and weights that move slowly from task to task.

Source:  Huai et al. 2025, CL-MoE, arXiv:2503.00413 (CVPR 2025), and its released code (ECNU-ICALK/CL-MoE):
         training     y = W x + s sum_e G(x)_e B_e A_e x, where G(x) = softmax(W_g x) for every token, s = alpha / R
         inference    G(x) becomes beta G(x) + (1 - beta) G_t, where G_t is the share of expert e in the visits of
                      task t, counted over its training tokens' `top_k` experts
         after task t theta_t = lambda theta_(t-1) + (1 - lambda) phi_t for A_e and B_e, phi_t being what was trained
                      from theta_(t-1); lambda = 1 - momentum for task-specific experts, else momentum
         beta = 0.5, momentum = 0.7, top_k = 2. Nothing is mixed after the first task.
Routing: per token and linear, dense. G_t is by sample: its task is found on the prompt by `parts/means.py`.
Tasks:   a task's end counts its favourites and fixes lambda. Weights are mixed when they are read, and folded when the
         next task starts; so phi_t and theta_(t-1) are in the folder of a stage. Without tasks it is MoELoRA.
Trace:   of each decoder block the first adapted linear reports its gates.
Differs: an expert is task-specific when it is among the `top_k` most visited of task t and of no earlier one, linear by
         linear. Released, lambda is 0.3 for experts that only the task before has among its top 8 of 4 or 8, so for
         none, and else 0.7; and names are compared such that no weight is mixed at all. There visits are sampled by the
         clock, added up over linears, and G_t is written by hand, as if the task of a test sample were known. Experts
         share a dropout mask. N(0, 0.01) of A is read as a standard deviation of 0.01, as in `moe_lora`.
Not verified: the paper's rule for lambda, its values, and how it finds the task of a test sample.

Shape letters: B batch, T tokens, K tasks, L linears, E experts, R rank of an expert, I inputs, O outputs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

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
from workloads.adapters.parts.means import TaskMeans
from workloads.adapters.parts.placing import Spot, check_lora, place
from workloads.adapters.parts.pooling import Pool
from workloads.adapters.parts.tasks import check_tasks
from workloads.config import AdapterConfig
from workloads.errors import require
from workloads.llava import sentence

VERSION = 1
# What an expert is after a task, and so what is kept of its weights from before it.
_OWN, _SPECIFIC, _SHARED = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class Config(AdapterConfig):
    """CL-MoE's settings; the mixture is scaled by alpha / rank_total."""

    name: str = "cl_moe"
    # Names of the tasks in the order in which they are learned.
    tasks: list[str] = field(default_factory=list)
    num_experts: int = 4
    # Rank of all experts together.
    rank_total: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    # Experts that a token visits, as far as visits are counted, and that a task favours.
    top_k: int = 2
    # Share of the token's own router in inference; the rest is the task's.
    beta: float = 0.5
    # What shared experts keep of their weights from before a task; task-specific ones keep the rest to 1.
    momentum: float = 0.7
    # Last path components of the adapted linears.
    targets: list[str] = field(default_factory=lambda: [*ATTENTION, *MLP])
    # Folder of the sentence encoder; empty: the packaged all-MiniLM-L6-v2.
    encoder: str = ""

    def layout_matters(self) -> bool:
        """Dropout masks depend on how a global batch is cut."""
        return self.dropout > 0

    def training_only(self) -> set[str]:
        """Fields that steer training and leave what given weights compute as it is."""
        return {"dropout"}

    def starts_as_saved(self) -> bool:
        """A stage saves its own weights and those from before it; the next one starts from their mixture."""
        return False

    def identity(self) -> dict[str, str]:
        """The content of the sentence encoder."""
        return {"encoder": sentence.content_hash(sentence.find(self.encoder, "adapter.encoder"))}

    def check(self) -> None:
        """Raise `UserError` on values out of range."""
        check_tasks(self.tasks)
        n = self.num_experts
        require(n >= 1, "adapter.num_experts", n, "a whole number of 1 or more")
        fits = self.rank_total >= 1 and self.rank_total % n == 0
        require(fits, "adapter.rank_total", self.rank_total, f"a multiple of adapter.num_experts ({n})")
        require(1 <= self.top_k <= n, "adapter.top_k", self.top_k, f"from 1 to adapter.num_experts ({n})")
        for key in ("beta", "momentum"):
            value = getattr(self, key)
            require(0 <= value <= 1, f"adapter.{key}", value, "from 0 to 1")
        check_lora(self.alpha, self.dropout, self.targets)


class MomentumExperts(nn.Module):
    """A frozen linear plus (alpha / rank_total) sum_e gate_e B_e A_e dropout(x), weights mixed with the past ones."""

    past_A: Tensor
    past_B: Tensor
    roles_E: Tensor
    visits_KE: Tensor

    def __init__(self, base: nn.Linear, config: Config, means: TaskMeans, spot: Spot) -> None:
        super().__init__()
        self.config, self.spot = config, spot
        # Seen from every linear, part of the model in one place.
        self.seen = (means,)
        experts, rank, like = config.num_experts, config.rank_total // config.num_experts, base.weight
        options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        self.base_layer = base
        self.router = kaiming_A(experts, base.in_features, like=like)
        self.experts_A = nn.Parameter(
            torch.empty(experts, rank, base.in_features, **options).normal_(std=0.01)
        )
        self.experts_B = nn.Parameter(torch.zeros(experts, rank, base.out_features, **options))
        # Weights from before the task that trains or was the last to train.
        self.register_buffer("past_A", torch.zeros(experts, rank, base.in_features, **options))
        self.register_buffer("past_B", torch.zeros(experts, rank, base.out_features, **options))
        self.register_buffer("roles_E", torch.zeros(experts, dtype=torch.int64, device=like.device))
        visits_KE = torch.zeros(len(config.tasks), experts, dtype=torch.int64, device=like.device)
        self.register_buffer("visits_KE", visits_KE)
        # Visits of the last forward pass of training; recomputation gives the same again.
        self.visited_E: Tensor | None = None

    def forward(self, x_BTI: Tensor) -> Tensor:
        (means,) = self.seen
        probs_BTE = routing.linear_scores(x_BTI, self.router).softmax(dim=-1)
        if self.training:
            self.visited_E = self._visits(probs_BTE, means.trace)
        gates_BTE = probs_BTE if self.training else self._with_task(probs_BTE, means)
        if self.spot.leads:
            route = Route(layer=self.spot.layer, probs_BTE=gates_BTE, choice_BT=gates_BTE.argmax(dim=-1))
            means.trace.routes.append(route)
        A_ERI, B_ERO = (self.experts_A, self.experts_B) if self.training else self.mixed()
        dropped_BTI = F.dropout(x_BTI, self.config.dropout, self.training) if self.config.dropout else x_BTI
        scaled_BTE1 = (gates_BTE * (self.config.alpha / self.config.rank_total)).to(x_BTI.dtype).unsqueeze(-1)
        inner_BTER = F.linear(dropped_BTI, A_ERI.flatten(0, 1)).unflatten(-1, A_ERI.shape[:2])
        return self.base_layer(x_BTI) + (inner_BTER * scaled_BTE1).flatten(-2) @ B_ERO.flatten(0, 1)

    def mixed(self) -> tuple[Tensor, Tensor]:
        """lambda theta_(t-1) + (1 - lambda) phi_t of A and B; phi_t itself where no task's end has told lambda."""
        momentum = self.config.momentum
        kept = torch.tensor([0.0, 1 - momentum, momentum], dtype=self.past_A.dtype, device=self.past_A.device)
        kept_E11 = kept[self.roles_E][:, None, None]
        A_ERI = self.experts_A + kept_E11 * (self.past_A - self.experts_A)
        return A_ERI, self.experts_B + kept_E11 * (self.past_B - self.experts_B)

    def _visits(self, probs_BTE: Tensor, trace: Trace) -> Tensor:
        """How often each expert is among the `top_k` of a valid token."""
        assert trace.token_mask_BT is not None
        chosen_BTk = probs_BTE.detach().topk(self.config.top_k, dim=-1).indices
        visits_BTE = torch.zeros_like(probs_BTE, dtype=torch.int64).scatter(-1, chosen_BTk, 1)
        return (visits_BTE * trace.token_mask_BT.unsqueeze(-1)).sum(dim=(0, 1))

    def _with_task(self, probs_BTE: Tensor, means: TaskMeans) -> Tensor:
        """Gates of inference; the token's router alone for a task without any visits."""
        visits_BE = self.visits_KE[means.nearest_B].to(probs_BTE.dtype)
        total_B1 = visits_BE.sum(dim=-1, keepdim=True)
        share_B1E = (visits_BE / total_B1.clamp(min=1)).unsqueeze(1)
        beta_B11 = torch.ones_like(total_B1).masked_fill(total_B1 > 0, self.config.beta).unsqueeze(1)
        return beta_B11 * probs_BTE + (1 - beta_B11) * share_B1E

    def favourites(self) -> Tensor:
        """Which experts (K, E) each task visits most; none for a task without any visits."""
        best_Kk = self.visits_KE.argsort(dim=-1, descending=True, stable=True)[:, : self.config.top_k]
        chosen_KE = torch.zeros_like(self.visits_KE, dtype=torch.bool).scatter(1, best_Kk, True)
        return chosen_KE & (self.visits_KE > 0)

    @torch.no_grad()
    def fold(self) -> None:
        """Take the mixed weights as those that the next task starts from."""
        for own, past, value in zip(
            (self.experts_A, self.experts_B), (self.past_A, self.past_B), self.mixed(), strict=True
        ):
            own.copy_(value)
            past.copy_(own)
        self.roles_E.fill_(_OWN)


class Memory:
    """Starts and ends tasks, and counts the experts' visits in between."""

    def __init__(self, means: TaskMeans, linears: list[MomentumExperts]) -> None:
        self.means, self.linears = means, linears
        self.pending_LE: Tensor | None = None

    def on_task_start(self, task: str) -> None:
        """Fold the past into the weights, which have to be whole; called after they are loaded.

        A task that has seen samples and has not ended goes on: its past is the one that was loaded.
        """
        mine = self.means.start(task)
        if not self.means.counts_K[mine] or any(linear.roles_E.any() for linear in self.linears):
            for linear in self.linears:
                linear.fold()

    def on_task_end(self, task: str) -> None:
        """Fix what every expert keeps of its weights from before the task; everything new after the first one."""
        assert task == self.means.task, f"{task} ends, {self.means.task} has started"
        mine = self.means.current
        for linear in self.linears:
            favoured_KE = linear.favourites()
            others_KE = favoured_KE[torch.arange(len(favoured_KE), device=favoured_KE.device) != mine]
            if others_KE.any():
                specific_E = favoured_KE[mine] & ~others_KE.any(dim=0)
                linear.roles_E.copy_(torch.where(specific_E, _SPECIFIC, _SHARED))

    def losses(self, trace: Trace) -> Mapping[str, Tensor]:
        """No terms; notes on the way which experts the task's tokens visited, and what its samples look like."""
        self.means.note()
        if self.means.task is not None:
            noted_LE = torch.stack([m.visited_E for m in self.linears if m.visited_E is not None])
            noted_LE = noted_LE if trace.counted else torch.zeros_like(noted_LE)
            self.pending_LE = noted_LE if self.pending_LE is None else self.pending_LE + noted_LE
        return {}

    def after_step(self, reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Add what all workers noted since the last step."""
        self.means.after_step(reduce_sum)
        if self.pending_LE is not None:
            for linear, visits_E in zip(self.linears, reduce_sum(self.pending_LE), strict=True):
                linear.visits_KE[self.means.current] += visits_E
            self.pending_LE = None


def attach(model: nn.Module, config: Config, trace: Trace) -> Attached:
    """Freeze `model` and put routed experts on its target linears."""
    freeze(model)
    inner: Any = model
    encoder = sentence.load(config.encoder, "adapter.encoder")
    entrance = inner.model.multi_modal_projector.linear_1
    pool = Pool(trace, "mean_valid", model)
    means = TaskMeans(config.tasks, trace, encoder, entrance.weight.device, pool, entrance.in_features)
    placed = place(model, config.targets, lambda base, spot: MomentumExperts(base, config, means, spot))
    inner.cl_moe_means = means.train(model.training)  # inference goes by this
    means.watch(inner.model.language_model)
    memory = Memory(means, list(placed.values()))
    num_weights = count(model.parameters())
    kept = ("past_A", "past_B", "roles_E", "visits_KE")
    own = {f"{path}.{name}" for path in placed for name in kept}
    return Attached(
        capabilities=Capabilities(stateful=True, routing="token", router_hears_task_loss=True),
        num_weights=num_weights,
        num_active=num_weights,
        losses=memory.losses,
        state=frozenset(own | {f"cl_moe_means.{name}" for name in means.state_dict()}),
        on_task_start=memory.on_task_start,
        on_task_end=memory.on_task_end,
        selected=means.selected,
        after_step=memory.after_step,
        as_lora="cl_moe mixes its experts anew for every token",
        exported={"sentence_encoder": encoder.described()},
    )
