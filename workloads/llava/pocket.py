"""The pocket base: a LLaVA of under 3 M weights (CLIP tower, two-layer projector, Llama) and its tokenizer.

`new_model` and `new_processor` make the untrained ones that `workloads.training.pretrain` trains.
"""

import string
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

IMAGE_SIZE = 96
PATCH_SIZE = 12
WIDTH = 128
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<image>", "<user>", "<assistant>", "<unk>")
# One user turn with the image first, then the answer, as LLaVA-1.5 orders them.
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %} {{ part.text }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def new_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer: `words` are whole tokens, all other text is spelled in single characters.

    Transcriptions (capitals) and numbers (digits) are therefore spelled, and unseen ones cost nothing new.
    """
    characters = string.ascii_letters + string.digits + string.punctuation
    pieces = [*SPECIAL_TOKENS, *characters, *(f"##{c}" for c in characters)]
    vocabulary = list(dict.fromkeys([*pieces, *sorted(words)]))
    ids = {token: i for i, token in enumerate(vocabulary)}
    # Words of any length are spelled; by default those over 100 characters become unknown.
    model = models.WordPiece(ids, unk_token="<unk>", max_input_chars_per_word=10**6)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={
            "image_token": "<image>",
            "user_token": "<user>",
            "assistant_token": "<assistant>",
        },
        clean_up_tokenization_spaces=False,
    )


def new_processor(words: list[str]) -> LlavaProcessor:
    """Tokenizer and image processor as one; images are 96 px and are only rescaled and normalised."""
    image_processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=new_tokenizer(words),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlavaForConditionalGeneration:
    """The untrained pocket model; weights follow from `seed`."""
    import torch

    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    ids: Any = tokenizer
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        pad_token_id=ids.pad_token_id,
        bos_token_id=ids.bos_token_id,
        eos_token_id=ids.eos_token_id,
        tie_word_embeddings=True,
        # The default of 0.02 suits wide models; at width 128 attention would start flat and learn late.
        initializer_range=WIDTH**-0.5,
    )
    make_config: Any = LlavaConfig
    config = make_config(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    positions: Any = model.get_submodule("model.vision_tower.embeddings.position_embedding")
    with torch.no_grad():
        # Drawn with the default deviation of 0.02 they drown in the patches, and places are learned late.
        positions.weight[1:] = torch.from_numpy(_places(IMAGE_SIZE // PATCH_SIZE, vision.hidden_size))
    return model


def _places(side: int, width: int) -> np.ndarray:
    """Sine-cosine codes (side * side, width) of the rows and columns of a square grid, in raster order.

    Source: Vaswani et al. 2017, section 3.5, half of the width for each axis.
    """
    rates = 1 / 100 ** (np.arange(width // 4) / (width // 4))
    angles = np.arange(side)[:, None] * rates[None]
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    rows, columns = np.repeat(axis, side, axis=0), np.tile(axis, (side, 1))
    return np.concatenate([rows, columns], axis=1).astype(np.float32)
