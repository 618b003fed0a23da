"""Captions: CIDEr-D against the paper's formula in plain loops and by hand; BLEU and ROUGE-L on known values."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads.evaluation.scorers import standard_error
from workloads.evaluation.scorers.captions import bleu, bleu_parts, cider_d, rouge_l, words

sentence = st.lists(st.sampled_from("pqrst"), max_size=7).map(" ".join)
references = st.lists(sentence, min_size=1, max_size=3)
corpus = st.lists(st.tuples(sentence, references), min_size=1, max_size=5)


def grams(text, n):
    """Every run of n words, in order, repeats included."""
    split = text.split()
    return [" ".join(split[i : i + n]) for i in range(len(split) - n + 1)]


def g(text, n, every, corpus_references):
    """Equation 2 with counts: the vector over `every` n-gram of count times log(images / images that have it)."""
    vector = []
    for gram in every:
        images_with = 0
        for of_image in corpus_references:
            if any(gram in grams(reference, n) for reference in of_image):
                images_with += 1
        rarity = math.log(len(corpus_references) / max(1, images_with))
        vector.append(grams(text, n).count(gram) * rarity)
    return vector


def paper_cider_d(caption, of_image, corpus_references):
    """Equations 4 and 5: 10 / m, summed over references, clipped, penalised by length, mean over n = 1 to 4."""
    total = 0.0
    for n in (1, 2, 3, 4):
        texts = [caption, *(r for image in corpus_references for r in image)]
        every = sorted({gram for text in texts for gram in grams(text, n)})
        own = g(caption, n, every, corpus_references)
        for reference in of_image:
            other = g(reference, n, every, corpus_references)
            norms = math.sqrt(sum(x * x for x in own)) * math.sqrt(sum(x * x for x in other))
            if norms == 0:
                continue
            dot = sum(min(x, y) * y for x, y in zip(own, other, strict=True))
            longer = len(caption.split()) - len(reference.split())
            total += math.exp(-longer * longer / (2 * 6.0 * 6.0)) * dot / norms
    return 10 * total / (4 * len(of_image))


@settings(max_examples=60, deadline=None)
@given(corpus)
def test_cider_d_is_the_papers_formula(items):
    raws, answers = [raw for raw, _ in items], [of_row for _, of_row in items]
    scores, total = cider_d(raws, answers)
    wanted = [paper_cider_d(raw, of_row, answers) for raw, of_row in items]
    assert scores == pytest.approx(wanted, abs=1e-9)
    assert total == pytest.approx(sum(wanted) / len(wanted), abs=1e-9)


def first_score(raw, of_row, *others):
    """CIDEr-D of the first row of a corpus; the other rows answer nothing."""
    return cider_d([raw, *("" for _ in others)], [of_row, *others])[0][0]


def test_cider_d_of_captions_computed_by_hand():
    one, two = ["a cat sat down"], ["a dog ran off"]
    # Two images: `a` is in both and weighs log(2/2) = 0, everything else weighs L = log 2.
    # Equal sentences: the cosine is 1 for every n, there is no penalty: 10 / 4 * (1 + 1 + 1 + 1).
    assert first_score("a cat sat down", one, two) == pytest.approx(10.0, abs=1e-12)
    # `cat` against (cat, sat, down): L * L / (L * L sqrt 3); no longer n-grams; 1 word against 4: exp(-9 / 72).
    assert first_score("cat", one, two) == pytest.approx(10 / 4 / math.sqrt(3) * math.exp(-1 / 8), abs=1e-12)
    # `a` alone weighs nothing.
    assert first_score("a", one, two) == 0.0
    # Clipped: (2 L) against (L): min(2 L, L) * L / (2 L * L) = 1/2, 2 words against 1: exp(-1 / 72).
    assert first_score("cat cat", ["cat"], two) == pytest.approx(10 / 4 / 2 * math.exp(-1 / 72), abs=1e-12)
    # Two references are averaged: `cat` scores 10 / 4 with the first and 0 with the second.
    assert first_score("cat", ["cat", "fox"], two) == pytest.approx(10 / 8, abs=1e-12)
    # Three images, `cat` in two of them: it weighs log(3/2), `sat` log 3; (cat, sat) against (sat), 2 words to 1.
    rare, common = math.log(3), math.log(3 / 2)
    wanted = 10 / 4 * rare / math.hypot(rare, common) * math.exp(-1 / 72)
    assert first_score("cat sat", ["sat"], ["cat"], ["cat", "cat"]) == pytest.approx(wanted, abs=1e-12)
    # One image alone: every n-gram is in all images and weighs nothing.
    assert first_score("a cat sat down", one) == 0.0


@settings(deadline=None)
@given(sentence, corpus)
def test_no_caption_beats_the_gold_one(raw, items):
    answers = [of_row[:1] for _, of_row in items]
    gold = first_score(answers[0][0], *answers)
    assert first_score(raw, *answers) <= gold + 1e-9


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("A man's hat.", ["a", "man", "'s", "hat"]),
        ("It isn’t 3.5 m", ["it", "is", "n't", "3.5", "m"]),
        ("can't they're", ["ca", "n't", "they", "'re"]),
        ("blue-green, (1,000) dogs!", ["blue-green", "1,000", "dogs"]),
        ('"cannot" -- ...', ["cannot"]),
        ("café\nnoir", ["café", "noir"]),
        ("", []),
    ],
)
def test_captions_are_cut_into_lower_case_words_without_punctuation(text, wanted):
    assert words(text) == wanted


def test_bleu_of_a_caption_computed_by_hand():
    raw, answer = "the cat sat on a mat", "the cat sat on the mat"
    # Of 6, 5, 4, 3 n-grams 5, 3, 2, 1 are in the reference (`the cat sat on`); the lengths are equal.
    wanted = 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** (1 / 4)
    assert bleu([raw], [[answer]]) == (None, pytest.approx(wanted, abs=1e-9))
    # Short by 2 of 6 words: all n-grams match, the brevity penalty is exp(1 - 6 / 4).
    _, short = bleu(["the cat sat on"], [[answer]])
    assert short == pytest.approx(100 * math.exp(-1 / 2), abs=1e-9)


def test_bleu_takes_any_number_of_references_for_each_caption():
    raws = ["the cat sat on the mat", "a dog ran over the grass"]
    _, total = bleu(raws, [["a dog", raws[0], "no"], [raws[1]]])
    assert total == pytest.approx(100.0, abs=1e-9)


def test_rouge_l_of_a_caption_computed_by_hand():
    # The longest common subsequence of `the cat sat` and `the black cat` is `the cat`: both shares are 2/3.
    scores, total = rouge_l(["the cat sat", "dog"], [["the black cat"], ["fox", "Dog!"]])
    assert scores == pytest.approx([2 / 3, 1.0], abs=1e-12)
    assert total == pytest.approx(5 / 6, abs=1e-12)
    # Not stemmed.
    assert rouge_l(["dogs"], [["dog"]])[1] == 0.0


@settings(max_examples=60, deadline=None)
@given(corpus)
def test_parts_of_bleu_have_its_value_as_mean_and_its_jackknife_error(items):
    raws, answers = [raw for raw, _ in items], [of_row for _, of_row in items]
    parts, (_, total) = bleu_parts(raws, answers), bleu(raws, answers)
    assert sum(parts) / len(parts) == pytest.approx(total, abs=1e-9)
    if len(items) > 1:
        without = []
        for i in range(len(items)):
            _, left = bleu(raws[:i] + raws[i + 1 :], answers[:i] + answers[i + 1 :])
            without.append(left)
        middle = sum(without) / len(without)
        wanted = (len(items) - 1) / len(items) * sum((left - middle) ** 2 for left in without)
        assert standard_error(parts) == pytest.approx(math.sqrt(wanted), abs=1e-9)


def test_a_single_caption_has_no_error():
    assert bleu_parts(["a b c d e"], [["a b c d e"]]) == [pytest.approx(100.0)]
    assert standard_error([100.0]) is None
    assert standard_error([1.0, 3.0]) == pytest.approx(1.0)
