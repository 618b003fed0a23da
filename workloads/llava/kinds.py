"""The kinds of LLaVA that can be built: LLaVA-1.5, which sees an image once, and LLaVA-NeXT, which sees its tiles too.

Source:  Liu et al. 2023, LLaVA-1.5, arXiv:2310.03744; Liu et al. 2024, LLaVA-NeXT (its 1.6 checkpoints): an image is
         resized to the grid of `image_grid_pinpoints` that wastes least of it and cut into tiles of the tower's size;
         the tokens of its tiles, padding left out, follow those of the whole image, with `image_newline` behind
         every row.
Differs: beside an adapter LLaVA-NeXT's `image_newline` stays frozen; the projector alone trains, as in LLaVA-1.5.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
)

Shape = LlavaConfig | LlavaNextConfig
Model = LlavaForConditionalGeneration | LlavaNextForConditionalGeneration
Processor = LlavaProcessor | LlavaNextProcessor
# Height and width of an image in pixels.
Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """The classes of one kind."""

    model: Any
    processor: Any


KINDS: dict[str, Kind] = {
    "llava": Kind(model=LlavaForConditionalGeneration, processor=LlavaProcessor),
    "llava_next": Kind(model=LlavaNextForConditionalGeneration, processor=LlavaNextProcessor),
}


def of(shape: Shape) -> Kind:
    """The kind of a model's configuration."""
    return KINDS[shape.model_type]


def empty(shape: Shape) -> Model:
    """A LLaVA of these sizes on the meta device: no memory, no numbers."""
    with torch.device("meta"):
        return of(shape).model(shape)


def is_tiled(shape: Any) -> bool:
    """Whether the number of an image's tokens depends on its size."""
    return isinstance(shape, LlavaNextConfig)


def class_tokens(model: Model) -> int:
    """Tokens of an image that the tower puts before its patches."""
    embeddings = model.get_submodule("model.vision_tower").get_submodule("embeddings")
    return int(any(hasattr(embeddings, name) for name in ("class_embedding", "cls_token")))


class Tiles:
    """How many tokens an image takes that is cut into tiles, by the processor's own count."""

    def __init__(self, processor: Any, side: int) -> None:
        """`side` is that of a tile in pixels."""
        self.processor, self.side = processor, side
        self._tile = torch.zeros(1, 1, 1, side, side)

    def tokens(self, size: Size) -> int:
        """Tokens of an image of this size."""
        seen = {"pixel_values": self._tile, "image_sizes": [list(size)]}
        return self.processor.replace_image_token(seen, 0).count(self.processor.image_token)

    def described(self) -> str:
        """All that decides the number, as text."""
        images, tower = self.processor.image_processor, self.processor.patch_size
        return f"tiles {images.image_grid_pinpoints} of {self.side} with patches of {tower}"
