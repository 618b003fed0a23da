"""Forms of answers: gold answers have their task's, other registers have not, and MIF is a plain mean of shares."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workloads.data.pocket_tasks import NEVER_TRAINED, TASKS, TRAINED, compose
from workloads.data.sources import of as source_of
from workloads.errors import UserError
from workloads.evaluation import forms
from workloads.schema import DataConfig, DomainConfig

KNOWN = forms.of({"source": "pocket_tasks"})


def obeys(form, raw, answers=()):
    return forms.FORMS[form](raw, answers) == 1.0


def samples(task):
    return [compose(task, split, 0, index) for split in ("train", "val", "test") for index in range(60)]


def test_every_task_that_is_trained_has_a_form_and_no_other():
    assert sorted(KNOWN) == sorted(TRAINED)
    assert forms.of({"source": "pocket_tasks_plain"}) == KNOWN
    assert not set(NEVER_TRAINED) & set(KNOWN)
    assert forms.of({"source": "pocket"}) == forms.of({}) == {}


@pytest.mark.parametrize("task", TRAINED)
def test_gold_answers_have_their_tasks_form_and_no_other_tasks(task):
    others = {form for form in KNOWN.values() if form != KNOWN[task]}
    for sample in samples(task):
        assert obeys(KNOWN[task], f" {sample.answer}\n")
        assert not any(obeys(form, sample.answer) for form in others)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("emoji", lambda facts: facts.name),
        ("plane", lambda facts: facts.plane),
        ("word", lambda facts: facts.name),
        ("items", lambda facts: f"n{facts.count}"),
        ("receipt", lambda facts: str(facts.total)),
        ("chart", lambda facts: facts.largest),
    ],
)
def test_what_the_base_says_has_another_form(task, said):
    for sample in samples(task):
        assert not obeys(KNOWN[task], said(sample.facts))


@pytest.mark.parametrize("form", sorted(set(forms.FORMS) - {"caption"}))
def test_no_output_has_no_form_and_a_long_one_neither(form):
    assert not obeys(form, "")
    assert not obeys(form, " \n")
    assert not obeys(form, "well it is hard to say")


@pytest.mark.parametrize(
    ("form", "raw"),
    [("word", "boot"), ("code", "e99"), ("number", "7"), ("spelled", "X Y"), ("total", "the total is 0")],
)
def test_a_wrong_answer_may_have_the_form(form, raw):
    assert obeys(form, raw)
    assert not obeys(form, f"{raw}.")


def test_forms_of_files_are_those_named_and_in_cvit_those_of_their_scorers():
    domains = {
        "named": {"format": "llava_json", "scorer": "vqa", "form": "letter"},
        "none": {"format": "llava_json", "scorer": "vqa", "form": ""},
        "sqa": {"format": "cvit", "scorer": "science_qa"},
        "flickr": {"format": "cvit", "scorer": "cider_d", "form": ""},
        "gqa": {"format": "cvit", "scorer": "gqa"},
        "boxes": {"format": "cvit", "scorer": "grounding"},
        "other": {"format": "cvit", "scorer": "gqa", "form": "caption"},
    }
    found = forms.of({"source": "files", "domains": domains})
    wanted = {"named": "letter", "sqa": "letter", "flickr": "caption", "gqa": "short", "other": "caption"}
    assert found == wanted


def test_an_unknown_form_is_told_in_one_line():
    data = DataConfig(source="files", domains={"a": DomainConfig(format="cvit", train="a.json", form="shrt")})
    with pytest.raises(
        UserError, match=r"^data.domains.a.form: 'shrt' is not allowed; .*did you mean 'short'\?$"
    ):
        source_of(data)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["x", "x y z", ""])), max_size=30))
def test_shares_and_their_mean_are_those_of_a_plain_count(said):
    rows = [{"domain": domain, "raw": raw, "answer": ["g"]} for domain, raw in said]
    found = forms.shares({"a": "short", "b": "short"}, rows)
    parts = {"one": ["a"], "both": ["a", "b"]}
    slow = {}
    for domain in "ab":
        mine = [raw for own, raw in said if own == domain]
        if mine:
            slow[domain] = mine.count("x") / len(mine)
    assert found == slow
    if len(slow) == 2:
        both = (slow["a"] + slow["b"]) / 2
        assert forms.by_task(found, parts) == pytest.approx({"one": slow["a"], "both": both})
        assert forms.mean(found, parts) == pytest.approx((slow["a"] + both) / 2)
    else:
        assert forms.mean(found, parts) is None


def test_every_packaged_task_is_one_of_its_source():
    assert set(KNOWN) <= set(TASKS)
