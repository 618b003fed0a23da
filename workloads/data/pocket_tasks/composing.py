"""One sample of a task: draw its picture, choose a wording, answer in the task's register."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from workloads.data.pocket.scene import SPLITS, Facts, generator
from workloads.data.pocket_tasks.tasks import TASKS, Task
from workloads.data.pocket_tasks.wording import TYPES, WORDINGS
from workloads.errors import require, require_known

# Keeps these random streams apart from those of `pocket`, whose keys begin with a domain's place.
_STREAM = 1_000
_PICTURE, _WORDING = 0, 1


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A picture with one question and its one right answer."""

    # (96, 96, 3) uint8 RGB.
    image: np.ndarray
    facts: Facts
    # What the picture was made of, as `pocket` names it, e.g. "garment:123", "word:cat", "slab:axial:3".
    sources: tuple[str, ...]
    question: str
    answer: str
    # One of the types of wording.
    question_type: str


def compose(task: str, split: str, seed: int, index: int, types: Sequence[str] = TYPES) -> Asked:
    """Sample `index` of a task's endless stream; a pure function of its arguments.

    Each of `types` words one sample of every aligned block of as many; they change no picture and no answer.
    Raises UserError for an unknown task, split or type, or a negative seed or index.
    """
    require(task in TASKS, "task", task, f"choose one of {', '.join(TASKS)}", TASKS)
    require(split in SPLITS, "split", split, f"choose one of {', '.join(SPLITS)}", SPLITS)
    require(seed >= 0 and index >= 0, "seed, index", (seed, index), "both are at least 0")
    require_known("types.", types, TYPES)
    key = (_STREAM, list(TASKS).index(task), SPLITS.index(split), seed)
    of = TASKS[task]
    image, facts, sources, answer = _drawn(of, generator(*key, _PICTURE, index), split)
    question_type, question = _worded(key, of.asks, index, types)
    return Asked(
        image=image,
        facts=facts,
        sources=sources,
        question=question,
        answer=answer,
        question_type=question_type,
    )


def _drawn(
    task: Task, rng: np.random.Generator, split: str
) -> tuple[np.ndarray, Facts, tuple[str, ...], str]:
    """The first picture that is one of the task's: image, facts, sources and answer."""
    while True:
        image, facts, sources = task.draw(rng, split, task.focus)
        answer = task.answer(facts)
        if answer is not None:
            return image, facts, sources, answer


def _worded(key: tuple[int, ...], asks: str, index: int, types: Sequence[str]) -> tuple[str, str]:
    """Type and text of the question of sample `index`."""
    block, turn = divmod(index, len(types))
    chosen = types[int(generator(*key, _WORDING, block).permutation(len(types))[turn])]
    wordings = WORDINGS[asks][chosen]
    return chosen, wordings[int(generator(*key, _WORDING, block, turn).integers(len(wordings)))]
