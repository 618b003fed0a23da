"""The source `files`: every format trains, is scored and has an identity of content; mistakes are one line."""

import json
from dataclasses import replace

import pytest

from tests.data import writers
from workloads import record
from workloads.config import from_tree, to_tree
from workloads.data import sources
from workloads.data.cache import ENVIRONMENT_KEY
from workloads.errors import UserError
from workloads.identity import fingerprint, identity
from workloads.run import run


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_KEY, str(tmp_path_factory.mktemp("cache")))


def tree(root, domain, **data):
    return {
        "adapter": {"name": "lora", "rank": 1},
        "data": {
            "source": "files", "root": str(root), "domains": {"d": domain}, "mixture": {"d": 1}, "samples": 4, **data
        },
        "optim": {"global_batch": 4},
        "eval": {"samples": 2, "max_new_tokens": 2},
        "execution": {"micro_batch": 4},
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(writers.WRITERS))
def test_a_run_takes_a_step_on_every_format_and_answers_its_test_split(name, tmp_path):
    config = from_tree(tree(tmp_path / "set", writers.WRITERS[name](tmp_path / "set")))
    assert from_tree(to_tree(config)) == config
    result = run(config, lambda metrics, folder: None, tmp_path / "run")
    assert (result.num_steps, result.num_samples, result.num_rejected) == (1, 4, 0)
    assert result.scores["d"].num_items == 2
    assert result.identity["data"].startswith("files-")
    rows = [json.loads(line) for line in (tmp_path / "run" / record.PREDICTIONS).read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["what is this ?"] * 2


def test_places_leave_the_fingerprint_and_contents_change_it(tmp_path):
    prints = []
    for place in ("one", "two"):
        domain = writers.llava_json(tmp_path / place)
        (tmp_path / place / "train.json").rename(tmp_path / place / f"{place}.json")
        prints.append(fingerprint(from_tree(tree(tmp_path / place, {**domain, "train": f"{place}.json"}))))
    assert prints[0] == prints[1]
    writers.dump(tmp_path / "two" / "two.json", [writers.talk(i + 1) for i in range(12)])
    assert fingerprint(from_tree(tree(tmp_path / "two", {**domain, "train": "two.json"}))) != prints[0]


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"temperature": 2.0}, False), ({"tokens": 50}, False), ({"caps": {"d": 5}}, False), ({"samples": 0}, False),
        ({"upsample": "cycle"}, False), ({"max_rejected": 0.5}, True),
    ],
)  # fmt: skip
def test_what_changes_a_stream_changes_the_fingerprint(change, same, tmp_path):
    domain = writers.llava_json(tmp_path)
    before, after = (fingerprint(from_tree(tree(tmp_path, domain, **part))) for part in ({}, change))
    assert (before == after) == same


def test_the_scorers_of_domains_enter_the_identity(tmp_path):
    domain = writers.llava_json(tmp_path)
    plain, scored = (from_tree(tree(tmp_path, {**domain, **part})) for part in ({}, {"scorer": "anls"}))
    assert identity(plain)["scorer"] == "exact-1"
    assert identity(scored)["scorer"] == "anls-1"
    assert identity(plain)["data"] == identity(scored)["data"]


def test_domains_that_no_run_reads_change_no_fingerprint(tmp_path):
    domain = writers.llava_json(tmp_path)
    config = from_tree(tree(tmp_path, domain))
    more = {"d": config.data.domains["d"], "unseen": replace(config.data.domains["d"], test="")}
    assert fingerprint(replace(config, data=replace(config.data, domains=more))) == fingerprint(config)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mixture": {"e": 1}}, ["data.mixture.e", "known keys: d"]),
        ({"samples": 13}, ["data.samples", "13 of d", "12"]),
        ({"caps": {"d": 3}}, ["data.samples", "4 of d", "3"]),
        ({"domains": {}}, ["data.domains", "at least one"]),
        ({"source": "pocket"}, ["data.source", "'files'"]),
        ({"domains": {"a/b": {"format": "coin", "train": "x"}}}, ["data.domains", "'a/b'"]),
        ({"domains": {"d": 3}}, ["data.domains.d", "3"]),
        ({"caps": {"e": 3}}, ["data.caps.e"]),
        ({"temperature": -1}, ["data.temperature", "-1"]),
        ({"samples": 0, "temperature": 2}, ["data.temperature"]),
        ({"samples": 0, "upsample": "repeat"}, ["data.upsample"]),
    ],
)
def test_a_mistake_in_data_is_told_in_one_line(change, words, tmp_path):
    with pytest.raises(UserError) as error:
        sources.check(from_tree(tree(tmp_path, writers.llava_json(tmp_path), **change)))
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_a_domain_without_a_training_split_is_only_scored(tmp_path):
    domain = writers.llava_json(tmp_path / "set")
    config = tree(tmp_path / "set", domain)
    config["data"]["domains"]["unseen"] = {**domain, "train": ""}
    result = run(from_tree(config), lambda metrics, folder: None, tmp_path / "run")
    assert set(result.scores) == {"d", "unseen"}
    assert result.scores["unseen"].majority is None
