"""A LLaVA from parts: a language model, a vision tower and a projector, put together as one checkpoint in the cache.

Source:  Liu et al. 2023, LLaVA-1.5, arXiv:2310.03744: the tower's level before the last without its class token, a
         projector of two layers with GELU, the prompt of vicuna v1.
Differs: the image token is a new row of the embeddings, as in checkpoints for transformers; its image processor is
         the tower's. Weights are renamed and copied, never changed, so the checkpoint takes their size on disk.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, LlavaConfig, LlavaProcessor

from workloads.data.cache import ENVIRONMENT_KEY, cache_dir
from workloads.data.rows import IMAGE
from workloads.errors import UserError, first_line, reason_of, require
from workloads.identity import model_hash
from workloads.llava import strict
from workloads.schema import ModelConfig

VERSION = 1
# Bytes of weights in one file of the checkpoint; so much is held in memory.
_SHARD = 2 * 2**30
_PAD = "<pad>"
_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_TEMPLATE = (
    "{% if messages[0].role != 'system' %}{{ system }} {% endif %}{% for message in messages %}"
    "{% set said = message.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') %}"
    "{% if message.role == 'system' %}{{ said }} {% elif message.role == 'user' %}USER: "
    "{% for part in message.content %}{% if part.type == 'image' %}<image>\n{% endif %}{% endfor %}{{ said }} "
    "{% else %}ASSISTANT: {% generation %}{{ said }} {% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
).replace("{{ system }}", _SYSTEM)
# Type of a tower -> whether a class token is in front of its patches, which the projector does not read. Of other
# types transformers' LLaVA does not count the tokens (those with registers) or cannot take the features.
_TOWERS = {"clip_vision_model": True, "dinov2": True, "siglip_vision_model": False}
# Names of a projector in LLaVA's releases and in transformers -> the layer's name here.
_PROJECTOR = re.compile(r"^(?:.*\.)?(?:(?:mm_projector\.)?([02])|linear_([12]))\.(weight|bias)$")


def assembled(config: ModelConfig) -> Path:
    """The folder of the checkpoint that `config`'s parts make, found in the cache or written there.

    Raises `UserError` on parts that do not fit, and when the cache cannot be written.
    """
    key = hashlib.sha256(f"{VERSION} {model_hash(config)}".encode()).hexdigest()[:16]
    folder = cache_dir() / "models" / key
    if not (folder / "config.json").is_file():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                made = Path(scratch) / key
                _write(config, made)
                put(made, folder)
        except OSError as error:
            raise UserError(f"{ENVIRONMENT_KEY}: cannot write {folder}: {reason_of(error)}") from None
    return folder


def shape_of(config: ModelConfig) -> LlavaConfig:
    """The sizes of the checkpoint that `config`'s parts make; nothing is written. Raises `UserError` as `assembled`."""
    speaks = Path(config.language_model)
    return _shape(speaks, Path(config.vision_tower), _tokenizer(speaks))


def put(made: Path, folder: Path) -> None:
    """Give the whole folder its name, unless another process was first."""
    try:
        made.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():
            raise


def _write(config: ModelConfig, folder: Path) -> None:
    speaks, sees = Path(config.language_model), Path(config.vision_tower)
    tokenizer = _tokenizer(speaks)
    shape = _shape(speaks, sees, tokenizer)
    # What can be refused comes before the weights, whose files are large.
    processor = processor_of(_image_processor(sees), tokenizer, shape.vision_config, _TEMPLATE)
    folder.mkdir()
    _save(_weights(config, shape, len(tokenizer)), folder)
    processor.save_pretrained(folder)
    shape.save_pretrained(folder)


def _tokenizer(folder: Path) -> Any:
    """The language model's tokenizer with tokens for images and padding."""
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        reason = first_line(error)
        raise UserError(f"model.language_model: {folder} has no usable tokenizer: {reason}") from None
    with_image_token(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.add_special_tokens({"pad_token": _PAD})
    return tokenizer


def _shape(speaks: Path, sees: Path, tokenizer: Any) -> LlavaConfig:
    text, vision = _config(speaks, "model.language_model"), _config(sees, "model.vision_tower")
    vision = getattr(vision, "vision_config", vision)
    allowed = f"a vision tower of type {' or '.join(_TOWERS)}; it is of type {vision.model_type}"
    require(vision.model_type in _TOWERS, "model.vision_tower", str(sees), allowed)
    text.vocab_size = max(text.vocab_size, len(tokenizer))
    text.pad_token_id = tokenizer.pad_token_id
    return config_of(text, vision, tokenizer)


def with_image_token(tokenizer: Any) -> None:
    """Give a tokenizer one more token, which stands for images."""
    tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)


def config_of(text: Any, vision: Any, tokenizer: Any) -> LlavaConfig:
    """The configuration of a LLaVA from those of its two parts; the tokenizer has its token for images."""
    make: Any = LlavaConfig
    return make(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if _TOWERS[vision.model_type] else "full",
        tie_word_embeddings=text.tie_word_embeddings,
        architectures=["LlavaForConditionalGeneration"],
    )


def processor_of(seeing: Any, tokenizer: Any, vision: Any, template: str) -> LlavaProcessor:
    """What turns pictures and conversations into the inputs of a LLaVA whose tower has the configuration `vision`."""
    has_class = _TOWERS[vision.model_type]
    return LlavaProcessor(
        image_processor=seeing,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default" if has_class else "full",
        chat_template=template,
        image_token=IMAGE,
        num_additional_image_tokens=int(has_class),
    )


def _config(folder: Path, key: str) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {folder} has no usable config.json: {first_line(error)}") from None


def _image_processor(folder: Path) -> Any:
    options: dict[str, Any] = {"backend": "pil", "local_files_only": True, "trust_remote_code": False}
    try:
        return AutoImageProcessor.from_pretrained(folder, **options)
    except (OSError, ValueError, ImportError) as error:
        reason = first_line(error)
        raise UserError(f"model.vision_tower: {folder} has no usable image processor: {reason}") from None


def _weights(config: ModelConfig, shape: LlavaConfig, num_tokens: int) -> Iterator[tuple[str, Tensor]]:
    """All weights one by one, under their names in the checkpoint."""
    for name, weight in _read(Path(config.language_model), "model.language_model"):
        if name.endswith("embed_tokens.weight") or name == "lm_head.weight":
            weight = with_rows(weight, num_tokens)
        yield f"language_model.{name}", weight
    for name, weight in _read(Path(config.vision_tower), "model.vision_tower"):
        # A whole CLIP has a text tower too.
        if not re.match(r"text_model\.|visual_projection\.|text_projection\.|logit_|text_", name):
            yield f"vision_tower.{name}", weight
    yield from _projector(config.projector, shape)


def _projector(path: str, shape: LlavaConfig) -> Iterator[tuple[str, Tensor]]:
    if not path:
        width_in, width_out = _widths(shape)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = {"linear_1": nn.Linear(width_in, width_out), "linear_2": nn.Linear(width_out, width_out)}
        for layer, linear in layers.items():
            for name, weight in linear.state_dict().items():
                yield f"multi_modal_projector.{layer}.{name}", weight
        return
    for name, weight in _read(Path(path), "model.projector"):
        match = _PROJECTOR.match(name)
        require(
            match is not None,
            "model.projector",
            name,
            "weights of two layers: 0 and 2, or linear_1 and linear_2",
        )
        assert match is not None
        layer = {"0": 1, "2": 2}[match[1]] if match[1] else int(match[2])
        yield f"multi_modal_projector.linear_{layer}.{match[3]}", weight


def _widths(shape: Any) -> tuple[int, int]:
    return shape.vision_config.hidden_size, shape.text_config.hidden_size


def _read(place: Path, key: str) -> Iterator[tuple[str, Tensor]]:
    """Weights of a model folder or of one safetensors file."""
    if place.is_file() and place.suffix != ".safetensors":
        raise UserError(f"{key}: {place} is not a safetensors file; convert it")
    files = [place] if place.is_file() else strict.weight_files(place, key)
    strict.shapes(files, key)  # tells broken files
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


def with_rows(weight_VD: Tensor, num_rows: int) -> Tensor:
    """New rows are the mean of the old ones: a token that is never said is no likelier than any other."""
    missing = num_rows - len(weight_VD)
    if missing <= 0:
        return weight_VD
    mean_D = weight_VD.float().mean(dim=0).to(weight_VD.dtype)
    return torch.cat([weight_VD, mean_D.expand(missing, -1)])


def _save(weights: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    """Files of about `_SHARD` bytes and their index."""
    places: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    total = 0

    def close() -> None:
        name = f"model-{len(set(places.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        places.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, weight in weights:
        if shard and sum(w.nbytes for w in shard.values()) + weight.nbytes > _SHARD:
            close()
        shard[name] = weight.contiguous()
        total += weight.nbytes
    close()
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
