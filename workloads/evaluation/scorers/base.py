"""What a scorer is, and what it returns: one score for each row where there is one, and the score of all rows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from workloads.evaluation.scorers.text import normalise
from workloads.record import Scale

# Raw answer, reference answers -> score.
OfItem = Callable[[str, Sequence[str]], float]
# Raw answers, reference answers of each -> (scores of the rows where rows have one, score of all).
OfCorpus = Callable[[Sequence[str], Sequence[Sequence[str]]], tuple[list[float] | None, float]]
# Raw answers, reference answers of each -> values of the rows.
OfParts = Callable[[Sequence[str], Sequence[Sequence[str]]], list[float]]


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """One metric; either `item`, whose mean is the total, or `corpus`, which needs all rows of a domain at once."""

    # The scorer's name, a dash, a number that changes whenever a score may.
    version: str
    # Where the definition stands.
    source: str
    scale: Scale = "fraction"
    item: OfItem | None = None
    corpus: OfCorpus | None = None
    # Where only the whole has a score: a value for each row, whose mean is the score and whose spread its error.
    parts: OfParts | None = None
    # What is compared of an answer: the `normalised` of a prediction.
    normalise: Callable[[str], str] = normalise

    def __post_init__(self) -> None:
        assert (self.item is None) != (self.corpus is None), f"{self.version}: either item or corpus"


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Scores of some rows by one scorer, all on `scale`."""

    # In the order of the rows; None where only the whole has a score.
    rows: tuple[float, ...] | None
    # The rows' scores, or their parts in the score of the whole; their mean is the total.
    values: tuple[float, ...]
    total: float
    scale: Scale


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean of independent values; None for a single one."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    return math.sqrt(squares / (len(values) - 1) / len(values))


def best(score: Callable[[str, str], float]) -> OfItem:
    """A scorer of an item by its best reference, from a score against one."""
    return lambda raw, answers: max(score(raw, answer) for answer in answers)
