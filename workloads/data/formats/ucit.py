"""MCITlib's tasks (UCIT, domain and ability data): conversations, and test questions; captions in COCO's form.

Source:  MCITlib, Guo et al. 2025, arXiv:2508.07307: `UCIT/instructions/TASK/{train,test}.json`, images in
         `UCIT/datasets`. The captions of Flickr30k and VizWiz stand in a COCO file by image id, which is the
         question's id: `annotations`.
"""

from collections.abc import Iterator
from pathlib import Path

from workloads.data import tasks
from workloads.data.formats import Part
from workloads.data.rows import Row

VERSION = "1"


def files(part: Part) -> list[Path]:
    """The task's file, and its captions where they are kept apart."""
    return tasks.files(part)


def rows(part: Part) -> Iterator[Row]:
    """The rows of a task."""
    return tasks.read(part, "answer")
