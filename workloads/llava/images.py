"""Images to pixels: the checkpoint's own processor, behind LLaVA's padding to a square where that is asked for.

Source:  Liu et al. 2023, LLaVA-1.5, arXiv:2310.03744, whose release pads with the processor's mean colour.

Shape letters: N images, K tiles, H height, W width, C channels, S side of a square.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor


def pixels(images_HWC: Sequence[np.ndarray], processor: Any, aspect: str) -> Tensor:
    """Processed pixels (N, C, H, W) of uint8 RGB images of any sizes; cut into tiles (N, K, C, H, W), with zeros
    for those that other images have more of."""
    if aspect == "pad":
        images_HWC = [squared(image_HWC, processor.image_mean) for image_HWC in images_HWC]
    # Said aloud, since an image of height 1 or 3 might as well have its channels first.
    return processor(list(images_HWC), return_tensors="pt", input_data_format="channels_last")["pixel_values"]


def squared(image_HWC: np.ndarray, mean: Sequence[float]) -> np.ndarray:
    """The image in the middle of a square (S, S, C) of the colour `mean`, given from 0 to 1; a square is unchanged."""
    height, width, _ = image_HWC.shape
    if height == width:
        return image_HWC
    side = max(height, width)
    # Rounded down, as the release does.
    square_SSC = np.empty((side, side, 3), dtype=np.uint8)
    square_SSC[:] = [int(part * 255) for part in mean]
    top, left = (side - height) // 2, (side - width) // 2
    square_SSC[top : top + height, left : left + width] = image_HWC
    return square_SSC
