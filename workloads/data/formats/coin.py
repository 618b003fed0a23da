"""CoIN's tasks: conversations to train on, and test questions with `question_id`, `image`, `text` and `answer`.

Source:  Chen et al. 2024, arXiv:2403.08350: `Instruction_Original/TASK/{train,test}.json`, or `val.json`.
         Grounding's box stands in `answer_bbox`; ScienceQA's answers in its own folder, TextVQA's and VizWiz's ten
         answers in their annotation files: `annotations`.
"""

from collections.abc import Iterator
from pathlib import Path

from workloads.data import tasks
from workloads.data.formats import Part
from workloads.data.rows import Row

VERSION = "1"


def files(part: Part) -> list[Path]:
    """The task's file, and its answers where they are kept apart."""
    return tasks.files(part)


def rows(part: Part) -> Iterator[Row]:
    """The rows of a task."""
    return tasks.read(part, "answer_bbox", "answer")
