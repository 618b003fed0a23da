"""Builds a LLaVA and its processor from a folder, the hub or parts: safetensors only, strict keys, no remote code."""

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoImageProcessor
from transformers.utils.logging import disable_progress_bar

from workloads.config import ModelConfig
from workloads.errors import UserError, first_line, require
from workloads.llava import images, kinds, parts, strict
from workloads.llava.folder import image_processor, resolve
from workloads.llava.kinds import Model, Processor, Shape, Tiles
from workloads.llava.prompt import Prompter

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Llava:
    """A base model with what turns samples into its inputs."""

    model: Model
    processor: Processor
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
    strict.check(folder, kinds.empty(shape))
    loader = kinds.of(shape).model
    with sharded or nullcontext():
        model, report = loader.from_pretrained(
            folder, dtype=DTYPES[dtype], use_safetensors=True, local_files_only=True, output_loading_info=True,
            attn_implementation=config.attention,
        )  # fmt: skip
    strict.loaded("model.name_or_path", folder, report)
    ends: Any = model.generation_config.eos_token_id
    prompter = _prompter(folder, config, model, _listed(ends))
    return Llava(
        model=model, processor=prompter.processor, prompter=prompter, image_aspect=config.image_aspect
    )


def prompter_of(config: ModelConfig) -> Prompter:
    """What encodes conversations for a base model, without its weights; raises `UserError` as `build` does."""
    folder = folder_of(config)
    return _prompter(folder, config, kinds.empty(_shape(folder, config)), [])


def folder_of(config: ModelConfig) -> Path:
    """The folder of the base model; one from parts is put together first."""
    return parts.assembled(config) if config.language_model else resolve(config.name_or_path, config.hub)


def base_name(config: ModelConfig) -> str:
    """What an adapter's folder calls the base model; `resolve` finds it by that."""
    return str(folder_of(config)) if config.language_model else config.name_or_path


def train_projector(model: Model) -> None:
    """Let the projector train in full, as LLaVA does beside an adapter."""
    model.model.multi_modal_projector.requires_grad_(True)


def projector_weights(model: Model) -> set[nn.Parameter]:
    """The weights of the projector and of VCE, which may learn at a rate of their own."""
    trained = (model.get_submodule("model.multi_modal_projector"), getattr(model.model, "visual_cues", None))
    return {weight for part in trained if part is not None for weight in part.parameters()}


def described_shape(config: ModelConfig) -> Shape:
    """The sizes of the base model, for which its config.json is enough; raises `UserError` when there is none."""
    if config.language_model:
        return parts.shape_of(config)
    return _read_shape(resolve(config.name_or_path, config.hub), config)


def _shape(folder: Path, config: ModelConfig) -> Shape:
    """The model's own configuration, where it can be built with the attention that is asked for."""
    if config.attention == "flash_attention_2":
        # Without its package transformers would look for compiled code on the hub.
        there = importlib.util.find_spec("flash_attn") is not None and torch.cuda.is_available()
        allowed = "it needs a GPU and the package flash_attn; sdpa or eager"
        require(there, "model.attention", config.attention, allowed)
    return _read_shape(folder, config)


def _read_shape(folder: Path, config: ModelConfig) -> Shape:
    """The model's own configuration, of a kind that can be built here."""
    try:
        shape: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"model.name_or_path: {folder} has no usable config.json: {reason}") from None
    allowed = f"a model of type {' or '.join(kinds.KINDS)}; {folder} is of type {shape.model_type}"
    require(shape.model_type in kinds.KINDS, "model.name_or_path", config.name_or_path, allowed)
    if kinds.is_tiled(shape):
        aspect, allowed = config.image_aspect, "LLaVA-NeXT cuts an image of any shape into tiles; crop"
        require(aspect == "crop", "model.image_aspect", aspect, allowed)
    return shape


def _prompter(folder: Path, config: ModelConfig, model: Model, ends: list[int]) -> Prompter:
    """What encodes conversations for `model`, whose weights may be on the meta device."""
    processor = _processor(folder, config, model.config)
    _check_tokens(folder, model, processor)
    image_tokens = _image_tokens(folder, model, processor)
    shape: Any = model.config
    tiles = Tiles(processor, shape.vision_config.image_size) if kinds.is_tiled(shape) else None
    return Prompter(processor, image_tokens, ends, tiles)


def _processor(folder: Path, config: ModelConfig, shape: Any) -> Processor:
    """Tokenizer, chat template and the named image processor class."""
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        seeing: Any = AutoImageProcessor.from_pretrained(folder, backend=config.image_backend, **options)
        kind = kinds.of(shape).processor
        processor = kind.from_pretrained(folder, image_processor=seeing, **options)
    except (OSError, ValueError, ImportError) as error:
        reason = first_line(error)
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


def _check_tokens(folder: Path, model: Model, processor: Any) -> None:
    """Raise `UserError` unless tokenizer and model mean the same tokens."""
    config: Any = model.config
    image, given = config.image_token_id, processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    rows, known = config.text_config.vocab_size, len(processor.tokenizer)
    if given != image or known > rows:
        raise UserError(
            f"model.name_or_path: {folder} has a tokenizer of another model: {known} tokens, {processor.image_token} "
            f"is {given}; the model has {rows}, and its images are {image}"
        )


def _image_tokens(folder: Path, model: Model, processor: Any) -> int:
    """Tokens of one image, of a square one where sizes matter, by the processor.

    It is first told of the tower that it works for: its own settings cannot be relied on, since they decide no shape,
    and many checkpoints leave out that the tower has a class token.
    """
    config: Any = model.config
    vision = config.vision_config
    processor.patch_size = vision.patch_size
    processor.vision_feature_select_strategy = config.vision_feature_select_strategy
    processor.num_additional_image_tokens = kinds.class_tokens(model)
    side = vision.image_size
    blank_HWC = np.zeros((side, side, 3), dtype=np.uint8)
    pixels = images.pixels([blank_HWC], processor.image_processor, "crop")
    given = tuple(pixels.shape[-2:])
    allowed = f"its image processor makes images of {given}, and its tower takes {(side, side)}"
    require(given == (side, side), "model.name_or_path", str(folder), allowed)
    seen = {"pixel_values": pixels, "image_sizes": [[side, side]]}
    if kinds.is_tiled(config):
        wanted, found = config.image_grid_pinpoints, processor.image_processor.image_grid_pinpoints
        allowed = f"its image processor's image_grid_pinpoints are {found}, and its model's {wanted}"
        same = sorted(map(tuple, wanted)) == sorted(map(tuple, found))
        require(same, "model.name_or_path", str(folder), allowed)
    return processor.replace_image_token(seen, 0).count(processor.image_token)


def _listed(ids: int | list[int] | None) -> list[int]:
    return [ids] if isinstance(ids, int) else list(ids or [])
