"""VQA accuracy: the official normalisation on its published cases; leaving each of the people out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workloads.evaluation.scorers import vqa


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        ("Yes", "yes"),
        ("a dog", "dog"),
        ("The the an A", ""),
        ("two dogs", "2 dogs"),
        ("none", "0"),
        ("twenty", "twenty"),
        ("ten.", "10"),
        ("3.5", "3.5"),  # a point before a digit stays
        ("3.", "3"),
        ("St. Louis", "st louis"),
        ("U.S.A.", "usa"),
        (".5", ".5"),
        ("1,000", "1000"),  # a comma between digits is dropped,
        ("1,000 red/blue", "1000 redblue"),  # and with it every mark of the answer
        ("red,blue", "red blue"),  # a mark between letters is a blank
        ("red, blue", "red blue"),  # a mark beside a blank is dropped
        ("red , blue-green", "red blue green"),
        ("red-blue -green", "redblue green"),  # the rule is for all of that mark
        ("what?", "what"),
        ("$5", "$5"),  # no mark of the official table
        ("it's", "it's"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),  # two apostrophes missing is not in the table
        ("oclock", "o'clock"),
        ("Im", "im"),  # its entry has a capital, which never meets a lower-cased word
        ("shes", "shes"),
        ("somebody'd", "somebodyd"),
        (" a\tcat\n sat ", "cat sat"),
    ],
)
def test_answers_are_normalised_as_the_official_evaluation_does(raw, wanted):
    assert vqa.normalise(raw) == wanted


@pytest.mark.parametrize(
    ("agree", "score"),
    # Of 10 people `agree` gave the answer. One who agrees leaves agree - 1 others, one who does not leaves all:
    # (agree * min(1, (agree - 1) / 3) + (10 - agree) * min(1, agree / 3)) / 10.
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (7, 1.0), (10, 1.0)],
)
def test_the_published_table_of_ten_people(agree, score):
    answers = ["Two."] * agree + ["cat"] * (10 - agree)
    assert vqa.accuracy("2", answers) == pytest.approx(score, abs=1e-12)


def leaving_one_out(given_answer, answers):
    scores = []
    for left_out in range(len(answers)):
        matches = 0
        for person, answer in enumerate(answers):
            if person != left_out and answer == given_answer:
                matches += 1
        scores.append(min(1.0, matches / 3))
    return sum(scores) / len(scores)


@given(st.sampled_from("pqr"), st.lists(st.sampled_from("pqrs"), min_size=2, max_size=12))
def test_accuracy_is_the_mean_over_people_left_out(raw, answers):
    assert vqa.accuracy(raw, answers) == pytest.approx(leaving_one_out(raw, answers), abs=1e-12)


def test_people_who_all_agree_are_normalised_too():
    assert vqa.accuracy("Yes.", ["yes"] * 10) == 1.0
    assert vqa.accuracy("yes", ["Yes!"] * 10) == 1.0


def test_a_single_reference_is_compared_directly():
    assert vqa.accuracy("two", ["2"]) == 1.0
    assert vqa.accuracy("three", ["2"]) == 0.0


@pytest.mark.parametrize("raw", ["", " ", "\n\t"])
def test_an_empty_answer_is_wrong_even_where_the_gold_answer_is_an_article(raw):
    assert vqa.accuracy(raw, ["a"] * 10) == 0.0
    assert vqa.accuracy("a", ["a"] * 10) == 1.0
