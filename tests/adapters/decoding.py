"""Logits of greedy decoding's two phases, for comparison with one full forward."""

import torch
from transformers import DynamicCache


def decoded(model, ids, pixels, num_prompt):
    """Logits (B, T, V) of a prefill of `num_prompt` tokens and of the rest token by token from the cache."""
    cache = DynamicCache()
    prompt = ids[:, :num_prompt]
    steps = [model(input_ids=prompt, pixel_values=pixels, past_key_values=cache, use_cache=True).logits]
    for t in range(num_prompt, ids.shape[1]):
        steps.append(model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    return torch.cat(steps, dim=1)
