"""The learning-rate schedule as a pure function of the step."""

import math


def cosine_with_warmup(step: int, num_steps: int, warmup_ratio: float) -> float:
    """Share of the peak learning rate at `step` (0-based): linear warm-up, then cosine to 0 at `num_steps`."""
    num_warmup = math.ceil(num_steps * warmup_ratio)
    if step < num_warmup:
        return (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))
