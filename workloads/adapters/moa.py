"""Mixture-of-LoRAs: one LoRA per domain, and in front of every decoder block a router that picks one of them.

Source:  Feng et al. 2024, Mixture-of-LoRAs, arXiv:2403.03432 (no released code).
Routing: once per sequence and block, from the mean of the block's input over the prompt's tokens; top-1;
         decided at prefill and kept while decoding. All adapted linears of the block follow the choice.
Losses:  cross-entropy of every block's router against the sample's domain.
Files:   `folders` gives domains a ready LoRA each (stage 1), trained further or frozen; other domains start fresh.
         `add_domain` and `remove_domain` change a saved mixture afterwards.
Differs: `router_grad` chooses how the task loss reaches the router; with `straight_through` (ours) the chosen
         LoRA acts at full strength, as it did alone. Weight of the domain loss and pooling are not in the abstract.

Shape letters: B batch, T tokens, D width, E domains, R rank, I inputs, O outputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
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
    Router,
    Trace,
    count,
    decoder_blocks,
    freeze,
    kaiming_A,
)
from workloads.adapters.parts.folders import PlainLora, adapter_files, check_folders, fill, read_all
from workloads.adapters.parts.placing import check_lora, place
from workloads.adapters.parts.pooling import prompt_mask
from workloads.adapters.parts.tasks import TaskIds, check_tasks, task_index
from workloads.config import AdapterConfig
from workloads.errors import UserError, require

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Config(AdapterConfig):
    """MoA's settings; every fresh LoRA is scaled by alpha / rank_per_expert, a loaded one as its folder says."""

    name: str = "moa"
    # Names of the domains; needed for every sample in training alone.
    tasks: list[str] = field(default_factory=list)
    # Domain -> folder of the plain LoRA that it starts from.
    folders: dict[str, str] = field(default_factory=dict)
    # Whether the LoRAs train beside the routers; frozen ones all have to come from folders.
    train_loras: bool = True
    # Leave out the projectors that were trained beside the loaded LoRAs; otherwise such folders are refused.
    drop_projectors: bool = False
    rank_per_expert: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    router_grad: routing.RouterGrad = "straight_through"
    domain_weight: float = 1.0
    # Last path components of the adapted linears.
    targets: list[str] = field(default_factory=lambda: [*ATTENTION, *MLP])

    def layout_matters(self) -> bool:
        """Dropout masks depend on how a global batch is cut."""
        return self.dropout > 0

    def training_only(self) -> set[str]:
        """Fields that steer training; `hard` and `straight_through` differ in their gradients alone."""
        start = {"folders", "drop_projectors", "train_loras"}
        return {"dropout", "domain_weight"} | start | routing.same_values(self.router_grad)

    def told_tasks(self) -> Literal["never", "in training", "always"]:
        """The routers learn from domains, and go without them."""
        return "in training" if self.domain_weight > 0 else "never"

    def check(self) -> None:
        """Raise `UserError` on values out of range."""
        check_tasks(self.tasks)
        check_folders(self.folders, self.tasks)
        for task in self.tasks:
            ready = self.train_loras or task in self.folders
            require(ready, "adapter.train_loras", False, f"give adapter.folders.{task} or train the LoRAs")
        rank = self.rank_per_expert
        require(rank >= 1, "adapter.rank_per_expert", rank, "a whole number of 1 or more")
        require(self.domain_weight >= 0, "adapter.domain_weight", self.domain_weight, "0 or more")
        learns = self.domain_weight > 0 or self.router_grad != "hard"
        require(
            learns,
            "adapter.domain_weight",
            0.0,
            "above 0 where router_grad is 'hard', or no loss trains routers",
        )
        check_lora(self.alpha, self.dropout, self.targets)

    def files(self) -> list[Path]:
        """The files that the method starts from; their contents decide numbers, their places do not."""
        return adapter_files(self.folders)

    def without_files(self) -> "Config":
        """The same method with nothing to read, for a model whose weights are restored afterwards."""
        return replace(self, folders={})


@dataclass(kw_only=True)
class Decision:
    """What one block's router decided for the sequences of the batch; its linears read it."""

    probs_BE: Tensor | None = None
    choice_B: Tensor | None = None
    gates_BE: Tensor | None = None


class BlockFront(nn.Module):
    """A decoder block's first norm with the router that sees the same input, the block's."""

    def __init__(self, norm: nn.Module, width: int, config: Config, trace: Trace, layer: int) -> None:
        super().__init__()
        self.base_layer = norm
        weight = next(norm.parameters())
        self.router = Router(width, len(config.tasks), dtype=weight.dtype, device=weight.device)
        self.router_grad: routing.RouterGrad = config.router_grad
        self.trace, self.layer = trace, layer
        self.decision = Decision()
        # New modules are in training mode; the model may not be.
        self.train(norm.training)
        # Of the last forward pass with a gradient; recomputation replaces them after they were read.
        self.scores_BE: Tensor | None = None

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.trace.phase != "decode":
            self._decide(x_BTD)
        probs_BE, choice_B = self.decision.probs_BE, self.decision.choice_B
        assert probs_BE is not None, "decoding follows a prefill"
        assert choice_B is not None
        assert len(choice_B) == len(x_BTD), "decoding follows a prefill of the same batch"
        length = x_BTD.shape[1]
        route = Route(
            layer=self.layer,
            probs_BTE=probs_BE.unsqueeze(1).expand(-1, length, -1),
            choice_BT=choice_B.unsqueeze(1).expand(-1, length),
        )
        self.trace.routes.append(route)
        return self.base_layer(x_BTD)

    def _decide(self, x_BTD: Tensor) -> None:
        """Route every sequence by the mean of its valid tokens before the answer."""
        mask_BT1 = prompt_mask(self.trace).unsqueeze(-1)
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        mean_BD = (x_BTD * mask_BT1).sum(dim=1, dtype=dtype) / mask_BT1.sum(dim=1).clamp(min=1)
        scores_BE = self.router(mean_BD)
        probs_BE, choice_B = routing.top1(scores_BE)
        gates_BE = routing.gates(probs_BE, choice_B, self.router_grad)
        self.decision.probs_BE, self.decision.choice_B = probs_BE, choice_B
        self.decision.gates_BE = gates_BE
        self.scores_BE = scores_BE if torch.is_grad_enabled() else None


class DomainLoRAs(nn.Module):
    """A frozen linear plus (alpha / R) sum_e gate_e B_e A_e dropout(x), gates as the block's router decided."""

    def __init__(self, base: nn.Linear, config: Config, decision: Decision) -> None:
        super().__init__()
        domains, rank, like = len(config.tasks), config.rank_per_expert, base.weight
        self.base_layer = base
        self.scale, self.dropout = config.alpha / rank, config.dropout
        self.experts_A = kaiming_A(domains, rank, base.in_features, like=like)
        zeros_ERO = torch.zeros(domains, rank, base.out_features, dtype=like.dtype, device=like.device)
        self.experts_B = nn.Parameter(zeros_ERO)
        for factor in (self.experts_A, self.experts_B):
            factor.requires_grad_(config.train_loras)
        self.decision = decision

    def forward(self, x_BTI: Tensor) -> Tensor:
        gates_BE = self.decision.gates_BE
        assert gates_BE is not None, "the block's router comes first"
        dropped_BTI = F.dropout(x_BTI, self.dropout, self.training) if self.dropout else x_BTI
        inner_BTER = F.linear(dropped_BTI, self.experts_A.flatten(0, 1)).unflatten(
            -1, self.experts_A.shape[:2]
        )
        weighted_BTER = inner_BTER * (gates_BE * self.scale).to(x_BTI.dtype)[:, None, :, None]
        return self.base_layer(x_BTI) + weighted_BTER.flatten(-2) @ self.experts_B.flatten(0, 1)


def attach(model: nn.Module, config: Config, trace: Trace) -> Attached:
    """Freeze `model`, put the domains' LoRAs on its target linears and a router in front of every block.

    Raises `UserError` on a folder that holds anything but a plain LoRA that fits.
    """
    loras = read_all(config.folders, model, config.targets, config.rank_per_expert, config.drop_projectors)
    freeze(model)
    fronts: list[BlockFront] = []
    for layer, block in decoder_blocks(model):
        width = block.get_submodule("self_attn.q_proj")
        assert isinstance(width, nn.Linear)
        front = BlockFront(block.get_submodule("input_layernorm"), width.in_features, config, trace, layer)
        block.input_layernorm = front
        fronts.append(front)
    placed = place(
        model, config.targets, lambda base, spot: DomainLoRAs(base, config, fronts[spot.layer].decision)
    )
    for domain, lora in loras.items():
        for path, linear in lora.linears.items():
            adapted = placed[path]
            fill(adapted.experts_A, adapted.experts_B, config.tasks.index(domain), linear, adapted.scale)
    num_weights = count(model.parameters())
    num_routers = sum(count(front.router.parameters()) for front in fronts)
    visited = len(config.tasks) if config.router_grad == "dense" else 1
    names = {f"{path}.{factor}" for path in placed for factor in ("experts_A", "experts_B")}
    task_ids = TaskIds(trace, config.tasks)

    def as_lora(task: str | None) -> Mapping[str, tuple[Tensor, Tensor, float]]:
        """The LoRA of one domain, as if every router chose it."""
        e = task_index(config.tasks, task)
        with torch.no_grad():
            return {
                path: (m.experts_A[e].detach(), m.experts_B[e].detach().T, m.scale)
                for path, m in placed.items()
            }

    return Attached(
        capabilities=Capabilities(
            needs_task_id_train=config.told_tasks() != "never",
            mergeable=True,
            stateful=not config.train_loras,
            routing="sequence",
            router_hears_task_loss=config.router_grad != "hard",
        ),
        num_weights=num_weights,
        num_active=num_routers + (num_weights - num_routers) * visited // len(config.tasks),
        losses=lambda trace: _losses(fronts, task_ids, config),
        state=frozenset() if config.train_loras else frozenset(names),
        as_lora=as_lora,
    )


def _losses(fronts: list[BlockFront], task_ids: TaskIds, config: Config) -> Mapping[str, Tensor]:
    """The weighted domain loss of the last forward pass: a mean over samples and blocks."""
    if config.domain_weight == 0:
        return {}
    terms: list[Tensor] = []
    for front in fronts:
        assert front.scores_BE is not None
        ids_B = task_ids(len(front.scores_BE), front.scores_BE.device)
        terms.append(F.cross_entropy(front.scores_BE, ids_B))
    return {"domain_loss": config.domain_weight * torch.stack(terms).mean()}


def add_domain(
    weights: Mapping[str, Tensor], config: Config, domain: str, lora: PlainLora
) -> tuple[dict[str, Tensor], Config]:
    """The weights and configuration of a mixture with one more LoRA; neither argument changes.

    The new domain's router row is the mean of the others', so no router chooses it before it has been trained.
    """
    require(
        domain not in config.tasks and domain != "", "domain", domain, "a name that is not in adapter.tasks"
    )
    places = {name.removesuffix(".experts_A") for name in weights if name.endswith(".experts_A")}
    for path, (A_RI, _, _) in lora.linears.items():
        if path not in places or len(A_RI) > config.rank_per_expert:
            raise UserError(
                f"domain {domain}: the LoRA of rank {len(A_RI)} at {path} has no place in the mixture"
            )
    grown: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name.endswith((".experts_A", ".experts_B")):
            grown[name] = torch.cat([weight, torch.zeros_like(weight[:1])])
        elif name.endswith((".router.weight", ".router.bias")):
            grown[name] = torch.cat([weight, weight.mean(dim=0, keepdim=True)])
        else:
            grown[name] = weight
    scale = config.alpha / config.rank_per_expert
    for path, linear in lora.linears.items():
        fill(grown[f"{path}.experts_A"], grown[f"{path}.experts_B"], len(config.tasks), linear, scale)
    return grown, replace(config, tasks=[*config.tasks, domain], folders={})


def remove_domain(
    weights: Mapping[str, Tensor], config: Config, domain: str
) -> tuple[dict[str, Tensor], Config]:
    """The weights and configuration of a mixture without one LoRA; neither argument changes."""
    require(len(config.tasks) > 1, "domain", domain, "the last LoRA stays")
    gone = task_index(config.tasks, domain)
    stacked = (".experts_A", ".experts_B", ".router.weight", ".router.bias")
    left = {
        name: torch.cat([w[:gone], w[gone + 1 :]]) if name.endswith(stacked) else w
        for name, w in weights.items()
    }
    return left, replace(config, tasks=[task for task in config.tasks if task != domain], folders={})
