"""Batches: samples to padded token ids, masks, labels, and pixels or features.

Shape letters: B batch, T tokens, N images of all samples in order, K tiles of an image, C channels, H height,
W width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workloads.adapters.base import Trace
from workloads.data.pool import Sample
from workloads.llava import images
from workloads.llava.build import Llava

IGNORE = -100


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples as model inputs; `labels_BT` is IGNORE wherever no loss is taken."""

    # The rows that count: all, or none.
    samples: Sequence[Sample]
    # Of every row, whether it counts or not: its sample, and its valid tokens before the answer.
    rows: Sequence[Sample]
    prompt_lengths: tuple[int, ...]
    ids_BT: Tensor
    mask_BT: Tensor
    labels_BT: Tensor
    # Pixels (N, C, H, W), or (N, K, C, H, W) of tiles; where the tower's features are cached, those: levels x tokens
    # x width of each image.
    vision: Tensor
    # Height and width of each image before it was cut into tiles; on the CPU, where the model reads them.
    sizes_N2: Tensor | None = None

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward."""
        tiled = {} if self.sizes_N2 is None else {"image_sizes": self.sizes_N2}
        return {
            "input_ids": self.ids_BT,
            "attention_mask": self.mask_BT,
            "pixel_values": self.vision,
            **tiled,
        }

    def to(self, device: torch.device, dtype: torch.dtype) -> "Batch":
        """The batch on `device`, what is seen in `dtype`."""
        return replace(
            self,
            ids_BT=self.ids_BT.to(device),
            mask_BT=self.mask_BT.to(device),
            labels_BT=self.labels_BT.to(device),
            vision=self.vision.to(device, dtype),
        )

    def begin(self, trace: Trace) -> None:
        """Tell the method of this batch; comes before its forward pass."""
        questions, tasks = [s.question for s in self.rows], [s.task or s.domain for s in self.rows]
        trace.begin(questions, tasks, self.prompt_lengths, counted=bool(self.samples))

    def silent(self) -> "Batch":
        """The same rows, which take part in every collective and add nothing."""
        return replace(self, samples=(), labels_BT=torch.full_like(self.labels_BT, IGNORE))


def train_batch(samples: Sequence[Sample], llava: Llava) -> Batch:
    """Prompts and answers, padded on the right; labels on answer and end token."""
    encoded = [llava.prompter.encode(s.turns, s.system, _sizes(s)) for s in samples]
    ids_BT, mask_BT = _pad([e.ids for e in encoded], samples, llava, left=False)
    labels_BT = torch.full_like(ids_BT, IGNORE)
    for row, e in enumerate(encoded):
        chosen_T = torch.tensor(e.supervised).nonzero()[:, 0]
        labels_BT[row, chosen_T] = ids_BT[row, chosen_T]
    return Batch(
        samples=samples,
        rows=samples,
        prompt_lengths=tuple(e.prompt_length for e in encoded),
        ids_BT=ids_BT,
        mask_BT=mask_BT,
        labels_BT=labels_BT,
        vision=vision(samples, llava),
        sizes_N2=sizes(samples, llava),
    )


def prompt_batch(samples: Sequence[Sample], llava: Llava) -> Batch:
    """Prompts alone, padded on the left, ready for decoding."""
    prefixes = [llava.prompter.prefix(s.turns, s.system, _sizes(s)) for s in samples]
    ids_BT, mask_BT = _pad(prefixes, samples, llava, left=True)
    labels_BT = torch.full_like(ids_BT, IGNORE)
    return Batch(
        samples=samples,
        rows=samples,
        prompt_lengths=tuple(map(len, prefixes)),
        ids_BT=ids_BT,
        mask_BT=mask_BT,
        labels_BT=labels_BT,
        vision=vision(samples, llava),
        sizes_N2=sizes(samples, llava),
    )


def _pad(rows: list[list[int]], samples: Sequence[Sample], llava: Llava, left: bool) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, T). Where no sample has an image, padding takes the places of the empty one of `vision`."""
    pad, length = llava.prompter.tokenizer.pad_token_id, max(map(len, rows))
    places = 0 if _has_image(samples) else llava.prompter.image_tokens
    spare = length * len(rows) - sum(map(len, rows))
    length += max(0, -(-(places - spare) // len(rows)))
    ids_BT = torch.full((len(rows), length), pad, dtype=torch.long)
    mask_BT = torch.zeros((len(rows), length), dtype=torch.long)
    for row, ids in enumerate(rows):
        span = slice(length - len(ids), length) if left else slice(0, len(ids))
        ids_BT[row, span] = torch.tensor(ids)
        mask_BT[row, span] = 1
    row_N, column_N = (mask_BT == 0).nonzero()[:places].unbind(dim=1)
    ids_BT[row_N, column_N] = llava.prompter.image_id
    return ids_BT, mask_BT


def _has_image(samples: Sequence[Sample]) -> bool:
    return any(s.images_HWC or s.features_LPD is not None for s in samples)


def vision(samples: Sequence[Sample], llava: Llava) -> Tensor:
    """What the model sees of the samples: their features where they have them, else processed pixels.

    Samples without any image have one of zeros, which stands in their padding and changes nothing: every worker
    computes tower and projector in every batch, as ZeRO-3 needs.
    """
    features = [s.features_LPD for s in samples if s.features_LPD is not None]
    if features:
        return torch.stack(features)
    processor: Any = llava.processor
    if not _has_image(samples):
        config: Any = llava.model.config
        side = config.vision_config.image_size
        if llava.prompter.tiles:
            blank_HWC = np.zeros((side, side, 3), dtype=np.uint8)
            return torch.zeros_like(images.pixels([blank_HWC], processor.image_processor, "crop"))
        return torch.zeros(1, config.vision_config.num_channels, side, side)
    seen = [image_HWC for s in samples for image_HWC in s.images_HWC]
    return images.pixels(seen, processor.image_processor, llava.image_aspect)


def sizes(samples: Sequence[Sample], llava: Llava) -> Tensor | None:
    """Heights and widths (N, 2) of the images of `vision`, for a model that needs them."""
    tiles = llava.prompter.tiles
    if tiles is None:
        return None
    return torch.tensor([size for s in samples for size in _sizes(s)] or [(tiles.side, tiles.side)])


def _sizes(sample: Sample) -> list[tuple[int, int]]:
    return [image_HWC.shape[:2] for image_HWC in sample.images_HWC]
