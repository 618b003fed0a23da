"""HiDe-LLaVA: one LoRA a task; below the last decoder block all are merged, in the last the closest ones are mixed.

Source:  Guo et al. 2025, HiDe-LLaVA, arXiv:2503.12941 (ACL 2025), and its released code (Ghy0501/HiDe-LLaVA):
         training     y = W x + s B_t A_t x, whatever was learned before
         inference    y = W x + s (sum_i B_i) (sum_i A_i) x          in all blocks but the last
                      y = W x + s sum_i softmax(c / T)_i B_i A_i x   in the last
         where i runs over the tasks seen so far, s = alpha / R, T = 0.1, and c_i is the mean of a sample's cosines
         with the mean image vector and the mean text vector of task i.
Routing: by sample, in the last block alone; decided on the prompt and kept while decoding.
Tasks:   a task's start gives it its slot and its means. A run without tasks in order is plain LoRA in the first slot.
Differs: `parts/means.py` says what stands for CLIP's vectors. As released, the merged blocks multiply sums, so that
         products of different tasks' factors appear. The block that mixes is the last one of any model (released: 31),
         and the mean image and text vectors are exact (released: they start from noise that counts as one sample).
Not verified: the paper's text on the merged blocks' coefficients; the released code sums with 1.

Shape letters: B batch, T tokens, K tasks, R rank of one slot, I inputs, O outputs.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads.adapters.base import ATTENTION, MLP, Attached, Trace, decoder_blocks, freeze
from workloads.adapters.parts import slots
from workloads.adapters.parts.means import TaskMeans
from workloads.adapters.parts.placing import Spot, place
from workloads.adapters.parts.pooling import Pool
from workloads.config import AdapterConfig
from workloads.errors import require
from workloads.llava import sentence

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Config(AdapterConfig):
    """HiDe-LLaVA's settings; every slot is scaled by alpha / rank_per_expert."""

    name: str = "hide_lora"
    # Names of the tasks in the order in which they are learned, one slot each.
    tasks: list[str] = field(default_factory=list)
    # Rank of one slot.
    rank_per_expert: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    # Of the softmax over tasks in the last block.
    temperature: float = 0.1
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


class HideLinear(nn.Module):
    """A frozen linear plus the update of the task that trains, or of the merged or mixed tasks in inference."""

    def __init__(self, base: nn.Linear, config: Config, means: TaskMeans, spot: Spot, mixes: bool) -> None:
        """`mixes` holds for the linears of the last decoder block."""
        super().__init__()
        self.config, self.spot, self.mixes = config, spot, mixes
        # Seen from every linear, part of the model in one place.
        self.seen = (means,)
        self.base_layer = base
        slots.add_slots(self, base, len(config.tasks), config.rank_per_expert)

    def forward(self, x_BTI: Tensor) -> Tensor:
        (means,) = self.seen
        dropped_BTI = F.dropout(x_BTI, self.config.dropout, self.training) if self.config.dropout else x_BTI
        weights_BK = means.weights_BK if self.mixes else torch.empty(0)
        if self.mixes and self.spot.leads:
            means.trace.routes.append(slots.route(weights_BK, self.spot.layer, x_BTI.shape[1]))
        known = [means.current] if self.training else means.known
        scale = self.config.alpha / self.config.rank_per_expert
        if self.mixes and not self.training:
            return self.base_layer(x_BTI) + self._mixed(dropped_BTI, weights_BK[:, known], known) * scale
        A_RI, B_OR = sum(slots.all_A(self, known)), sum(slots.all_B(self, known))
        assert isinstance(A_RI, Tensor)
        assert isinstance(B_OR, Tensor)
        return self.base_layer(x_BTI) + F.linear(F.linear(dropped_BTI, A_RI), B_OR) * scale

    def _mixed(self, x_BTI: Tensor, weights_BK: Tensor, known: list[int]) -> Tensor:
        """The weighted sum of the known slots' updates."""
        A_SI, B_OS = slots.stacked(self, known)
        inner_BTKR = F.linear(x_BTI, A_SI).unflatten(-1, (len(known), -1))
        return F.linear((inner_BTKR * weights_BK.to(x_BTI.dtype)[:, None, :, None]).flatten(-2), B_OS)


def attach(model: nn.Module, config: Config, trace: Trace) -> Attached:
    """Freeze `model` and put one LoRA slot per task on its target linears; the first slot trains."""
    freeze(model)
    inner: Any = model
    encoder = sentence.load(config.encoder, "adapter.encoder")
    entrance = inner.model.multi_modal_projector.linear_1
    pool = Pool(trace, "mean_valid", model)
    means = TaskMeans(
        config.tasks, trace, encoder, entrance.weight.device, pool, entrance.in_features, config.temperature
    )
    last = max(layer for layer, _ in decoder_blocks(model))
    placed = place(
        model,
        config.targets,
        lambda base, spot: HideLinear(base, config, means, spot, mixes=spot.layer == last),
    )
    why = "hide_lora mixes the last block's LoRAs anew for every sample"
    return slots.weighted(model, placed, means, "hide_means", why)
