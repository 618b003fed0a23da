"""What a run takes of memory, disk and a GPU's time, by formula: the model's config.json alone is enough.

Bytes of one worker, with b bytes a number of the model's dtype, F frozen and P trained weights, W workers, width d
(d_kv of keys), hidden width f, H heads, L blocks, vocabulary V, n tokens of a micro-batch whose samples are all as long
as `data.max_length`, and R the rank of the plain LoRA that has as many weights as the method:

  weights      b (F + P), shared by W under ZeRO-3; and the model's buffers, whole, with what starts of tasks form
  optimizer    12 P, shared by W from ZeRO-1 on: fp32 weights and AdamW's two moments (in fp32 without ZeRO the model's
               own weights, which count here alone)
  gradients    b P, shared by W from ZeRO-2 on; in bf16 also their fp32 copy in the step, 4 P, shared from ZeRO-1 on
  buffers      DeepSpeed's defaults: 5e8 b of a bucket from ZeRO-1 on, under ZeRO-3 1e9 b of gathered weights too
  activations  n L s with s = 2 (4 d + 4) + 4 H + b (4 d + 2 d_kv + 4 f + 7 R), with gradient checkpointing
               n (L b d + s); the last norm's and the projector's; (8 + b) V for every token that may be supervised
  answers      2 L b d_kv a token of keys and values for `execution.eval_batch` prompts, and one block's values of those

Training and answering come one after the other: the total holds the larger. Left out are the CUDA context (about
1 GB), fragmentation, and what passes through the frozen tower, of which nothing is kept.

Source:  Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054, section 3, for what is shared; DeepSpeed 0.19 for buffers;
         activations are what autograd saves of a Llama block with frozen linears and attention that keeps no scores.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from workloads import adapters, meeting
from workloads.adapters.base import count
from workloads.adapters.parts import iso
from workloads.config import RunConfig
from workloads.data import mixture, sources
from workloads.llava import kinds, vce
from workloads.llava.build import described_shape, train_projector

BYTES = {"fp32": 4, "bf16": 2}
_BUCKET, _GATHERED = 500_000_000, 1_000_000_000
# Dense bf16 peak of a GPU in FLOP/s, from NVIDIA's data sheets (SXM).
PEAKS = {"A100": 312e12, "H100": 989e12}
# Share of the peak that training is taken to reach.
UTILISATION = 0.4


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """Parameters or buffers: numbers in the model's dtype, and bytes of those whose size is their own."""

    numbers: int
    fixed: int

    def bytes(self, dtype: str) -> int:
        """What they take in a model of this dtype."""
        return BYTES[dtype] * self.numbers + self.fixed


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Numbers of weights, and the sizes that the formulas take."""

    frozen: int
    trained: int
    # Of the trained weights those that one token meets, and those of the language model and the tower.
    active: int
    language: int
    tower: int
    # What an adapter's folder holds, the model's buffers, and bytes of those that have no size before a task starts.
    saved: Tensors
    buffers: Tensors
    formed: int
    # Rank of the plain LoRA with as many weights as the adapter.
    rank: int
    width: int
    hidden: int
    heads: int
    width_kv: int
    blocks: int
    vocabulary: int
    image_tokens: int
    tower_width: int


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that one worker holds."""

    weights: int
    optimizer: int
    gradients: int
    buffers: int
    # While it trains and, after that, while it answers.
    activations: int
    answers: int

    @property
    def total(self) -> int:
        """All at once, training or answering, whichever is larger."""
        fixed = self.weights + self.optimizer + self.gradients + self.buffers
        return fixed + max(self.activations, self.answers)


def counts(config: RunConfig) -> Counts:
    """Count the run's model with its method on the meta device; raises `UserError` when there is no config.json."""
    shape: Any = described_shape(config.model)
    model = kinds.empty(shape)
    language, tower = (
        sum(w.numel() for w in model.get_submodule(name).parameters())
        for name in ("model.language_model", "model.vision_tower")
    )
    attached = iso.put(model, config.adapter)
    if config.model.train_projector:
        train_projector(model)
    if config.model.vce:
        vce.attach(model, config.model.vce_levels, config.model.vce_heads, config.model.vce_points)
    trained = count(model.parameters())
    buffers = dict(model.named_buffers())
    own = {**dict(model.named_parameters()), **buffers}
    text, vision = shape.text_config, shape.vision_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Counts(
        frozen=sum(w.numel() for w in model.parameters()) - trained,
        trained=trained,
        active=trained - attached.num_weights + attached.num_active,
        language=language,
        tower=tower,
        saved=_tensors(own[name] for name in adapters.saved_names(model, attached)),
        buffers=_tensors(buffers.values()),
        formed=attached.formed,
        rank=iso.rank_of(shape, attached.num_weights),
        width=text.hidden_size,
        hidden=text.intermediate_size,
        heads=text.num_attention_heads,
        width_kv=head * text.num_key_value_heads,
        blocks=text.num_hidden_layers,
        vocabulary=text.vocab_size,
        image_tokens=(vision.image_size // vision.patch_size) ** 2,
        tower_width=vision.hidden_size,
    )


def _tensors(found: Iterable[Tensor]) -> Tensors:
    """Whole numbers and truth values keep their size in any model."""
    numbers = fixed = 0
    for tensor in found:
        if tensor.is_floating_point():
            numbers += tensor.numel()
        else:
            fixed += tensor.numel() * tensor.element_size()
    return Tensors(numbers=numbers, fixed=fixed)


def memory(config: RunConfig, sizes: Counts) -> Memory:
    """What one worker of a run with these settings holds, where every sample is as long as it may be."""
    execution, dtype = config.execution, config.optim.dtype
    stage, b, P = execution.zero_stage, BYTES[dtype], sizes.trained
    over = [execution.workers if stage >= least else 1 for least in range(4)]
    own_masters = dtype == "fp32" and stage == 0
    everything = sizes.frozen + P
    gathered = min(_GATHERED, everything) if stage == 3 else 0
    kept = sizes.buffers.bytes(dtype) + sizes.formed
    return Memory(
        weights=b * (sizes.frozen if own_masters else everything) // over[3] + kept,
        optimizer=12 * P // over[1],
        gradients=b * P // over[2] + (4 * P // over[1] if dtype == "bf16" else 0),
        buffers=b * ((_BUCKET if stage >= 1 else 0) + gathered),
        activations=activations(config, sizes),
        answers=_answers(config, sizes),
    )


def activations(config: RunConfig, sizes: Counts) -> int:
    """Bytes that autograd keeps of one micro-batch, and what its loss takes."""
    b, d, length = BYTES[config.optim.dtype], sizes.width, config.data.max_length
    samples = config.execution.micro_batch
    block = samples * length * saved_by_a_block(sizes, b)
    kept = sizes.blocks * block
    if config.execution.gradient_checkpointing:
        kept = sizes.blocks * samples * length * b * d + block
    supervised = samples * max(1, length - sizes.image_tokens)
    return kept + beside_blocks(sizes, b, samples, length) + supervised * (8 + b) * sizes.vocabulary


def saved_by_a_block(sizes: Counts, b: int) -> int:
    """Bytes that autograd keeps of one token in one decoder block."""
    norms = 2 * (4 * sizes.width + 4)
    inputs = 4 * sizes.width + 2 * sizes.width_kv + 4 * sizes.hidden + 7 * sizes.rank
    return norms + 4 * sizes.heads + b * inputs


def beside_blocks(sizes: Counts, b: int, samples: int, length: int) -> int:
    """Bytes kept outside of the blocks: the last norm's, the projector's, and where images go among the tokens."""
    projector = samples * sizes.image_tokens * b * (sizes.tower_width + 2 * sizes.width)
    return samples * length * (4 * sizes.width + 5) + projector


def _answers(config: RunConfig, sizes: Counts) -> int:
    b, length = BYTES[config.optim.dtype], config.data.max_length
    prompts = config.execution.eval_batch
    cached = prompts * (length + config.eval.max_new_tokens) * 2 * sizes.blocks * b * sizes.width_kv
    return cached + prompts * length * b * (4 * sizes.width + 3 * sizes.hidden)


def disk(config: RunConfig, sizes: Counts) -> tuple[int, int]:
    """Bytes of a finished run's adapter, and of a checkpoint beside the one before while it is written.

    An adapter is all that its folder holds, also what no longer trains or never did, but for names and shapes.
    """
    adapter = sizes.saved.bytes(config.optim.dtype)
    return adapter, 2 * (adapter + 12 * sizes.trained) if config.execution.checkpoint_every else 0


def features(configs: Iterable[RunConfig]) -> tuple[int, int]:
    """Images that runs with a feature cache meet, each once for every way to see it, and bytes of their features.

    Exact where every sample is usable and the budget is in samples; one in tokens counts as all samples.
    """
    met: dict[tuple[Any, ...], np.ndarray] = {}
    widths: dict[tuple[Any, ...], int] = {}
    keeping = [config for config in configs if config.execution.feature_cache]
    for config in {repr((c.model, c.optim.dtype, c.data, c.eval, c.seed)): c for c in keeping}.values():
        view = (meeting.base(config), *meeting.cues(config.model))
        if view not in widths:
            widths[view] = row_bytes(config)
        for domain, split, size, indices in _met(config):
            key = (view, meeting.held(config.data), domain, split)
            met.setdefault(key, np.zeros(size, dtype=bool))[indices] = True
    images = {key: int(seen.sum()) for key, seen in met.items()}
    return sum(images.values()), sum(count * widths[key[0]] for key, count in images.items())


def _met(config: RunConfig) -> Iterator[tuple[str, str, int, Any]]:
    """Domain, split, size and pool indices of all that a run meets when every sample is usable."""
    data, source = config.data, sources.of(config.data)
    sizes = {domain: source.size(domain, "train") for domain in mixture.domains(data)}
    usable = {domain: range(size) for domain, size in sizes.items()}
    picked = usable if data.tokens else mixture.picks(data, usable, config.seed)
    for domain, size in sizes.items():
        yield domain, "train", size, picked[domain]
    for domain in sources.evaluated(config):
        size = source.size(domain, config.eval.split)
        yield domain, config.eval.split, size, range(config.eval.samples)


def row_bytes(config: RunConfig) -> int:
    """Bytes of what the tower says of one image at the levels that a run reads."""
    shape: Any = described_shape(config.model)
    vision, own = shape.vision_config, shape.vision_feature_layer
    levels = {*([own] if isinstance(own, int) else own), *meeting.cues(config.model)}
    tokens = (vision.image_size // vision.patch_size) ** 2 + kinds.class_tokens(kinds.empty(shape))
    return len(levels) * tokens * vision.hidden_size * BYTES[config.optim.dtype]


def flops(config: RunConfig, sizes: Counts, samples: int) -> float:
    """FLOP of training on `samples`, each as long as it may be with one image: 2 a weight and token forward, 2 back
    to the inputs, 2 more for trained weights, and forward again with gradient checkpointing.
    """
    again = 2 if config.execution.gradient_checkpointing else 0
    met = sizes.language + sizes.active
    token = (4 + again) * met + 2 * sizes.active
    return float(samples) * (config.data.max_length * token + 2 * sizes.image_tokens * sizes.tower)


def hours(config: RunConfig, sizes: Counts, samples: int, gpu: str) -> float:
    """Hours of training on as many GPUs as the run has workers, at `UTILISATION` of the peak of `PEAKS`."""
    return flops(config, sizes, samples) / (config.execution.workers * PEAKS[gpu] * UTILISATION) / 3600
