"""Dual-LoRA: a low-rank update whose rank dimensions a second projection switches on and off for each token.

Source:  Jiao et al. 2024, From Holistic to Localized, arXiv:2411.12787, and its released model code.
Forward: W x + (alpha / R) B (LayerNorm(S x) * relu(T x)); S spans the skill space, T the task space.
Scale:   alpha / rank (2 in the release: rank 32, alpha 64). A linear has r (2 d_in + d_out) + 2 r weights:
         about those of plain LoRA at 1.5 times the rank where it is square.
Differs: LayerNorm, relu and their product run in at least fp32. A rank of 1 is refused, since LayerNorm maps
         one value to its bias. Dropout as released: on the skill space alone.

Shape letters: B batch, T tokens, R rank, I inputs, O outputs.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads.adapters.base import Attached, Capabilities, Trace, count, freeze, kaiming_A
from workloads.adapters.parts.placing import check_lora, place
from workloads.config import AdapterConfig
from workloads.errors import require

VERSION = 1
# As in torch.nn.LayerNorm.
EPSILON = 1e-5


@dataclass(frozen=True, kw_only=True)
class Config(AdapterConfig):
    """Dual-LoRA's settings; the update is scaled by alpha / rank."""

    name: str = "dual_lora"
    # Width of the skill space and of the task space.
    rank: int = 8
    alpha: float = 16.0
    # On the input of the skill space.
    dropout: float = 0.0
    # Last path components of the adapted linears.
    targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])

    def layout_matters(self) -> bool:
        """Dropout masks depend on how a global batch is cut."""
        return self.dropout > 0

    def training_only(self) -> set[str]:
        """Fields that steer training and leave what given weights compute as it is."""
        return {"dropout"}

    def check(self) -> None:
        """Raise `UserError` on values out of range."""
        require(self.rank >= 2, "adapter.rank", self.rank, "a whole number of 2 or more")
        check_lora(self.alpha, self.dropout, self.targets)


class DualLinear(nn.Module):
    """A frozen linear plus (alpha / R) B (LayerNorm(S dropout(x)) * relu(T x))."""

    def __init__(self, base: nn.Linear, config: Config) -> None:
        super().__init__()
        self.base_layer = base
        self.scale = config.alpha / config.rank
        self.dropout = config.dropout
        like = base.weight
        # S and T, stacked so that one matrix product serves both.
        self.skill_and_task = kaiming_A(2, config.rank, base.in_features, like=like)
        self.norm_weight = nn.Parameter(torch.ones(config.rank, dtype=like.dtype, device=like.device))
        self.norm_bias = nn.Parameter(torch.zeros(config.rank, dtype=like.dtype, device=like.device))
        zeros_RO = torch.zeros(config.rank, base.out_features, dtype=like.dtype, device=like.device)
        self.out = nn.Parameter(zeros_RO)

    def forward(self, x_BTI: Tensor) -> Tensor:
        skill_BTR, task_BTR = self._spaces(x_BTI)
        wide = torch.promote_types(x_BTI.dtype, torch.float32)
        norm_weight_R, norm_bias_R = self.norm_weight.to(wide), self.norm_bias.to(wide)
        u_BTR = F.layer_norm(skill_BTR.to(wide), norm_weight_R.shape, norm_weight_R, norm_bias_R, EPSILON)
        gated_BTR = u_BTR * task_BTR.to(wide).relu() * self.scale
        return self.base_layer(x_BTI) + gated_BTR.to(x_BTI.dtype) @ self.out

    def _spaces(self, x_BTI: Tensor) -> tuple[Tensor, Tensor]:
        """S dropout(x) and T x, both (B, T, R)."""
        if self.dropout and self.training:
            S_RI, T_RI = self.skill_and_task
            return F.linear(F.dropout(x_BTI, self.dropout), S_RI), F.linear(x_BTI, T_RI)
        both = F.linear(x_BTI, self.skill_and_task.flatten(0, 1))
        skill_BTR, task_BTR = both.chunk(2, dim=-1)
        return skill_BTR, task_BTR


def attach(model: nn.Module, config: Config, trace: Trace) -> Attached:
    """Freeze `model` and put a Dual-LoRA on its target linears; routes nothing."""
    freeze(model)
    place(model, config.targets, lambda base, spot: DualLinear(base, config))
    num_weights = count(model.parameters())
    return Attached(
        capabilities=Capabilities(),
        num_weights=num_weights,
        num_active=num_weights,
        as_lora="dual_lora's LayerNorm and relu depend on the token",
    )
