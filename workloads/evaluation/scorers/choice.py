"""Short answers of a known kind: GQA, OCR-VQA, UCIT, ScienceQA's option letters, class names, PathVQA.

Source:  GQA: Hudson, Manning 2019, arXiv:1902.09506. OCR-VQA: Mishra et al. 2019. ScienceQA: Lu et al. 2022,
         arXiv:2209.09513, letters as LLaVA's and CoIN's evaluations read them. Class names: CoIN, Chen et al.
         2024, arXiv:2403.08350. UCIT: MCITlib, upper-cased equality. PathVQA: He et al. 2020, arXiv:2003.10286,
         scored as LLaVA-Med does, Li et al. 2023, arXiv:2306.00890.
Differs: An empty answer is always wrong. A class name is looked for as whole words (CoIN looks for letters
         anywhere, so that an empty answer, or `a`, is right). A closed PathVQA answer has to be the word yes
         or no alone, and a wrong one counts; recall counts a repeated word as often as the gold has it.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from workloads.evaluation.scorers import vqa
from workloads.evaluation.scorers.documents import caseless

OPTIONS = "ABCDE"
_SINGLE = re.compile(r"\b\w\b")
_YES_NO = ("yes", "no")


def plain(text: str) -> str:
    """Lower-cased, without punctuation and symbols, blanks squeezed: what GQA compares."""
    return " ".join("".join(c for c in text.lower() if unicodedata.category(c)[0] not in "PS").split())


def gqa(raw: str, gold: str) -> float:
    """1 for equality but for case and punctuation."""
    given = plain(raw)
    return float(bool(given) and given == plain(gold))


def same_but_case(raw: str, gold: str) -> float:
    """1 for equality but for case and blanks: OCR-VQA and UCIT."""
    given = caseless(raw)
    return float(bool(given) and given == caseless(gold))


def option(text: str) -> str:
    """The letter that an answer chooses: all of it, before `. `, or its first one-character word; else "".

    As published, the word may be any, also no option: `I think B` chooses I, `it's B` chooses S.
    """
    text = text.strip()
    if text[:1] and text[:1] in OPTIONS and (len(text) == 1 or text[1:3] == ". "):
        return text[0]
    found = _SINGLE.search(text)
    return found[0].upper() if found and found[0].upper() in OPTIONS else ""


def science_qa(raw: str, gold: str) -> float:
    """1 when the answer chooses the gold option's letter."""
    chosen = option(raw)
    return float(bool(chosen) and chosen == option(gold))


def class_name(raw: str, gold: str) -> float:
    """1 when the gold name stands in the answer, or the answer in the gold name, as whole words."""
    given, name = f" {plain(raw)} ", f" {plain(gold)} "
    return float(bool(given.strip()) and bool(name.strip()) and (name in given or given in name))


def path_vqa(raw: str, answers: Sequence[str]) -> float:
    """`path_vqa_closed` where the gold answer is yes or no, else `path_vqa_open`."""
    is_closed = all(vqa.normalise(answer) in _YES_NO for answer in answers)
    score = path_vqa_closed if is_closed else path_vqa_open
    return max(score(raw, answer) for answer in answers)


def path_vqa_closed(raw: str, gold: str) -> float:
    """1 when the normalised answer is the gold one."""
    return float(bool(raw.strip()) and vqa.normalise(raw) == vqa.normalise(gold))


def path_vqa_open(raw: str, gold: str) -> float:
    """Share of the gold answer's words that the answer has."""
    given, wanted = Counter(vqa.normalise(raw).split()), Counter(vqa.normalise(gold).split())
    if not wanted:  # articles only
        return path_vqa_closed(raw, gold)
    return (given & wanted).total() / wanted.total()
