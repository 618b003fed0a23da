"""Scorers by name: from raw answers and their references to scores, each with version, scale and source."""

from collections.abc import Mapping, Sequence
from typing import Any

from workloads.errors import require
from workloads.evaluation.scorers import boxes, captions, choice, documents, mif, vqa
from workloads.evaluation.scorers.base import OfItem, Scored, Scorer, best, standard_error
from workloads.evaluation.scorers.text import exact, majority, normalise
from workloads.record import TOP, Scale

__all__ = [
    "DEFAULT",
    "SCORERS",
    "SCORER_VERSION",
    "TOP",
    "OfItem",
    "Scale",
    "Scored",
    "Scorer",
    "exact",
    "find",
    "majority",
    "normalise",
    "score_rows",
    "standard_error",
]

# The scorer of runs whose data name none.
DEFAULT = "exact"
_PATH_VQA = "He et al. 2020, arXiv:2003.10286; LLaVA-Med, arXiv:2306.00890"
_MIF = "SMoLoRA, Wang et al. 2024, arXiv:2411.13949"

SCORERS: Mapping[str, Scorer] = {
    "exact": Scorer(version="exact-1", source="equality but for blanks", item=best(exact)),
    "vqa": Scorer(
        version="vqa-1",
        source="VQA accuracy, Antol et al. 2015, arXiv:1505.00468",
        item=vqa.accuracy,
        normalise=vqa.normalise,
    ),
    "anls": Scorer(
        version="anls-1",
        source="Biten et al. 2019, arXiv:1905.13648, threshold 0.5",
        item=best(documents.anls),
        normalise=documents.caseless,
    ),
    "relaxed": Scorer(
        version="relaxed-1",
        source="ChartQA, Masry et al. 2022, arXiv:2203.10244, 5 %",
        item=best(documents.relaxed),
        normalise=documents.caseless,
    ),
    "gqa": Scorer(
        version="gqa-1",
        source="Hudson, Manning 2019, arXiv:1902.09506",
        item=best(choice.gqa),
        normalise=choice.plain,
    ),
    "ocr_vqa": Scorer(
        version="ocr_vqa-1",
        source="Mishra et al. 2019, OCR-VQA; lower-cased equality",
        item=best(choice.same_but_case),
        normalise=documents.caseless,
    ),
    "ucit": Scorer(
        version="ucit-1",
        source="MCITlib's UCIT; equality but for case",
        item=best(choice.same_but_case),
        normalise=documents.caseless,
    ),
    "science_qa": Scorer(
        version="science_qa-1",
        source="Lu et al. 2022, arXiv:2209.09513; letters as LLaVA and CoIN read them",
        item=best(choice.science_qa),
        normalise=choice.option,
    ),
    "class_name": Scorer(
        version="class_name-1",
        source="CoIN's ImageNet, Chen et al. 2024, arXiv:2403.08350, in whole words",
        item=best(choice.class_name),
        normalise=choice.plain,
    ),
    "grounding": Scorer(
        version="grounding-1",
        source="RefCOCO, Yu et al. 2016, arXiv:1608.00272; IoU > 0.5",
        item=best(boxes.grounding),
        normalise=boxes.normalise,
    ),
    "path_vqa": Scorer(version="path_vqa-1", source=_PATH_VQA, item=choice.path_vqa, normalise=vqa.normalise),
    "path_vqa_closed": Scorer(
        version="path_vqa_closed-1",
        source=_PATH_VQA,
        item=best(choice.path_vqa_closed),
        normalise=vqa.normalise,
    ),
    "path_vqa_open": Scorer(
        version="path_vqa_open-1",
        source=_PATH_VQA,
        item=best(choice.path_vqa_open),
        normalise=vqa.normalise,
    ),
    "bleu": Scorer(
        version="bleu-1",
        scale="percent",
        source="Papineni et al. 2002, by sacrebleu, 13a tokens",
        corpus=captions.bleu,
        parts=captions.bleu_parts,
    ),
    "rouge_l": Scorer(version="rouge_l-1", source="Lin 2004, by rouge-score", corpus=captions.rouge_l),
    "cider_d": Scorer(
        version="cider_d-1",
        scale="cider",
        source="Vedantam, Zitnick, Parikh 2015, arXiv:1411.5726; counts, sigma 6",
        corpus=captions.cider_d,
    ),
    "mif_short": Scorer(version="mif_short-1", source=_MIF, item=mif.short),
    "mif_caption": Scorer(version="mif_caption-1", source=_MIF, item=mif.caption),
    "mif_letter": Scorer(version="mif_letter-1", source=_MIF, item=mif.letter),
}
SCORER_VERSION = SCORERS[DEFAULT].version


def find(name: str, key: str = "scorer") -> Scorer:
    """The scorer of that name; raises `UserError` about `key` that names the nearest when there is none."""
    require(name in SCORERS, key, name, f"scorers: {', '.join(SCORERS)}", SCORERS)
    return SCORERS[name]


def score_rows(name: str, rows: Sequence[Mapping[str, Any]]) -> Scored:
    """Score prediction rows of one domain: `raw`, and `answer`, one string or several references.

    There is at least one row, and at least one reference in each. Raises `UserError` for an unknown name.
    """
    scorer = find(name)
    raws = [row["raw"] for row in rows]
    answers = [[row["answer"]] if isinstance(row["answer"], str) else row["answer"] for row in rows]
    if scorer.corpus is not None:
        found, total = scorer.corpus(raws, answers)
        if found is None:
            assert scorer.parts is not None
            return Scored(
                rows=None, values=tuple(scorer.parts(raws, answers)), total=total, scale=scorer.scale
            )
        scores = tuple(found)
    else:
        assert scorer.item is not None
        scores = tuple(scorer.item(raw, of_row) for raw, of_row in zip(raws, answers, strict=True))
        total = sum(scores) / len(scores)
    return Scored(rows=scores, values=scores, total=total, scale=scorer.scale)
