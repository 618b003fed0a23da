"""LwF: on the present stage's samples, the model shall go on saying what it said when the stage began.

Source:  Li, Hoiem 2016, Learning without Forgetting, arXiv:1606.09282: a distillation term beside the new task's loss.
         L += weight * T^2 * KL(teacher_T || student_T), the mean over the supervised tokens of the global batch.
Teacher: the start weights, without dropout. The output layer is frozen, so of each supervised position its last hidden
         state is kept in memory, from before training: N x D numbers instead of N x V, and no second model.
Differs: T^2 keeps the gradient's size from depending on T (Hinton et al. 2015, arXiv:1503.02531).

Shape letters: N supervised tokens, D width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads.adapters.base import Trace
from workloads.training import loss
from workloads.training.batches import Batches


class Teacher:
    """What the model said before training of every micro-batch of this worker, and the distance from it."""

    def __init__(self, model: nn.Module, weight: float, temperature: float) -> None:
        """Listens at the output layer of `model`, where supervised positions alone arrive."""
        self.model, self.weight, self.temperature = model, weight, temperature
        self.head: Any = model.get_submodule("lm_head")
        self.head.register_forward_hook(self._listen)
        self.learning = False
        # (step, micro-batch) -> hidden states (N, D), on the CPU.
        self.hidden: dict[tuple[int, int], Tensor] = {}
        self._heard_ND = self._said_NV = torch.empty(0)

    def _listen(self, module: nn.Module, args: tuple[Tensor, ...], logits_NV: Tensor) -> None:
        if self.learning:
            self._heard_ND = args[0]
        elif module.training:
            self._said_NV = logits_NV

    @torch.no_grad()
    def learn(self, batches: Batches, trace: Trace, first: int = 0) -> None:
        """Keep what the model as it is now says of all steps from `first` on."""
        self.learning = True
        for step in range(first, batches.num_steps):
            for number, batch in enumerate(batches.of(step)):
                batch.begin(trace)
                loss.token_losses(lambda inputs: self.model(**inputs), batch)
                trace.clear()
                self.hidden[step, number] = self._heard_ND.cpu()
        self.learning = False
        self._heard_ND = torch.empty(0)

    def loss(self, step: int, number: int) -> Tensor:
        """weight * T^2 * the sum over a micro-batch's tokens of KL(teacher_T || student_T), in at least fp32.

        The student is the last forward pass in training.
        """
        said_NV, self._said_NV = self._said_NV, torch.empty(0)
        dtype = torch.promote_types(said_NV.dtype, torch.float32)
        with torch.no_grad():
            hidden_ND = self.hidden[step, number].to(said_NV.device)
            wanted_NV = self.head.forward(hidden_ND).to(dtype) / self.temperature
        student_NV = (said_NV.to(dtype) / self.temperature).log_softmax(dim=-1)
        kl = F.kl_div(student_NV, wanted_NV.log_softmax(dim=-1), reduction="sum", log_target=True)
        return self.weight * self.temperature**2 * kl
