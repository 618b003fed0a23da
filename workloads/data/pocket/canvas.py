"""Draw on a 96 x 96 RGB picture with integer arithmetic only, so that pixels are equal on every machine.

Shape letters: H rows, W columns, C channels.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from workloads.data.pocket.assets import Font
from workloads.data.pocket.scene import EDGE_CLEARANCE, SIZE, Mark

Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]

MARK_RADIUS = 5
MAGENTA: Colour = (255, 0, 255)
YELLOW: Colour = (255, 255, 0)


def ground(rng: np.random.Generator, colour: Colour, noise: int) -> np.ndarray:
    """A picture of one colour under soft blotches of at most `noise` grey levels; (96, 96, 3) int16."""
    blotches_HW = rng.integers(-noise, noise + 1, (SIZE // 4, SIZE // 4), dtype=np.int16)
    blotches_HW = blotches_HW.repeat(4, 0).repeat(4, 1)
    return blotches_HW[:, :, None] + np.array(colour, np.int16)


def finish(image_HWC: np.ndarray) -> np.ndarray:
    """Clip to uint8."""
    return np.clip(image_HWC, 0, 255).astype(np.uint8)


def sample(image_HW: np.ndarray, rows_q8_H: np.ndarray, columns_q8_W: np.ndarray) -> np.ndarray:
    """Bilinear values of an image (rows, columns[, channels]) at fixed-point places (1/256 px); int32."""
    top_H, left_W = rows_q8_H >> 8, columns_q8_W >> 8
    extra = (1,) * (image_HW.ndim - 2)
    down_H = (rows_q8_H & 255).reshape(-1, 1, *extra)
    right_W = (columns_q8_W & 255).reshape(1, -1, *extra)
    rows = image_HW[top_H] * (256 - down_H) + image_HW[np.minimum(top_H + 1, len(image_HW) - 1)] * down_H
    last = image_HW.shape[1] - 1
    return (rows[:, left_W] * (256 - right_W) + rows[:, np.minimum(left_W + 1, last)] * right_W) >> 16


@lru_cache(maxsize=128)
def _stretch(source: int, target: int) -> np.ndarray:
    """Fixed-point centres of `target` pixels laid over `source` pixels; int32."""
    centres = (np.arange(target) * 2 + 1) * source * 128 // target - 128
    return np.clip(centres, 0, (source - 1) * 256).astype(np.int32)


def resize(image_HW: np.ndarray, side: int) -> np.ndarray:
    """A square image (n, n[, channels]) at side x side, bilinear; int32."""
    places = _stretch(len(image_HW), side)
    return sample(image_HW.astype(np.int32), places, places)


def paste(image_HWC: np.ndarray, colour_HWC: np.ndarray, alpha_HW: np.ndarray, left: int, top: int) -> None:
    """Blend colours over the picture in place; alpha 0-255; the patch must lie inside."""
    height, width = alpha_HW.shape
    view = image_HWC[top : top + height, left : left + width]
    assert view.shape[:2] == alpha_HW.shape, (left, top, alpha_HW.shape)
    view += ((colour_HWC - view) * alpha_HW[:, :, None].astype(np.int32) // 255).astype(np.int16)


def fill(image_HWC: np.ndarray, box: Box, colour: Colour) -> None:
    """Paint a box in place."""
    left, top, right, bottom = box
    image_HWC[top:bottom, left:right] = colour


def text_width(font: Font, size: int, text: str) -> int:
    """Pixels from the pen's start to its end; a space is half a cap height."""
    space = font.cap_heights[size] // 2
    return sum(space if character == " " else font.advance[size][character] for character in text)


def write(image_HWC: np.ndarray, font: Font, size: int, text: str, left: int, bottom: int,
          ink: Colour, pitch: int = 0) -> list[Box]:  # fmt: skip
    """Write a line with its baseline at `bottom` (in place); the box of each character, spaces left out.

    With a `pitch` every character stands in the middle of a cell of that width, as in a form.
    """
    boxes, pen, cap = [], left, font.cap_heights[size]
    ink_C = np.array(ink, np.int16)
    for character in text:
        if character == " ":
            pen += pitch or cap // 2
            continue
        glyph_HW, advance = font.coverage[size][character], font.advance[size][character]
        step = pitch or advance
        x, y = pen + (step - advance) // 2 - font.origin, bottom - font.baseline
        cut_HW = glyph_HW[max(0, -y) : SIZE - y, max(0, -x) : SIZE - x]
        paste(image_HWC, ink_C, cut_HW, max(0, x), max(0, y))
        boxes.append((pen, bottom - cap, pen + step, bottom))
        pen += step
    return boxes


def draw_mark(image_HWC: np.ndarray, mark: Mark) -> None:
    """Draw the mark in place: a magenta ring with yellow ticks, open in its middle 5 x 5 pixels."""
    ring, ticks = _mark_masks()
    top, left = mark.y - MARK_RADIUS, mark.x - MARK_RADIUS
    view = image_HWC[top : mark.y + MARK_RADIUS + 1, left : mark.x + MARK_RADIUS + 1]
    assert view.shape[:2] == ring.shape, mark
    view[ring] = MAGENTA
    view[ticks] = YELLOW


@lru_cache(maxsize=1)
def _mark_masks() -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[-MARK_RADIUS : MARK_RADIUS + 1, -MARK_RADIUS : MARK_RADIUS + 1]
    distance = x * x + y * y
    ring = (distance >= 11) & (distance <= 29)
    ticks = ring & ((x == 0) | (y == 0))
    return ring, ticks


def mark_box(mark: Mark) -> Box:
    """The pixels that the mark covers."""
    reach = MARK_RADIUS + 1
    return (mark.x - MARK_RADIUS, mark.y - MARK_RADIUS, mark.x + reach, mark.y + reach)


@lru_cache(maxsize=1)
def clear_places() -> np.ndarray:
    """Coordinates at which a mark is clear of the frame and of all cell borders along one axis."""
    along = range(EDGE_CLEARANCE, SIZE - EDGE_CLEARANCE)
    return np.array([place for place in along if Mark(x=place, y=place).cell() is not None])


def candidate_marks(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 2) places (x, y) for a mark, uniform over those clear of cell borders."""
    places = clear_places()
    return places[rng.integers(0, len(places), (count, 2))]


def free_mark(rng: np.random.Generator, off_middle: bool, boxes: Sequence[Box] = ()) -> Mark:
    """A mark clear of cell borders and of `boxes`; also of the midline if `off_middle`."""
    for _ in range(100):
        for x, y in candidate_marks(rng, 16).tolist():
            mark = Mark(x=x, y=y)
            if off_middle and mark.right_of_middle() is None:
                continue
            if not any(overlaps(mark_box(mark), box, gap=1) for box in boxes):
                return mark
    raise AssertionError(f"no room for a mark beside {boxes}")


def overlaps(box: Box, other: Box, gap: int = 0) -> bool:
    """Whether two boxes come closer than `gap` pixels."""
    across = box[0] < other[2] + gap and other[0] < box[2] + gap
    return across and box[1] < other[3] + gap and other[1] < box[3] + gap
