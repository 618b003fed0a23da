"""Language model and tower of `smol` as one untrained LLaVA: their weights as they are, and a new projector.

Source:  Liu et al. 2023, LLaVA-1.5, arXiv:2310.03744: the tower's level before the last without its class token, a
         projector of two layers with GELU.
"""

from typing import Any

import torch
from transformers import (
    Dinov2Model,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from workloads.llava.smol.language import IMAGE
from workloads.llava.smol.vision import image_processor


def joined(
    speaker: LlamaForCausalLM, tower: Dinov2Model, tokenizer: Any, seed: int
) -> LlavaForConditionalGeneration:
    """The LLaVA in fp32; the projector's weights follow from `seed`."""
    text: Any = speaker.config
    vision: Any = tower.config
    make: Any = LlavaConfig
    config = make(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=text.tie_word_embeddings,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.get_submodule("model.vision_tower").load_state_dict(tower.state_dict(), strict=True)
    model.get_submodule("model.language_model").load_state_dict(speaker.model.state_dict(), strict=True)
    model.lm_head.load_state_dict(speaker.lm_head.state_dict(), strict=True)
    ends: Any = model.generation_config
    ends.bos_token_id, ends.eos_token_id, ends.pad_token_id = (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    return model.eval()


def processor(tokenizer: Any, tower: Dinov2Model) -> LlavaProcessor:
    """What turns pictures and conversations into the joined model's inputs."""
    vision: Any = tower.config
    return LlavaProcessor(
        image_processor=image_processor(),
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        chat_template=tokenizer.chat_template,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )
