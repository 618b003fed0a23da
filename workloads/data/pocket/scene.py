"""What a composed sample is: its picture, the facts behind it, and the random numbers it is drawn with."""

from dataclasses import dataclass

import numpy as np

SIZE = 96
GRID = 5

DOMAINS = ("general", "document", "biomedical")
SPLITS = ("train", "val", "test")

# Distances in pixels that keep an answer unambiguous: mark to cell border, mark to midline, mark to edge.
BORDER_CLEARANCE, SIDE_CLEARANCE, EDGE_CLEARANCE = 3.0, 8, 7


@dataclass(frozen=True, kw_only=True)
class Mark:
    """The one mark of a picture, by the pixel at its centre."""

    x: int
    y: int

    def cell(self) -> tuple[int, int] | None:
        """(row, column) in the 5 x 5 grid, or None within 3 px of a cell border."""
        places = []
        for value in (self.y, self.x):
            scaled = (value + 0.5) * GRID / SIZE
            if min(scaled % 1, -scaled % 1) * SIZE / GRID < BORDER_CLEARANCE:
                return None
            places.append(int(scaled))
        return places[0], places[1]

    def right_of_middle(self) -> bool | None:
        """Whether the viewer sees the mark right of the middle, or None within 8 px of it."""
        offset = self.x + 0.5 - SIZE / 2
        return None if abs(offset) < SIDE_CLEARANCE else offset > 0


@dataclass(frozen=True, kw_only=True)
class Part:
    """One thing drawn: an item, a receipt line, a bar or a marked dot."""

    # Item: its kind. Receipt line: its word. Bar: its letter. Dot: "dot".
    label: str
    # Item: longer side in pixels. Receipt line: its number. Bar: the value of its table row. Dot: 0.
    value: float
    # (left, top, right, bottom), right and bottom exclusive.
    box: tuple[int, int, int, int]
    # Name of the tint of a garment, else "".
    colour: str = ""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Neutral values that answers are worded from; None where the picture leaves the question open."""

    domain: str
    # general: single, several, pair, marked; document: word, receipt, chart; biomedical: scan.
    layout: str
    parts: tuple[Part, ...]
    mark: Mark | None = None
    # Object kind, transcription in capitals, or plane.
    name: str | None = None
    count: int | None = None
    # True: the mark is on the right in the domain's own convention (patient's right in biomedical).
    mark_right: bool | None = None
    # (row, column) of the mark in the 5 x 5 grid over the frame.
    mark_cell: tuple[int, int] | None = None
    # Colour, letter or tissue at the mark.
    at_mark: str | None = None
    # Kind of the larger item or letter of the largest bar.
    largest: str | None = None
    total: int | None = None
    # Colour name of the background (general) or "" elsewhere.
    ground: str = ""
    # axial, coronal, sagittal (biomedical) or "".
    plane: str = ""
    # Voxel index along the axis that the plane is cut across (biomedical) or -1.
    slice_index: int = -1
    # How the slice lies in the frame: voxels per pixel in 1/256, then shift along rows and columns in pixels.
    view: tuple[int, int, int] | None = None
    # Indices (right, anterior, superior) of the brain voxel under the mark.
    voxel: tuple[int, int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class QA:
    """One question with its one right answer."""

    question_type: str
    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One composed sample."""

    # (96, 96, 3) uint8 RGB.
    image: np.ndarray
    facts: Facts
    # Neutral sentence about the picture.
    caption: str
    # Every question that this picture answers in exactly one way.
    qa: tuple[QA, ...]
    # What it was made of, e.g. "garment:123", "emoji:1f600", "word:cat", "font:DejaVuSans", "slab:axial:3".
    sources: tuple[str, ...]
    # The question type that the picture was drawn for; always one of `qa`.
    focus: str


def generator(*key: int) -> np.random.Generator:
    """Random numbers that depend on the integers of `key` only, in every process."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
