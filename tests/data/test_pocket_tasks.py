"""Tasks for continual tuning: answers recomputed from pixels and raw assets, wordings, splits, sources."""

import functools
import hashlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from workloads.config import ModelConfig, from_tree
from workloads.data import sources
from workloads.data.images import decode
from workloads.data.pocket_tasks import NEVER_TRAINED, TASKS, TRAINED, TYPES, WORDINGS, compose
from workloads.data.sources import pocket_tasks, pocket_tasks_plain
from workloads.errors import UserError
from workloads.llava.build import prompter_of
from workloads.llava.prompt import Turn

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "workloads" / "assets"
SPLITS = ("train", "val", "test")
BARS = ((70, 110, 170), (190, 110, 60), (90, 140, 90), (120, 120, 120))
TINTS = {
    "red": (235, 50, 45),
    "yellow": (250, 225, 50),
    "green": (60, 190, 70),
    "blue": (70, 120, 250),
    "purple": (170, 75, 215),
    "white": (250, 250, 250),
}


@functools.cache
def samples(task, split="val"):
    return [compose(task, split, 0, index) for index in range(150)]


@pytest.fixture(scope="module")
def raw():
    return {name: dict(np.load(ASSETS / f"{name}.npz")) for name in ("garments", "emoji", "brain")}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAVA_CONFLICT_LAB_CACHE", str(tmp_path))
    monkeypatch.setattr(pocket_tasks, "SIZES", {"train": 30, "val": 12, "test": 12})
    return tmp_path


def in_every_split(task):
    return [sample for split in SPLITS for sample in samples(task, split)]


def bar_runs(image):
    """Heights of the bars from left to right: runs of columns that hold one of the bars' exact colours."""
    (held,) = [held for colour in BARS if (held := (image == colour).all(2)).sum() > 50]
    heights = held.sum(0)
    labels, count = ndimage.label(heights > 3)
    return [int(heights[labels == run].max()) for run in range(1, count + 1)]


def mark_centre(image):
    """(x, y) of the mark, found by its colours."""
    shown = image.astype(int)
    ring = (shown == (255, 0, 255)).all(2) | (shown == (255, 255, 0)).all(2)
    rows, columns = np.nonzero(ring)
    return (columns.min() + columns.max()) // 2, (rows.min() + rows.max()) // 2


def test_a_garments_word_is_its_kind_in_the_raw_set(raw):
    for sample in in_every_split("garment"):
        (source,) = sample.sources
        kind = raw["garments"]["kinds_N"][int(source.removeprefix("garment:"))]
        assert sample.answer == raw["garments"]["kinds"][kind]


def test_an_emojis_code_is_that_of_its_kind_in_the_raw_set(raw):
    known = [
        "face",
        "hand",
        "heart",
        "flag",
        "clock",
        "arrow",
        "fruit",
        "animal",
        "vehicle",
        "building",
        "plant",
    ]
    kinds = raw["emoji"]["kinds"][raw["emoji"]["kinds_N"]]
    kind_of = {f"emoji:{code}": str(kind) for code, kind in zip(raw["emoji"]["codes_N"], kinds, strict=True)}
    for sample in in_every_split("emoji"):
        (source,) = sample.sources
        assert sample.answer == f"e{known.index(kind_of[source])}"


def test_a_slices_code_is_that_of_the_plane_it_was_cut_along():
    for sample in in_every_split("plane"):
        (source,) = sample.sources
        assert sample.answer == {"axial": "k0", "coronal": "k1", "sagittal": "k2"}[source.split(":")[1]]


def test_a_word_is_told_letter_by_letter_and_is_one_of_its_split():
    words = json.loads((ASSETS / "words.json").read_text())
    for split in SPLITS:
        for sample in samples("word", split):
            assert all(len(letter) == 1 and letter.isupper() for letter in sample.answer.split(" "))
            spelled = sample.answer.replace(" ", "").lower()
            assert spelled in words[split]
            assert f"word:{spelled}" in sample.sources


def test_items_are_as_many_as_the_pictures_they_were_pasted_from():
    for sample in in_every_split("items"):
        assert sample.answer == str(len(sample.sources))


def test_the_place_of_the_highest_bar_is_the_one_seen_in_the_picture():
    for sample in in_every_split("chart"):
        heights = bar_runs(sample.image)
        assert sample.answer == str(int(np.argmax(heights)) + 1)
        assert sorted(heights)[-1] > sorted(heights)[-2]


def test_bars_are_as_many_as_are_seen_in_the_picture():
    for sample in in_every_split("bars"):
        assert sample.answer == str(len(bar_runs(sample.image)))


def test_a_total_is_the_sum_of_the_receipts_lines():
    for sample in in_every_split("receipt"):
        assert sample.answer == f"the total is {sum(part.value for part in sample.facts.parts):.0f}"
        assert [f"word:{part.label}" for part in sample.facts.parts] == list(sample.sources[1:])


def test_the_tissue_at_the_mark_is_that_of_the_raw_voxel(raw):
    for sample in in_every_split("tissue"):
        x, y = mark_centre(sample.image)
        assert (x, y) == (sample.facts.mark.x, sample.facts.mark.y)
        grey, white = (int(raw["brain"][f"{name}_XYZ"][sample.facts.voxel]) for name in ("grey", "white"))
        (tissue,) = [
            name for name, here in (("grey", grey), ("white", white), ("fluid", 255 - grey - white))
            if here >= 205
        ]  # fmt: skip
        assert sample.answer == tissue


def test_the_colour_at_the_mark_is_that_of_the_pixels_in_its_open_middle():
    for sample in in_every_split("colour"):
        x, y = mark_centre(sample.image)
        seen = sample.image[y - 1 : y + 2, x - 1 : x + 2].reshape(-1, 3).astype(float).mean(0)
        likeness = {
            name: float(seen @ np.array(tint) / np.linalg.norm(seen) / np.linalg.norm(tint))
            for name, tint in TINTS.items()
        }
        assert sample.answer == max(likeness, key=likeness.__getitem__)


@pytest.mark.parametrize("task", TASKS)
def test_no_answer_is_right_for_more_than_three_in_five(task):
    for split in SPLITS:
        counts = Counter(sample.answer for sample in samples(task, split))
        assert max(counts.values()) <= 0.6 * counts.total()


def test_one_answer_means_something_else_in_each_task_that_gives_it():
    given = {task: {sample.answer for sample in samples(task, "train")} for task in TASKS}
    assert given["bars"] < given["chart"] < given["items"]
    assert given["tissue"] & given["colour"] == {"white"}
    letters = {letter for answer in given["word"] for letter in answer.split()}
    assert len(letters) > 20
    assert all(answer.startswith("the total is ") for answer in given["receipt"])


def test_one_question_is_asked_of_several_tasks_and_one_kind_of_picture_serves_several():
    asked = {task: {sample.question for sample in samples(task)} for task in TASKS}
    assert asked["garment"] == asked["emoji"] == asked["plane"] == asked["word"]
    assert asked["items"] == asked["bars"]
    assert asked["tissue"] == asked["colour"]
    shown = {task: {sample.facts.layout for sample in samples(task)} for task in TASKS}
    assert shown["tissue"] == shown["plane"] == {"scan"}
    assert shown["garment"] == shown["emoji"] == {"single"}
    assert shown["chart"] == shown["bars"] == {"chart"}


@pytest.mark.parametrize("task", TASKS)
def test_every_type_of_wording_is_asked_in_equal_shares_and_every_paraphrase_is_used(task):
    wordings = WORDINGS[TASKS[task].asks]
    for split in SPLITS:
        found = samples(task, split)
        assert Counter(sample.question_type for sample in found) == dict.fromkeys(TYPES, 50)
        for kind in TYPES:
            used = {sample.question for sample in found if sample.question_type == kind}
            assert used == set(wordings[kind])


def test_a_wording_belongs_to_one_question_and_one_type():
    texts = [text for of_type in WORDINGS.values() for group in of_type.values() for text in group]
    assert len(texts) == len(set(texts))
    assert all(tuple(of_type) == TYPES and all(of_type.values()) for of_type in WORDINGS.values())


def test_types_change_neither_picture_nor_answer():
    for index in range(9):
        mixed, plain = (compose("word", "val", 0, index, types) for types in (TYPES, ("plain",)))
        assert (mixed.image == plain.image).all()
        assert mixed.answer == plain.answer
        assert plain.question == "what is this ?"
        assert plain.question_type == "plain"


def test_the_base_has_every_word_of_the_questions_and_reads_every_answer_in_few_tokens():
    prompter = prompter_of(ModelConfig())
    for task in TASKS:
        for sample in in_every_split(task)[::3]:
            pieces = prompter.tokenizer.tokenize(sample.question)
            assert pieces == sample.question.split(), "whole tokens"
            answer = prompter.tokenizer.tokenize(sample.answer)
            assert len(answer) <= 5
            assert "<unk>" not in answer
            turn = Turn(question=f"<image>\n{sample.question}", answer=sample.answer)
            assert prompter.decode(prompter.tokenizer(sample.answer)["input_ids"]) == sample.answer
            assert len(prompter.encode((turn,)).ids) <= 128


def test_samples_of_two_splits_share_no_source_in_any_task():
    made = {
        split: {name for task in TASKS for s in samples(task, split) for name in s.sources}
        for split in SPLITS
    }
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not made[one] & made[other]
    pixels = [s.image.tobytes() for split in SPLITS for task in TASKS for s in samples(task, split)]
    assert len(set(pixels)) == len(pixels) == 3 * 10 * 150


PROBE = """
import hashlib
from workloads.data.pocket_tasks import TASKS, compose
total = hashlib.sha256()
for task in TASKS:
    for split in ("train", "val", "test"):
        for index in (4, 0):
            made = compose(task, split, 3, index)
            total.update(made.image.tobytes() + repr((made.question, made.answer, made.sources)).encode())
print(total.hexdigest())
"""


def test_a_fresh_process_composes_the_same_bytes_in_any_order():
    environment = os.environ | {"PYTHONHASHSEED": "77", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, env=environment, check=True
    )
    keys = [(task, split, index) for task in TASKS for split in SPLITS for index in (4, 0)]
    made = {key: compose(key[0], key[1], 3, key[2]) for key in reversed(keys)}
    total = hashlib.sha256()
    for key in keys:
        text = repr((made[key].question, made[key].answer, made[key].sources))
        total.update(made[key].image.tobytes() + text.encode())
    assert ran.stdout.strip() == total.hexdigest()


@pytest.mark.parametrize(
    "change",
    [("plane", "train", 5, 7), ("plane", "train", 4, 8), ("plane", "val", 4, 7), ("tissue", "train", 4, 7)],
)
def test_task_split_seed_and_index_each_change_the_picture(change):
    assert (compose(*change).image != compose("plane", "train", 4, 7).image).any()


def test_three_hundred_samples_a_second_are_composed():
    compose("tissue", "train", 1, 0)
    best = min(_seconds(range(start, start + 30)) for start in (0, 30, 60))
    assert best / (30 * len(TASKS)) < 1 / 300


def _seconds(indices):
    began = time.process_time()
    for task in TASKS:
        for index in indices:
            compose(task, "train", 1, index)
    return time.process_time() - began


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("garments", "train", 0, 0), "task: 'garments' is not allowed; .*did you mean 'garment'"),
        (("garment", "trian", 0, 0), "split: 'trian' is not allowed; .*did you mean 'train'"),
        (("garment", "train", 0, -1), "seed"),
        (("garment", "train", 0, 0, ("plane",)), "plane.*did you mean 'plain'"),
    ],
)
def test_a_wrong_argument_is_told_in_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        compose(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["pocket_tasks", "pocket_tasks_plain"])
def test_eight_tasks_are_trained_on_and_two_more_are_evaluated(name):
    source = sources.of(config(name).data)
    assert len(TRAINED) == 8
    assert source.domains("train") == sorted(TRAINED)
    for split in ("val", "test"):
        assert source.domains(split) == sorted((*TRAINED, *NEVER_TRAINED))
    assert {source.size(task, "train") for task in TRAINED} == {2000}
    assert {source.size(task, split) for task in TASKS for split in ("val", "test")} == {300}


@pytest.mark.parametrize("task", NEVER_TRAINED)
def test_training_on_a_task_that_is_never_trained_is_refused(task):
    with pytest.raises(UserError, match=f"data.mixture.{task}"):
        sources.check(config("pocket_tasks", {task: 1.0}))
    with pytest.raises(KeyError):
        sources.of(config("pocket_tasks").data).size(task, "train")


def config(name, mixture=None):
    data = {"source": name, "mixture": mixture or {"garment": 1.0}, "samples": 10}
    return from_tree({"adapter": {"name": "lora"}, "data": data, "eval": {"samples": 12}})


def test_a_pool_holds_the_composed_samples_and_is_built_once(cache, monkeypatch):
    rows = pocket_tasks.load("receipt", "val")
    assert len(rows) == 12
    for index, row in enumerate(rows):
        made = compose("receipt", "val", 0, index)
        assert row["id"] == f"receipt-val-{index}"
        assert row["fault"] == ""
        assert row["turns"] == [{"question": f"<image>\n{made.question}", "answer": made.answer}]
        assert row["answers"] == [made.answer]
        assert row["question_type"] == made.question_type
        (image,) = row["images"]
        assert (decode(image["bytes"]) == made.image).all()
    monkeypatch.setattr("workloads.data.pocket_tasks.pool._rows", None)
    assert pocket_tasks.load("receipt", "val")[:] == rows[:]


def test_the_plain_source_differs_in_the_questions_it_trains_on_and_in_nothing_else(cache):
    assert pocket_tasks_plain.load("chart", "val")[:] == pocket_tasks.load("chart", "val")[:]
    mixed, plain = (module.load("chart", "train") for module in (pocket_tasks, pocket_tasks_plain))
    assert set(plain["question_type"]) == {"plain"}
    assert {turn["question"] for (turn,) in plain["turns"]} == {"<image>\nwhich one is the largest ?"}
    assert plain["images"] == mixed["images"]
    assert plain["answers"] == mixed["answers"]
    assert set(mixed["question_type"]) == set(TYPES)


def test_the_two_sources_have_digests_of_their_own(cache):
    digests = {
        sources.of(config(name).data).digest("chart", "val")
        for name in ("pocket_tasks", "pocket_tasks_plain")
    }
    assert len(digests) == 2
