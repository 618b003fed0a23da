"""The tasks of CVIT: conversations to train on, and test questions whose `answer` may be a list of captions.

Source:  Wang et al. 2024, SMoLoRA, arXiv:2411.13949: `Instructions_Single/TASK/{train,test}.json`, or `val.json`.
Differs: the vectors of instructions that come with it are not read; `smolora` computes its own.
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
    return tasks.read(part, "answer", "answers")
