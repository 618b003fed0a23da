"""What is compared with what, and how slow ours may be; loads without torch.

Blocks are frozen Llama MLPs (SwiGLU) of width d and hidden width f with one method on their linears; a pass is forward
and backward, of 2048 tokens in fp32, whose input requires a gradient. The peers compute the same update in the obvious
way (`loop`, `stack`), or are PEFT's plain LoRA of the rank that one token or sample meets of ours (`peft`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from workloads.errors import UserError, nearest

Peer = Literal["peft", "loop", "stack", "lora_step", "tower_step"]
DESCRIBED: dict[Peer, str] = {
    "peft": "PEFT's LoRA",
    "loop": "loop over experts",
    "stack": "stack of all experts' outputs",
    "lora_step": "training step of lora",
    "tower_step": "the same with pictures and tower",
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """A block and the tokens that it sees: samples x tokens of them."""

    width: int
    hidden: int
    samples: int = 16
    tokens: int = 128


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison; the ratio is the time of ours over the peer's."""

    name: str
    # The method's name and settings.
    adapter: dict[str, Any]
    peer: Peer
    # Rank of a peer that is a plain LoRA.
    peer_rank: int = 0
    # None: a training step on the pocket model.
    size: Size | None
    # None: what it costs is told, whatever it is.
    limit: float | None
    # The limit is aimed at, not required.
    aim: bool = False

    def against(self) -> str:
        """What ours is divided by, in words."""
        return f"{DESCRIBED[self.peer]}, rank {self.peer_rank}" if self.peer_rank else DESCRIBED[self.peer]


def _mole(width: int, hidden: int, experts: int, rank: int, peer: Peer, limit: float) -> Case:
    return Case(
        name=f"mole_{peer}_d{width}_e{experts}_r{rank}",
        adapter={"name": "mole", "num_experts": experts, "rank_per_expert": rank},
        peer=peer,
        peer_rank=rank if peer == "peft" else 0,
        size=Size(width=width, hidden=hidden),
        limit=limit,
    )


def _moe_lora(width: int, hidden: int, experts: int, rank: int, limit: float) -> Case:
    return Case(
        name=f"moe_lora_stack_d{width}_e{experts}_r{rank}",
        adapter={"name": "moe_lora", "num_experts": experts, "rank_total": experts * rank},
        peer="stack",
        size=Size(width=width, hidden=hidden),
        limit=limit,
    )


def _by_sample(width: int, hidden: int, settings: dict[str, Any], active_rank: int) -> Case:
    return Case(
        name=f"{settings['name']}_peft_d{width}_r{active_rank}",
        adapter=settings,
        peer="peft",
        peer_rank=active_rank,
        size=Size(width=width, hidden=hidden),
        limit=1.3,
        aim=True,
    )


def _step(settings: dict[str, Any], limit: float | None = None) -> Case:
    """A method as the study all_methods has it, beside plain LoRA of rank 1."""
    return Case(
        name=f"step_{settings['name']}",
        adapter=settings,
        peer="lora_step",
        peer_rank=1,
        size=None,
        limit=limit,
    )


# From samples to updated weights, with what the tower says of the pictures looked up.
_FEATURES = Case(
    name="features",
    adapter={"name": "lora", "rank": 1},
    peer="tower_step",
    size=None,
    limit=1.0,
)

_TASKS = ["general", "document", "biomedical"]
# A sample meets two experts of rank 8; the branches that it meets are mixed into one B of rank 8.
_SMOLORA = {"name": "smolora", "num_visual": 4, "num_instruction": 4, "rank_total": 64}
_BRANCH_LORA = {"name": "branch_lora", "num_branches": 8, "rank_total": 64, "top_k": 2}

CASES: tuple[Case, ...] = (
    _mole(512, 1376, 3, 16, "peft", 1.00),
    _mole(256, 688, 8, 8, "peft", 1.00),
    _mole(256, 688, 3, 16, "peft", 1.10),
    _mole(512, 1376, 3, 16, "loop", 1 / 1.10),
    _mole(256, 688, 3, 16, "loop", 1 / 1.10),
    _mole(256, 688, 8, 8, "loop", 1 / 1.25),
    _moe_lora(512, 1376, 4, 32, 1 / 1.75),
    _moe_lora(256, 688, 8, 8, 1 / 5),
    _by_sample(512, 1376, _SMOLORA, 16),
    _by_sample(256, 688, _SMOLORA, 16),
    _by_sample(512, 1376, _BRANCH_LORA, 8),
    _by_sample(256, 688, _BRANCH_LORA, 8),
    _FEATURES,
    _step({"name": "mole", "num_experts": 3, "rank_per_expert": 1}, limit=1.25),
    _step({"name": "moe_lora", "num_experts": 3, "rank_total": 3}),
    _step({"name": "branch_lora", "num_branches": 3, "rank_total": 3, "top_k": 1}),
    _step({"name": "hydra_lora", "num_experts": 3, "rank_per_expert": 1}),
    _step({"name": "smolora", "num_visual": 2, "num_instruction": 2, "rank_total": 4}),
    _step({"name": "dual_lora", "rank": 4}),
    _step({"name": "more", "rank_total": 2, "tasks": _TASKS}),
    _step({"name": "smora", "rank_total": 3, "top_k": 1}),
    _step({"name": "mtl_lora", "num_experts": 3, "rank_per_expert": 1, "tasks": _TASKS}),
    _step({"name": "meteora", "rank_per_expert": 1, "top_k": 2, "tasks": _TASKS}),
    _step({"name": "moa", "rank_per_expert": 1, "tasks": _TASKS}),
    _step({"name": "mix_lora", "rank_total": 3, "top_k": 1}),
    _step({"name": "o_lora", "rank_per_expert": 1, "tasks": ["all"]}),
)


def select(beginning: str) -> Sequence[Case]:
    """The cases whose name begins so, all of them for nothing; raises `UserError` when there is none."""
    found = [case for case in CASES if case.name.startswith(beginning)]
    if not found:
        names = [case.name for case in CASES]
        raise UserError(
            f"--only: no case begins with {beginning!r}{nearest(beginning, names)}; cases: {', '.join(names)}"
        )
    return found
