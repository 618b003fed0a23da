"""The language-model loss of a batch: summed over supervised tokens, with its parts by domain.

Shape letters: B batch, T tokens, V vocabulary, N supervised tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from workloads.data.collate import IGNORE, Batch


def token_losses(forward: Callable[[dict[str, Any]], Any], batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy (N) in fp32 of every supervised token, and the row (N) of the batch it is in.

    Only positions that predict a supervised token reach the output layer.
    """
    predicts_BT = F.pad(batch.labels_BT[:, 1:] != IGNORE, (0, 1), value=False)
    logits_NV = forward({**batch.inputs(), "logits_to_keep": predicts_BT, "use_cache": False}).logits
    targets_N = batch.labels_BT[:, 1:][predicts_BT[:, :-1]]
    losses_N = F.cross_entropy(logits_NV.float(), targets_N, reduction="none")
    return losses_N, predicts_BT.nonzero()[:, 0]


def num_supervised(batch: Batch) -> int:
    """Tokens of the batch that a loss is taken on."""
    return int((batch.labels_BT != IGNORE).sum())


def by_domain(
    losses_N: Tensor, rows_N: Tensor, batch: Batch, domains: list[str]
) -> tuple[list[float], list[float]]:
    """Sum of losses and number of supervised tokens of each domain."""
    owner_B = torch.tensor(
        [domains.index(s.domain) for s in batch.samples], dtype=torch.long, device=rows_N.device
    )
    owner_N = owner_B[rows_N]
    zeros = torch.zeros(len(domains), dtype=torch.float64, device=rows_N.device)
    sums = zeros.scatter_add(0, owner_N, losses_N.detach().double())
    tokens = zeros.scatter_add(0, owner_N, torch.ones_like(losses_N, dtype=torch.float64))
    return sums.tolist(), tokens.tolist()
