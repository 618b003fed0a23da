"""Tells tasks apart by their mean features: those of a task's questions and images, gathered while it trains.

Source:  HiDe-LLaVA 2025, arXiv:2503.12941, and DISCO 2025, arXiv:2503.12897: a sample's closeness to a task is its
         cosine with the task's mean, mean over text and image (HiDe-LLaVA) or by text alone (DISCO).
Differs: the sources take CLIP's text and image vectors. Here a text is the sentence vector of the question, an image
         its mean patch feature as it enters the projector; both are frozen. The sources' decision is one for a whole
         batch; here every sample has its own.

Sums are kept in whole units of 2^-20, so that they are exact in any order and on any workers.

Shape letters: B batch, K tasks, S text width, V image width, W both.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads.adapters.base import Trace
from workloads.adapters.parts.pooling import Pool
from workloads.adapters.parts.tasks import task_index
from workloads.llava.sentence import SentenceEncoder

_UNIT = 2**20


class TaskMeans(nn.Module):
    """Mean vectors of all tasks, and how close the samples of the last prompt are to them.

    Tasks count as seen from their start on; before any start the first task does, alone.
    """

    seen_K: Tensor
    counts_K: Tensor
    sums_KW: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        trace: Trace,
        encoder: SentenceEncoder,
        device: torch.device,
        pool: Pool | None = None,
        image_width: int = 0,
        temperature: float = 1.0,
    ) -> None:
        """Without a `pool` texts alone are looked at; `image_width` is that of the features the projector takes.

        `temperature` is that of the softmax behind the weights.
        """
        super().__init__()
        self.temperature = temperature
        self.tasks, self.trace, self.encoder, self.pool = tuple(tasks), trace, encoder, pool
        self.widths = [encoder.width] if pool is None else [encoder.width, image_width]
        for name, shape in (("counts_K", (len(tasks),)), ("sums_KW", (len(tasks), sum(self.widths)))):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int64, device=device))
        self.register_buffer("seen_K", torch.zeros(len(tasks), dtype=torch.bool, device=device))
        self.task: str | None = None
        # Of the last prompt: its samples' vectors, the tasks that were seen, the closeness to every task, its softmax
        # over temperature, and the closest task; in training all weight is on the task that trains, the closest one.
        self.vectors_BW = torch.empty(0)
        self.known: list[int] = [0]
        self.closeness_BK = torch.empty(0)
        self.weights_BK = torch.empty(0)
        self.nearest_B = torch.empty(0, dtype=torch.long)
        self.pending: Tensor | None = None

    @property
    def current(self) -> int:
        """The task that trains; the first one where none was started."""
        return 0 if self.task is None else self.tasks.index(self.task)

    def watch(self, language_model: nn.Module) -> None:
        """Look at the samples whenever a prompt is about to enter the language model."""
        language_model.register_forward_pre_hook(self._see)

    def _see(self, module: nn.Module, args: tuple[object, ...]) -> None:
        if self.trace.phase == "decode":
            return
        parts = [self.encoder.vectors(self.trace.questions)]
        if self.pool is not None:
            parts.append(self.pool.images(self.widths[1]))
        self.vectors_BW = torch.cat([part.to(self.sums_KW.device).double() for part in parts], dim=1)
        seen = self.seen_K.nonzero()[:, 0].tolist()
        self.known = seen or [0]
        self.closeness_BK = self.closeness(self.vectors_BW)
        # Once a prompt: every linear reads them, and so does every token that is decoded.
        if self.training:
            self.nearest_B = torch.full_like(self.closeness_BK[:, 0], self.current, dtype=torch.long)
            self.weights_BK = F.one_hot(self.nearest_B, len(self.tasks)).to(self.closeness_BK.dtype)
        else:
            self.nearest_B = self.closeness_BK.argmax(dim=-1)
            self.weights_BK = (self.closeness_BK / self.temperature).softmax(dim=-1)

    def closeness(self, vectors_BW: Tensor) -> Tensor:
        """Cosine (B, K) of each sample with every task's mean, mean over text and image; -inf for unseen tasks.

        In fp64, in which means are exact.
        """
        means_KW = self.sums_KW.double() / _UNIT / self.counts_K.clamp(min=1).unsqueeze(1)
        pairs = zip(vectors_BW.split(self.widths, dim=1), means_KW.split(self.widths, dim=1), strict=True)
        cosines_BK = sum(F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T for a, b in pairs)
        assert isinstance(cosines_BK, Tensor)
        known_K = torch.zeros_like(self.seen_K)
        known_K[self.known] = True
        return (cosines_BK / len(self.widths)).masked_fill(~known_K, float("-inf"))

    def selected(self) -> list[str]:
        """The name of the closest task of each sample of the last prompt."""
        return [self.tasks[k] for k in self.nearest_B.tolist()]

    def start(self, task: str) -> int:
        """Gather the features of `task` from now on, and count it as seen; its index. Raises UserError if unknown."""
        mine = task_index(self.tasks, task)
        self.task = task
        self.seen_K[mine] = True
        return mine

    def note(self) -> None:
        """Note the samples of the last prompt of training, once a batch; nothing before a task is started."""
        if self.task is None:
            return
        units_W = (self.vectors_BW * _UNIT).round().long().sum(dim=0)
        noted = torch.cat([torch.tensor([len(self.vectors_BW)], device=units_W.device), units_W])
        # Noted all the same: every worker has to take part in the sum after the step.
        noted = noted if self.trace.counted else torch.zeros_like(noted)
        self.pending = noted if self.pending is None else self.pending + noted

    def after_step(self, reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Add what all workers noted since the last step."""
        if self.pending is not None:
            total = reduce_sum(self.pending)
            self.counts_K[self.current] += total[0]
            self.sums_KW[self.current] += total[1:]
            self.pending = None
