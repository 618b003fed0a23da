"""MoRE: one LoRA whose rank each task chooses; the experts are the nested prefixes of its rank-1 parts.

Source:  Zhang et al. 2025, MoRE, arXiv:2505.22694, and its released code. Per linear and for task t:
         r_t = argmax softmax(W_s e_t) over the ranks 1..R, y = W x + (alpha / R) B[:, :r_t] A[:r_t] x.
Routing: by task alone, per linear, from a trained embedding e_t of the task. The trace's route of a decoder
         block is that of its first adapted linear.
Losses:  cross-entropy of cos(x, e_j) / temperature over the tasks j against the sample's own task.
Differs: the selector is evaluated in every forward pass (the released code keeps its choice from the start), and
         the contrastive loss enters the loss (there it does not). x is the mean over the sample's valid tokens,
         since in a causal model the first token is the same for every sample. No factor i / R on rank i. The
         weight of the contrastive loss and the start of e (standard normal) are ours. How often a data set is
         drawn is the mixture's business, not the method's.

Shape letters: B batch, T tokens, N tasks, R rank, I inputs, O outputs.
"""

from collections.abc import Mapping
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
from workloads.adapters.parts.tasks import TaskIds, check_tasks, task_index
from workloads.config import AdapterConfig
from workloads.errors import require

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Config(AdapterConfig):
    """MoRE's settings; the update is scaled by alpha / rank_total, whatever rank a task chooses."""

    name: str = "more"
    # Names of all tasks; needed for every sample, in training and at inference.
    tasks: list[str] = field(default_factory=list)
    # Largest rank, and the number of ranks to choose from.
    rank_total: int = 8
    alpha: float = 32.0
    dropout: float = 0.0
    router_grad: routing.RouterGrad = "straight_through"
    contrast_weight: float = 0.1
    contrast_temperature: float = 0.05
    # Last path components of the adapted linears.
    targets: list[str] = field(default_factory=lambda: [*ATTENTION, *MLP])

    def layout_matters(self) -> bool:
        """Dropout masks depend on how a global batch is cut."""
        return self.dropout > 0

    def training_only(self) -> set[str]:
        """Fields that steer training; `hard` and `straight_through` differ in their gradients alone."""
        return {"dropout", "contrast_weight", "contrast_temperature"} | routing.same_values(self.router_grad)

    def told_tasks(self) -> Literal["never", "in training", "always"]:
        """Every sample is computed with its task's rank."""
        return "always"

    def check(self) -> None:
        """Raise `UserError` on values out of range."""
        check_tasks(self.tasks)
        require(self.rank_total >= 1, "adapter.rank_total", self.rank_total, "a whole number of 1 or more")
        require(self.contrast_weight >= 0, "adapter.contrast_weight", self.contrast_weight, "0 or more")
        temperature = self.contrast_temperature
        require(temperature > 0, "adapter.contrast_temperature", temperature, "a number above 0")
        check_lora(self.alpha, self.dropout, self.targets)


class Selector(nn.Module):
    """Every task's scores of the ranks, and the similarity of samples to tasks; in at least fp32."""

    def __init__(self, base: nn.Linear, num_tasks: int, rank: int) -> None:
        super().__init__()
        like = base.weight
        embedding_NI = torch.empty(num_tasks, base.in_features, dtype=like.dtype, device=like.device)
        self.embedding = nn.Parameter(embedding_NI.normal_())
        self.weight = kaiming_A(rank, base.in_features, like=like)

    def forward(self, mean_BI: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Scores (N, R), and for means of samples their cosines (B, N) with the embeddings."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        embedding_NI = self.embedding.to(dtype)
        scores_NR = F.linear(embedding_NI, self.weight.to(dtype))
        if mean_BI is None:
            return scores_NR, None
        return scores_NR, F.normalize(mean_BI, dim=-1) @ F.normalize(embedding_NI, dim=-1).T


class NestedLoRA(nn.Module):
    """A frozen linear plus (alpha / R) B (prefix_t * A dropout(x)) for samples of task t."""

    def __init__(self, base: nn.Linear, config: Config, trace: Trace, task_ids: TaskIds, spot: Spot) -> None:
        super().__init__()
        rank, like = config.rank_total, base.weight
        self.base_layer = base
        self.scale, self.dropout = config.alpha / rank, config.dropout
        self.router_grad: routing.RouterGrad = config.router_grad
        self.contrasts = config.contrast_weight > 0
        self.lora_A = kaiming_A(rank, base.in_features, like=like)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=like.dtype, device=like.device))
        self.selector = Selector(base, len(config.tasks), rank)
        # What no loss reaches stays at its random start and is saved as state.
        hears = config.router_grad != "hard"
        self.selector.weight.requires_grad_(hears)
        self.selector.embedding.requires_grad_(hears or self.contrasts)
        self.trace, self.task_ids, self.spot = trace, task_ids, spot
        # Cosines of the last forward pass with a gradient; recomputation replaces them after they were read.
        self.cosines_BN: Tensor | None = None

    def forward(self, x_BTI: Tensor) -> Tensor:
        ids_B = self.task_ids(len(x_BTI), x_BTI.device)
        mean_BI = self._mean(x_BTI) if self.contrasts and torch.is_grad_enabled() else None
        scores_NR, self.cosines_BN = self.selector(mean_BI)
        prefix_NR, probs_NR, choice_N = self._prefixes(scores_NR)
        if self.spot.leads:
            probs_BTR = probs_NR[ids_B].unsqueeze(1).expand(-1, x_BTI.shape[1], -1)
            choice_BT = choice_N[ids_B].unsqueeze(1).expand(-1, x_BTI.shape[1])
            self.trace.routes.append(Route(layer=self.spot.layer, probs_BTE=probs_BTR, choice_BT=choice_BT))
        dropped_BTI = F.dropout(x_BTI, self.dropout, self.training) if self.dropout else x_BTI
        kept_B1R = (prefix_NR[ids_B] * self.scale).to(x_BTI.dtype).unsqueeze(1)
        return self.base_layer(x_BTI) + F.linear(F.linear(dropped_BTI, self.lora_A) * kept_B1R, self.lora_B)

    def _prefixes(self, scores_NR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weight (N, R) of every rank-1 part, probabilities (N, R) of and choice (N) among the ranks.

        Part i takes part wherever rank i or a larger one is chosen.
        """
        probs_NR, choice_N = routing.top1(scores_NR)
        gates_NR = routing.gates(probs_NR, choice_N, self.router_grad)
        return gates_NR.flip(-1).cumsum(-1).flip(-1), probs_NR, choice_N

    def _mean(self, x_BTI: Tensor) -> Tensor:
        """Mean (B, I) over valid tokens in at least fp32."""
        mask_BT = self.trace.token_mask_BT
        assert mask_BT is not None
        mask_BT1 = mask_BT.unsqueeze(-1)
        dtype = torch.promote_types(x_BTI.dtype, torch.float32)
        return (x_BTI * mask_BT1).sum(dim=1, dtype=dtype) / mask_BT1.sum(dim=1).clamp(min=1)

    def plain(self, task: int) -> tuple[Tensor, Tensor, float]:
        """This linear's LoRA for one task: A (R, I), B (O, R), scale; parts that the task leaves out are 0."""
        prefix_NR, _, _ = self._prefixes(self.selector(None)[0])
        return self.lora_A.detach(), self.lora_B * prefix_NR[task].to(self.lora_B.dtype), self.scale


def attach(model: nn.Module, config: Config, trace: Trace) -> Attached:
    """Freeze `model` and put a LoRA of nested ranks on its target linears."""
    freeze(model)
    task_ids = TaskIds(trace, config.tasks)
    placed = place(
        model, config.targets, lambda linear, spot: NestedLoRA(linear, config, trace, task_ids, spot)
    )
    num_weights = count(model.parameters())
    # A sample meets the embedding of its own task alone; the contrastive loss, which meets all, is for training.
    trained = [m.selector.embedding for m in placed.values() if m.selector.embedding.requires_grad]
    num_others = count(iter(trained)) * (len(config.tasks) - 1) // len(config.tasks)

    frozen = {
        f"{path}.selector.{name}"
        for path, nested in placed.items()
        for name, weight in nested.selector.named_parameters()
        if not weight.requires_grad
    }

    def as_lora(task: str | None) -> Mapping[str, tuple[Tensor, Tensor, float]]:
        index = task_index(config.tasks, task)
        with torch.no_grad():
            return {path: nested.plain(index) for path, nested in placed.items()}

    return Attached(
        capabilities=Capabilities(
            needs_task_id_train=True,
            needs_task_id_infer=True,
            mergeable=True,
            stateful=bool(frozen),
            routing="task",
            router_hears_task_loss=config.router_grad != "hard",
        ),
        num_weights=num_weights,
        num_active=num_weights - num_others,
        losses=lambda trace: _losses(list(placed.values()), task_ids, config),
        state=frozenset(frozen),
        as_lora=as_lora,
    )


def _losses(adapted: list[NestedLoRA], task_ids: TaskIds, config: Config) -> Mapping[str, Tensor]:
    """The weighted contrastive loss of the last forward pass: a mean over samples and linears."""
    if config.contrast_weight == 0:
        return {}
    terms: list[Tensor] = []
    for nested in adapted:
        cosines_BN = nested.cosines_BN
        assert cosines_BN is not None
        ids_B = task_ids(len(cosines_BN), cosines_BN.device)
        terms.append(F.cross_entropy(cosines_BN / config.contrast_temperature, ids_B))
    return {"contrast_loss": config.contrast_weight * torch.stack(terms).mean()}
