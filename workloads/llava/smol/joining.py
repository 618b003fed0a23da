"""Language model and tower of `smol` as one untrained LLaVA: their weights as they are, and a new projector.

Source:  Liu et al. 2023, LLaVA-1.5, arXiv:2310.03744: the tower's level before the last without its class token, a
         projector of two layers with GELU.
"""

from typing import Any

import torch
from transformers import Dinov2Model, LlamaForCausalLM, LlavaForConditionalGeneration, LlavaProcessor

from workloads.llava import parts
from workloads.llava.smol.vision import image_processor


def joined(
    speaker: LlamaForCausalLM, tower: Dinov2Model, tokenizer: Any, seed: int
) -> LlavaForConditionalGeneration:
    """The LLaVA in fp32; the projector's weights follow from `seed`."""
    config = parts.config_of(speaker.config, tower.config, tokenizer)
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
    return parts.processor_of(image_processor(), tokenizer, tower.config, tokenizer.chat_template)
