"""The language model of `smol`: the first blocks of a Llama from a folder or a GGUF file, with its tokenizer.

Source:  Ben Allal et al. 2025, SmolLM2, arXiv:2502.02737.
Differs: a new row of the embeddings stands for images; the chat template is the model's own behind a few words that
         put an image's place into the text of its message.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from workloads.errors import UserError, first_line, require
from workloads.llava import strict
from workloads.llava.parts import with_image_token, with_rows
from workloads.llava.smol.places import LANGUAGE_MODEL, Place

# Turns messages made of parts into messages of text, which language models' own templates take.
_AS_TEXT = (
    "{% set plain = namespace(messages=[]) %}{% for message in messages %}{% set said %}"
    "{% for part in message.content %}{{ '<image>\\n' if part.type == 'image' else part.text }}{% endfor %}"
    "{% endset %}{% set plain.messages = plain.messages + [{'role': message.role, 'content': said | string}] %}"
    "{% endfor %}{% set messages = plain.messages %}"
)


def load(place: Place, layers: int) -> tuple[LlamaForCausalLM, Any, bool]:
    """The first `layers` blocks (or all) in fp32, the tokenizer with its token for images, and whether those are all.

    Raises `UserError` when the model is of another kind, not whole, or has no chat template.
    """
    disable_progress_bar()
    option, path = LANGUAGE_MODEL.option, place.path
    folder, options = path, {"local_files_only": True, "trust_remote_code": False}
    if path.is_file():
        folder, options = path.parent, {**options, "gguf_file": path.name}
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, **options)
        with torch.random.fork_rng():
            model = _model(folder, options)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{option}: {path}: {first_line(error)}") from None
    require(bool(tokenizer.chat_template), option, str(path), "a model with a chat template; it has none")
    if path.is_file() and _pre_tokenizer(path) == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = _by_digits()
    with_image_token(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = _AS_TEXT + tokenizer.chat_template
    return _first(model, layers, tokenizer), tokenizer, layers >= model.config.num_hidden_layers


def _model(folder: Path, options: dict[str, Any]) -> Any:
    loader: Any = AutoModelForCausalLM
    model, report = loader.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
    )
    kind = model.config.model_type
    require(
        kind == "llama", LANGUAGE_MODEL.option, str(folder), f"a model of type llama; it is of type {kind}"
    )
    strict.loaded(LANGUAGE_MODEL.option, folder, report)
    return model


def _pre_tokenizer(path: Path) -> str:
    """How a GGUF file says that text is split before it is encoded."""
    from gguf import GGUFReader  # pyright: ignore[reportMissingImports]

    field = GGUFReader(path).get_field("tokenizer.ggml.pre")
    return str(field.contents()) if field else ""


def _by_digits() -> pre_tokenizers.PreTokenizer:
    """SmolLM's: every digit alone, then by GPT-2's pattern; the reader of GGUF files leaves the digits out."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])


def _first(model: Any, layers: int, tokenizer: Any) -> LlamaForCausalLM:
    """A new model of the first `layers` blocks with rows for all tokens of `tokenizer`."""
    old = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    num_rows, num_layers = max(old["vocab_size"], len(tokenizer)), min(layers, old["num_hidden_layers"])
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    changed = {"num_hidden_layers": num_layers, "vocab_size": num_rows}
    with torch.random.fork_rng():
        new = LlamaForCausalLM(LlamaConfig(**{**old, **changed, **ends}))
    weights = {name: w for name, w in model.state_dict().items() if name in new.state_dict()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = with_rows(weights[name], num_rows)
    new.load_state_dict(weights, strict=True)
    return new.eval()
