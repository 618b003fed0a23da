"""Pooled vectors: what a router that decides once per sample sees of the sample's tokens.

Tokens of the answer are left out wherever the trace tells where the prompt ends, since decoding decides before
there is an answer; padding is always left out. So teacher forcing and decoding decide alike.

Shape letters: B batch, T tokens, I inputs of a linear, N images, P patches of an image, V width of a patch.
"""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads.adapters.base import Trace

RouterPool = Literal["first", "first_after_image", "mean_valid", "last_prompt"]
ROUTER_POOLS: tuple[str, ...] = get_args(RouterPool)


def prompt_mask(trace: Trace) -> Tensor:
    """Valid tokens (B, T) before the answer; all valid tokens where nothing is known of an answer."""
    mask_BT = trace.token_mask_BT
    assert mask_BT is not None
    if not trace.prompt_lengths:
        return mask_BT
    assert len(trace.prompt_lengths) == len(mask_BT), "one prompt length a sample"
    lengths_B1 = torch.tensor(trace.prompt_lengths, device=mask_BT.device).unsqueeze(1)
    return mask_BT & (mask_BT.cumsum(dim=1) <= lengths_B1)


def pooled_tokens(mask_BT: Tensor, image_BT: Tensor | None, pool: RouterPool) -> Tensor:
    """The tokens (B, T) of `mask_BT` whose mean is a sample's pooled vector.

    first              the first one; in a causal model its vector is the same for every sample
    first_after_image  the first one behind an image; the first one where there is no image
    mean_valid         all of them
    last_prompt        the last one
    """
    if pool == "mean_valid":
        return mask_BT
    # argmax gives the first of several equal values.
    place_B = mask_BT.int().argmax(dim=1)
    if pool == "last_prompt":
        place_B = mask_BT.shape[1] - 1 - mask_BT.flip(1).int().argmax(dim=1)
    if pool == "first_after_image":
        assert image_BT is not None, "image positions are read from input_ids"
        behind_BT = mask_BT & ~image_BT & (image_BT.cumsum(dim=1) > 0)
        place_B = torch.where(behind_BT.any(dim=1), behind_BT.int().argmax(dim=1), place_B)
    return F.one_hot(place_B, mask_BT.shape[1]).bool()


def image_means(patches_NPV: Tensor, image_BT: Tensor) -> Tensor:
    """Mean patch feature (B, V) of each sample's images in at least fp32; 0 for a sample without any.

    `image_BT` marks image tokens, P for each image, in the order of the images.
    """
    num_images, num_patches, _ = patches_NPV.shape
    ends_B = image_BT.sum(dim=1).cumsum(dim=0)
    assert int(ends_B[-1]) == num_images * num_patches, "image tokens and patches differ in number"
    starts_N = torch.arange(num_images, device=ends_B.device) * num_patches
    owner_N = torch.searchsorted(ends_B, starts_N, right=True)
    means_NV = patches_NPV.to(torch.promote_types(patches_NPV.dtype, torch.float32)).mean(dim=1)
    owned_BN = F.one_hot(owner_N, len(image_BT)).T.to(means_NV.dtype)
    return (owned_BN @ means_NV) / owned_BN.sum(dim=1, keepdim=True).clamp(min=1)


class Pool:
    """Pools the input of any linear of the language model, and the images; tokens are chosen once per forward pass."""

    def __init__(self, trace: Trace, pool: RouterPool, model: nn.Module) -> None:
        """Follow `model`, a LLaVA, from its next forward pass on."""
        self.trace = trace
        self.pool: RouterPool = pool
        config: Any = model.config
        self.image_token: int = config.image_token_id
        # Where images are in the sequence; None when the model was given embeddings.
        self.image_BT: Tensor | None = None
        # What entered the projector last, and whether the language model has been entered since.
        self._patches_NPV: Tensor | None = None
        self._used = False
        self._tokens_BT: Tensor | None = None
        model.register_forward_pre_hook(self._find_images, with_kwargs=True)
        model.get_submodule("model.multi_modal_projector").register_forward_pre_hook(self._see_patches)
        model.get_submodule("model.language_model").register_forward_pre_hook(self._choose)

    def _find_images(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids_BT = kwargs.get("input_ids")
        self.image_BT = None if ids_BT is None else ids_BT == self.image_token
        mask = kwargs.get("attention_mask")
        if self.image_BT is not None and mask is not None:
            # An image in the padding belongs to nobody: it is there where no sample has one.
            self.image_BT = self.image_BT & mask[:, -self.image_BT.shape[1] :].bool()
        if self._used:  # `generate` encodes the images before it enters the model
            self._patches_NPV = None

    def _see_patches(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._patches_NPV, self._used = args[0].detach(), False

    def _choose(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._used = True
        # The trace is up to date here: its own hook runs when the whole model is entered.
        if self.trace.phase != "decode":
            self._tokens_BT = pooled_tokens(prompt_mask(self.trace), self.image_BT, self.pool)

    def __call__(self, x_BTI: Tensor) -> Tensor:
        """Pooled vectors (B, I) in at least fp32."""
        assert self._tokens_BT is not None
        dtype = torch.promote_types(x_BTI.dtype, torch.float32)
        chosen_B1T = self._tokens_BT.to(dtype).unsqueeze(1)
        return torch.bmm(chosen_B1T, x_BTI.to(dtype)).squeeze(1) / chosen_B1T.sum(dim=-1).clamp(min=1)

    def images(self, width: int) -> Tensor:
        """Mean patch feature (B, V = width) of each sample's images as they enter the projector, without gradient."""
        assert self.image_BT is not None, "image positions are read from input_ids"
        if self._patches_NPV is None or not self.image_BT.any():
            return torch.zeros(len(self.image_BT), width, device=self.image_BT.device)
        return image_means(self._patches_NPV, self.image_BT)
