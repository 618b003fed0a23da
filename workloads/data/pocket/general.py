"""General photographs: tinted garments and emoji on a muted background, asked in everyday words.

Source:  Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747); Twemoji 16.
Differs: a garment's shades are tinted and its black surround is transparent; items are 26-64 px wide.

Shape letters: H rows, W columns, C channels.
"""

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from workloads.data.pocket import assets, canvas
from workloads.data.pocket.questions import EMOJI, GARMENTS, GROUNDS, TINTS
from workloads.data.pocket.scene import EDGE_CLEARANCE, SIZE, Facts, Mark, Part

TINT_RGB = {
    "red": (235, 50, 45),
    "yellow": (250, 225, 50),
    "green": (60, 190, 70),
    "blue": (70, 120, 250),
    "purple": (170, 75, 215),
    "white": (250, 250, 250),
}
GROUND_RGB = {
    "grey": (128, 128, 128),
    "brown": (105, 78, 58),
    "navy": (32, 40, 84),
    "teal": (24, 98, 102),
    "olive": (92, 96, 42),
    "maroon": (92, 30, 46),
    "slate": (74, 88, 104),
    "tan": (164, 144, 112),
}
# Cells of the 3 x 3 lattice that several items are spread over, in pixels.
CELL = SIZE // 3


def _choose(rng: np.random.Generator, split: str, kind: str) -> tuple[int, str]:
    """Index and source of one picture of `kind`; every source is equally likely, whatever its variants."""
    pictures = assets.garments() if kind in GARMENTS else assets.emoji()
    group = pictures.members[split][kind]
    variants = group[rng.integers(len(group))]
    index = int(variants[rng.integers(len(variants))])
    return index, pictures.sources[index]


@dataclass(frozen=True, kw_only=True)
class _Item:
    """One pasted picture."""

    part: Part
    source: str
    # Opacity of the pasted patch, 0-255.
    alpha_HW: np.ndarray


def _draw(image_HWC: np.ndarray, rng: np.random.Generator, split: str, kind: str, side: int,
          left: int, top: int) -> _Item:  # fmt: skip
    """Paste one item of `kind`, side x side pixels."""
    index, source = _choose(rng, split, kind)
    colour = ""
    if kind in GARMENTS:
        shade_HW = canvas.resize(assets.garments().images[index], side)
        colour = TINTS[rng.integers(len(TINTS))]
        level_HW = 70 + shade_HW * 185 // 255
        colour_HWC = level_HW[:, :, None] * np.array(TINT_RGB[colour], np.int32) // 255
        alpha_HW = np.minimum(shade_HW * 5, 255)
    else:
        rgba_HWC = canvas.resize(assets.emoji().images[index], side)
        colour_HWC, alpha_HW = rgba_HWC[:, :, :3], rgba_HWC[:, :, 3]
    canvas.paste(image_HWC, colour_HWC, alpha_HW, left, top)
    box = (left, top, left + side, top + side)
    part = Part(label=kind, value=float(side), box=box, colour=colour)
    return _Item(part=part, source=source, alpha_HW=alpha_HW)


def _kinds(rng: np.random.Generator, count: int) -> list[str]:
    """`count` different kinds, each a garment or an emoji with equal chance."""
    chosen: list[str] = []
    while len(chosen) < count:
        table = GARMENTS if rng.integers(2) else EMOJI
        kind = table[rng.integers(len(table))]
        if kind not in chosen:
            chosen.append(kind)
    return chosen


def _single(image_HWC: np.ndarray, rng: np.random.Generator, split: str) -> list[_Item]:
    side = int(rng.integers(44, 65))
    left, top = (int(value) for value in rng.integers(0, SIZE - side + 1, 2))
    return [_draw(image_HWC, rng, split, _kinds(rng, 1)[0], side, left, top)]


def _several(image_HWC: np.ndarray, rng: np.random.Generator, split: str) -> list[_Item]:
    """One to six items in different cells of the 3 x 3 lattice; of one kind in half of the pictures."""
    cells = rng.permutation(9)[: int(rng.integers(1, 7))]
    count = len(cells)
    kinds = _kinds(rng, 1) * count if rng.integers(2) else [_kinds(rng, 1)[0] for _ in range(count)]
    items = []
    for cell, kind in zip(cells, kinds, strict=True):
        side = int(rng.integers(26, CELL + 1))
        shift = rng.integers(0, CELL - side + 1, 2)
        left, top = int(cell) % 3 * CELL + int(shift[0]), int(cell) // 3 * CELL + int(shift[1])
        items.append(_draw(image_HWC, rng, split, kind, side, left, top))
    return items


def _pair(image_HWC: np.ndarray, rng: np.random.Generator, split: str) -> list[_Item]:
    """A large and a small item of different kinds, side by side or stacked; the large one first."""
    sides = (int(rng.integers(50, 59)), int(rng.integers(26, 33)))
    near, far = sorted(int(value) for value in rng.integers(0, SIZE - sum(sides) + 1, 2))
    along = (near, far + sides[0]) if rng.integers(2) else (far + sides[1], near)
    upright = bool(rng.integers(2))
    items = []
    for kind, side, place in zip(_kinds(rng, 2), sides, along, strict=True):
        other = int(rng.integers(0, SIZE - side + 1))
        left, top = (other, place) if upright else (place, other)
        items.append(_draw(image_HWC, rng, split, kind, side, left, top))
    return items


def _marked(image_HWC: np.ndarray, rng: np.random.Generator, split: str) -> list[_Item]:
    """Two or three garments in different quarters."""
    items, half = [], SIZE // 2
    for quarter in rng.permutation(4)[: int(rng.integers(2, 4))]:
        side = int(rng.integers(38, half + 1))
        shift = rng.integers(0, half - side + 1, 2)
        left, top = int(quarter) % 2 * half + int(shift[0]), int(quarter) // 2 * half + int(shift[1])
        kind = GARMENTS[rng.integers(len(GARMENTS))]
        items.append(_draw(image_HWC, rng, split, kind, side, left, top))
    return items


def _solid_spot(rng: np.random.Generator, item: _Item) -> Mark | None:
    """A place inside the frame where the item covers the mark's open middle (5 x 5) throughout."""
    left, top = item.part.box[:2]
    solid_HW = sliding_window_view(item.alpha_HW == 255, (5, 5)).all((2, 3))
    rows, columns = np.nonzero(solid_HW)
    xs, ys = columns + left + 2, rows + top + 2
    edge = SIZE - EDGE_CLEARANCE
    inside = np.flatnonzero((xs >= EDGE_CLEARANCE) & (xs < edge) & (ys >= EDGE_CLEARANCE) & (ys < edge))
    if not len(inside):
        return None
    chosen = inside[rng.integers(len(inside))]
    return Mark(x=int(xs[chosen]), y=int(ys[chosen]))


_LAYOUTS = {
    "name": (_single,),
    "count": (_several,),
    "side": (_single, _pair),
    "where": (_single, _pair),
    "at_mark": (_marked,),
    "largest": (_pair,),
}


def draw(rng: np.random.Generator, split: str, focus: str) -> tuple[np.ndarray, Facts, tuple[str, ...]]:
    """A picture that answers `focus`: (96, 96, 3) uint8, its facts and its sources."""
    backdrop = GROUNDS[rng.integers(len(GROUNDS))]
    image_HWC = canvas.ground(rng, GROUND_RGB[backdrop], 6)
    layout = _LAYOUTS[focus][rng.integers(len(_LAYOUTS[focus]))]
    items = layout(image_HWC, rng, split)
    mark, colour = None, None
    if focus == "at_mark":
        for item in items:
            mark = mark or _solid_spot(rng, item)
            colour = colour or (item.part.colour if mark else None)
        if mark is None:  # only garments too thin to be marked: draw another picture
            return draw(rng, split, focus)
    elif focus in ("side", "where"):
        mark = canvas.free_mark(rng, off_middle=focus == "side")
    if mark:
        canvas.draw_mark(image_HWC, mark)
    facts = Facts(
        domain="general",
        layout=layout.__name__.removeprefix("_"),
        parts=tuple(item.part for item in items),
        mark=mark,
        name=items[0].part.label if layout is _single else None,
        count=len(items),
        mark_right=mark.right_of_middle() if mark else None,
        mark_cell=mark.cell() if mark else None,
        at_mark=colour,
        largest=items[0].part.label if layout is _pair else None,
        ground=backdrop,
    )
    return canvas.finish(image_HWC), facts, tuple(item.source for item in items)
