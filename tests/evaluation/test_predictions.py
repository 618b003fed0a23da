"""A predictions file is scored from itself alone; scales are never mixed; bad lines are one clear line each."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads.errors import UserError
from workloads.evaluation import predictions
from workloads.evaluation.predictions import read, rescore


def row(name, domain="general", kind="count", answer="4", raw="4", **more):
    return {"id": name, "domain": domain, "question_type": kind, "raw": raw, "answer": answer, **more}


@pytest.fixture
def written(tmp_path):
    def write(*rows):
        path = tmp_path / "predictions.jsonl"
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
        return path

    return write


def test_scores_are_means_by_domain_and_question_type(written):
    found = rescore(
        read(
            written(
                row("1", score=1.0),
                row("2", raw="5", score=0.0),
                row("3", kind="name", raw="boot", answer="boot", score=1.0),
                row("4", domain="document", kind="name", raw="x", answer=["y", "z"], score=0.0),
            )
        )
    )
    document, general = found.groups
    assert (document.domain, document.score, document.num_items) == ("document", 0.0, 1)
    assert (general.domain, general.num_items, general.scorer) == ("general", 3, "exact")
    assert general.score == pytest.approx(2 / 3, abs=1e-12)
    assert general.by_type == {"count": (0.5, 2), "name": (1.0, 1)}
    assert found.mean == pytest.approx(1 / 3, abs=1e-12)  # over domains, not over items
    assert (found.num_items, found.num_compared, found.differences) == (4, 4, ())


def test_a_recorded_score_that_is_another_one_is_told(written):
    found = rescore(read(written(row("1", score=0.0), row("2", score=1), row("3"))))
    assert found.num_compared == 2
    (difference,) = found.differences
    assert (difference.id, difference.recorded, difference.recomputed) == ("1", 0.0, 1.0)


def test_rows_name_their_scorer_by_name_or_version_and_scales_are_not_averaged(written):
    caption = {"domain": "flickr", "kind": "caption", "scorer": "cider_d-1"}
    path = written(
        row("1", scorer="vqa", raw="Two", answer=["2"] * 10),
        row("1", raw="a dog ran far away", answer=["a dog ran far away"], **caption),
        row("2", raw="one cat sat here", answer=["one cat sat here", "a cat"], **caption),
    )
    found = rescore(read(path))
    flickr, general = found.groups
    assert (flickr.version, flickr.scale, general.version) == ("cider_d-1", "cider", "vqa-1")
    assert general.score == 1.0
    assert flickr.score > 1.0
    assert flickr.by_type["caption"] == (pytest.approx(flickr.score), 2)
    assert found.mean is None
    one_scale = rescore(read(path), "rouge_l")
    assert one_scale.mean == pytest.approx(sum(group.score for group in one_scale.groups) / 2, abs=1e-12)


def test_a_domain_of_two_scorers_counts_once_in_the_mean(written):
    rows = [row(str(i), kind="closed", scorer="path_vqa_closed", raw="yes", answer="yes") for i in range(3)]
    rows += [row("9", kind="open", scorer="path_vqa_open", raw="lung", answer="left lung")]
    rows += [row("1", domain="other", raw="x")]
    found = rescore(read(written(*rows)))
    assert [(g.domain, g.scorer, g.score) for g in found.groups] == [
        ("general", "path_vqa_closed", 1.0),
        ("general", "path_vqa_open", 0.5),
        ("other", "exact", 0.0),
    ]
    assert found.mean == pytest.approx((3.5 / 4 + 0) / 2, abs=1e-12)


def test_a_score_of_the_whole_is_computed_for_each_question_type_alone(written):
    good, bad = "a dog ran far away", "one cat sat here today"
    rows = [row("1", kind="p", raw=good, answer=good), row("2", kind="q", raw=good, answer=bad)]
    (group,) = rescore(read(written(*rows)), "bleu").groups
    assert group.by_type["p"] == (pytest.approx(100.0), 1)
    assert group.by_type["q"][0] < group.score < 100.0


def test_scores_by_another_scorer_or_of_no_single_row_are_not_compared(written):
    rows = [row("1", score=0.25, scorer="anls"), row("2", score=0.5)]
    assert rescore(read(written(*rows)), "exact").num_compared == 1
    assert rescore(read(written(*rows)), "bleu").num_compared == 0


def test_versions_that_are_gone_are_told_and_compared(written):
    found = rescore(read(written(row("1", scorer="vqa-0", score=0.0), row("2", scorer="vqa-1", score=1.0))))
    assert found.outdated == ("vqa-0",)
    assert (found.num_compared, len(found.differences)) == (2, 1)


def test_the_same_id_in_two_domains_is_two_items(written):
    assert len(read(written(row("1"), row("1", domain="document")))) == 2


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"id": "2", "domain": "gen', "line 2: not a JSON object, or cut off"),
        ("[1, 2]", "line 2: not a JSON object"),
        ("null", "line 2: not a JSON object"),
        ("[" * 100_000, "line 2: not a JSON object, or cut off"),
        (json.dumps(row("1")), "line 2: item '1' of 'general' is there twice, first on line 1"),
        (json.dumps({k: v for k, v in row("2").items() if k != "raw"}), "line 2: no 'raw'"),
        (json.dumps({k: v for k, v in row("2").items() if k != "answer"}), "line 2: no 'answer'"),
        (json.dumps(row("2", raw=None)), "line 2: 'raw' is not a string"),
        (json.dumps(row(2)), "line 2: 'id' is not a string"),
        (json.dumps(row("2", answer=[])), "line 2: 'answer' is not a string or a list of strings"),
        (json.dumps(row("2", answer=["x", 1])), "line 2: 'answer' is not a string or a list of strings"),
        (json.dumps(row("2", domain="\ud800")), "line 2: 'domain' is not a string"),
        (json.dumps(row("2", score="1")), "line 2: 'score' is not a number"),
        (json.dumps(row("2", score=float("nan"))), "line 2: 'score' is not a number"),
        (json.dumps(row("2", score=10**400)), "line 2: 'score' is not a number"),
        (json.dumps(row("2", scorer="vqaa")), "line 2: unknown scorer 'vqaa'; did you mean 'vqa'?"),
        (json.dumps(row("2", scorer=None)), "line 2: 'scorer' is not a string"),
    ],
)
def test_a_bad_line_is_named(written, line, words):
    path = written(row("1"))
    with path.open("a") as file:
        file.write(line)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value) == f"{path} {words}"


def test_bytes_that_are_no_text_are_named(written):
    path = written(row("1"))
    path.write_bytes(path.read_bytes() + b'\n{"id": "\xff"}\n')
    with pytest.raises(UserError, match="line 3: not UTF-8"):
        read(path)


def test_a_file_that_is_empty_or_not_there_is_one_line(written, tmp_path):
    with pytest.raises(UserError, match="no predictions"):
        read(written())
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            read(path)


def test_an_unknown_scorer_is_a_mistake_of_the_option():
    with pytest.raises(UserError, match="--scorer: 'anl' is not allowed.*did you mean 'anls'"):
        rescore([row("1")], "anl")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
keys = ("id", "domain", "question_type", "raw", "answer", "score", "scorer")
objects = st.fixed_dictionaries({}, optional=dict.fromkeys(keys, st.text(max_size=3) | values))
likely = st.builds(row, st.text(max_size=3), raw=st.text(max_size=5), answer=st.text(max_size=5) | values)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        (objects | likely).map(lambda tree: json.dumps(tree).encode()) | st.binary(max_size=20), max_size=4
    )
)
def test_any_file_is_scored_or_refused_in_one_line(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(b"\n".join(lines))
    refusal = ""
    try:
        rows = read(path)
    except UserError as error:
        refusal, rows = str(error), []
    assert len(refusal.splitlines()) == (0 if rows else 1)
    if rows:
        assert sum(group.num_items for group in predictions.rescore(rows, "exact").groups) == len(rows)
