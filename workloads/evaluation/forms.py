"""MIF of a stream: how many outputs have the form that their task's answers have, whatever they say.

Source:  SMoLoRA's measure of instruction following, Wang et al. 2024, arXiv:2411.13949: the share of outputs that
         obey the instruction's form, mean over tasks, after the last stage; rules in scorers/mif.py.
Differs: a domain of the source `files` has the form that its `form` names; of the format cvit, without one, the form
         that goes with its scorer. In `pocket_tasks` no instruction names a form: there it is the register that the
         task is taught in, and the rules tell these registers from each other and from the base's, nothing more. What
         no stage teaches (`bars`, `colour`) has none there, and neither have the domains of `pocket`.

All shares are fractions, whatever the scale of the scores.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from workloads.errors import require
from workloads.evaluation.continual import Parts
from workloads.evaluation.scorers import mif
from workloads.evaluation.scorers.base import OfItem
from workloads.evaluation.scorers.text import normalise


def _pattern(pattern: str) -> OfItem:
    """Obeyed by a whole output, but for blanks, that matches."""
    return lambda raw, answers: float(re.fullmatch(pattern, normalise(raw)) is not None)


# Form -> 1.0 for an output (and its references) that has it, else 0.0.
FORMS: Mapping[str, OfItem] = {
    "short": mif.short,
    "caption": mif.caption,
    "letter": mif.letter,
    # The registers of `pocket_tasks`: dress; e4; 3; C A T; the total is 17.
    "word": _pattern("[a-z]{2,}"),
    "code": _pattern("[a-z][0-9]+"),
    "number": _pattern("[0-9]+"),
    "spelled": _pattern("[A-Z]( [A-Z])+"),
    "total": _pattern("the total is [0-9]+"),
}
_POCKET_TASKS = {
    "garment": "word",
    "emoji": "code",
    "items": "number",
    "word": "spelled",
    "receipt": "total",
    "chart": "number",
    "tissue": "word",
    "plane": "code",
}
# Packaged source -> task -> form.
_PACKAGED = {"pocket_tasks": _POCKET_TASKS, "pocket_tasks_plain": _POCKET_TASKS}
# Scorer -> form that CVIT's instructions ask for where answers are scored so.
_CVIT = {
    **dict.fromkeys(("exact", "vqa", "gqa", "ocr_vqa", "ucit", "class_name"), "short"),
    **dict.fromkeys(("bleu", "rouge_l", "cider_d"), "caption"),
    "science_qa": "letter",
}


def check(name: str, key: str) -> None:
    """Raise `UserError` about `key` unless `name` is a form, or empty."""
    require(not name or name in FORMS, key, name, f"forms: {', '.join(FORMS)}", FORMS)


def of(data: Mapping[str, Any]) -> dict[str, str]:
    """Domain -> form, of those that have one, from the section `data` of a run's configuration."""
    if data.get("source") != "files":
        return dict(_PACKAGED.get(str(data.get("source")), {}))
    found = {}
    for domain, part in data.get("domains", {}).items():
        usual = _CVIT.get(part.get("scorer", ""), "") if part.get("format") == "cvit" else ""
        if form := part.get("form") or usual:
            found[domain] = form
    return found


def shares(forms: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Domain -> share of its outputs that have its form, from prediction rows; other domains are left out."""
    obeyed: dict[str, list[float]] = {}
    for row in rows:
        if row["domain"] in forms:
            answers: Sequence[str] = [row["answer"]] if isinstance(row["answer"], str) else row["answer"]
            score = FORMS[forms[row["domain"]]](row["raw"], answers)
            obeyed.setdefault(row["domain"], []).append(score)
    return {domain: sum(scores) / len(scores) for domain, scores in obeyed.items()}


def by_task(found: Mapping[str, float], parts: Parts) -> dict[str, float | None]:
    """Share of each task: the mean over its domains; None where one has none."""
    return {
        task: sum(found[d] for d in domains) / len(domains) if all(d in found for d in domains) else None
        for task, domains in parts.items()
    }


def mean(found: Mapping[str, float], parts: Parts) -> float | None:
    """MIF: the mean of the tasks' shares; None where one has none."""
    values = [value for value in by_task(found, parts).values() if value is not None]
    return sum(values) / len(values) if values and len(values) == len(parts) else None
