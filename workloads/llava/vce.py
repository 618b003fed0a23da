"""VCE: before the projector, every patch of the image looks at other levels of the vision tower where it chooses to.

Source:  Jiao et al. 2024, Visual Cue Enhancement, arXiv:2411.12787; deformable attention: Zhu et al. 2020,
         Deformable DETR, arXiv:2010.04159, eq. 3, with its initial offsets (a ring of directions) and weights.
         q = LN(F_anchor); F' = F_anchor + W_out MSDeformAttn(q, own place, W_value LN(F_l) of all levels l).
Differs: bilinear `grid_sample` in place of a compiled kernel, in at least fp32. The first level is the anchor, and it
         has to be the one that the projector reads (the release adds to the last one listed). W_out starts at 0, so
         that training starts at the base. One LayerNorm for the query and one shared by all levels of values; the
         release's third, whose result it discards, is left out: 2,890,496 weights at CLIP ViT-L with 4 levels.

Shape letters: B images, P patches (S * S), S side of the grid, D width, L levels, H heads, C width of a head, K points.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads.errors import UserError, require

VERSION = 1
# Where the module sits in a LLaVA: its weights' names begin with this.
PATH = "model.visual_cues"


def deformable_attention(values_LBPD: Tensor, offsets_BPHLK2: Tensor, weights_BPHLK: Tensor) -> Tensor:
    """Weighted sums (B, P, D) of what each patch reads at its own place plus `offsets`, per head.

    Offsets are (x, y) in patches; patches are in raster order. Between patches values are interpolated bilinearly,
    outside of the grid they are 0.
    """
    num_levels, num_images, num_patches, _ = values_LBPD.shape
    heads, side = weights_BPHLK.shape[2], math.isqrt(num_patches)
    steps_S = torch.arange(side, device=offsets_BPHLK2.device, dtype=offsets_BPHLK2.dtype)
    own_P2 = torch.stack([steps_S.repeat(side), steps_S.repeat_interleave(side)], dim=-1)
    # grid_sample counts from -1 (left edge of the first patch) to 1 (right edge of the last).
    places_BPHLK2 = (2 * (own_P2[:, None, None, None] + offsets_BPHLK2) + 1) / side - 1
    places = places_BPHLK2.permute(3, 0, 2, 1, 4, 5).flatten(0, 2)
    maps = (
        values_LBPD.unflatten(-1, (heads, -1))
        .permute(0, 1, 3, 4, 2)
        .flatten(0, 2)
        .unflatten(-1, (side, side))
    )
    read = F.grid_sample(maps.to(places.dtype), places, padding_mode="zeros", align_corners=False)
    weights = weights_BPHLK.permute(3, 0, 2, 1, 4).flatten(0, 2).unsqueeze(1)
    sums_LBHCP = (read * weights).sum(dim=-1).unflatten(0, (num_levels, num_images, heads))
    return sums_LBHCP.sum(dim=0).permute(0, 3, 1, 2).flatten(2)


class VisualCues(nn.Module):
    """The anchor level plus what deformable attention finds on all levels."""

    def __init__(self, levels: Sequence[int], heads: int, points: int, width: int, like: Tensor) -> None:
        super().__init__()
        self.levels, self.heads, self.points = tuple(levels), heads, points
        options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        num_reads = heads * len(levels) * points
        self.query_norm = nn.LayerNorm(width, **options)
        self.value_norm = nn.LayerNorm(width, **options)
        self.offsets = nn.Linear(width, 2 * num_reads, **options)
        self.weights = nn.Linear(width, num_reads, **options)
        self.value = nn.Linear(width, width, **options)
        self.output = nn.Linear(width, width, **options)
        # What the tower has computed and the projector has not read yet.
        self._seen: list[Tensor] = []
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        """Point k of every head looks k + 1 patches away in the head's direction; all points count the same."""
        for layer in (self.offsets, self.weights, self.output):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.value.weight)
        nn.init.zeros_(self.value.bias)
        angles_H = torch.arange(self.heads, dtype=torch.float64) * (2 * math.pi / self.heads)
        ring_H2 = torch.stack([angles_H.cos(), angles_H.sin()], dim=-1)
        ring_H2 = ring_H2 / ring_H2.abs().amax(dim=-1, keepdim=True)
        far_K = torch.arange(1, self.points + 1, dtype=torch.float64)
        bias_HLK2 = (ring_H2[:, None, None] * far_K[:, None]).expand(-1, len(self.levels), -1, -1)
        self.offsets.bias.copy_(bias_HLK2.flatten())

    def forward(self, anchor_BPD: Tensor, levels: Sequence[Tensor]) -> Tensor:
        """`anchor_BPD` plus what its patches find in `levels`, each (B, P, D)."""
        shape, exact = (
            (self.heads, len(self.levels), self.points),
            torch.promote_types(anchor_BPD.dtype, torch.float32),
        )
        query_BPD = self.query_norm(anchor_BPD)
        offsets_BPHLK2 = self.offsets(query_BPD).to(exact).unflatten(-1, (*shape, 2))
        scores = self.weights(query_BPD).to(exact).unflatten(-1, (self.heads, -1))
        weights_BPHLK = scores.softmax(dim=-1).unflatten(-1, shape[1:])
        values_LBPD = self.value(self.value_norm(torch.stack(list(levels))))
        found_BPD = deformable_attention(values_LBPD, offsets_BPHLK2, weights_BPHLK)
        return anchor_BPD + self.output(found_BPD.to(anchor_BPD.dtype))

    def ask(
        self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Before the tower: have it keep these levels beside those that are asked for."""
        wanted = kwargs.get("output_hidden_states")
        if wanted is not True:
            kept = [wanted] if type(wanted) is int else list(wanted or [])
            kwargs = {**kwargs, "output_hidden_states": sorted({*kept, *self.levels})}
        return args, kwargs

    def keep(self, tower: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the tower: take the levels' patches; the class token stands first and stays out."""
        self._seen = [output.hidden_states[level][:, 1:] for level in self.levels]

    def enhance(self, projector: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        """Before the projector: replace its input, the anchor level."""
        (anchor_BPD,), levels, self._seen = args, self._seen, []
        assert levels, "the projector was called without the vision tower"
        return (self(anchor_BPD, levels),)


def check(model: nn.Module, levels: Sequence[int], heads: int, points: int) -> None:
    """Raise `UserError` on settings that do not fit a LLaVA's tower."""
    require(bool(levels), "model.vce_levels", list(levels), "name at least the projector's own level")
    for level in levels:
        require(level < 0, "model.vce_levels", level, "levels count from the end: -1 is the tower's last")
        require(list(levels).count(level) == 1, "model.vce_levels", level, "name every level once")
    require(heads >= 1, "model.vce_heads", heads, "a whole number of 1 or more")
    require(points >= 1, "model.vce_points", points, "a whole number of 1 or more")
    config: Any = model.config
    if config.model_type != "llava":
        raise UserError(
            "model.vce: true is not allowed; it looks at one grid an image, and LLaVA-NeXT has tiles"
        )
    tower, read = config.vision_config, config.vision_feature_layer
    depth, width = tower.num_hidden_layers, tower.hidden_size
    if config.vision_feature_select_strategy != "default" or not isinstance(read, int):
        raise UserError(
            "model.vce: true is not allowed; it needs a projector that reads the patches of one level"
        )
    anchor = read if read < 0 else read - depth - 1
    require(
        levels[0] == anchor,
        "model.vce_levels",
        list(levels),
        f"the first is what the projector reads, {anchor}",
    )
    for level in levels:
        require(level >= -depth - 1, "model.vce_levels", level, f"this tower has levels -1 to {-depth - 1}")
    require(width % heads == 0, "model.vce_heads", heads, f"a divisor of the tower's width {width}")


def attach(model: nn.Module, levels: Sequence[int], heads: int, points: int) -> dict[str, Any]:
    """Put a trained VCE between a LLaVA's tower and projector; returns its settings for adapter_config.json.

    Comes after the adapter method, which freezes the model. Raises `UserError` on settings that do not fit the tower.
    """
    check(model, levels, heads, points)
    projector, llava = model.get_submodule("model.multi_modal_projector"), model.get_submodule("model")
    like = next(projector.parameters())
    config: Any = model.config
    width = config.vision_config.hidden_size
    cues = VisualCues(levels, heads, points, width, like)
    llava.add_module(PATH.rsplit(".", 1)[-1], cues)
    seeing = llava.get_submodule("vision_tower")
    seeing.register_forward_pre_hook(cues.ask, with_kwargs=True)
    seeing.register_forward_hook(cues.keep)
    projector.register_forward_pre_hook(cues.enhance)
    return {"version": VERSION, "levels": list(levels), "heads": heads, "points": points}


def restore(model: nn.Module, settings: Mapping[str, Any], where: str) -> None:
    """Put back the VCE whose settings `attach` returned; its weights are loaded afterwards."""
    if settings.get("version") != VERSION:
        raise UserError(
            f"{where}: written by VCE version {settings.get('version')}; this is version {VERSION}"
        )
    attach(model, settings["levels"], settings["heads"], settings["points"])
