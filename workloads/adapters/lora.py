"""Plain LoRA: a low-rank update of every linear of the language model.

Source:  Hu et al. 2021, LoRA, arXiv:2106.09685; placement as LLaVA-1.5 (all linears but lm_head).
Files:   `adapter_model.safetensors` and `adapter_config.json` are PEFT's own format.
"""

from dataclasses import dataclass, field

from torch import nn

from workloads.adapters.base import ATTENTION, MLP, Attached, Capabilities, Trace, count, freeze
from workloads.adapters.parts.placing import check_lora, plain_form, put_lora
from workloads.config import AdapterConfig
from workloads.errors import require

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Config(AdapterConfig):
    """Plain LoRA's settings; the update is scaled by alpha / rank."""

    name: str = "lora"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    # Last path components of the adapted linears.
    targets: list[str] = field(default_factory=lambda: [*ATTENTION, *MLP])

    def layout_matters(self) -> bool:
        """Dropout masks depend on how a global batch is cut."""
        return self.dropout > 0

    def training_only(self) -> set[str]:
        """Fields that steer training and leave what given weights compute as it is."""
        return {"dropout"}

    def check(self) -> None:
        """Raise `UserError` on values out of range."""
        require(self.rank >= 1, "adapter.rank", self.rank, "a whole number of 1 or more")
        check_lora(self.alpha, self.dropout, self.targets)


def attach(model: nn.Module, config: Config, trace: Trace) -> Attached:
    """Freeze `model` and put a LoRA on its target linears; routes nothing."""
    freeze(model)
    placed = put_lora(model, config.targets, config.rank, config.alpha, config.dropout)
    num_weights = count(model.parameters())
    return Attached(
        capabilities=Capabilities(mergeable=True),
        as_lora=plain_form(placed),
        num_weights=num_weights,
        num_active=num_weights,
        exported={
            "peft_type": "LORA",
            "r": config.rank,
            "lora_alpha": config.alpha,
            "lora_dropout": config.dropout,
            "bias": "none",
            # A pattern, since the vision tower has linears of the same names.
            "target_modules": rf"model\.language_model\..*\.({'|'.join(config.targets)})",
        },
    )
