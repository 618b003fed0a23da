"""Builds a LLaVA and its processor from a folder: safetensors only, strict keys, no remote code."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils.logging import disable_progress_bar

from workloads.config import ModelConfig
from workloads.errors import UserError
from workloads.llava.folder import resolve
from workloads.llava.prompt import Prompter

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Llava:
    """A base model with what turns samples into its inputs."""

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor
    prompter: Prompter


def build(
    config: ModelConfig,
    dtype: Literal["fp32", "bf16"],
    sharded: AbstractContextManager[Any] | None = None,
) -> Llava:
    """Load the base; `sharded` is the engine's context under which ZeRO-3 partitions weights as they load."""
    folder = resolve(config.name_or_path)
    disable_progress_bar()
    loader: Any = LlavaForConditionalGeneration
    with sharded or nullcontext():
        model, report = loader.from_pretrained(
            folder, dtype=DTYPES[dtype], use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    _strict(str(folder), report)
    processor = LlavaProcessor.from_pretrained(
        folder, image_processor=CLIPImageProcessorPil.from_pretrained(folder), local_files_only=True
    )
    return Llava(
        model=model, processor=processor, prompter=Prompter(processor, model.config.image_seq_length)
    )


def train_projector(model: LlavaForConditionalGeneration) -> None:
    """Let the projector train in full, as LLaVA does beside an adapter."""
    model.model.multi_modal_projector.requires_grad_(True)


def projector_weights(model: LlavaForConditionalGeneration) -> set[nn.Parameter]:
    """The weights of the projector and of VCE, which may learn at a rate of their own."""
    parts = (model.get_submodule("model.multi_modal_projector"), getattr(model.model, "visual_cues", None))
    return {weight for part in parts if part is not None for weight in part.parameters()}


def _strict(folder: str, report: dict[str, Any]) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, report[kind])):
            raise UserError(
                f"model.name_or_path: {folder} has {kind.replace('_', ' ')}: {', '.join(keys[:5])}"
            )
