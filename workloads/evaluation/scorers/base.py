"""What a scorer is, and what it returns: one score for each row where there is one, and the score of all rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from workloads.evaluation.scorers.text import normalise

Scale = Literal["fraction", "percent", "cider"]
# Scale -> the best score on it; 0 is the worst on each.
TOP: Mapping[Scale, float] = {"fraction": 1.0, "percent": 100.0, "cider": 10.0}

# Raw answer, reference answers -> score.
OfItem = Callable[[str, Sequence[str]], float]
# Raw answers, reference answers of each -> (scores of the rows where rows have one, score of all).
OfCorpus = Callable[[Sequence[str], Sequence[Sequence[str]]], tuple[list[float] | None, float]]


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
    # What is compared of an answer: the `normalised` of a prediction.
    normalise: Callable[[str], str] = normalise

    def __post_init__(self) -> None:
        assert (self.item is None) != (self.corpus is None), f"{self.version}: either item or corpus"


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Scores of some rows by one scorer, all on `scale`."""

    # In the order of the rows; None where only the whole has a score.
    rows: tuple[float, ...] | None
    total: float
    scale: Scale


def best(score: Callable[[str, str], float]) -> OfItem:
    """A scorer of an item by its best reference, from a score against one."""
    return lambda raw, answers: max(score(raw, answer) for answer in answers)
