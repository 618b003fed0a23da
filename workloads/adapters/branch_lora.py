"""BranchLoRA: one shared A (the trunk) and several B's (branches), of which each sample visits a few.

Source:  BranchLoRA 2025, arXiv:2506.02041 (ACL 2025); its code could not be seen.
Routing: once per sample and linear from the sample's pooled input; softmax over the top k branches alone.
Tasks:   `branch_memory` of the model starts and ends tasks: a task's end freezes the branches that it used most.
         With `task_routers` every task has routers of its own; training uses the sample's task, evaluation the
         seen task that the selector finds.
Scale:   alpha / rank_total; the trunk and each branch have rank rank_total / num_branches.
Trace:   of each decoder block the first adapted linear reports its router; the choice is its favourite branch.
Differs: the sources leave open, and here it is so: inputs are pooled over the prompt's valid tokens (the first token
         of a causal model is the same for every sample); routing mass is summed while the task trains; a task freezes
         its top k branches while `min_tunable` others of the linear stay tunable; the trunk trains on
         (`freeze_A_after_task`). B's are mixed before they are multiplied: a sample costs one B for any k.

Shape letters: B batch, T tokens, K tasks, L linears, N branches, R rank, I inputs, O outputs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads import routing
from workloads.adapters import base
from workloads.adapters.base import Attached, Capabilities, Route, Trace
from workloads.adapters.parts import tasks
from workloads.adapters.parts.placing import Spot, check_lora, place
from workloads.adapters.parts.pooling import Pool, RouterPool
from workloads.adapters.parts.selector import TaskSelector
from workloads.config import AdapterConfig
from workloads.errors import require
from workloads.llava import sentence

VERSION = 1
# Routing mass is counted in whole units of 2^-20, so that its sum is exact in any order and on any workers.
_UNIT = 2**20


@dataclass(frozen=True, kw_only=True)
class Config(AdapterConfig):
    """BranchLoRA's settings; the mixture is scaled by alpha / rank_total."""

    name: str = "branch_lora"
    num_branches: int = 8
    # Rank of all branches together.
    rank_total: int = 64
    alpha: float = 128.0
    dropout: float = 0.0
    top_k: int = 2
    router_grad: routing.RouterGrad = "scaled"
    router_pool: RouterPool = "mean_valid"
    # Last path components of the adapted linears.
    targets: list[str] = field(default_factory=lambda: [*base.ATTENTION, *base.MLP])
    task_routers: bool = False
    # Names in order; needed by `task_routers`.
    tasks: list[str] = field(default_factory=list)
    align_weight: float = 1.0
    # Folder of the sentence encoder; empty: the packaged all-MiniLM-L6-v2.
    encoder: str = ""
    freeze_branches: bool = True
    # Branches of every linear that are never frozen; with 0, later tasks may train routers, keys and trunk alone.
    min_tunable: int = 2
    freeze_A_after_task: bool = False

    def layout_matters(self) -> bool:
        """Dropout masks depend on how a global batch is cut."""
        return self.dropout > 0

    def training_only(self) -> set[str]:
        """Fields that steer training; `hard` and `straight_through` differ in their gradients alone."""
        freezing = {"freeze_branches", "min_tunable", "freeze_A_after_task"}
        return {"dropout", "align_weight"} | freezing | routing.same_values(self.router_grad)

    def identity(self) -> dict[str, str]:
        """The content of the sentence encoder, where one is used."""
        folder = sentence.find(self.encoder, "adapter.encoder") if self.task_routers else None
        return {"encoder": sentence.content_hash(folder) if folder else ""}

    def told_tasks(self) -> Literal["never", "in training", "always"]:
        """Keys and routers learn from tasks; the selector goes without them."""
        return "in training" if self.task_routers else "never"

    def check(self) -> None:
        """Raise `UserError` on values out of range."""
        n = self.num_branches
        require(n >= 1, "adapter.num_branches", n, "a whole number of 1 or more")
        fits = self.rank_total >= n and self.rank_total % n == 0
        require(fits, "adapter.rank_total", self.rank_total, f"a multiple of adapter.num_branches ({n})")
        check_lora(self.alpha, self.dropout, self.targets)
        require(1 <= self.top_k <= n, "adapter.top_k", self.top_k, f"from 1 to adapter.num_branches ({n})")
        require(0 <= self.min_tunable <= n, "adapter.min_tunable", self.min_tunable, f"from 0 to {n}")
        require(self.align_weight >= 0, "adapter.align_weight", self.align_weight, "0 or more")
        if self.task_routers:
            tasks.check_tasks(self.tasks)


def branch_gates(scores_BN: Tensor, top_k: int, router_grad: routing.RouterGrad) -> Tensor:
    """Weight (B, N) of every branch for every sample.

    scaled            the softmax over the top k (BranchLoRA); for k = 1 the constant 1
    hard              1 / k for each of the top k, without gradient: the routers stay as drawn
    straight_through  the same with the gradient of the softmax over all branches
    dense             the softmax over all branches
    """
    probs_BN = scores_BN.softmax(dim=-1)
    if router_grad == "dense":
        return probs_BN
    chosen_BN = torch.zeros_like(scores_BN).scatter(-1, scores_BN.topk(top_k, dim=-1).indices, 1.0)
    if router_grad == "scaled":
        return scores_BN.masked_fill(chosen_BN == 0, float("-inf")).softmax(dim=-1)
    if router_grad == "hard":
        return chosen_BN / top_k
    assert router_grad == "straight_through", router_grad
    return chosen_BN / top_k + (probs_BN - probs_BN.detach())


@dataclass(kw_only=True)
class Sample:
    """What all linears use in one forward pass: how to pool, and each sample's task where routers go by task."""

    trace: Trace
    pool: Pool
    selector: TaskSelector | None = None


class BranchLinear(nn.Module):
    """A frozen linear plus (alpha / rank_total) sum_n gate_n B_n A dropout(x), gates by sample.

    Branches and routers are weights of their own, since some are frozen while others train.
    """

    def __init__(self, linear: nn.Linear, config: Config, spot: Spot, sample: Sample) -> None:
        super().__init__()
        self.config, self.spot, self.sample = config, spot, sample
        self.rank = config.rank_total // config.num_branches
        self.base_layer = linear
        like = linear.weight
        self.trunk_A = base.kaiming_A(self.rank, linear.in_features, like=like)
        for n in range(config.num_branches):
            zeros_RO = torch.zeros(self.rank, linear.out_features, dtype=like.dtype, device=like.device)
            self.register_parameter(f"branch_{n}_B", nn.Parameter(zeros_RO))
        for k in range(len(config.tasks) if config.task_routers else 1):
            router_NI = base.kaiming_A(config.num_branches, linear.in_features, like=like)
            router_NI.requires_grad_(config.router_grad != "hard")
            self.register_parameter(f"router_{k}", router_NI)
        # Of the last forward pass that saw the prompt; decoding goes on with them.
        self.gates_BN: Tensor | None = None
        self.probs_BN: Tensor | None = None

    def named(self, prefix: str) -> list[nn.Parameter]:
        """Branches or routers in order."""
        return [w for name, w in self.named_parameters(recurse=False) if name.startswith(prefix)]

    def forward(self, x_BTI: Tensor) -> Tensor:
        gates_BN = self.gates_BN if self.sample.trace.phase == "decode" else self._route(x_BTI)
        assert gates_BN is not None, "a prompt comes before decoding"
        assert self.probs_BN is not None
        if self.spot.leads:
            probs_BTE = self.probs_BN.unsqueeze(1).expand(-1, x_BTI.shape[1], -1)
            route = Route(layer=self.spot.layer, probs_BTE=probs_BTE, choice_BT=probs_BTE.argmax(dim=-1))
            self.sample.trace.routes.append(route)
        branches_NZ = torch.stack([*self.named("branch_")]).flatten(1)
        mixed_BRO = (gates_BN.to(x_BTI.dtype) @ branches_NZ).unflatten(-1, (self.rank, -1))
        dropped_BTI = F.dropout(x_BTI, self.config.dropout, self.training) if self.config.dropout else x_BTI
        inner_BTR = F.linear(dropped_BTI, self.trunk_A)
        scale = self.config.alpha / self.config.rank_total
        return torch.baddbmm(self.base_layer(x_BTI), inner_BTR, mixed_BRO, alpha=scale)

    def _route(self, x_BTI: Tensor) -> Tensor:
        """Gates (B, N) from the sample's pooled input and its task's router, in at least fp32."""
        pooled_BI = self.sample.pool(x_BTI)
        scores = [routing.linear_scores(pooled_BI, router_NI) for router_NI in self.named("router_")]
        scores_BN = scores[0]
        if self.sample.selector is not None:
            own_BK1 = self.sample.selector.tasks_BK.to(scores_BN.dtype).unsqueeze(-1)
            scores_BN = (torch.stack(scores, dim=1) * own_BK1).sum(dim=1)
        gates_BN = branch_gates(scores_BN, self.config.top_k, self.config.router_grad)
        self.gates_BN, self.probs_BN = gates_BN.detach(), scores_BN.detach().softmax(dim=-1)
        return gates_BN


class Memory(nn.Module):
    """What outlasts a task: frozen branches, the routing mass so far, the selector; starts and ends tasks."""

    frozen_LN: Tensor
    mass_LN: Tensor
    num_ended: Tensor

    def __init__(self, config: Config, linears: list[BranchLinear], selector: TaskSelector | None) -> None:
        super().__init__()
        self.config, self.linears, self.selector = config, linears, selector
        shape_LN, device = (len(linears), config.num_branches), linears[0].trunk_A.device
        self.register_buffer("frozen_LN", torch.zeros(shape_LN, dtype=torch.bool, device=device))
        self.register_buffer("mass_LN", torch.zeros(shape_LN, dtype=torch.int64, device=device))
        self.register_buffer("num_ended", torch.zeros(1, dtype=torch.int64, device=device))
        self.task: str | None = None
        self.pending_LN: Tensor | None = None

    def on_task_start(self, task: str) -> None:
        """Train the weights of `task`: its routers and keys, the tunable branches and, if not frozen, the trunk.

        Call it after the adapter is loaded and before the optimizer is made, again after a resume. Raises
        UserError on a task that task routers do not know.
        """
        if self.selector is not None:
            self.selector.start(task)
        self.task = task
        self._switch()

    def on_task_end(self, task: str) -> None:
        """Freeze the branches of every linear that the task used most, as far as `min_tunable` allows."""
        assert task == self.task, f"{task} ends, {self.task} has started"
        self.num_ended += 1
        if self.config.freeze_branches:
            for frozen_N, mass_N in zip(self.frozen_LN, self.mass_LN, strict=True):
                for n in mass_N.argsort(descending=True, stable=True)[: self.config.top_k].tolist():
                    if int((~frozen_N).sum()) > self.config.min_tunable:
                        frozen_N[n] = True
        self.mass_LN.zero_()
        self._switch()

    def _switch(self) -> None:
        """Let exactly those weights of the linears train that may."""
        trunk = not (self.config.freeze_A_after_task and int(self.num_ended))
        mine = 0 if self.selector is None else tasks.task_index(self.config.tasks, self.task)
        for linear, frozen_N in zip(self.linears, self.frozen_LN.tolist(), strict=True):
            linear.trunk_A.requires_grad_(trunk)
            for branch, frozen in zip(linear.named("branch_"), frozen_N, strict=True):
                branch.requires_grad_(not frozen)
            for k, router in enumerate(linear.named("router_")):
                router.requires_grad_(k == mine and self.config.router_grad != "hard")

    def losses(self, trace: Trace) -> Mapping[str, Tensor]:
        """The weighted distance of samples from their task's keys; notes on the way what each branch received."""
        if self.task is not None and self.config.freeze_branches:
            gates = [linear.gates_BN for linear in self.linears]
            units_LN = torch.stack([(g * _UNIT).round().long().sum(dim=0) for g in gates if g is not None])
            # Noted all the same: every worker has to take part in the sum after the step.
            units_LN = units_LN if trace.counted else torch.zeros_like(units_LN)
            self.pending_LN = units_LN if self.pending_LN is None else self.pending_LN + units_LN
        if self.selector is None:
            return {}
        return {"align_loss": self.config.align_weight * self.selector.align_loss()}

    def after_step(self, reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Add what all workers noted since the last step."""
        if self.pending_LN is not None:
            self.mass_LN += reduce_sum(self.pending_LN)
            self.pending_LN = None


def attach(model: nn.Module, config: Config, trace: Trace) -> Attached:
    """Freeze `model` and put trunk, branches and routers on its target linears."""
    base.freeze(model)
    inner: Any = model
    sample = Sample(trace=trace, pool=Pool(trace, config.router_pool, model))
    placed = place(model, config.targets, lambda linear, spot: BranchLinear(linear, config, spot, sample))
    exported: dict[str, Any] = {}
    if config.task_routers:
        encoder = sentence.load(config.encoder, "adapter.encoder")
        entrance = inner.model.multi_modal_projector.linear_1
        sample.selector = TaskSelector(config.tasks, trace, sample.pool, encoder, entrance)
        sample.selector.watch(inner.model.language_model)
        exported["sentence_encoder"] = encoder.described()
    memory = inner.branch_memory = Memory(config, list(placed.values()), sample.selector)
    memory.train(model.training)  # the selector goes by this
    hears = config.router_grad != "hard" and not (config.router_grad == "scaled" and config.top_k == 1)
    own = [f"{path}.{name}" for path, m in placed.items() for name, _ in m.named_parameters(recurse=False)]
    return Attached(
        capabilities=Capabilities(
            needs_task_id_train=config.told_tasks() != "never",
            stateful=True,
            routing="sample",
            router_hears_task_loss=hears,
        ),
        num_weights=base.count(model.parameters()),
        num_active=_num_active(model, config, list(placed.values())),
        losses=memory.losses,
        state=frozenset([*own, *(f"branch_memory.{name}" for name in memory.state_dict())]),
        after_step=memory.after_step,
        on_task_start=memory.on_task_start,
        on_task_end=memory.on_task_end,
        selected=None if sample.selector is None else sample.selector.selected,
        as_lora="the branches are mixed anew for every sample",
        exported=exported,
    )


def _num_active(model: nn.Module, config: Config, linears: list[BranchLinear]) -> int:
    """Trained weights that one token meets: all but other tasks' routers and branches that are not chosen."""
    routers = base.count(w for linear in linears for w in linear.named("router_"))
    branches = base.count(w for linear in linears for w in linear.named("branch_"))
    num_tasks = len(config.tasks) if config.task_routers else 1
    visited = config.num_branches if config.router_grad == "dense" else config.top_k
    unmet = routers - routers // num_tasks + branches - branches * visited // config.num_branches
    return base.count(model.parameters()) - unmet
