"""ARMS: one line per adapter method, with the settings it starts from and the space it is searched in.

A space maps a dotted key to one of `ray.tune`'s sampling words with its arguments, for example
`{"optim.lr": {"loguniform": [5e-4, 2e-2]}}`. Words are resolved by `orchestrator.schedulers`.
`meteora` and `icm_lora` start from folders that another run has made: a study gives their paths.
"""

from typing import Any

Space = dict[str, dict[str, list[Any]]]

# Domains of the pocket source, for methods that are told names of tasks.
_TASKS = ["general", "document", "biomedical"]

# Method -> settings on top of the defaults of its Config in workloads/adapters/NAME.py.
ARMS: dict[str, dict[str, Any]] = {
    "branch_lora": {},
    "cl_moe": {"tasks": _TASKS},
    "disco": {"tasks": _TASKS},
    "dual_lora": {},
    "hide_lora": {"tasks": _TASKS},
    "hydra_lora": {},
    "icm_lora": {},
    "lora": {},
    "meteora": {"tasks": _TASKS},
    "mix_lora": {},
    "moa": {"tasks": _TASKS},
    "modal_prompt": {"tasks": _TASKS},
    "moe_lora": {},
    "mole": {},
    "more": {"tasks": _TASKS},
    "mtl_lora": {"tasks": _TASKS},
    "o_lora": {"tasks": _TASKS},
    "sefe": {"tasks": _TASKS},
    "smolora": {},
    "smora": {},
}

# Method -> what a search with `method_space: true` searches beside its own space.
SPACES: dict[str, Space] = {
    "branch_lora": {"adapter.rank_total": {"choice": [16, 32, 64]}, "adapter.top_k": {"choice": [1, 2, 4]}},
    "cl_moe": {"adapter.num_experts": {"choice": [2, 4, 8]}, "adapter.momentum": {"choice": [0.5, 0.7, 0.9]}},
    "disco": {
        "adapter.rank_per_expert": {"choice": [2, 4, 8]},
        "adapter.temperature": {"choice": [0.05, 0.1]},
    },
    "dual_lora": {"adapter.rank": {"choice": [2, 4, 8, 16]}},
    "hide_lora": {
        "adapter.rank_per_expert": {"choice": [2, 4, 8]},
        "adapter.temperature": {"choice": [0.05, 0.1]},
    },
    "hydra_lora": {
        "adapter.num_experts": {"choice": [2, 3, 4]},
        "adapter.rank_per_expert": {"choice": [2, 4, 8]},
    },
    # Nothing of it trains but the projector; draws differ in the latent alone.
    "icm_lora": {"adapter.draw": {"choice": [0, 1, 2, 3]}},
    "lora": {"adapter.rank": {"choice": [1, 2, 4, 8, 16]}},
    "meteora": {"adapter.top_k": {"choice": [1, 2, 3]}, "adapter.gate_weight": {"choice": [5.0, 50.0]}},
    "mix_lora": {"adapter.rank_total": {"choice": [8, 16, 32]}, "adapter.top_k": {"choice": [2, 4, 8]}},
    "moa": {
        "adapter.rank_per_expert": {"choice": [2, 4, 8]},
        "adapter.domain_weight": {"choice": [0.1, 1.0]},
    },
    "modal_prompt": {"adapter.prompt_length": {"choice": [5, 10]}, "adapter.top_k": {"choice": [1, 2, 3]}},
    "moe_lora": {
        "adapter.num_experts": {"choice": [2, 4, 8]},
        "adapter.rank_total": {"choice": [8, 16, 32]},
    },
    "mole": {
        "adapter.num_experts": {"choice": [2, 3, 4]},
        "adapter.balance_weight": {"choice": [0.0, 0.001, 0.01]},
    },
    "more": {
        "adapter.rank_total": {"choice": [4, 8, 16]},
        "adapter.contrast_weight": {"choice": [0.0, 0.1]},
    },
    "mtl_lora": {"adapter.num_experts": {"choice": [2, 3, 4]}, "adapter.tau": {"choice": [0.1, 0.5, 1.0]}},
    "o_lora": {
        "adapter.rank_per_expert": {"choice": [2, 4, 8]},
        "adapter.orthogonality_weight": {"choice": [0.1, 0.5]},
    },
    "sefe": {
        "adapter.rank_per_expert": {"choice": [2, 4, 8]},
        "adapter.marked_weight": {"choice": [250.0, 2500.0]},
    },
    "smolora": {"adapter.rank_total": {"choice": [16, 32, 64]}},
    "smora": {"adapter.rank_total": {"choice": [16, 32, 64]}, "adapter.top_k": {"choice": [4, 8, 16]}},
}
