"""Answers read off documents and charts: ANLS forgives slips of reading, relaxed accuracy 5 % of a number.

Source:  ANLS: Biten et al. 2019, ST-VQA, arXiv:1905.13648. Relaxed accuracy: Masry et al. 2022, ChartQA,
         arXiv:2203.10244, section 5.1, in the form that the pix2struct evaluation gave it.
Differs: ANLS keeps a similarity of exactly 0.5, as the challenge's own script does (the paper's formula drops
         it), and two empty strings score 1. Relaxed accuracy computes in decimals, so that 1.05 is within 5 %
         of 1, and reads only plain decimal numbers, not `nan`, `inf` or `1_000`.
"""

import re
from decimal import Decimal

_ANLS_THRESHOLD = 0.5
_TOLERANCE = Decimal("0.05")
_NUMBER = re.compile(r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?)\s*(%?)")


def caseless(text: str) -> str:
    """Lower-cased, outer and repeated blanks removed."""
    return " ".join(text.lower().split())


def anls(raw: str, gold: str) -> float:
    """1 - edit distance / length of the longer string, or 0 below one half; case does not count."""
    given, wanted = caseless(raw), caseless(gold)
    longer = max(len(given), len(wanted))
    if given == wanted:
        return 1.0
    if abs(len(given) - len(wanted)) > longer * (1 - _ANLS_THRESHOLD):
        return 0.0  # the distance is at least the difference in length
    similarity = 1 - _edit_distance(given, wanted) / longer
    return similarity if similarity >= _ANLS_THRESHOLD else 0.0


def relaxed(raw: str, gold: str) -> float:
    """1 for a number within 5 % of the gold number, `%` being a hundredth; else for equality but for case.

    A gold number of 0 is compared as text. Thousands separators are not parsed, as in the reference: `1,000`
    is a text, right only for `1,000`.
    """
    given, wanted = caseless(raw), caseless(gold)
    number, target = _number(given), _number(wanted)
    if number is not None and target:
        return float(abs(number - target) <= _TOLERANCE * abs(target))
    return float(bool(given) and given == wanted)


def _number(text: str) -> Decimal | None:
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    return Decimal(match[1]) / 100 if match[2] else Decimal(match[1])


def _edit_distance(left: str, right: str) -> int:
    """Fewest insertions, deletions and replacements of one character."""
    above = list(range(len(right) + 1))
    for row, letter in enumerate(left, start=1):
        line = [row]
        for column, other in enumerate(right, start=1):
            replaced = above[column - 1] + (letter != other)
            line.append(min(replaced, above[column] + 1, line[-1] + 1))
        above = line
    return above[-1]
