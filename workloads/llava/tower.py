"""The frozen vision tower, computed once per image: fills a pool's features, and then steps out of the model.

A tower that never changes says the same of an image in every run. What it says is kept (`workloads.data.features`),
and in the model a stand-in takes its place, whose input is what the tower would say. Results are equal to the bit
wherever the tower's rows do not depend on the batch they are computed in, as with PyTorch on CPU.

Shape letters: B images, L levels, P tokens of the tower (its class token included), D width.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from workloads.data.cache import ENVIRONMENT_KEY, cache_dir
from workloads.data.collate import vision
from workloads.data.features import Features, tensor_bytes
from workloads.data.pool import Pool, Sample
from workloads.errors import UserError, reason_of
from workloads.llava.build import Llava

# Where the tower sits in a LLaVA.
_PARENT, _NAME = "model", "vision_tower"
# Images of one forward pass while rows are made.
_BATCH = 32


class StandIn(nn.Module):
    """Takes the tower's place: gets what the tower would say (B, L, P, D) and passes it on, level by level."""

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.levels = tuple(levels)

    def forward(self, pixel_values: Tensor, **asked: Any) -> BaseModelOutputWithPooling:
        """The levels under the indices by which the projector and VCE ask for them."""
        levels: Any = dict(zip(self.levels, pixel_values.unbind(dim=1), strict=True))
        return BaseModelOutputWithPooling(hidden_states=levels)


def tower_of(llava: Llava) -> Any:
    """The vision tower of a LLaVA."""
    return llava.model.get_submodule(f"{_PARENT}.{_NAME}")


def levels_of(llava: Llava, cues: Sequence[int]) -> list[int]:
    """Indices of the tower's levels that the projector reads, and beside them `cues`, which VCE reads.

    Raises `UserError` on a model that cuts images into tiles: rows of features are of one image seen once.
    """
    if llava.prompter.tiles:
        raise UserError(
            "execution.feature_cache: true is not allowed; LLaVA-NeXT sees each image as tiles of its own number"
        )
    read: Any = llava.model.config.vision_feature_layer
    return list(dict.fromkeys([*([read] if isinstance(read, int) else read), *cues]))


@torch.no_grad()
def with_features(llava: Llava, pools: Sequence[Pool], levels: Sequence[int]) -> list[Pool]:
    """The same pools with their features opened, filled or not; raises `UserError` if files cannot be made."""
    key, dtype = _key(llava, levels), tower_of(llava).dtype
    shape = tuple(_rows(llava, [pools[0].sample(pools[0].accepted[0])], levels).shape[1:])
    folder = cache_dir() / "features" / key
    try:
        return [
            replace(pool, features=Features(folder / pool.key, len(pool.rows), shape, dtype))
            for pool in pools
        ]
    except OSError as error:
        raise _unwritable(error) from None


@torch.no_grad()
def fill(llava: Llava, pool: Pool, indices: Sequence[int], levels: Sequence[int]) -> None:
    """Make the rows of `indices` that are missing; raises `UserError` when they cannot be written."""
    features = pool.features
    assert features is not None, "the pool has no features"
    seen, missing = replace(pool, features=None), features.missing(indices)
    for start in range(0, len(missing), _BATCH):
        chosen = missing[start : start + _BATCH]
        rows_BLPD = _rows(llava, [seen.sample(i) for i in chosen], levels).cpu()
        try:
            for index, row_LPD in zip(chosen, rows_BLPD, strict=True):
                features.write(index, row_LPD)
        except OSError as error:
            raise _unwritable(error) from None


def stand_in(llava: Llava, levels: Sequence[int]) -> None:
    """Take the tower out of the model; batches bring features from now on."""
    setattr(llava.model.get_submodule(_PARENT), _NAME, StandIn(levels))


def _rows(llava: Llava, samples: Sequence[Sample], levels: Sequence[int]) -> Tensor:
    """What the tower says of the samples' images (B, L, P, D); raises `UserError` unless each has one."""
    for sample in samples:
        if len(sample.images_HWC) != 1:
            reason = f"{sample.id} has {len(sample.images_HWC)} images, and features are kept of exactly one"
            raise UserError(f"execution.feature_cache: true is not allowed; {reason}")
    tower = tower_of(llava)
    output = tower(vision(samples, llava).to(tower.device, tower.dtype), output_hidden_states=True)
    return torch.stack([output.hidden_states[level] for level in levels], dim=1)


def _key(llava: Llava, levels: Sequence[int]) -> str:
    """16 hex digits over all that decides a row but the image: weights, shape, processing, levels, PyTorch."""
    tower, processor = tower_of(llava), llava.processor
    images: Any = processor.image_processor  # pyright: ignore[reportAttributeAccessIssue]
    about = [tower.config.to_dict(), images.to_dict(), type(images).__name__, list(levels), torch.__version__]
    if llava.image_aspect != "crop":
        about.append(llava.image_aspect)
    total = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, weight in tower.state_dict().items():
        total.update(f"{name} {weight.dtype} {weight.device.type}".encode())
        total.update(tensor_bytes(weight.cpu()))
    return total.hexdigest()[:16]


def _unwritable(error: OSError) -> UserError:
    reason = (
        f"cannot write in {cache_dir() / 'features'}: {reason_of(error)}; name a folder that can be written"
    )
    return UserError(f"{ENVIRONMENT_KEY}: {reason}, or set execution.feature_cache to false")
