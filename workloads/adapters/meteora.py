"""MeteoRA: ready-made LoRAs stay frozen; on every linear a gate mixes the few that each token needs.

Source:  Xu et al. 2024, MeteoRA, arXiv:2405.13053, and its released code. Per linear and token, over the top-k
         gate scores z of G x: y = W x + sum_i softmax(z_topk / temperature)_i s_i B_i A_i x.
Routing: per token and linear, gates without bias. The trace's route of a decoder block is that of its first
         adapted linear, before the top-k.
Losses:  cross-entropy of every gate at every valid token against the LoRA of the sample's task, times 50.
Files:   the LoRAs come from `folders`, ours or PEFT's; they are saved with the gates, their scales multiplied
         into B. A linear that a LoRA does not adapt, or a rank that it does not have, is 0 there.
Differs: `router_grad`: `scaled` is the release; `hard` keeps the weights' values without the task gradient,
         `straight_through` gives them the gradient of the softmax over all LoRAs, `dense` mixes all. The gate
         loss is a mean over a sample's tokens, then samples, then gates (there over all tokens of the batch).

Shape letters: B batch, T tokens, E LoRAs, R rank, I inputs, O outputs.
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
    Trace,
    count,
    freeze,
    kaiming_A,
)
from workloads.adapters.parts.folders import adapter_files, check_folders, fill, read_all
from workloads.adapters.parts.placing import Spot, check_lora, place
from workloads.adapters.parts.tasks import TaskIds, check_tasks
from workloads.config import AdapterConfig
from workloads.errors import require

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Config(AdapterConfig):
    """MeteoRA's settings; rank and scale of every LoRA are those of its folder."""

    name: str = "meteora"
    # Names of the LoRAs, each the task that its samples come from; needed in training alone.
    tasks: list[str] = field(default_factory=list)
    # Task -> folder of its plain LoRA; one for every task.
    folders: dict[str, str] = field(default_factory=dict)
    # Leave out the projectors that were trained beside the LoRAs; otherwise such folders are refused.
    drop_projectors: bool = False
    # Largest rank among the LoRAs.
    rank_per_expert: int = 8
    top_k: int = 2
    # Of the softmax over the chosen scores; the paper raises it to mix several tasks in one prompt.
    temperature: float = 1.0
    router_grad: routing.RouterGrad = "scaled"
    gate_weight: float = 50.0
    # Last path components of the linears that get a gate.
    targets: list[str] = field(default_factory=lambda: [*ATTENTION, *MLP])

    def training_only(self) -> set[str]:
        """Fields that steer training; all router gradients but `dense` have the same values."""
        same_values = {"router_grad"} if self.router_grad != "dense" else set()
        return {"folders", "drop_projectors", "gate_weight"} | same_values

    def told_tasks(self) -> Literal["never", "in training", "always"]:
        """The gates learn from tasks, and go without them."""
        return "in training" if self.gate_weight > 0 else "never"

    def check(self) -> None:
        """Raise `UserError` on values out of range."""
        check_tasks(self.tasks)
        check_folders(self.folders, self.tasks)
        for task in self.tasks:
            require(task in self.folders, "adapter.folders", dict(self.folders), f"give a folder for {task}")
        rank, top_k = self.rank_per_expert, self.top_k
        require(rank >= 1, "adapter.rank_per_expert", rank, "a whole number of 1 or more")
        require(1 <= top_k <= len(self.tasks), "adapter.top_k", top_k, f"1 to {len(self.tasks)}, the LoRAs")
        require(self.temperature > 0, "adapter.temperature", self.temperature, "a number above 0")
        require(self.gate_weight >= 0, "adapter.gate_weight", self.gate_weight, "0 or more")
        learns = self.gate_weight > 0 or self.hears()
        require(learns, "adapter.gate_weight", 0.0, "above 0 where no task loss reaches the gates")
        check_lora(1.0, 0.0, self.targets)

    def hears(self) -> bool:
        """Whether the task loss reaches the gates: a softmax over one score is 1 whatever the score."""
        return self.router_grad != "hard" and not (self.router_grad == "scaled" and self.top_k == 1)

    def files(self) -> list[Path]:
        """The files that the method starts from; their contents decide numbers, their places do not."""
        return adapter_files(self.folders)

    def without_files(self) -> "Config":
        """The same method with nothing to read, for a model whose weights are restored afterwards."""
        return replace(self, folders={})


class Gate(nn.Linear):
    """A linear without bias whose scores (B, T, E) are computed in at least fp32 whatever the model's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        return routing.linear_scores(input, self.weight)


def mix(scores_BTE: Tensor, top_k: int, temperature: float, router_grad: routing.RouterGrad) -> Tensor:
    """Weight (B, T, E) of every LoRA: a softmax over the top-k scores, 0 elsewhere; gradients as declared above."""
    heated_BTE = scores_BTE / temperature
    probs_BTE = heated_BTE.softmax(dim=-1)
    if router_grad == "dense":
        return probs_BTE
    kept_BTK = heated_BTE.topk(top_k, dim=-1).indices
    left_out_BTE = torch.ones_like(heated_BTE, dtype=torch.bool).scatter(-1, kept_BTK, False)
    weights_BTE = heated_BTE.masked_fill(left_out_BTE, -torch.inf).softmax(dim=-1)
    if router_grad == "scaled":
        return weights_BTE
    if router_grad == "hard":
        return weights_BTE.detach()
    assert router_grad == "straight_through", router_grad
    return weights_BTE.detach() + (probs_BTE - probs_BTE.detach())


class GatedLoRAs(nn.Module):
    """A frozen linear plus sum_e weight_e B_e A_e x over frozen LoRAs, scales multiplied into B."""

    def __init__(self, base: nn.Linear, config: Config, trace: Trace, spot: Spot) -> None:
        super().__init__()
        experts, rank, like = len(config.tasks), config.rank_per_expert, base.weight
        options = {"dtype": like.dtype, "device": like.device}
        self.base_layer = base
        self.gate = Gate(base.in_features, experts, bias=False, **options)
        self.gate.weight = kaiming_A(experts, base.in_features, like=like)
        A_ERI = torch.zeros(experts, rank, base.in_features, **options)
        B_ERO = torch.zeros(experts, rank, base.out_features, **options)
        self.experts_A = nn.Parameter(A_ERI, requires_grad=False)
        self.experts_B = nn.Parameter(B_ERO, requires_grad=False)
        self.config, self.trace, self.spot = config, trace, spot
        # Of the last forward pass with a gradient; recomputation replaces them after they were read.
        self.scores_BTE: Tensor | None = None

    def forward(self, x_BTI: Tensor) -> Tensor:
        config, scores_BTE = self.config, self.gate(x_BTI)
        self.scores_BTE = scores_BTE if torch.is_grad_enabled() else None
        if self.spot.leads:
            probs_BTE, choice_BT = routing.top1(scores_BTE)
            self.trace.routes.append(Route(layer=self.spot.layer, probs_BTE=probs_BTE, choice_BT=choice_BT))
        weights_BTE = mix(scores_BTE, config.top_k, config.temperature, config.router_grad)
        inner_BTER = F.linear(x_BTI, self.experts_A.flatten(0, 1)).unflatten(-1, self.experts_A.shape[:2])
        weighted_BTER = inner_BTER * weights_BTE.to(x_BTI.dtype).unsqueeze(-1)
        return self.base_layer(x_BTI) + weighted_BTER.flatten(-2) @ self.experts_B.flatten(0, 1)


def attach(model: nn.Module, config: Config, trace: Trace) -> Attached:
    """Freeze `model` and put the folders' LoRAs with a gate each on its target linears; the gates train.

    The model does not start at the base but as a mixture of the LoRAs. Raises `UserError` on a folder that holds
    anything but a plain LoRA that fits.
    """
    loras = read_all(config.folders, model, config.targets, config.rank_per_expert, config.drop_projectors)
    freeze(model)
    placed = place(model, config.targets, lambda base, spot: GatedLoRAs(base, config, trace, spot))
    for task, lora in loras.items():
        for path, linear in lora.linears.items():
            gated = placed[path]
            fill(gated.experts_A, gated.experts_B, config.tasks.index(task), linear, scale=1.0)
    num_weights = count(model.parameters())
    task_ids = TaskIds(trace, config.tasks)
    return Attached(
        capabilities=Capabilities(
            needs_task_id_train=config.told_tasks() != "never",
            stateful=True,
            routing="token",
            router_hears_task_loss=config.hears(),
        ),
        num_weights=num_weights,
        num_active=num_weights,
        losses=lambda trace: _losses(list(placed.values()), task_ids, config),
        state=frozenset(f"{path}.{factor}" for path in placed for factor in ("experts_A", "experts_B")),
        as_lora="the gates choose LoRAs token by token",
    )


def _losses(adapted: list[GatedLoRAs], task_ids: TaskIds, config: Config) -> Mapping[str, Tensor]:
    """The weighted gate loss of the last forward pass: a mean over a sample's valid tokens, samples and gates."""
    if config.gate_weight == 0:
        return {}
    terms: list[Tensor] = []
    for gated in adapted:
        scores_BTE, mask_BT = gated.scores_BTE, gated.trace.token_mask_BT
        assert scores_BTE is not None
        assert mask_BT is not None
        ids_B = task_ids(len(scores_BTE), scores_BTE.device)
        wanted_BT = ids_B.unsqueeze(1).expand(-1, scores_BTE.shape[1])
        losses_BT = F.cross_entropy(scores_BTE.transpose(1, 2), wanted_BT, reduction="none")
        terms.append(((losses_BT * mask_BT).sum(dim=1) / mask_BT.sum(dim=1).clamp(min=1)).mean())
    return {"gate_loss": config.gate_weight * torch.stack(terms).mean()}
