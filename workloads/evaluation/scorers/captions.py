"""Captions against several references: BLEU, ROUGE-L and CIDEr-D.

Source:  BLEU: Papineni et al. 2002, by sacrebleu (13a tokens, one corpus score). ROUGE-L: Lin 2004, by
         rouge-score (words of a-z and 0-9, no stemming, F of the best reference). CIDEr-D: Vedantam, Zitnick,
         Parikh 2015, arXiv:1411.5726, equations 2 to 5. The jackknife of BLEU's parts: Tukey 1958.
Differs: CIDEr-D weighs counts of n-grams, as the authors' released code and so all published numbers do, where
         the paper's formula divides them by the sentence's length; the length in its penalty is in words (the
         code's is in pairs of words, the same but for sentences of no word). Words are not stemmed. They are
         made by a rule close to the Penn Treebank's, without Java: lower case, punctuation dropped, hyphens
         and decimal points kept inside a word, `n't` and `'s` words of their own; `cannot` stays one word.
         Scores are from 0 to 10, as the code's; papers print them times 100.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

_MAX_N = 4
_SIGMA = 6.0
_SCALE = 10.0
_WORD = re.compile(r"\w+?(?=n't(?!\w))|n't(?!\w)|'(?:s|re|ve|ll|d|m)(?!\w)|\w+(?:[-.,]\w+)*")

Gram = tuple[str, ...]


def bleu(raws: Sequence[str], answers: Sequence[Sequence[str]]) -> tuple[None, float]:
    """Corpus BLEU-4 in percent; single captions have no score."""
    from sacrebleu.metrics.bleu import BLEU

    num_references = max(len(references) for references in answers)
    # One list for each reference number; None where an item has fewer.
    streams: Any = [
        [references[k] if k < len(references) else None for references in answers]
        for k in range(num_references)
    ]
    return None, float(BLEU(force=True).corpus_score(list(raws), streams).score)


def bleu_parts(raws: Sequence[str], answers: Sequence[Sequence[str]]) -> list[float]:
    """A value for each caption: the corpus BLEU, and what it gains by the caption, as the jackknife counts it.

    The mean is the corpus BLEU, the standard error of the mean its jackknife error; in a difference of two models
    on the same images the values are paired as item scores are.
    """
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(force=True)
    alone = [
        metric.corpus_score([raw], [[reference] for reference in of_row])
        for raw, of_row in zip(raws, answers, strict=True)
    ]
    counts = [[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in alone]
    sums = [sum(column) for column in zip(*counts, strict=True)]

    def score(of: Sequence[int]) -> float:
        correct, total = list(of[:_MAX_N]), list(of[_MAX_N : 2 * _MAX_N])
        return float(BLEU.compute_bleu(correct, total, of[-2], of[-1], smooth_method="exp").score)

    without = [score([whole - part for whole, part in zip(sums, own, strict=True)]) for own in counts]
    mean = math.fsum(without) / len(without)
    return [score(sums) + (len(without) - 1) * (mean - each) for each in without]


def rouge_l(raws: Sequence[str], answers: Sequence[Sequence[str]]) -> tuple[list[float], float]:
    """F of the longest common subsequence of words with the best reference; the total is the mean."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    pairs = zip(raws, answers, strict=True)
    scores = [float(scorer.score_multi(list(of_row), raw)["rougeL"].fmeasure) for raw, of_row in pairs]
    return scores, sum(scores) / len(scores)


def cider_d(raws: Sequence[str], answers: Sequence[Sequence[str]]) -> tuple[list[float], float]:
    """CIDEr-D of every caption, and their mean; what is rare is counted over the references of these rows."""
    references = [[words(answer) for answer in of_row] for of_row in answers]
    frequency = Counter(gram for of_row in references for gram in {g for r in of_row for g in _grams(r)})
    log_rows = math.log(len(answers))
    scores: list[float] = []
    for raw, of_row in zip(raws, references, strict=True):
        given = words(raw)
        similar = [_similarity(given, wanted, frequency, log_rows) for wanted in of_row]
        scores.append(_SCALE * sum(similar) / len(similar))
    return scores, sum(scores) / len(scores)


def words(text: str) -> list[str]:
    """The words that CIDEr-D counts."""
    return _WORD.findall(text.lower().replace("’", "'"))


def _grams(sentence: Sequence[str]) -> Counter[Gram]:
    """How often each run of 1 to 4 words stands in a sentence."""
    return Counter(
        tuple(sentence[start : start + n])
        for n in range(1, _MAX_N + 1)
        for start in range(len(sentence) - n + 1)
    )


def _similarity(
    given: Sequence[str], wanted: Sequence[str], frequency: Counter[Gram], log_rows: float
) -> float:
    """Clipped cosine of the TF-IDF vectors, mean over n, times the length penalty; in [0, 1]."""
    vectors = []
    for sentence in (given, wanted):
        weights = {g: c * (log_rows - math.log(max(1, frequency[g]))) for g, c in _grams(sentence).items()}
        vectors.append([{g: w for g, w in weights.items() if len(g) == n} for n in range(1, _MAX_N + 1)])
    total = 0.0
    for own, other in zip(*vectors, strict=True):
        norm = math.sqrt(sum(w * w for w in own.values()) * sum(w * w for w in other.values()))
        if norm > 0:
            total += sum(min(w, other[g]) * other[g] for g, w in own.items() if g in other) / norm
    penalty = math.exp(-((len(given) - len(wanted)) ** 2) / (2 * _SIGMA**2))
    return penalty * total / _MAX_N
