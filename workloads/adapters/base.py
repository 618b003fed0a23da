"""What adapter methods share: the trace, LoRA on one linear, freezing, and the description of an attached method.

A method file offers `VERSION`, `Config` and `attach(model, config, trace) -> Attached`. `attach` puts its
modules into a frozen LLaVA; whatever requires a gradient afterwards is trained and saved.

Shape letters: B batch, T tokens, E experts, R rank, I inputs, O outputs.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Route:
    """One router's decision in one forward pass."""

    layer: int
    probs_BTE: Tensor
    choice_BT: Tensor


@dataclass(kw_only=True)
class Trace:
    """What a forward pass tells the method (mask, phase) and what routers tell the loop (routes).

    The loop owns it: it reads `routes` before backward and calls `clear` after, so that what recomputation
    under gradient checkpointing appends is never read.
    """

    token_mask_BT: Tensor | None = None
    # One entry a sample, set by `begin`: what is asked, and the domain or task it comes from. Only methods that
    # declare `needs_task_id_*` may read `tasks`.
    questions: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    # Valid tokens of each sample before its answer; empty where nothing is known of an answer.
    prompt_lengths: tuple[int, ...] = ()
    # False for a batch that only keeps a worker in step with the others: no statistics may be taken of it.
    counted: bool = True
    phase: Literal["full", "prefill", "decode"] = "full"
    past_length: int = 0
    # Positions that the method puts in front of every sample; they are in the cache, and in nothing else told here.
    prefix_length: int = 0
    routes: list[Route] = field(default_factory=list)

    def clear(self) -> None:
        self.routes.clear()

    def begin(
        self,
        questions: Sequence[str],
        tasks: Sequence[str],
        prompt_lengths: Sequence[int] = (),
        counted: bool = True,
    ) -> None:
        """Tell the method of the batch that the next forward passes are about; one entry a row."""
        self.questions, self.tasks = tuple(questions), tuple(tasks)
        self.prompt_lengths, self.counted = tuple(prompt_lengths), counted

    def watch(self, model: nn.Module) -> None:
        """Keep mask, phase and past length in step with every forward call of `model`."""
        model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs["inputs_embeds"]
        cache = kwargs.get("past_key_values")
        self.past_length = 0 if cache is None else max(0, int(cache.get_seq_length()) - self.prefix_length)
        mask = kwargs.get("attention_mask")
        length = tokens.shape[1]
        ones = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        self.token_mask_BT = ones if mask is None else mask[:, -length:].bool()
        self.phase = "decode" if self.past_length else ("full" if cache is None else "prefill")


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a method needs and can do; stands in every record and table."""

    needs_task_id_train: bool = False
    needs_task_id_infer: bool = False
    mergeable: bool = False
    stateful: bool = False
    routing: Literal["none", "token", "sample", "sequence", "task"] = "none"
    router_hears_task_loss: bool = False


@dataclass(frozen=True, kw_only=True)
class Attached:
    """A method on a model: what it is, what it costs and what it adds to the loss."""

    capabilities: Capabilities
    # Adapter weights in all, and those that one token meets.
    num_weights: int
    num_active: int
    # Weighted loss terms of the last forward pass by name, each a mean over its samples.
    losses: Callable[[Trace], Mapping[str, Tensor]] = lambda trace: {}
    # Names (in the model) of parameters and buffers that are saved and restored though they are not trained.
    state: frozenset[str] = frozenset()
    # Bytes of buffers, beyond those that the fresh method has, when the last of its tasks trains.
    formed: int = 0
    # Where tasks are learned in order: called with a task's name before its optimizer is made, and after its training.
    on_task_start: Callable[[str], None] = lambda task: None
    on_task_end: Callable[[str], None] = lambda task: None
    # The task that the method itself found for each sample of the last prompt; None where it looks for none.
    selected: Callable[[], list[str]] | None = None
    # Called once after every optimizer step, by every worker, with a function that sums a tensor over all workers.
    after_step: Callable[[Callable[[Tensor], Tensor]], None] = lambda reduce: None
    # The method as one plain LoRA per linear for a task (None where no task matters): path of the linear to
    # (A (R, I), B (O, R), scale). A text says why there is none; merging and PEFT export stand on it.
    as_lora: Callable[[str | None], Mapping[str, tuple[Tensor, Tensor, float]]] | str = "no plain form"
    # How the update is computed where there are several ways; empty where there is one.
    backend: Callable[[], str] = lambda: ""
    # Fields of adapter_config.json beyond the method's own configuration.
    exported: Mapping[str, Any] = field(default_factory=dict)


def decoder_blocks(model: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """The decoder blocks of a LLaVA's language model with their index."""
    layers: Any = model.get_submodule("model.language_model.layers")
    yield from enumerate(layers)


def freeze(model: nn.Module) -> None:
    """Stop training every weight; methods and the projector are switched on afterwards."""
    for weight in model.parameters():
        weight.requires_grad_(False)


def kaiming_A(*shape: int, like: Tensor) -> nn.Parameter:
    """LoRA's A: kaiming-uniform with a = sqrt(5) over its last axis, as PEFT and LLaVA-MoLE draw it."""
    bound = 1 / math.sqrt(shape[-1])
    return nn.Parameter(torch.empty(*shape, dtype=like.dtype, device=like.device).uniform_(-bound, bound))


class LoRALinear(nn.Module):
    """A frozen linear plus (alpha / R) B A dropout(x).

    Source: LoRA, arXiv:2106.09685, eq. 3. Submodules are named as PEFT names them.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.base_layer = base
        self.scale = alpha / rank
        self.dropout = dropout
        options: dict[str, Any] = {"bias": False, "dtype": base.weight.dtype, "device": base.weight.device}
        self.lora_A = nn.Linear(base.in_features, rank, **options)
        self.lora_B = nn.Linear(rank, base.out_features, **options)
        self.lora_A.weight = kaiming_A(rank, base.in_features, like=base.weight)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x_BTI: Tensor) -> Tensor:
        dropped_BTI = F.dropout(x_BTI, self.dropout, self.training) if self.dropout else x_BTI
        return self.base_layer(x_BTI) + self.lora_B(self.lora_A(dropped_BTI) * self.scale)


class Router(nn.Linear):
    """A linear with bias whose scores (B, T, E) are computed in at least fp32 whatever the model's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        dtype = torch.promote_types(input.dtype, torch.float32)
        return F.linear(input.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


def count(weights: Iterator[nn.Parameter]) -> int:
    """Number of weights, also when ZeRO-3 has partitioned them."""
    return sum(int(getattr(w, "ds_numel", w.numel())) for w in weights if w.requires_grad)
