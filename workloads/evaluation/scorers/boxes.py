"""Grounding: a box written as four numbers is right when it overlaps the gold box by more than half (IoU).

Source:  RefCOCO's accuracy at IoU 0.5: Yu et al. 2016, arXiv:1608.00272; boxes as CoIN writes them,
         `[x1, y1, x2, y2]` relative to the padded image.
Differs: Digits are kept and brackets may be missing, doubled or of another kind; CoIN's reader takes brackets
         off twice and loses the first and last digit.
"""

import math
import re

_IOU = 0.5
_BRACKETS = re.compile(r"\[([^\[\]]*)\]")
_NUMBER = re.compile(r"(?<![\w.])[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?(?!\w)")

Box = tuple[float, float, float, float]


def parse(text: str) -> Box | None:
    """The first brackets with exactly four numbers, else all numbers of the text when they are four, else None."""
    for part in (*_BRACKETS.findall(text), text):
        numbers = [float(number) for number in _NUMBER.findall(part)]
        if len(numbers) == 4 and all(math.isfinite(number) for number in numbers):
            return (numbers[0], numbers[1], numbers[2], numbers[3])
    return None


def iou(one: Box, other: Box) -> float:
    """Area that both boxes cover / area that any of them covers; 0 for a box without area."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    union = sum((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (one, other)) - shared
    return shared / union if union > 0 else 0.0


def grounding(raw: str, gold: str) -> float:
    """1 when the answer's box has an IoU above 0.5 with the gold box; no box is wrong."""
    given, wanted = parse(raw), parse(gold)
    return float(given is not None and wanted is not None and iou(given, wanted) > _IOU)


def normalise(text: str) -> str:
    """The box as it was read, or an empty string."""
    box = parse(text)
    return "" if box is None else f"[{', '.join(f'{number:g}' for number in box)}]"
