"""One sweep by the command line, from a LLaVA-1.5 checkpoint and every source of data, and what a user reads of it."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from pyarrow import parquet
from transformers import AutoProcessor
from typer.testing import CliRunner

from dashboards.load import compare
from dashboards.units import NO_MEAN
from orchestrator.__main__ import app
from orchestrator.store import Store
from tests.data import writers
from tests.llava import checkpoints
from workloads import adapters, record
from workloads.config import ModelConfig
from workloads.identity import model_hash
from workloads.llava.build import build
from workloads.run import RunRecord

REPO = Path(__file__).parents[2]
NAME, ITEMS, SAMPLES, BATCH, NEW_TOKENS = "sources", 3, 128, 8, 24
# Formats whose writers share no path: one run trains on all of them.
TOGETHER = ("coin", "cvit", "ucit", "parquet", "hub")
# Domain -> scorer, its version and its scale.
SCORED = {
    "llava_json": ("exact", "exact-1", "fraction"),
    "coin": ("science_qa", "science_qa-1", "fraction"),
    "cvit": ("cider_d", "cider_d-1", "cider"),
    "ucit": ("cider_d", "cider_d-1", "cider"),
    "prism": ("exact", "exact-1", "fraction"),
    "parquet": ("relaxed", "relaxed-1", "fraction"),
    "hub": ("relaxed", "relaxed-1", "fraction"),
    **dict.fromkeys(("general", "word", "bars"), ("exact", "exact-1", "fraction")),
}
# Domain -> references of its first item, which the other items do not have.
REFERENCES = {
    "llava_json": "thing 0",
    "coin": "A",
    "cvit": ["a thing 0 .", "it ."],
    "ucit": ["caption 0 of 0", "caption 1 of 0"],
    "prism": "thing 0",
    "parquet": ["thing 0", "things 0"],
    "hub": ["thing 0", "things 0"],
}
# Arm on packaged data -> its source, what it trains on and what it is scored on.
PACKAGED = {
    "pocket": ("pocket", "general", ["general"]),
    "pocket_tasks": ("pocket_tasks", "word", ["word", "bars"]),
    "pocket_tasks_plain": ("pocket_tasks_plain", "word", ["word", "bars"]),
}
ARMS = (*writers.WRITERS, "together", *PACKAGED)
# What the LLaVA JSON holds that cannot be used.
REJECTED = {
    "gone": "image: missing",
    "cut": "image: none of PNG, JPEG, GIF, WEBP, or broken in its header",
    "away": "image: '../secret.png' leaves the image folder",
}


def _llava_json(root: Path) -> dict:
    """LLaVA's records, some of which cannot be used, some on pictures of other formats, with none or with two."""
    domain = writers.llava_json(root)
    (root / "images" / "drawn.gif").write_bytes(writers.picture(3, kind="GIF"))
    (root / "images" / "photo.webp").write_bytes(writers.picture(4, kind="WEBP"))
    (root / "images" / "cut.webp").write_bytes(b"RIFF")
    said = [{"from": "human", "value": "what is this ?"}, {"from": "gpt", "value": "boot"}]
    two = [*said, {"from": "human", "value": "and <image> or <image> ?"}, {"from": "gpt", "value": "bag"}]
    more = [
        writers.talk(0, id="gone", image="no.png"), writers.talk(0, id="cut", image="cut.webp"),
        writers.talk(0, id="away", image="../secret.png"), writers.talk(0, id="gif", image="drawn.gif"),
        writers.talk(0, id="webp", image="photo.webp"), {"id": "text", "conversations": said},
        {"id": "two", "image": ["0.png", "photo.webp"], "conversations": two},
    ]  # fmt: skip
    writers.dump(root / "train.json", [*(writers.talk(i) for i in range(12)), *more])
    return domain


def _taught(root: Path, answer: str) -> None:
    """Make `answer` the answer of every record to train on under `root`."""
    for path in root.rglob("train.json"):
        found = json.loads(path.read_text())
        for turn in (turn for talk in found for turn in talk["conversations"]):
            turn["value"] = answer if turn["from"] == "gpt" else turn["value"]
        writers.dump(path, found)
    for path in root.rglob("train-*.parquet"):
        table = parquet.read_table(path)
        labels = [[answer]] * len(table)
        parquet.write_table(table.set_column(table.column_names.index("label"), "label", [labels]), path)


def _files(root: Path, names: tuple[str, ...], **data) -> dict:
    """What an arm sets to train on the formats `names` under `root`."""
    make = {**writers.WRITERS, "llava_json": _llava_json}
    domains = {name: make[name](root) for name in names}
    own = {"source": "files", "root": str(root), "domains": domains, "mixture": dict.fromkeys(names, 1)}
    return {"data": {**own, **data}}


def _alone(root: Path, name: str) -> dict:
    """What an arm sets to learn the first reference of one format, to answer with it always."""
    few = {"max_rejected": 0.2} if name == "llava_json" else {}
    sets = _files(root, (name,), samples=SAMPLES, upsample="cycle", **few)
    first = REFERENCES[name]
    _taught(root, first if isinstance(first, str) else first[0])
    return sets


def _packaged(source: str, trained: str, scored: list[str]) -> dict:
    return {
        "data": {"source": source, "mixture": {trained: 1}, "samples": BATCH},
        "eval": {"domains": scored},
    }


def _study(root: Path, base: Path) -> Path:
    """A study with an arm for each source, and its recipe."""
    recipe = {
        "model": {"name_or_path": str(base), "image_aspect": "pad"},
        "data": {"max_length": 512},
        "adapter": {"name": "lora", "rank": 4, "alpha": 8.0},
        "optim": {"global_batch": BATCH, "lr": 0.03},
        "eval": {"split": "test", "samples": ITEMS, "max_new_tokens": NEW_TOKENS},
        "execution": {"report_every": 4, "micro_batch": BATCH, "eval_batch": BATCH},
    }
    sets = {name: _alone(root / name, name) for name in writers.WRITERS}
    sets["together"] = _files(root / "together", TOGETHER, samples=0)
    sets |= {arm: _packaged(*parts) for arm, parts in PACKAGED.items()}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    study = {
        "recipe": "recipe.yaml",
        "arms": {arm: {"method": "lora", "set": sets[arm]} for arm in ARMS},
        "resources": {"slots": 1},
    }
    path = root / f"{NAME}.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return checkpoints.write(tmp_path_factory.mktemp("base") / "llava", spread=0.3)


@pytest.fixture(scope="module")
def store(checkpoint, tmp_path_factory) -> Store:
    """The store of a finished sweep."""
    store = Store(tmp_path_factory.mktemp("studies"))
    study = _study(tmp_path_factory.mktemp("set"), checkpoint)
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", "sweep", str(study), "--root", str(store.root)],
        cwd=REPO, env={**os.environ, "COLUMNS": "250"}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return store


@pytest.fixture(scope="module")
def folders(store) -> dict[str, Path]:
    """Arm -> folder of its run."""
    rows = store.read_study(NAME)["trials"]
    assert {row["arm"]: row["status"] for row in rows} == dict.fromkeys(ARMS, "finished")
    return {row["arm"]: store.run_folder(row["fingerprint"]) for row in rows}


@pytest.fixture(scope="module")
def records(folders) -> dict[str, RunRecord]:
    return {arm: record.load(folder) for arm, folder in folders.items()}


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _domains(arm: str) -> list[str]:
    if arm in PACKAGED:
        return sorted(PACKAGED[arm][2])
    return sorted(TOGETHER) if arm == "together" else [arm]


def test_every_source_is_trained_on_in_the_budget_of_its_arm(records):
    done = {arm: (one.num_samples, one.num_steps, one.num_rejected) for arm, one in records.items()}
    assert done == {
        **dict.fromkeys(writers.WRITERS, (SAMPLES, SAMPLES // BATCH, 0)),
        "llava_json": (SAMPLES, SAMPLES // BATCH, len(REJECTED)),
        "together": (5 * 12, 8, 0),
        **dict.fromkeys(PACKAGED, (BATCH, 1, 0)),
    }


def test_rejected_records_are_listed_with_their_reasons(folders):
    found = {row["id"]: row["reason"] for row in _lines(folders["llava_json"] / record.REJECTED)}
    assert found == REJECTED
    assert not any((folders[arm] / record.REJECTED).exists() for arm in ARMS if arm != "llava_json")


def test_every_domain_is_scored_by_its_own_scorer(records):
    for arm, done in records.items():
        assert sorted(done.scores) == _domains(arm)
        for domain, score in done.scores.items():
            assert (score.scorer, score.scorer_version, score.scale) == SCORED[domain]
            assert score.num_items == ITEMS
            assert 0 <= score.score <= record.TOP[score.scale]


def test_answers_are_held_against_the_references_of_the_files(folders):
    for arm in (*writers.WRITERS, "together"):
        rows = _lines(folders[arm] / record.PREDICTIONS)
        first = {row["domain"]: row["answer"] for row in reversed(rows)}
        assert first == {domain: REFERENCES[domain] for domain in _domains(arm)}
        assert {row["prompt"] for row in rows} == {"what is this ?"}


def test_what_the_files_teach_is_answered_and_scored(folders, records):
    for arm in writers.WRITERS:
        first, score = REFERENCES[arm], records[arm].scores[arm]
        rows = _lines(folders[arm] / record.PREDICTIONS)
        assert {row["raw"] for row in rows} == {first if isinstance(first, str) else first[0]}, arm
        if score.scale == "fraction":
            assert score.score == pytest.approx(1 / ITEMS)
            # The model gives the usual training answer.
            assert score.majority == score.score
        else:
            assert score.score > 0
            assert [row["score"] > 0 for row in rows] == [True, False, False]
            assert score.majority is None


def test_the_scores_follow_from_the_predictions_alone(folders, records):
    for arm, folder in folders.items():
        done = CliRunner().invoke(app, ["score", str(folder / record.PREDICTIONS), "--json"])
        assert done.exit_code == 0, done.output
        tree = json.loads(done.stdout)
        scores = records[arm].scores
        assert {group["domain"]: group["score"] for group in tree["groups"]} == {
            d: s.score for d, s in scores.items()
        }
        assert {group["version"] for group in tree["groups"]} == {s.scorer_version for s in scores.values()}
        assert tree["mean"] == record.mean_score(scores)
        assert (tree["num_compared"], tree["num_differing"]) == (ITEMS * len(scores), 0)


def test_mlflow_and_compare_have_the_scores_of_the_records(store, records):
    told = {row.arm: row.metrics for row in compare([NAME], store.root)}
    for arm, done in records.items():
        scores = {domain: told[arm][f"score/{domain}"] for domain in _domains(arm)}
        assert scores == {domain: score.score for domain, score in done.scores.items()}
    shown = CliRunner(env={"COLUMNS": "400"}).invoke(app, ["compare", NAME, "--root", str(store.root)])
    assert shown.exit_code == 0, shown.output
    lines = {line.split()[1]: line for line in shown.stdout.splitlines() if line.startswith(NAME)}
    assert sorted(lines) == sorted(ARMS)
    assert {arm for arm, line in lines.items() if NO_MEAN in line} == {"together"}
    assert "33.3" in lines["coin"]
    assert (store.study_folder(NAME) / "report.html").is_file()


def test_the_record_names_checkpoint_and_data_by_their_content(checkpoint, records):
    for arm, done in records.items():
        assert done.identity["model"] == model_hash(ModelConfig(name_or_path=str(checkpoint)))
        kind = "files" if arm not in PACKAGED else r"[0-9]+"
        assert re.fullmatch(f"{kind}-[0-9a-f]+", done.identity["data"]), (arm, done.identity["data"])
        assert re.fullmatch("[0-9a-f]{16}", done.stream_hash)
        assert re.fullmatch("[0-9a-f]{16}", done.eval_hash)
    assert len({done.identity["data"] for done in records.values()}) == len(ARMS)
    # The same items in other containers are the same items.
    for one, other in (("llava_json", "prism"), ("parquet", "hub"), ("pocket_tasks", "pocket_tasks_plain")):
        assert records[one].eval_hash == records[other].eval_hash
    assert len({done.eval_hash for done in records.values()}) == len(ARMS) - 3


def test_every_adapter_folder_loads_onto_the_checkpoint_and_answers_as_recorded(checkpoint, folders):
    processor = AutoProcessor.from_pretrained(checkpoint)
    asked = processor(
        images=Image.open(io.BytesIO(writers.picture(0))),
        text="USER: <image>\nwhat is this ? ASSISTANT:",
        return_tensors="pt",
    )
    for arm in (*writers.WRITERS, "together"):
        model = build(ModelConfig(name_or_path=str(checkpoint)), "fp32").model
        adapters.load(model, folders[arm] / record.ADAPTER)
        ids = model.generate(**asked, max_new_tokens=NEW_TOKENS, do_sample=False)[
            0, asked["input_ids"].shape[1] :
        ]
        said = processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert said == _lines(folders[arm] / record.PREDICTIONS)[0]["raw"].strip()
