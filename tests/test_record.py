"""Records and events survive the disk exactly, and a kill leaves whole files."""

import dataclasses
import json

import pytest

from workloads import record
from workloads.errors import UserError
from workloads.record import Cost, DomainScore, RunRecord

COST = Cost(
    seconds=1.5, train_seconds=1.0, eval_seconds=0.5, samples_per_second=10.0, tokens_per_second=99.0,
    peak_bytes=7, trainable=5, adapter_weights=4, adapter_active=3,
)  # fmt: skip


def example():
    score = DomainScore(score=0.1 + 0.2, num_items=3, loss=1.0, by_type={"name": (0.5, 2)}, majority=0.25)
    return RunRecord(
        fingerprint="f" * 16, name="n", seed=1, config={"a": {"b": 1}}, identity={"model": "m"},
        environment={"python": "3"}, capabilities={"mergeable": True}, stream_hash="s", eval_hash="e",
        sample_shares={"general": 1.0}, token_shares={"general": 1.0}, num_steps=2, num_samples=32,
        num_rejected=0, train_loss={"general": 0.3}, scores={"general": score}, cost=COST,
    )  # fmt: skip


def test_a_record_survives_the_disk_exactly(tmp_path):
    record.save(example(), tmp_path)
    assert record.is_finished(tmp_path)
    assert record.load(tmp_path) == example()


@pytest.mark.parametrize("other", [0, 2, "1", None])
def test_an_older_or_newer_schema_is_told_in_one_line(other, tmp_path):
    record.save(example(), tmp_path)
    tree = json.loads((tmp_path / record.RECORD).read_text())
    (tmp_path / record.RECORD).write_text(json.dumps({**tree, "schema_version": other}))
    with pytest.raises(UserError) as error:
        record.load(tmp_path)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / record.RECORD}: schema_version: {other!r} is not allowed")
    assert message.endswith("reads 1")
    assert "\n" not in message


def test_a_record_that_is_no_object_is_told_in_one_line(tmp_path):
    (tmp_path / record.RECORD).write_text("[]")
    with pytest.raises(UserError, match=r"record\.json: schema_version: None is not allowed"):
        record.load(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_no_partial_one(tmp_path):
    record.write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(ValueError, match="nan|NaN|Out of range"):
        record.write_json(tmp_path / "x.json", {"a": float("nan")})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_an_event_line_cut_by_a_kill_is_left_out(tmp_path):
    record.append_event(tmp_path, {"event": "train", "step": 1})
    with (tmp_path / record.EVENTS).open("a") as file:
        file.write('{"event": "tr')
    assert [event["step"] for event in record.read_events(tmp_path)] == [1]


def test_a_record_that_names_no_scorer_is_of_exact_match_on_a_fraction(tmp_path):
    record.save(example(), tmp_path)
    tree = json.loads((tmp_path / record.RECORD).read_text())
    old = ("score", "num_items", "loss", "by_type", "majority")
    tree["scores"]["general"] = {key: tree["scores"]["general"][key] for key in old}
    (tmp_path / record.RECORD).write_text(json.dumps(tree))
    score = record.load(tmp_path).scores["general"]
    assert (score.scorer, score.scorer_version, score.scale) == ("exact", "exact-1", "fraction")
    assert (score.score, score.error) == (0.1 + 0.2, None)


def test_scores_on_several_scales_have_no_mean():
    one = example().scores["general"]
    other = dataclasses.replace(one, score=0.5)
    assert record.mean_score({"a": one, "b": other}) == ((0.1 + 0.2) + 0.5) / 2
    captions = dataclasses.replace(one, score=1.2, scorer="cider_d", scale="cider")
    assert record.mean_score({"a": one, "b": captions}) is None
    assert record.mean_score({"b": captions}) == 1.2
    told = record.no_mean({"a": one.scale, "b": captions.scale})
    assert told.endswith("scales differ: a 0 to 1 (fraction), b 0 to 10 (cider)")
