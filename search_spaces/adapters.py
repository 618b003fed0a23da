"""ARMS: one line per adapter method, with the settings it starts from and the space it is searched in.

A space maps a dotted key to one of `ray.tune`'s sampling words with its arguments, for example
`{"optim.lr": {"loguniform": [5e-4, 2e-2]}}`. Words are resolved by `orchestrator.schedulers`.
"""

from typing import Any

Space = dict[str, dict[str, list[Any]]]

# Method -> settings on top of the defaults of its Config in workloads/adapters/NAME.py.
ARMS: dict[str, dict[str, Any]] = {
    "lora": {},
    "mole": {},
}

# Method -> what a search with `method_space: true` searches beside its own space.
SPACES: dict[str, Space] = {
    "lora": {"adapter.rank": {"choice": [1, 2, 4, 8, 16]}},
    "mole": {
        "adapter.num_experts": {"choice": [2, 3, 4]},
        "adapter.balance_weight": {"choice": [0.0, 0.001, 0.01]},
    },
}
