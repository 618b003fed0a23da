"""MIF: whether an output obeys the form that the instruction asks for, whatever it says.

Source:  SMoLoRA's measure of instruction following, Wang et al. 2024, arXiv:2411.13949, one rule for each form.
Differs: An empty output obeys no form. A short caption has to equal a reference (the published rule takes any
         part of one, so that a lone full stop obeys).
"""

import re
from collections.abc import Sequence

from workloads.evaluation.scorers.documents import caseless

_SHORT = 2
_CAPTION = 4


def short(raw: str, answers: Sequence[str]) -> float:
    """VQA and classification: one or two words, or the gold answer."""
    return float(0 < len(raw.split()) <= _SHORT or _is_gold(raw, answers))


def caption(raw: str, answers: Sequence[str]) -> float:
    """A full stop at the end, and more than four words or a reference caption."""
    is_long = len(raw.split()) > _CAPTION
    return float(raw.rstrip().endswith(".") and (is_long or _is_gold(raw, answers)))


def letter(raw: str, answers: Sequence[str]) -> float:
    """ScienceQA: exactly one letter from A to Z, capital or not."""
    return float(re.fullmatch("[A-Za-z]", raw.strip()) is not None)


def _is_gold(raw: str, answers: Sequence[str]) -> bool:
    given = caseless(raw)
    return bool(given) and given in [caseless(answer) for answer in answers]
