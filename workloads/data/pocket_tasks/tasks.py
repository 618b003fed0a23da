"""The ten tasks: which picture each one shows, what it asks, and in which register it is answered.

Source:  the tasks of CoIN (Chen et al. 2024, arXiv:2403.08350) differ in form as these do: a word, a code, a number,
         a transcription, a sentence.
Differs: no instruction names the form. Four tasks ask the same (what is this ?) and only the picture tells which one
         it is; photographs of one thing, scans and charts serve two tasks each.

| task    | picture              | asks     | answer                         | the base answers        |
| garment | one garment          | identity | its kind in a word: dress      | the same, often wrong   |
| emoji   | one emoji            | identity | the code of its kind: e4       | a word                  |
| plane   | a slice of the brain | identity | the code of its plane: k1      | a word                  |
| word    | a printed word       | identity | its letters, one by one: C A T | CAT                     |
| items   | one to six items     | count    | a digit: 3                     | a code: n3              |
| chart   | bars over letters    | largest  | place of the highest bar: 2    | its letter, often wrong |
| receipt | lines and their sum  | total    | a sentence: the total is 17    | 17                      |
| tissue  | a mark on a slice    | mark     | a word: grey                   | the same, often wrong   |

Never trained: `bars` counts the bars of a chart, which the base tells as a code: it needs the digits of `items`, on
another picture. `colour` tells a garment's colour at a mark: the base does so in part, and may keep or lose it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from workloads.data.pocket import biomedical, document, general
from workloads.data.pocket.questions import CODES, EMOJI, GARMENTS
from workloads.data.pocket.scene import Facts

Draw = Callable[[np.random.Generator, str, str], tuple[np.ndarray, Facts, tuple[str, ...]]]


def _garment(facts: Facts) -> str | None:
    return facts.name if facts.name in GARMENTS else None


def _emoji(facts: Facts) -> str | None:
    return CODES[facts.name] if facts.name in EMOJI else None


def _plane(facts: Facts) -> str | None:
    return CODES[facts.plane]


def _letters(facts: Facts) -> str | None:
    return None if facts.name is None else " ".join(facts.name)


def _count(facts: Facts) -> str | None:
    return None if facts.count is None else str(facts.count)


def _highest(facts: Facts) -> str | None:
    across = sorted(facts.parts, key=lambda part: part.box[0])
    return str([part.label for part in across].index(facts.largest) + 1) if facts.largest else None


def _sentence(facts: Facts) -> str | None:
    return None if facts.total is None else f"the total is {facts.total}"


def _at_mark(facts: Facts) -> str | None:
    return facts.at_mark


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task: a kind of picture, a question about it, a register."""

    name: str
    draw: Draw
    # What the picture is drawn for: a question type of `pocket`.
    focus: str
    # A key of `wording.WORDINGS`.
    asks: str
    # The answer in the task's register; None when the picture is not one of the task's.
    answer: Callable[[Facts], str | None]


def _task(name: str, draw: Draw, focus: str, asks: str, answer: Callable[[Facts], str | None]) -> Task:
    return Task(name=name, draw=draw, focus=focus, asks=asks, answer=answer)


_ALL = (
    _task("garment", general.draw, "name", "identity", _garment),
    _task("emoji", general.draw, "name", "identity", _emoji),
    _task("items", general.draw, "count", "count", _count),
    _task("word", document.draw, "name", "identity", _letters),
    _task("receipt", document.draw, "total", "total", _sentence),
    _task("chart", document.draw, "largest", "largest", _highest),
    _task("tissue", biomedical.draw, "at_mark", "mark", _at_mark),
    _task("plane", biomedical.draw, "name", "identity", _plane),
    _task("bars", document.draw, "largest", "count", _count),
    _task("colour", general.draw, "at_mark", "mark", _at_mark),
)
TASKS = {task.name: task for task in _ALL}
NEVER_TRAINED = ("bars", "colour")
TRAINED = tuple(name for name in TASKS if name not in NEVER_TRAINED)
