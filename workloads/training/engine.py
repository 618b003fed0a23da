"""The DeepSpeed engine behind one narrow interface; the only file that imports deepspeed.

Losses are sums normalised by the caller over the whole global batch; the engine undoes DeepSpeed's averaging
over workers, so that 1, 2 or 4 workers take the same step.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from workloads.config import ExecutionConfig, OptimConfig

# DeepSpeed otherwise warns on machines without an accelerator.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import logger as deepspeed_logger
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config


def join() -> None:
    """Join the process group: the one that exists, the one the environment describes, or one of this process.

    On CPU, DeepSpeed's compiled shared-memory op is left out: it takes a compiler and about 50 s at first use.
    It helps several CPU workers on one node with large all-reduces; adapters are small.
    """
    deepspeed_logger.setLevel("WARNING")
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it, also for one process
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # pyright: ignore[reportAttributeAccessIssue]
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def rank() -> int:
    """This worker's rank in the joined group."""
    return dist.get_rank()


def world_size() -> int:
    """Number of workers in the joined group."""
    return dist.get_world_size()


def device() -> torch.device:
    """Where this worker computes."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextmanager
def contained() -> Iterator[None]:
    """Context that takes back what ZeRO-3 leaves in the process, however the run in it ends.

    DeepSpeed replaces torch's `linear` for good by one that rounds differently, and never lets go of an
    engine's model: it stays on a stack and in the cache of a method.
    """
    linear = torch.nn.functional.linear
    try:
        yield
    finally:
        torch.nn.functional.linear = linear
        FWD_MODULE_STACK.clear()
        for method in vars(PartitionedParameterCoordinator).values():
            for cell in getattr(method, "__closure__", None) or ():
                if hasattr(cell.cell_contents, "cache_clear"):
                    cell.cell_contents.cache_clear()


@contextmanager
def sharded_init(zero_stage: int, dtype: str) -> Iterator[None]:
    """Context under which `from_pretrained` partitions weights as it loads them (ZeRO-3): no worker holds all.

    transformers learns of ZeRO-3 through a process-wide setting, which is taken back at the end, so that a
    reused process can build the next model whole.
    """
    if zero_stage != 3:
        yield
        return
    setting = HfDeepSpeedConfig(_settings(zero_stage, dtype))
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del setting


@contextmanager
def gathered(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Context in which ZeRO-3 weights are whole on every rank; changes made in it are kept (rank 0's win)."""
    parts = [w for w in weights if hasattr(w, "ds_id")]
    with deepspeed.zero.GatheredParameters(parts, modifier_rank=0) if parts else nullcontext():
        yield


def reduce_sum(values: list[float]) -> list[float]:
    """Sum of each value over all workers, in fp64."""
    if world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(total)
    return total.tolist()


def sum_tensor(part: Tensor) -> Tensor:
    """Sum of a tensor over all workers, on every worker; each has to call it equally often."""
    total = part.clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def gather_objects(value: Any) -> list[Any]:
    """Every worker's `value` in rank order, on every worker."""
    if world_size() == 1:
        return [value]
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, value)
    return parts


def barrier() -> None:
    """Wait for all workers."""
    if world_size() > 1:
        dist.barrier()


def _settings(stage: int, dtype: str) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": dtype == "bf16"},
    }


class Engine:
    """One model in training: forward, backward, step, and the optimizer's state as plain tensors."""

    def __init__(
        self, model: nn.Module, optim: OptimConfig, execution: ExecutionConfig, slow: set[nn.Parameter]
    ) -> None:
        """`slow` holds the weights that learn at `projector_lr_ratio` times the rate."""
        trained = [w for w in model.parameters() if w.requires_grad]
        self.groups = [
            {"params": [w for w in trained if w not in slow], "ratio": 1.0},
            {"params": [w for w in trained if w in slow], "ratio": optim.projector_lr_ratio},
        ]
        self.optim = optim
        groups = [group for group in self.groups if group["params"]]
        betas = (optim.beta1, optim.beta2)
        adam = torch.optim.AdamW(
            groups, lr=optim.lr, betas=betas, weight_decay=optim.weight_decay, fused=True
        )
        settings = {
            **_settings(execution.zero_stage, optim.dtype),
            "managed_gradient_accumulation": False,
            "gradient_clipping": optim.clip,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        self.engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=adam, config=settings)
        self.optimizer: Any = optimizer
        if execution.zero_stage == 0:
            # For bf16 DeepSpeed takes a step without gradients, which Adam's bias correction would count.
            self._inner().state.clear()

    def forward(self, inputs: dict[str, Any]) -> Any:
        """The model's output for keyword inputs."""
        return self.engine(**inputs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this worker's share of the global loss."""
        self.engine.backward(loss * world_size())

    def step(self, factor: float) -> None:
        """One optimizer step at `factor` times each group's peak learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.optim.lr * group["ratio"] * factor
        self.engine.step()

    def optimizer_bytes(self) -> int:
        """Bytes of master weights and moments that this worker holds."""
        return sum(t.numel() * t.element_size() for t in self.optimizer_state().values())

    def optimizer_state(self) -> dict[str, Tensor]:
        """This worker's master weights and moments by name, ready for safetensors."""
        state: dict[str, Tensor] = {}
        for i, master in enumerate(self._masters()):
            state[f"{i}.master"] = master.detach().clone()
            for key, value in self._inner().state[master].items():
                state[f"{i}.{key}"] = torch.as_tensor(value).clone()
        return state

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Put back what `optimizer_state` returned in a run of the same world size and stage."""
        for i, master in enumerate(self._masters()):
            master.data.copy_(state[f"{i}.master"])
            prefix = f"{i}."
            moments = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            moments.pop("master")
            self._inner().state[master] = {
                k: v.to(master.device) if v.dim() else v for k, v in moments.items()
            }

    def close(self) -> None:
        """Release DeepSpeed's hooks, so that a reused process can start another run."""
        self.engine.destroy()

    def _inner(self) -> Any:
        """The torch optimizer under DeepSpeed's wrapper, if there is one."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _masters(self) -> list[Tensor]:
        """The tensors that the torch optimizer updates: the weights, or this worker's fp32 partitions of them."""
        partitions = getattr(self.optimizer, "fp32_partitioned_groups_flat", None)
        if partitions is not None:
            return list(partitions)
        return [w for group in self._inner().param_groups for w in group["params"]]
