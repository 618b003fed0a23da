"""What a run does about the stages before it: the loss terms of EWC and LwF, made once before training.

Source:  EWC: Kirkpatrick et al. 2017, arXiv:1612.00796, one term per earlier stage; LwF: Li, Hoiem 2016,
         arXiv:1606.09282, the distillation term alone, on the present stage's own samples.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from workloads import adapters, record
from workloads.adapters.base import Attached, Trace
from workloads.config import RunConfig
from workloads.llava.build import Llava
from workloads.training import checkpoint, engine
from workloads.training.batches import Batches
from workloads.training.past.ewc import Anchors, Quadratic
from workloads.training.past.lineage import Course, Stage
from workloads.training.past.lwf import Teacher


@dataclass(frozen=True, kw_only=True)
class Past:
    """The loss terms that stand for earlier stages, ready for training; none by default."""

    ewc: Anchors | None = None
    lwf: Teacher | None = None
    # What it took to make them.
    seconds: float = 0.0

    def losses(self, step: int, number: int, share: float, num_tokens: float) -> dict[str, Tensor]:
        """What micro-batch `number` of a step adds to the loss of the global batch, by term; call it after its forward.

        `share` is the micro-batch's part of the global batch's samples; `num_tokens` are all that are supervised.
        """
        terms: dict[str, Tensor] = {}
        if self.ewc is not None:
            terms["ewc_loss"] = self.ewc.loss() * share
        if self.lwf is not None:
            terms["lwf_loss"] = self.lwf.loss(step, number) / num_tokens
        return terms

    def save(self, folder: Path) -> None:
        """Rank 0 writes what later stages and a resumed run need not make again."""
        if self.ewc is not None and engine.rank() == 0:
            self.ewc.save(folder / record.PAST)


NO_PAST = Past()


def start(config: RunConfig, llava: Llava, attached: Attached, earlier: Stage) -> None:
    """Put the adapter of the stage before into the fresh `attached`."""
    weights = adapters.read(earlier.folder / record.ADAPTER)
    checkpoint.load_weights(llava.model, attached, weights, f"init_from {config.init_from}")


def make(
    config: RunConfig, llava: Llava, attached: Attached, trace: Trace, course: Course, folder: Path
) -> Past:
    """What the run's regulariser needs of its past; the model holds the start weights, before and afterwards.

    Draws no random numbers that are seen outside. A run without earlier stages, or without a regulariser, has none.
    """
    own, began = config.continual, time.monotonic()
    if not course.stages or own.regulariser == "none":
        return NO_PAST
    llava.model.eval()
    devices = [engine.device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        if own.regulariser == "ewc":
            held = Quadratic.of(config, llava, attached, trace, course, folder)
            start(config, llava, attached, course.stages[-1])
            anchors = Anchors(model=llava.model, held=held, weight=own.weight)
            return Past(ewc=anchors, seconds=time.monotonic() - began)
        batches = Batches(config=config, llava=llava, pools=course.pools, stream=course.stream)
        teacher = Teacher(llava.model, own.weight, own.temperature)
        newest = checkpoint.latest(folder / record.CHECKPOINT)
        teacher.learn(batches, trace, checkpoint.step_of(newest) if newest else 0)
        return Past(lwf=teacher, seconds=time.monotonic() - began)
