"""Whether a base sees: greedy captions and their loss on samples with their own pictures, or with each other's."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from workloads.data.collate import prompt_batch, train_batch
from workloads.data.pool import Sample
from workloads.evaluation.scorers import exact
from workloads.llava.build import Llava
from workloads.training import loss


@torch.no_grad()
def matched(llava: Llava, samples: Sequence[Sample], max_new_tokens: int) -> float:
    """Share of the samples whose greedy answer is the right one."""
    llava.model.eval()
    tokenizer: Any = llava.prompter.tokenizer
    model: Any = llava.model
    batch = prompt_batch(samples, llava)
    ids_BT = model.generate(
        **batch.inputs(),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = [llava.prompter.decode(ids) for ids in ids_BT[:, batch.ids_BT.shape[1] :].tolist()]
    return sum(exact(t, s.answer) for t, s in zip(texts, samples, strict=True)) / len(samples)


@torch.no_grad()
def mean_loss(llava: Llava, samples: Sequence[Sample]) -> float:
    """Mean loss of the answers, in nats per token."""
    llava.model.eval()
    batch = train_batch(samples, llava)
    return float(loss.token_losses(lambda inputs: llava.model(**inputs), batch)[0].mean())


def shuffled(samples: Sequence[Sample]) -> list[Sample]:
    """The same samples, each with the next one's picture."""
    images = [s.images_HWC for s in samples]
    return [replace(s, images_HWC=seen) for s, seen in zip(samples, [*images[1:], images[0]], strict=True)]
