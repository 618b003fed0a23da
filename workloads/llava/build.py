"""Builds a LLaVA and its processor from a folder, the hub or parts: safetensors only, strict keys, no remote code."""

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.utils.logging import disable_progress_bar

from workloads.config import ModelConfig
from workloads.errors import UserError, require
from workloads.llava import images, parts, strict
from workloads.llava.folder import image_processor, resolve
from workloads.llava.prompt import Prompter

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Llava:
    """A base model with what turns samples into its inputs."""

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor
    prompter: Prompter
    # What happens to images that are not square: `crop` or `pad`.
    image_aspect: str = "crop"


def build(
    config: ModelConfig,
    dtype: Literal["fp32", "bf16"],
    sharded: AbstractContextManager[Any] | None = None,
) -> Llava:
    """Load the base; `sharded` is the engine's context under which ZeRO-3 partitions weights as they load.

    Raises `UserError` when there is no such model, or when it is not exactly what its config.json says.
    """
    folder = folder_of(config)
    disable_progress_bar()
    shape = _shape(folder, config)
    with torch.device("meta"):
        strict.check(folder, LlavaForConditionalGeneration(shape))
    loader: Any = LlavaForConditionalGeneration
    with sharded or nullcontext():
        model, report = loader.from_pretrained(
            folder, dtype=DTYPES[dtype], use_safetensors=True, local_files_only=True, output_loading_info=True,
            attn_implementation=config.attention,
        )  # fmt: skip
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        strict.told(folder, kind.replace("_", " "), set(map(str, report[kind])))
    processor = _processor(folder, config)
    _check_tokens(folder, model, processor)
    ends: Any = model.generation_config.eos_token_id
    return Llava(
        model=model,
        processor=processor,
        prompter=Prompter(processor, _image_tokens(model, processor), _listed(ends)),
        image_aspect=config.image_aspect,
    )


def prompter_of(config: ModelConfig) -> Prompter:
    """What encodes conversations for a base model, without its weights; raises `UserError` as `build` does."""
    folder = folder_of(config)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(_shape(folder, config))
    processor = _processor(folder, config)
    _check_tokens(folder, model, processor)
    return Prompter(processor, _image_tokens(model, processor))


def folder_of(config: ModelConfig) -> Path:
    """The folder of the base model; one from parts is put together first."""
    return parts.assembled(config) if config.language_model else resolve(config.name_or_path, config.hub)


def base_name(config: ModelConfig) -> str:
    """What an adapter's folder calls the base model; `resolve` finds it by that."""
    return str(folder_of(config)) if config.language_model else config.name_or_path


def train_projector(model: LlavaForConditionalGeneration) -> None:
    """Let the projector train in full, as LLaVA does beside an adapter."""
    model.model.multi_modal_projector.requires_grad_(True)


def projector_weights(model: LlavaForConditionalGeneration) -> set[nn.Parameter]:
    """The weights of the projector and of VCE, which may learn at a rate of their own."""
    trained = (model.get_submodule("model.multi_modal_projector"), getattr(model.model, "visual_cues", None))
    return {weight for part in trained if part is not None for weight in part.parameters()}


def _shape(folder: Path, config: ModelConfig) -> LlavaConfig:
    """The model's own configuration, of a kind that can be built here."""
    try:
        shape: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model.name_or_path: {folder} has no usable config.json: {reason}") from None
    allowed = f"a model of type llava; {folder} is of type {shape.model_type}"
    require(isinstance(shape, LlavaConfig), "model.name_or_path", config.name_or_path, allowed)
    if config.attention == "flash_attention_2":
        # Without its package transformers would look for compiled code on the hub.
        there = importlib.util.find_spec("flash_attn") is not None and torch.cuda.is_available()
        require(
            there,
            "model.attention",
            config.attention,
            "it needs a GPU and the package flash_attn; sdpa or eager",
        )
    return shape


def _processor(folder: Path, config: ModelConfig) -> LlavaProcessor:
    """Tokenizer, chat template and the named image processor class."""
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        seeing: Any = AutoImageProcessor.from_pretrained(folder, backend=config.image_backend, **options)
        processor = LlavaProcessor.from_pretrained(folder, image_processor=seeing, **options)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model.name_or_path: {folder} has no usable processor: {reason}") from None
    named, given = image_processor(config), type(seeing).__name__
    allowed = f"it needs {named}, and only {given} is installed here"
    require(named == given, "model.image_backend", config.image_backend, allowed)
    tokenizer: Any = processor.tokenizer
    if not tokenizer.is_fast:
        raise UserError(f"model.name_or_path: {folder} has no tokenizer.json")
    if processor.chat_template is None:
        raise UserError(f"model.name_or_path: {folder} has no chat template")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return processor


def _check_tokens(folder: Path, model: LlavaForConditionalGeneration, processor: Any) -> None:
    """Raise `UserError` unless tokenizer and model mean the same tokens."""
    config: Any = model.config
    image, given = config.image_token_id, processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    rows, known = config.text_config.vocab_size, len(processor.tokenizer)
    if given != image or known > rows:
        raise UserError(
            f"model.name_or_path: {folder} has a tokenizer of another model: {known} tokens, {processor.image_token} "
            f"is {given}; the model has {rows}, and its images are {image}"
        )


def _image_tokens(model: LlavaForConditionalGeneration, processor: Any) -> int:
    """Tokens of one image, by the processor; it is first told of the tower that it works for.

    A processor's own settings cannot be relied on: they decide no shape, and many checkpoints leave out that the
    tower has a class token.
    """
    config: Any = model.config
    vision, embeddings = (
        config.vision_config,
        model.get_submodule("model.vision_tower").get_submodule("embeddings"),
    )
    processor.patch_size = vision.patch_size
    processor.vision_feature_select_strategy = config.vision_feature_select_strategy
    processor.num_additional_image_tokens = int(
        any(hasattr(embeddings, name) for name in ("class_embedding", "cls_token"))
    )
    side = vision.image_size
    blank_HWC = np.zeros((side, side, 3), dtype=np.uint8)
    seen_NCHW = images.pixels([blank_HWC], processor.image_processor, "crop")
    given = tuple(seen_NCHW.shape[-2:])
    allowed = f"its image processor makes images of {given}, and its tower takes {(side, side)}"
    require(given == (side, side), "model.name_or_path", config.name_or_path, allowed)
    return processor.replace_image_token({"pixel_values": seen_NCHW}, 0).count(processor.image_token)


def _listed(ids: int | list[int] | None) -> list[int]:
    return [ids] if isinstance(ids, int) else list(ids or [])
