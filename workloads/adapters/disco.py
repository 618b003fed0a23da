"""DISCO's slots: one LoRA a task, at inference weighted by how close a sample's text is to each task's mean.

Source:  Guo et al. 2025, DISCO, arXiv:2503.12897 (ICCV 2025), and its released code (Ghy0501/FCIT; MCITlib has the
         form without clients):
         training     y = W x + s B_t A_t x, whatever was learned before
         inference    y = W x + s B diag(w_1 I, ..., w_K I) A x, where A and B stack all slots, w = softmax(c / T),
                      T = 0.05, and c_i is the cosine of the sample's text vector with the mean one of task i
Routing: by sample, the same weights in every linear; decided on the prompt and kept while decoding.
Tasks:   a task's start gives it its slot and its mean. A run without tasks in order is plain LoRA in the first slot.
Differs: there are no clients, so nothing of its federated part (which client's LoRA joins which slot) is here.
         `parts/means.py` says what stands for CLIP's vectors. The softmax is over the tasks seen so far.
Not verified: the paper's equations; the released code is what is followed.

Shape letters: B batch, T tokens, K tasks, R rank of one slot, I inputs, O outputs.
"""

from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from workloads.adapters.base import ATTENTION, MLP, Attached, Trace, freeze
from workloads.adapters.parts import slots
from workloads.adapters.parts.means import TaskMeans
from workloads.adapters.parts.placing import Spot, place
from workloads.config import AdapterConfig
from workloads.errors import require
from workloads.llava import sentence

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Config(AdapterConfig):
    """DISCO's settings; every slot is scaled by alpha / rank_per_expert."""

    name: str = "disco"
    # Names of the tasks in the order in which they are learned, one slot each.
    tasks: list[str] = field(default_factory=list)
    # Rank of one slot.
    rank_per_expert: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    # Of the softmax over tasks.
    temperature: float = 0.05
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

    def identity(self) -> dict[str, str]:
        """The content of the sentence encoder."""
        return {"encoder": sentence.content_hash(sentence.find(self.encoder, "adapter.encoder"))}

    def check(self) -> None:
        """Raise `UserError` on values out of range."""
        slots.check_slots(self.tasks, self.rank_per_expert, self.alpha, self.dropout, self.targets)
        require(self.temperature > 0, "adapter.temperature", self.temperature, "a number above 0")


class WeightedSlots(nn.Module):
    """A frozen linear plus (alpha / R) sum_i w_i B_i A_i dropout(x), in training the current task's alone."""

    def __init__(self, base: nn.Linear, config: Config, means: TaskMeans, spot: Spot) -> None:
        super().__init__()
        self.config, self.spot = config, spot
        # Seen from every linear, part of the model in one place.
        self.seen = (means,)
        self.base_layer = base
        slots.add_slots(self, base, len(config.tasks), config.rank_per_expert)

    def forward(self, x_BTI: Tensor) -> Tensor:
        (means,) = self.seen
        weights_BK = means.weights_BK
        if self.spot.leads:
            means.trace.routes.append(slots.route(weights_BK, self.spot.layer, x_BTI.shape[1]))
        dropped_BTI = F.dropout(x_BTI, self.config.dropout, self.training) if self.config.dropout else x_BTI
        known = [means.current] if self.training else means.known
        A_SI, B_OS = slots.stacked(self, known)
        scale = self.config.alpha / self.config.rank_per_expert
        inner_BTKR = F.linear(dropped_BTI, A_SI).unflatten(-1, (len(known), -1))
        weighted_BTKR = inner_BTKR * (weights_BK[:, known] * scale).to(x_BTI.dtype)[:, None, :, None]
        return self.base_layer(x_BTI) + F.linear(weighted_BTKR.flatten(-2), B_OS)


def attach(model: nn.Module, config: Config, trace: Trace) -> Attached:
    """Freeze `model` and put one LoRA slot per task on its target linears; the first slot trains."""
    freeze(model)
    inner: Any = model
    encoder = sentence.load(config.encoder, "adapter.encoder")
    device = inner.model.multi_modal_projector.linear_1.weight.device
    means = TaskMeans(config.tasks, trace, encoder, device, temperature=config.temperature)
    placed = place(model, config.targets, lambda base, spot: WeightedSlots(base, config, means, spot))
    return slots.weighted(model, placed, means, "disco_means", "disco weighs its LoRAs anew for every sample")
