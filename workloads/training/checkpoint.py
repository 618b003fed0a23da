"""Resumable checkpoints of a run: adapter, optimizer, RNG and stream position, written atomically as safetensors.

`checkpoint/step-N/` holds one `worker-R.safetensors` per rank and, from rank 0, `adapter.safetensors` and
`state.json`. A folder appears under its final name only when every rank has written its part.
"""

import json
import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from workloads import adapters, record
from workloads.adapters.base import Attached
from workloads.errors import UserError
from workloads.training import engine

_RNG, _CUDA_RNG = "rng", "rng.cuda"


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where training stands: optimizer steps taken, and what was summed up to there."""

    step: int
    # Tallies of this rank as JSON text: all of training's last tenth, and since the last report.
    tallies: dict[str, str]
    num_resumes: int
    # Time that training took up to there.
    seconds: float


def weights_of(model: nn.Module, attached: Attached) -> dict[str, Tensor]:
    """Copies of all that is trained and of the method's state, by name; whole also under ZeRO-3 (a collective call)."""
    with _gathered(model, attached):
        own = adapters.weights_of(model, attached)
        weights = {name: tensor.cpu().clone() for name, tensor in own.items()}
    for name, tensor in weights.items():
        assert tensor.numel() > 0, f"{name} is empty"
    return weights


def load_weights(model: nn.Module, attached: Attached, weights: dict[str, Tensor], where: str) -> None:
    """Inverse of `weights_of`; raises `UserError` unless names and shapes are those of the model."""
    with _gathered(model, attached):
        adapters.put(model, weights, adapters.saved_names(model, attached), where)


def _gathered(model: nn.Module, attached: Attached) -> AbstractContextManager[None]:
    """Context in which what is saved is whole; ZeRO-3 partitions parameters, trained or not, and no buffers."""
    names = adapters.saved_names(model, attached)
    return engine.gathered(w for name, w in model.named_parameters() if name in names)


def save(
    folder: Path,
    model: nn.Module,
    attached: Attached,
    trained: engine.Engine,
    position: Position,
    layout: str,
) -> None:
    """Write a checkpoint under `folder` and remove the one before; every rank calls it.

    `layout` names worker count and ZeRO stage, which a resumed run must share.
    """
    final = folder / f"step-{position.step:08d}"
    part = folder / f".step-{position.step:08d}.part"
    part.mkdir(parents=True, exist_ok=True)
    weights = weights_of(model, attached)
    rank = engine.rank()
    save_file({**trained.optimizer_state(), **rng_state()}, part / f"worker-{rank}.safetensors")
    record.write_json(part / f"worker-{rank}.json", position.tallies)
    if rank == 0:
        save_file(weights, part / "adapter.safetensors")
        state = {
            "step": position.step,
            "num_resumes": position.num_resumes,
            "seconds": position.seconds,
            "layout": layout,
        }
        record.write_json(part / "state.json", state)
    engine.barrier()
    if rank == 0:
        old = [p for p in folder.iterdir() if p != part]
        part.rename(final)
        for path in old:
            shutil.rmtree(path)
    engine.barrier()


def rng_state() -> dict[str, Tensor]:
    """The states of this worker's generators: the CPU's and, where there is one, its GPU's."""
    gpu = {_CUDA_RNG: torch.cuda.get_rng_state(engine.device())} if torch.cuda.is_available() else {}
    return {_RNG: torch.get_rng_state(), **gpu}


def restore_rng(tensors: dict[str, Tensor]) -> None:
    """Put back what `rng_state` returned."""
    torch.set_rng_state(tensors[_RNG])
    if _CUDA_RNG in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors[_CUDA_RNG], engine.device())


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint under `folder`, if any."""
    steps = sorted(folder.glob("step-*")) if folder.is_dir() else []
    return steps[-1] if steps else None


def step_of(path: Path) -> int:
    """The optimizer steps that a checkpoint's run had taken."""
    return int(path.name.removeprefix("step-"))


def load_adapter(path: Path, model: nn.Module, attached: Attached) -> None:
    """Put a checkpoint's adapter into `model`, before the engine takes its master copies."""
    load_weights(model, attached, load_file(path / "adapter.safetensors"), str(path))


def load_position(path: Path, trained: engine.Engine, layout: str) -> Position:
    """Restore this rank's optimizer and RNG; returns where training stands."""
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if state["layout"] != layout:
        raise UserError(
            f"{path}: written with {state['layout']}, cannot be resumed with {layout}; delete it to restart"
        )
    rank = engine.rank()
    tensors = load_file(path / f"worker-{rank}.safetensors")
    restore_rng(tensors)
    trained.load_optimizer_state(tensors)
    tallies = json.loads((path / f"worker-{rank}.json").read_text(encoding="utf-8"))
    return Position(
        step=state["step"],
        tallies=tallies,
        num_resumes=state["num_resumes"] + 1,
        seconds=state.get("seconds", 0.0),
    )


def remove_all(folder: Path) -> None:
    """Delete the checkpoints of a finished run."""
    if folder.is_dir():
        shutil.rmtree(folder)
