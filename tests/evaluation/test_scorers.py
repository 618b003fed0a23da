"""Scorers: equal up to blanks and nothing else; the majority answer is what counting by hand gives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workloads.evaluation.scorers import exact, majority, normalise

BLANKS = " \t\n\r\x0b\x0c\x1c\x1f\x85\u00a0\u2003\u2028\u3000"
blanks = st.text(st.sampled_from(BLANKS), min_size=1)


def squeezed(text):
    """Character by character: every run of blanks is one space, none at either end."""
    out = ""
    for character in text:
        if not character.isspace():
            out += character
        elif out and out[-1] != " ":
            out += " "
    return out[:-1] if out.endswith(" ") else out


@given(st.text() | st.text(st.sampled_from(BLANKS + "aB")))
def test_normalising_squeezes_blanks_and_nothing_else(text):
    assert normalise(text) == squeezed(text)
    assert normalise(normalise(text)) == normalise(text)
    assert [c for c in normalise(text) if c != " "] == [c for c in text if not c.isspace()]


@given(st.text(st.sampled_from("aB1 \u00a0"), max_size=6), st.text(st.sampled_from("aB1 \u00a0"), max_size=6))
def test_a_score_is_1_exactly_for_equal_answers_that_are_not_empty(raw, gold):
    wanted = squeezed(raw) == squeezed(gold) != ""
    assert exact(raw, gold) == float(wanted) == exact(gold, raw)


@given(st.lists(st.text("aB1", min_size=1), min_size=1, max_size=4), st.lists(blanks, min_size=5, max_size=5))
def test_blanks_around_and_between_words_change_no_score(parts, gaps):
    padded = gaps[0] + "".join(word + gap for word, gap in zip(parts, gaps[1:], strict=False))
    assert exact(padded, " ".join(parts)) == 1.0


@pytest.mark.parametrize(
    ("raw", "gold"),
    [
        ("cat", "CAT"),  # capitals mark transcriptions
        ("CAT", "CAT."),
        ("topleft", "top left"),
        ("left top", "top left"),
        ("4 4", "44"),
        ("o", "0"),
        ("l", "1"),
        ("04", "4"),
        ("4", "4.0"),
        ("boot\u200b", "boot"),  # a zero-width space is no blank
        ("caf\u00e9", "cafe\u0301"),  # composed and decomposed
        ("stra\u00dfe", "strasse"),
        ("A", "\u0391"),  # Latin and Greek
        ("boot boot", "boot"),
        ("", ""),
        (" \u00a0\n", "\t"),
        ("", "boot"),
        ("boot", ""),
    ],
)
def test_answers_that_only_look_alike_score_0(raw, gold):
    assert exact(raw, gold) == 0.0


@given(
    st.lists(st.tuples(st.sampled_from("pqr"), st.sampled_from(["no", "yes", "Yes", "maybe"])), max_size=30)
)
def test_the_majority_is_counted_and_ties_go_to_the_alphabet(pairs):
    wanted = {}
    for question in {q for q, _ in pairs}:
        given_answers = sorted(a for q, a in pairs if q == question)
        best = given_answers[0]
        for answer in given_answers:
            if given_answers.count(answer) > given_answers.count(best):
                best = answer
        wanted[question] = best
    assert majority([q for q, _ in pairs], [a for _, a in pairs]) == wanted


def test_a_question_without_an_answer_is_an_error():
    with pytest.raises(ValueError):
        majority(["what ?", "where ?"], ["here"])
