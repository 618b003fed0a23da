"""The parts of a RunConfig: frozen dataclasses whose fields are the keys of a recipe.

Identity is kept apart from execution: `execution` says where and how a run is computed and never enters
its fingerprint (`workloads.identity`); all other fields do.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base LLaVA that the adapter is put on."""

    # `pocket`; `smol` or `smol-30`, which `orchestrator prepare` makes; the folder of a LLaVA, or its name on the hub.
    name_or_path: str = "pocket"
    # Ask the hub for what is not on this machine.
    hub: bool = False
    # A LLaVA from parts instead: folders of a language model and a vision tower, and the projector's weights
    # (empty: a new projector).
    language_model: str = ""
    vision_tower: str = ""
    projector: str = ""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    # `pad` makes an image square with the mean colour, as LLaVA does; `crop` leaves its shape to the processor,
    # which cuts off what is beyond the square.
    image_aspect: Literal["crop", "pad"] = "crop"
    image_backend: Literal["pil", "torchvision"] = "pil"
    # LLaVA trains the projector in full beside the adapter.
    train_projector: bool = True
    # Visual Cue Enhancement between tower and projector; the first level is the one that the projector reads.
    vce: bool = False
    vce_levels: list[int] = field(default_factory=lambda: [-1, -2, -3, -4])
    vce_heads: int = 16
    vce_points: int = 4


@dataclass(frozen=True, kw_only=True)
class DomainConfig:
    """Where the samples of one domain of the source `files` are; paths are relative to `data.root`."""

    # A file of workloads/data/formats.
    format: str = ""
    # The file of each split (Parquet: a file, a folder or a pattern; hub: a split's name); empty: there is none.
    train: str = ""
    val: str = ""
    test: str = ""
    # Folder that the records' image paths start from, and never leave.
    images: str = ""
    # Answers that are kept apart from the questions: ScienceQA's folder, VQA answers, COCO captions.
    annotations: str = ""
    # Format hub: name of the set, or its folder, and its configuration. Format prism: name of the task.
    name: str = ""
    subset: str = ""
    # Formats parquet and hub: our name of a column -> its name there.
    columns: dict[str, str] = field(default_factory=dict)
    # A scorer of workloads/evaluation/scorers.
    scorer: str = "exact"
    # Form of the answers that the instruction asks for, as workloads/evaluation/forms.py has them; it changes no
    # score. Empty: none, or in the format cvit the one that goes with the scorer.
    form: str = ""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which samples a run trains on, in which shares."""

    # A file of workloads/data/sources: a packaged set, or `files` for those that `domains` describes.
    source: str = "pocket"
    # Folder of all files; a place, no part of the identity.
    root: str = ""
    domains: dict[str, DomainConfig] = field(default_factory=dict)
    # Domain -> weight; a domain of weight w contributes round(w * samples) samples.
    mixture: dict[str, float] = field(default_factory=dict)
    # Samples of a domain of weight 1; 0: all of its samples.
    samples: int = 2000
    # Above 0, the budget is in tokens: those of a domain of weight 1, image and prompt included.
    tokens: int = 0
    # Above 0, shares follow sizes: p_d ~ weight_d * n_d ** (1 / temperature); the total stays the same.
    temperature: float = 0.0
    # Domain -> most different samples of it that are used; it counts as if it had no more.
    caps: dict[str, int] = field(default_factory=dict)
    # How a budget above a domain's size or a weight above 1 is filled: with fresh samples, which have to be
    # there, by repeating the first `samples` ones, or by starting anew whenever the domain is exhausted.
    upsample: Literal["fresh", "repeat", "cycle"] = "fresh"
    # Replace every image by mid-grey: the blind baseline.
    blind: bool = False
    # Longest sequence in tokens, image tokens included; a longer sample is rejected.
    max_length: int = 128
    # Share of bad records at which a run stops.
    max_rejected: float = 0.001


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay, one pass over the stream."""

    lr: float = 2e-3
    # Learning rate of the projector as a multiple of `lr`; a tenth, as in LLaVA-1.5's LoRA recipe.
    projector_lr_ratio: float = 0.1
    # Samples of one optimizer step, over all workers and accumulation steps.
    global_batch: int = 16
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    # Largest global gradient norm; 0 means no clipping.
    clip: float = 1.0
    dtype: Literal["fp32", "bf16"] = "fp32"


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is answered and scored after training."""

    split: Literal["val", "test"] = "test"
    # Domains to score; an empty list means all of the source.
    domains: list[str] = field(default_factory=list)
    # Items of each domain.
    samples: int = 600
    max_new_tokens: int = 8


@dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """Where and how a run is computed; nothing here changes its numbers beyond rounding."""

    workers: int = 1
    # Samples of one forward pass on one worker.
    micro_batch: int = 16
    zero_stage: int = 0
    gradient_checkpointing: bool = False
    # Optimizer steps between two resumable checkpoints, the last of which stands at the end of training and keeps what
    # is answered; 0 writes none.
    checkpoint_every: int = 0
    # Optimizer steps between two reports.
    report_every: int = 25
    eval_batch: int = 100
    threads: int = 1
    # Compute the frozen tower's output on an image once, and keep it on disk for all runs.
    feature_cache: bool = False
    gpus_per_worker: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ContinualConfig:
    """Where a run stands in an ordered stream of tasks, and what keeps it from forgetting."""

    # Name of the stage's task; empty: the run is no stage of a stream.
    task: str = ""
    regulariser: Literal["none", "ewc", "lwf"] = "none"
    # Lambda of the regulariser.
    weight: float = 1.0
    # EWC: samples of each earlier stage that its Fisher is estimated from.
    fisher_samples: int = 200
    # LwF: temperature of both distributions.
    temperature: float = 2.0
    replay: Literal["none", "reservoir", "balanced"] = "none"
    # Samples kept, as a share of all samples of the earlier stages.
    replay_share: float = 0.0


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What every method's `Config` has; the methods' own fields are in workloads/adapters/NAME.py."""

    name: str

    def layout_matters(self) -> bool:
        """Whether numbers depend on workers and micro-batches, which then enter the fingerprint."""
        return False

    def training_only(self) -> set[str]:
        """Fields that steer training and leave what given weights compute as it is."""
        return set()

    def starts_as_saved(self) -> bool:
        """Whether a task starts from the very weights that the stage before it saved; EWC holds weights to those."""
        return True

    def files(self) -> list[Path]:
        """The files that the method starts from; their contents decide numbers, their places do not."""
        return []

    def without_files(self) -> "AdapterConfig":
        """The same method with nothing to read: what it would read is restored afterwards, or not wanted."""
        return self

    def identity(self) -> dict[str, str]:
        """Field -> hash of what its path leads to, beyond `files`; enters the fingerprint in place of the path."""
        return {}

    def told_tasks(self) -> Literal["never", "in training", "always"]:
        """When the method has to be told the task of every sample, one of its `tasks`."""
        return "never"

    def check(self) -> None:
        """Raise `UserError` on values out of range."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run. `workloads.config.from_tree` builds it from plain values, `to_tree` is its inverse."""

    schema_version: int = SCHEMA_VERSION
    # A label for people; not part of the identity.
    name: str = "run"
    seed: int = 0
    # Fingerprint of a finished run whose adapter this one starts from; empty means a fresh adapter.
    init_from: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    adapter: AdapterConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    continual: ContinualConfig = field(default_factory=ContinualConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
