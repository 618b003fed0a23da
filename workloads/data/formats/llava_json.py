"""LLaVA's instruction JSON: a list (or lines) of `id`, `image` and `conversations` between human and gpt.

Source:  Liu et al. 2023, arXiv:2304.08485, the files of LLaVA-Instruct and LLaVA-1.5's mix.
Differs: `<image>` stays where it stands and is not moved to the front; a record whose image has no place gets it in
         front; `image` may be a list; a missing id becomes the record's place in the file.
"""

from collections.abc import Iterator
from pathlib import Path

from workloads.data.formats import Part
from workloads.data.rows import Row
from workloads.data.tasks import conversations

VERSION = "1"


def files(part: Part) -> list[Path]:
    """The one file of records."""
    part.refuse("annotations", "name", "subset", "columns")
    return [part.file()]


def rows(part: Part) -> Iterator[Row]:
    """The rows of the file, in its order."""
    return conversations(part.file(), part.images)
