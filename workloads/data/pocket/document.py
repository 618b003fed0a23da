"""Documents: a word, a receipt or a bar chart printed on paper, asked as one asks about documents.

Source:  words of SCOWL, tables of vega-datasets, glyphs of DejaVu fonts.
Differs: bars are a table's values in random order under random letters; a receipt's sum is right. Text is set
         on a 12 px grid, one character to a cell, as in a form.

Shape letters: H rows, W columns, C channels.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from workloads.data.pocket import assets, canvas
from workloads.data.pocket.assets import Font
from workloads.data.pocket.canvas import Box, Colour
from workloads.data.pocket.scene import SIZE, Facts, Mark, Part

PAPERS: tuple[Colour, ...] = ((252, 252, 252), (250, 246, 230), (240, 240, 246), (246, 238, 222))
INKS: tuple[Colour, ...] = ((15, 15, 15), (25, 25, 70), (70, 25, 20), (40, 40, 40))
BARS: tuple[Colour, ...] = ((70, 110, 170), (190, 110, 60), (90, 140, 90), (120, 120, 120))
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# Width and height of a letter's cell, and the width of a digit's.
CELL, DIGIT = 24, 12
# Least ratio of the largest bar to the next, and of the smallest to the largest.
CLEAR_MARGIN, LEAST_BAR = 1.15, 0.1
BAR_FOOT, BAR_REACH = 72, 56


@dataclass(kw_only=True)
class _Page:
    """A page while it is being printed."""

    image_HWC: np.ndarray
    rng: np.random.Generator
    split: str
    font: Font
    ink: Colour
    sources: list[str]
    parts: list[Part] = field(default_factory=list)
    # What a mark must stay clear of.
    occupied: list[Box] = field(default_factory=list)

    def print(self, size: int, text: str, left: int, bottom: int, pitch: int = 0) -> list[Box]:
        """Print a line; the box of each character."""
        boxes = canvas.write(self.image_HWC, self.font, size, text, left, bottom, self.ink, pitch)
        self.occupied += boxes
        return boxes

    def word(self, length: int) -> str:
        """One word of the split, noted as a source."""
        choices = assets.words()[self.split][length]
        word = choices[self.rng.integers(len(choices))]
        self.sources.append(f"word:{word}")
        return word


def _new_page(rng: np.random.Generator, split: str) -> _Page:
    fonts = assets.fonts()[split]
    font = fonts[rng.integers(len(fonts))]
    return _Page(
        image_HWC=canvas.ground(rng, PAPERS[rng.integers(len(PAPERS))], 3),
        rng=rng,
        split=split,
        font=font,
        ink=INKS[rng.integers(len(INKS))],
        sources=[f"font:{font.name}"],
    )


def _word(page: _Page, focus: str) -> tuple[Facts, Mark | None]:
    """One word in capitals, a letter to a cell; a mark, if any, just above one letter."""
    rng, font = page.rng, page.font
    text = page.word(int(rng.integers(3, 5))).upper()
    size = len(font.cap_heights) - 1 - int(rng.integers(2))
    width, cap = CELL * len(text), font.cap_heights[size]
    left = 12 * int(rng.integers((SIZE - width) // 12 + 1))
    bottom = 12 * int(rng.integers(3 if focus == "at_mark" else 2, SIZE // 12 + 1)) - 2
    boxes = page.print(size, text, left, bottom, CELL)
    page.parts.append(Part(label=text, value=0.0, box=(left, bottom - cap, left + width, bottom)))
    mark, letter = None, None
    if focus == "at_mark":
        chosen = int(rng.integers(len(text)))
        letter = text[chosen]
        mark = _above(boxes[chosen])
    facts = Facts(domain="document", layout="word", parts=tuple(page.parts), name=text, at_mark=letter)
    return facts, mark


def _above(box: Box) -> Mark:
    """A mark centred two pixels above a box, moved sideways only as far as the frame asks."""
    middle = (box[0] + box[2] - 1) // 2
    reach = canvas.MARK_RADIUS
    return Mark(x=min(max(middle, reach), SIZE - 1 - reach), y=box[1] - reach - 3)


def _receipt(page: _Page) -> Facts:
    """One to three lines of a word and a number, a rule, and the sum of the numbers."""
    rng, cap = page.rng, page.font.cap_heights[0]
    numbers = [int(number) for number in rng.integers(1, 20, int(rng.integers(1, 4)))]
    right = SIZE - DIGIT
    bottom = CELL * int(rng.integers(1, 5 - len(numbers))) - 5
    for number in numbers:
        word = page.word(3)
        page.print(0, word.upper(), 3, bottom)
        page.print(0, str(number), right - DIGIT * len(str(number)), bottom, DIGIT)
        page.parts.append(Part(label=word, value=float(number), box=(3, bottom - cap, right, bottom)))
        bottom += CELL
    rule = (3, bottom - cap - 5, right, bottom - cap - 3)
    canvas.fill(page.image_HWC, rule, page.ink)
    total = sum(numbers)
    page.print(0, "=", 3 * DIGIT, bottom, DIGIT)
    page.print(0, str(total), right - DIGIT * len(str(total)), bottom, DIGIT)
    parts = tuple(page.parts)
    return Facts(domain="document", layout="receipt", parts=parts, count=len(parts), total=total)


def _table_values(page: _Page) -> tuple[str, list[float]]:
    """Two to four values of one table in random order, the largest clearly ahead of the others."""
    rng = page.rng
    tables = assets.tables()[page.split]
    name = list(tables)[rng.integers(len(tables))]
    values, count = tables[name], int(rng.integers(2, 5))
    while True:
        first = int(rng.integers(len(values)))
        lower = [value for value in values if LEAST_BAR <= value / values[first] <= 1 / CLEAR_MARGIN]
        if len(lower) >= count - 1:
            break
    others = [lower[index] for index in rng.permutation(len(lower))[: count - 1]]
    picked = [values[first], *others]
    return name, [picked[index] for index in rng.permutation(count)]


def _chart(page: _Page, focus: str) -> tuple[Facts, Mark | None]:
    """Two to four bars over letters, as high as the values; a mark, if any, just above one bar."""
    rng = page.rng
    name, values = _table_values(page)
    page.sources.append(f"table:{name}")
    letters = [LETTERS[index] for index in rng.permutation(len(LETTERS))[: len(values)]]
    start = 12 * int(rng.integers((SIZE - CELL * len(values)) // 12 + 1))
    colour = BARS[rng.integers(len(BARS))]
    for index, (letter, value) in enumerate(zip(letters, values, strict=True)):
        left = start + index * CELL
        height = round(value / max(values) * BAR_REACH)
        box = (left + 3, BAR_FOOT - height, left + CELL - 3, BAR_FOOT)
        canvas.fill(page.image_HWC, box, colour)
        page.occupied.append(box)
        page.parts.append(Part(label=letter, value=value, box=box))
        page.print(0, letter, left, BAR_FOOT + 4 + page.font.cap_heights[0], CELL)
    canvas.fill(page.image_HWC, (3, BAR_FOOT, SIZE - 3, BAR_FOOT + 1), page.ink)
    mark, letter = None, None
    if focus == "at_mark":
        chosen = int(rng.integers(len(values)))
        letter, mark = letters[chosen], _above(page.parts[chosen].box)
    facts = Facts(
        domain="document",
        layout="chart",
        parts=tuple(page.parts),
        count=len(values),
        at_mark=letter,
        largest=letters[values.index(max(values))],
    )
    return facts, mark


_LAYOUTS = {
    "name": ("word",),
    "count": ("receipt", "chart"),
    "side": ("word", "chart"),
    "where": ("word", "chart"),
    "at_mark": ("word", "chart"),
    "largest": ("chart",),
    "total": ("receipt",),
}


def draw(rng: np.random.Generator, split: str, focus: str) -> tuple[np.ndarray, Facts, tuple[str, ...]]:
    """A page that answers `focus`: (96, 96, 3) uint8, its facts and its sources."""
    page = _new_page(rng, split)
    layout = _LAYOUTS[focus][rng.integers(len(_LAYOUTS[focus]))]
    if layout == "receipt":
        facts, mark = _receipt(page), None
    else:
        facts, mark = _word(page, focus) if layout == "word" else _chart(page, focus)
    if focus in ("side", "where"):
        mark = canvas.free_mark(rng, off_middle=focus == "side", boxes=page.occupied)
    if mark:
        canvas.draw_mark(page.image_HWC, mark)
        facts = replace(facts, mark=mark, mark_right=mark.right_of_middle(), mark_cell=mark.cell())
    return canvas.finish(page.image_HWC), facts, tuple(page.sources)
