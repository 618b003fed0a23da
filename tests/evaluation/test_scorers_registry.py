"""Every scorer: scores stay on its scale for any text, the gold answer is the best, rows never depend on order."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads.errors import UserError
from workloads.evaluation import scorers
from workloads.evaluation.scorers import SCORERS, TOP, find, score_rows

# What a model, or a gold answer, may well be.
LIKELY = [
    "yes",
    "No.",
    "A",
    "b. cat",
    "the",
    "3.5",
    "50%",
    "1,000",
    "[0.1, 0.2, 0.3, 0.4]",
    "a cat sat on the mat.",
    "",
]
texts = st.text(max_size=30) | st.sampled_from(LIKELY) | st.text("[]0123456789.,-e %'", max_size=30)
golds = st.lists(texts, min_size=1, max_size=4)
rows_of = st.lists(
    st.builds(lambda raw, answer: {"raw": raw, "answer": answer}, texts, texts | golds),
    min_size=1,
    max_size=5,
)
# A gold answer in the form that the scorer reads; words enough for n-grams.
GOLD = {"science_qa": "C", "grounding": "[0.1, 0.2, 0.3, 0.4]", "mif_letter": "C", "path_vqa_closed": "no"}
USUAL = "Two brown dogs run over grass."


@pytest.fixture(scope="session", autouse=True)
def libraries():
    """The caption libraries take seconds to load, which is no example's time."""
    score_rows("bleu", [{"raw": "a", "answer": "a"}])
    score_rows("rouge_l", [{"raw": "a", "answer": "a"}])


@pytest.mark.parametrize("name", SCORERS)
@settings(max_examples=40, deadline=None)
@given(rows=rows_of)
def test_any_text_has_a_score_on_the_scale(name, rows):
    scored = score_rows(name, rows)
    top = TOP[SCORERS[name].scale]
    assert scored.scale == SCORERS[name].scale
    for score in (scored.total, *(scored.rows or ())):
        assert 0.0 <= score <= top + 1e-9
    if scored.rows is not None:
        assert len(scored.rows) == len(rows)
        assert scored.total == pytest.approx(sum(scored.rows) / len(rows), abs=1e-9)
    assert all(isinstance(SCORERS[name].normalise(row["raw"]), str) for row in rows)


@pytest.mark.parametrize("name", SCORERS)
def test_gold_answers_are_right_and_empty_ones_are_wrong(name):
    gold = GOLD.get(name, USUAL)
    other = GOLD.get(name, "A small boat lies on the beach.")
    for answer in (gold, [gold], [gold] * 10):
        rows = [{"raw": gold, "answer": answer}, {"raw": other, "answer": other}]
        assert score_rows(name, rows).total == pytest.approx(TOP[SCORERS[name].scale], abs=1e-9)
    rows = [{"raw": blank, "answer": gold} for blank in ("", " ", "\n")]
    assert score_rows(name, rows).total == 0.0


@pytest.mark.parametrize("name", [name for name in SCORERS if name != "bleu"])
@settings(max_examples=25, deadline=None)
@given(rows=rows_of, data=st.data())
def test_rows_are_scored_by_what_they_hold_and_not_by_their_place(name, rows, data):
    order = data.draw(st.permutations(range(len(rows))))
    straight, shuffled = score_rows(name, rows), score_rows(name, [rows[place] for place in order])
    assert [straight.rows[place] for place in order] == pytest.approx(list(shuffled.rows), abs=1e-9)


@pytest.mark.parametrize(
    "name", [name for name, scorer in SCORERS.items() if scorer.item is not None and name != "vqa"]
)
@settings(max_examples=25, deadline=None)
@given(raw=texts, answers=golds)
def test_an_item_is_worth_its_best_reference(name, raw, answers):
    if name == "path_vqa":  # the references together decide the kind
        answers = [f"lung {answer}" for answer in answers]
    alone = [SCORERS[name].item(raw, [answer]) for answer in answers]
    assert SCORERS[name].item(raw, answers) == max(alone)


def test_versions_name_their_scorer_and_sources_are_given():
    for name, scorer in SCORERS.items():
        assert scorer.version.rpartition("-")[0] == name
        assert int(scorer.version.rpartition("-")[2]) >= 1
        assert scorer.source
    assert scorers.SCORER_VERSION == "exact-1"


def test_captions_are_on_scales_of_their_own():
    assert {name: s.scale for name, s in SCORERS.items() if s.scale != "fraction"} == {
        "bleu": "percent",
        "cider_d": "cider",
    }


def test_an_unknown_scorer_is_told_with_the_nearest():
    with pytest.raises(UserError, match="'cider' is not allowed.*did you mean 'cider_d'"):
        find("cider")


def test_scorers_load_without_the_libraries_that_only_captions_need():
    code = (
        "import sys, workloads.evaluation.scorers\n"
        "heavy = {'torch', 'ray', 'mlflow', 'numpy', 'sacrebleu', 'rouge_score', 'nltk'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
