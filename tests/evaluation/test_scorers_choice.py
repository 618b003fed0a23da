"""Short answers of a known kind: tables of what is right, with the public scorers' bugs among what is not."""

import pytest

from workloads.evaluation.scorers import choice, mif


@pytest.mark.parametrize(
    ("raw", "gold", "score"),
    [
        ("Yes.", "yes", 1.0),
        ("t-shirt", "tshirt", 1.0),
        ("t shirt", "tshirt", 0.0),
        ("“dining  table”!", "dining table", 1.0),
        ("5", "$5", 1.0),
        ("on the left", "left", 0.0),
        ("", "left", 0.0),
        ("?!", "left", 0.0),
        ("", "?", 0.0),
    ],
)
def test_gqa_ignores_case_and_punctuation_only(raw, gold, score):
    assert choice.gqa(raw, gold) == score


@pytest.mark.parametrize(
    ("raw", "gold", "score"),
    [("Dan  Brown", "dan brown", 1.0), ("Dan Brown.", "dan brown", 0.0), ("", "", 0.0), ("x", "", 0.0)],
)
def test_ocr_vqa_and_ucit_ignore_case_and_blanks_only(raw, gold, score):
    assert choice.same_but_case(raw, gold) == score


@pytest.mark.parametrize(
    ("raw", "letter"),
    [
        ("A", "A"),
        (" C\n", "C"),
        ("E", "E"),
        ("F", ""),  # no option
        ("B. the moon", "B"),
        ("B.", "B"),
        ("B.the moon", "B"),
        ("b", "B"),
        ("(d)", "D"),
        ("The answer is C.", "C"),
        ("the moon", ""),
        ("BC", ""),
        ("", ""),
        ("A cat is B", "A"),
        ("I think B", ""),  # the first word of one character is I
        ("it's B", ""),  # and here it is s
        ("1 B", ""),
        ("Bees. A", "A"),
    ],
)
def test_the_option_letter_is_read_as_published(raw, letter):
    assert choice.option(raw) == letter
    assert [choice.science_qa(raw, gold) for gold in "ABCDE"] == [float(gold == letter) for gold in "ABCDE"]


@pytest.mark.parametrize(
    ("raw", "gold", "score"),
    [
        ("golden retriever", "golden retriever", 1.0),
        ("This is a Golden Retriever.", "golden retriever", 1.0),
        ("retriever", "golden retriever", 1.0),
        ("", "golden retriever", 0.0),  # CoIN's scorer says right: an empty string is part of every other
        (" . ", "golden retriever", 0.0),
        ("a", "cat", 0.0),  # as is a letter
        ("ox", "fox", 0.0),
        ("retriever golden", "golden retriever", 0.0),
        ("cat", "", 0.0),
    ],
)
def test_a_class_name_is_looked_for_in_whole_words(raw, gold, score):
    assert choice.class_name(raw, gold) == score


@pytest.mark.parametrize(
    ("raw", "gold", "score"),
    [
        ("Yes", "yes", 1.0),
        ("no.", "no", 1.0),
        ("no", "yes", 0.0),
        ("yes and no", "no", 0.0),
        ("nodule", "no", 0.0),
        ("", "no", 0.0),
    ],
)
def test_a_closed_pathology_question_wants_the_word_alone(raw, gold, score):
    assert choice.path_vqa_closed(raw, gold) == choice.path_vqa(raw, [gold]) == score


@pytest.mark.parametrize(
    ("raw", "gold", "score"),
    [
        ("it shows the left lung", "left lung", 1.0),
        ("lung", "left lung", 0.5),
        ("lung lung", "left lung", 0.5),  # a word counts as often as the gold has it
        ("Left. LUNG!", "a left lung", 1.0),
        ("two cells", "2 cells and 2 nuclei", 2 / 5),
        ("liver", "left lung", 0.0),
        ("", "left lung", 0.0),
        ("yes", "left lung", 0.0),
        ("the", "a", 1.0),  # articles only: compared as a whole
        ("", "a", 0.0),
    ],
)
def test_an_open_pathology_question_is_scored_by_recall(raw, gold, score):
    assert choice.path_vqa_open(raw, gold) == choice.path_vqa(raw, [gold]) == pytest.approx(score, abs=1e-12)


def test_every_wrong_closed_answer_counts():
    from workloads.evaluation.scorers import score_rows

    rows = [{"raw": "yes", "answer": "yes"}, {"raw": "yes", "answer": "no"}, {"raw": "lung", "answer": "no"}]
    assert score_rows("path_vqa", rows).total == pytest.approx(1 / 3, abs=1e-12)


@pytest.mark.parametrize(
    ("rule", "raw", "answers", "obeys"),
    [
        (mif.short, "dog", ["cat"], True),
        (mif.short, "hot dog", ["cat"], True),
        (mif.short, "a hot dog", ["cat"], False),
        (mif.short, "A Hot Dog", ["cat", "a hot dog"], True),
        (mif.short, "", ["cat"], False),
        (mif.short, " ", [""], False),
        (mif.caption, "A dog runs over grass.", [], True),
        (mif.caption, "A dog runs over grass. \n", [], True),
        (mif.caption, "A dog runs over grass", [], False),
        (mif.caption, "A dog runs over.", [], False),
        (mif.caption, "Dogs run.", ["A man.", "dogs run."], True),
        (mif.caption, ".", ["A dog runs over grass."], False),
        (mif.caption, "", [""], False),
        (mif.letter, "B", [], True),
        (mif.letter, " b\n", [], True),
        (mif.letter, "B.", [], False),
        (mif.letter, "AB", [], False),
        (mif.letter, "é", [], False),
        (mif.letter, "", [], False),
    ],
)
def test_an_output_obeys_the_form_that_its_instruction_asks_for(rule, raw, answers, obeys):
    assert rule(raw, answers) == float(obeys)
