"""EWC: weights that earlier stages needed are held to where those stages left them, each by its Fisher information.

Source:  Kirkpatrick et al. 2017, EWC, arXiv:1612.00796, eq. 3, one term per earlier stage:
         L += weight / 2 * sum_k sum_p F_kp (theta_p - theta*_kp)^2.
Fisher:  diagonal and empirical: the mean over samples of the squared gradient of the log-likelihood of a sample's
         supervised tokens, taken sample by sample at the stage's final weights, without dropout.
Terms:   a weight has a term for the stages in which it trained, and where it trains again.
Differs: the terms are kept as their sum, which is one quadratic: precision sum_k F_kp, mean, and a constant. So memory
         does not grow with the number of stages.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from workloads import adapters, record
from workloads.adapters.base import Attached, Trace
from workloads.config import RunConfig
from workloads.data.collate import Batch, train_batch
from workloads.data.mixture import Slot
from workloads.errors import UserError
from workloads.llava.build import DTYPES, Llava
from workloads.training import checkpoint, engine, loss
from workloads.training.batches import sample_of
from workloads.training.past.lineage import Course, Stage

_PARTS = ("precision", "mean", "constant")


@dataclass(frozen=True, kw_only=True)
class Quadratic:
    """sum_k 1/2 sum_p F_kp (theta_p - theta*_kp)^2 as 1/2 precision (theta - mean)^2 + constant, by weight's name."""

    precision: Mapping[str, Tensor] = field(default_factory=dict)
    mean: Mapping[str, Tensor] = field(default_factory=dict)
    constant: Mapping[str, Tensor] = field(default_factory=dict)
    # The stages in it, and the samples of each behind its Fisher.
    stages: tuple[str, ...] = ()
    num_samples: int = 0

    @staticmethod
    def of(
        config: RunConfig, llava: Llava, attached: Attached, trace: Trace, course: Course, folder: Path
    ) -> "Quadratic":
        """All stages of `course`: as far as this run or the one before left them behind, else from their adapters.

        Leaves the weights of one of the stages in the model.
        """
        num = config.continual.fisher_samples
        names = [stage.fingerprint for stage in course.stages]
        for place, known in ((folder, names), (course.stages[-1].folder, names[:-1])):
            held = read(place / record.PAST, num, known)
            if held is not None:
                break
        else:
            held = Quadratic(num_samples=num)
        for place in range(len(held.stages), len(names)):
            examples = course.examples(place, num)
            # One at a time: all of them at once may not fit onto the device.
            batches = (_batch(config, llava, course, slot) for slot in _mine(examples))
            held = held.with_stage(course.stages[place], llava, attached, trace, batches, len(examples))
        return held

    def with_stage(
        self,
        stage: Stage,
        llava: Llava,
        attached: Attached,
        trace: Trace,
        batches: Iterable[Batch],
        total: int,
    ) -> "Quadratic":
        """The sum with one more stage; `batches` hold one sample each, this worker's of `total`."""
        model = llava.model
        training = {w: w.requires_grad for w in model.parameters()}
        checkpoint.load_weights(
            model, attached, adapters.read(stage.folder / record.ADAPTER), str(stage.folder)
        )
        if stage.task:
            attached.on_task_start(stage.task)
        fisher = {
            name: engine.sum_tensor(squares) / total
            for name, squares in squared_gradients(model, trace, batches).items()
        }
        weights = dict(model.named_parameters())
        anchors = {name: weights[name].detach().to(part.dtype).clone() for name, part in fisher.items()}
        for weight, trains in training.items():
            weight.requires_grad_(trains)
        return self.plus(fisher, anchors, stage.fingerprint)

    def plus(self, fisher: Mapping[str, Tensor], anchors: Mapping[str, Tensor], stage: str) -> "Quadratic":
        """The sum with the term of one more stage."""
        precision, mean, constant = dict(self.precision), dict(self.mean), dict(self.constant)
        for name, part in fisher.items():
            old = precision.get(name, torch.zeros_like(part))
            centre = mean.get(name, anchors[name])
            both = old + part
            share = torch.where(both > 0, part / both.clamp(min=torch.finfo(both.dtype).tiny), 0.0)
            apart = anchors[name] - centre
            precision[name], mean[name] = both, centre + share * apart
            rest = (0.5 * old.double() * share.double() * apart.double().square()).sum()
            constant[name] = constant.get(name, torch.zeros_like(rest)) + rest
        stages = (*self.stages, stage)
        return Quadratic(
            precision=precision, mean=mean, constant=constant, stages=stages, num_samples=self.num_samples
        )


def squared_gradients(model: nn.Module, trace: Trace, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Sums of the squared gradients of the one-sample batches' losses, of all that trains, in at least fp32."""
    named = {name: w for name, w in model.named_parameters() if w.requires_grad}
    sums = {
        name: torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32))
        for name, w in named.items()
    }
    for batch in batches:
        assert len(batch.samples) == 1, "squares of sums are not sums of squares"
        batch.begin(trace)
        losses_N, _ = loss.token_losses(lambda inputs: model(**inputs), batch)
        gradients = torch.autograd.grad(losses_N.sum(), list(named.values()), allow_unused=True)
        trace.clear()
        for name, gradient in zip(named, gradients, strict=True):
            if gradient is not None:
                sums[name] += gradient.to(sums[name].dtype).square()
    return sums


@dataclass(frozen=True, kw_only=True)
class Anchors:
    """The quadratic over those weights of `model` that train now."""

    model: nn.Module
    held: Quadratic
    weight: float

    def loss(self) -> Tensor:
        """weight * the sum of all terms, in at least fp32."""
        held, terms = self.held, []
        for name, w in self.model.named_parameters():
            if w.requires_grad and name in held.precision:
                apart = w.to(held.mean[name].dtype) - held.mean[name]
                terms.append(
                    (held.precision[name] * apart.square()).sum() / 2 + held.constant[name].to(apart.dtype)
                )
        first = next(w for w in self.model.parameters() if w.requires_grad)
        return self.weight * (torch.stack(terms).sum() if terms else first.new_zeros(()))

    def save(self, path: Path) -> None:
        """Write the quadratic, unless it is there."""
        if path.is_file():
            return
        held = self.held
        tensors: dict[str, Tensor] = {}
        for part in _PARTS:
            tensors |= {f"{part}.{name}": t.cpu().contiguous() for name, t in getattr(held, part).items()}
        about = {"stages": json.dumps(held.stages), "num_samples": str(held.num_samples)}
        half = path.with_name(f".{path.name}.part")
        save_file(tensors, half, metadata=about)
        half.replace(path)


def read(path: Path, num_samples: int, stages: Sequence[str]) -> Quadratic | None:
    """What a run wrote, if it holds exactly `stages`, each with a Fisher from `num_samples` samples."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt", device=str(engine.device())) as file:
            about: dict[str, str] = file.metadata() or {}
            if about.get("stages") != json.dumps(list(stages)) or about.get("num_samples") != str(
                num_samples
            ):
                return None
            found: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
            for key in file.keys():  # noqa: SIM118
                part, _, name = key.partition(".")
                found[part][name] = file.get_tensor(key)
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it, and it is made again") from None
    parts: dict[str, Any] = dict(found)
    return Quadratic(**parts, stages=tuple(stages), num_samples=num_samples)


def _mine(slots: Sequence[Slot]) -> Sequence[Slot]:
    """This worker's share of the examples."""
    return slots[engine.rank() :: engine.world_size()]


def _batch(config: RunConfig, llava: Llava, course: Course, slot: Slot) -> Batch:
    sample = sample_of(course.pools, slot)
    return train_batch([sample], llava).to(engine.device(), DTYPES[config.optim.dtype])
