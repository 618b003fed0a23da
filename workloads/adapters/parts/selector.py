"""Tells tasks apart without being told: each task has an image and a text key, learned beside the adapter.

Source:  BranchLoRA 2025, arXiv:2506.02041: the loss draws a task's keys to its samples by cosine; at inference the
         task with the closest keys wins.
Differs: the source does not name its encoders. Here an image is its mean patch feature as it enters the projector,
         a text the sentence vector of the question; both are frozen. Closeness is the sum of both cosines.

Shape letters: B batch, K tasks, V image width, S text width, W width of either.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads.adapters.base import Trace, kaiming_A
from workloads.adapters.parts.pooling import Pool
from workloads.adapters.parts.tasks import TaskIds, task_index
from workloads.llava.sentence import SentenceEncoder


class TaskSelector(nn.Module):
    """Keys of all tasks; in training a sample's task is the one it is said to come from, else the closest one."""

    seen_K: Tensor

    def __init__(
        self, tasks: Sequence[str], trace: Trace, pool: Pool, encoder: SentenceEncoder, projector: nn.Linear
    ) -> None:
        """`projector` is the linear that the images enter."""
        super().__init__()
        self.tasks, self.trace, self.pool, self.encoder = tuple(tasks), trace, pool, encoder
        self.task_ids = TaskIds(trace, tasks)
        self.image_width = projector.in_features
        for k in range(len(tasks)):
            self.register_parameter(f"image_key_{k}", kaiming_A(self.image_width, like=projector.weight))
            self.register_parameter(f"text_key_{k}", kaiming_A(encoder.width, like=projector.weight))
        self.register_buffer(
            "seen_K", torch.zeros(len(tasks), dtype=torch.bool, device=projector.weight.device)
        )
        # One-hot task of each sample of the last prompt, and its closeness to every task.
        self.tasks_BK = torch.empty(0)
        self.closeness_BK = torch.empty(0)

    def watch(self, language_model: nn.Module) -> None:
        """Find the tasks whenever a prompt is about to enter the language model."""
        language_model.register_forward_pre_hook(self._choose)

    def _choose(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.trace.phase == "decode":
            return
        image_BV = self.pool.images(self.image_width)
        text_BS = self.encoder.vectors(self.trace.questions).to(image_BV.device)
        self.closeness_BK = self(image_BV, text_BS)
        if self.training:
            best_B = self.task_ids(len(image_BV), image_BV.device)
        else:
            known_K = self.seen_K if self.seen_K.any() else ~self.seen_K
            best_B = self.closeness_BK.masked_fill(~known_K, float("-inf")).argmax(dim=-1)
        self.tasks_BK = F.one_hot(best_B, len(self.tasks)).to(self.closeness_BK.dtype)

    def forward(self, image_BV: Tensor, text_BS: Tensor) -> Tensor:
        """Sum (B, K) of the cosines of each sample's image and text with every task's keys, in at least fp32."""
        images_BK = self._cosines(image_BV, "image_key_")
        return images_BK + self._cosines(text_BS, "text_key_").to(images_BK.dtype)

    def _cosines(self, vectors_BW: Tensor, prefix: str) -> Tensor:
        keys_KW = torch.stack([key for name, key in self.named_parameters() if name.startswith(prefix)])
        dtype = torch.promote_types(torch.promote_types(vectors_BW.dtype, keys_KW.dtype), torch.float32)
        return F.normalize(vectors_BW.to(dtype), dim=-1) @ F.normalize(keys_KW.to(dtype), dim=-1).T

    def align_loss(self) -> Tensor:
        """Mean over samples of (1 - cosine) to the image key and to the text key of their task."""
        return (2 - (self.closeness_BK * self.tasks_BK).sum(dim=-1)).mean()

    def selected(self) -> list[str]:
        """The task whose keys each sample of the last prompt was given."""
        return [self.tasks[k] for k in self.tasks_BK.argmax(dim=-1).tolist()]

    def start(self, task: str) -> None:
        """Train the keys of `task` alone, and count it among the seen ones, which alone are selected.

        Raises UserError on an unknown task. Before any task is started, all count as seen and all keys train.
        """
        mine = task_index(self.tasks, task)
        self.seen_K[mine] = True
        for name, key in self.named_parameters():
            key.requires_grad_(name.endswith(f"_key_{mine}"))
