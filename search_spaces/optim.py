"""Named search spaces over the optimiser, in `ray.tune`'s sampling words."""

from search_spaces.adapters import Space

SPACES: dict[str, Space] = {
    # One decade on either side of LoRA's usual rate for models of a few million weights.
    "learning_rate": {"optim.lr": {"loguniform": [2e-4, 2e-2]}},
    "learning_rate_and_decay": {
        "optim.lr": {"loguniform": [2e-4, 2e-2]},
        "optim.weight_decay": {"choice": [0.0, 0.01, 0.1]},
    },
}
