"""A run scores every domain by its own scorer, and its predictions file alone gives the same numbers again."""

import json
import math

import pyarrow as pa
import pytest
from pyarrow import parquet
from sacrebleu.metrics import BLEU
from typer.testing import CliRunner

from orchestrator.__main__ import app
from tests.data.writers import picture
from workloads import record
from workloads.config import from_tree
from workloads.data.cache import ENVIRONMENT_KEY
from workloads.evaluation import predictions
from workloads.run import run

NUM_ITEMS = 6


def table(references, start):
    """Questions about one-coloured pictures; references are a list of texts for each row."""
    return pa.table(
        {
            "image": [
                {"bytes": picture(10 * (i % 4)), "path": f"{start + i}.png"} for i in range(len(references))
            ],
            "question": ["what is this ?", "which side is the mark on ?"] * (len(references) // 2),
            "answers": references,
            "question_type": ["what", "which"] * (len(references) // 2),
        }
    )


# Domain -> scorer, references of the training and of the test rows. The usual training answer is `boot`.
SPOKEN = {
    "document": ("anls", [["boot"]] * 8, [["booty"], ["x"], ["boots", "y"], ["z"], ["boot"], ["q"]]),
    "general": ("vqa", [["boot"]] * 8, [["boot"] * 3 + ["shoe"] * 7] * 4 + [["cat"] * 10] * 2),
    "flickr": (
        "bleu",
        [["a dog runs over the grass"]] * 8,
        [[f"a dog runs over grass {i}", "one dog runs on green grass ."] for i in range(NUM_ITEMS)],
    ),
    "captions": ("cider_d", [["the cat sat"]] * 8, [[f"cat {i} sat here", "it sat"] for i in range(NUM_ITEMS)]),
    "books": ("ocr_vqa", [["boot"]] * 8, [["BOOT"], ["x"], ["Boot"], ["y"], ["z"], ["boot"]]),
}  # fmt: skip
# Said in turn, instead of what a model of two steps would say.
SAID = ["boot", "a dog runs over grass", "shoe", "cat 3 sat here", "z", "one dog runs on green grass ."]
RUNS = {
    "mixed": ("document", "general", "flickr"),
    "captions": ("captions", "flickr"),
    "plain": ("document", "general", "books"),
}


@pytest.fixture(scope="module", params=RUNS)
def done(request, tmp_path_factory):
    """Record, rows and events of a run of two steps whose answers are made up, and its folder."""
    root = tmp_path_factory.mktemp(request.param)
    names, domains = RUNS[request.param], {}
    for name in names:
        scorer, train, test = SPOKEN[name]
        parquet.write_table(table(train, 0), root / f"{name}-train.parquet")
        parquet.write_table(table(test, 100), root / f"{name}-test.parquet")
        domains[name] = {
            "format": "parquet", "train": f"{name}-train.parquet", "test": f"{name}-test.parquet",
            "scorer": scorer,
        }  # fmt: skip
    trained = (
        {**domains, names[0]: {**domains[names[0]], "train": ""}} if request.param == "plain" else domains
    )
    tree = {
        "adapter": {"name": "lora", "rank": 1},
        "data": {
            "source": "files", "root": str(root), "domains": trained, "mixture": {names[1]: 1}, "samples": 4,
        },
        "optim": {"global_batch": 2},
        "eval": {"samples": NUM_ITEMS, "max_new_tokens": 2},
        "execution": {"micro_batch": 2, "eval_batch": 4},
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENVIRONMENT_KEY, str(tmp_path_factory.mktemp("cache")))
        if request.param != "plain":
            said = iter(SAID * 20)
            patch.setattr("workloads.llava.prompt.Prompter.decode", lambda self, ids: next(said))
        result = run(from_tree(tree), lambda metrics, folder: None, root / "run")
    rows = [json.loads(line) for line in (root / "run" / record.PREDICTIONS).read_text().splitlines()]
    return names, result, rows, list(record.read_events(root / "run")), root / "run"


def test_every_domain_is_scored_by_its_own_scorer_against_all_references(done):
    names, result, rows, _, _ = done
    assert list(result.scores) == sorted(names)
    assert len(rows) == NUM_ITEMS * len(names)
    for row in rows:
        scorer, _, test = SPOKEN[row["domain"]]
        wanted = [references for references in test if references in (row["answer"], [row["answer"]])]
        assert wanted
        assert row["scorer"] == f"{scorer}-1"
        assert {"id", "domain", "question_type", "prompt", "answer", "raw", "normalised"} < row.keys()
        assert ("score" in row, "value" in row) == (scorer != "bleu", scorer == "bleu")


def test_the_file_alone_gives_the_records_numbers_again(done):
    _, result, rows, _, folder = done
    found = predictions.rescore(predictions.read(folder / record.PREDICTIONS))
    assert (found.num_compared, found.differences, found.outdated) == (len(rows), (), ())
    for group in found.groups:
        score = result.scores[group.domain]
        assert (score.score, score.num_items, score.by_type) == (group.score, group.num_items, group.by_type)
        assert (score.scorer, score.scorer_version, score.scale) == (group.scorer, group.version, group.scale)
        assert score.error == group.error
    assert found.mean == record.mean_score(result.scores)
    assert record.load(folder) == result


def test_the_command_gives_the_records_numbers_again(done):
    _, result, _, _, folder = done
    told = CliRunner().invoke(app, ["score", str(folder / record.PREDICTIONS), "--json"])
    groups = {group["domain"]: group for group in json.loads(told.stdout)["groups"]}
    assert {domain: group["score"] for domain, group in groups.items()} == {
        domain: score.score for domain, score in result.scores.items()
    }


def test_bleu_is_that_of_all_captions_at_once(done):
    names, result, rows, _, _ = done
    if "flickr" in names:
        mine = [row for row in rows if row["domain"] == "flickr"]
        streams = [list(each) for each in zip(*(row["answer"] for row in mine), strict=True)]
        wanted = BLEU(force=True).corpus_score([row["raw"] for row in mine], streams).score
        assert result.scores["flickr"].score == pytest.approx(wanted)
        assert wanted > 1
        assert sum(row["value"] for row in mine) / NUM_ITEMS == pytest.approx(wanted)


def test_errors_are_those_of_the_items(done):
    _, result, rows, _, _ = done
    for domain, score in result.scores.items():
        values = [row.get("score", row.get("value")) for row in rows if row["domain"] == domain]
        mean = sum(values) / len(values)
        spread = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
        assert score.error == pytest.approx(math.sqrt(spread / len(values)))


def test_a_mean_is_told_only_where_all_domains_share_a_scale(done):
    names, result, _, events, _ = done
    event = events[-1]
    assert event["event"] == "eval"
    assert {f"score/{name}" for name in names} <= event.keys()
    if len({score.scale for score in result.scores.values()}) == 1:
        mean = sum(event[f"score/{name}"] for name in sorted(names)) / len(names)
        assert event["score"] == pytest.approx(mean)
        assert "no_mean" not in event
    else:
        assert "score" not in event
        assert event["no_mean"].startswith("no mean over domains, since their scales differ: ")
        assert "flickr 0 to 100 (percent)" in event["no_mean"]
    for name, score in result.scores.items():
        assert event.get(f"scale/{name}", "fraction") == score.scale


# One edit of five letters leaves 0.8, one of four is 4 / 5; three of ten people make 0.9 by leaving one out.
MAJORITY = {"document": (4 / 5 + 4 / 5 + 1) / 6, "general": 4 * 0.9 / 6, "books": 3 / 6}


def test_majority_is_by_the_domains_scorer_where_there_are_usual_answers(done):
    names, result, rows, _, _ = done
    for name in names:
        found = result.scores[name].majority
        if SPOKEN[name][0] in ("bleu", "cider_d") or (names == RUNS["plain"] and name == names[0]):
            assert found is None
        else:
            assert found == pytest.approx(MAJORITY[name])
