"""Every format: its records become rows as its benchmark means them, whose pictures and answers are found."""

import json

import datasets
import numpy as np
import pytest

from tests.data import writers
from workloads.config import data_from_tree
from workloads.data import arrow, formats, images, sources
from workloads.data.cache import ENVIRONMENT_KEY
from workloads.errors import UserError


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_KEY, str(tmp_path_factory.mktemp("cache")))


def source(root, domain):
    return sources.of(data_from_tree({"source": "files", "root": str(root), "domains": {"d": domain}}))


def rows(root, domain, split="train"):
    return [dict(row) for row in source(root, domain).load("d", split)]


def test_every_format_has_a_writer_here():
    assert set(writers.WRITERS) == set(formats.names())


@pytest.mark.parametrize("name", sorted(writers.WRITERS))
def test_training_records_have_their_picture_question_and_answer(name, tmp_path):
    found = rows(tmp_path, writers.WRITERS[name](tmp_path))
    assert len(found) == 12
    for i, row in enumerate(found):
        assert row["fault"] == ""
        assert row["turns"] == [{"question": "<image>\nwhat is this ?", "answer": f"thing {i}"}]
        (image,) = row["images"]
        assert np.array_equal(images.decode(images.read(image)), np.full((96, 96, 3), 10 * (i % 4)))


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("llava_json", [[f"thing {i}"] for i in range(6)]),
        ("coin", [["A"], ["B"], ["C"], ["A"]]),
        ("cvit", [[f"a thing {i} .", "it ."] for i in range(4)]),
        ("ucit", [[f"caption 0 of {i}", f"caption 1 of {i}"] for i in range(3)]),
        ("prism", [[f"thing {i}"] for i in range(4)]),
        ("parquet", [[f"thing {i}", f"things {i}"] for i in range(4)]),
        ("hub", [[f"thing {i}", f"things {i}"] for i in range(4)]),
    ],
)
def test_test_records_have_the_references_of_their_benchmark(name, answers, tmp_path):
    found = rows(tmp_path, writers.WRITERS[name](tmp_path), "test")
    assert [row["fault"] for row in found] == [""] * len(answers)
    assert [row["answers"] for row in found] == answers
    assert [row["turns"][-1]["answer"] for row in found] == [several[0] for several in answers]
    assert len({row["id"] for row in found}) == len(found)


def llava(root, *records):
    writers.write_pictures(root)
    writers.dump(root / "train.json", list(records))
    return rows(root, {"format": "llava_json", "train": "train.json"})


def said(*words):
    roles = ("human", "gpt")
    return [{"from": roles[i % 2], "value": word} for i, word in enumerate(words)]


def test_what_llava_files_may_hold_is_accepted(tmp_path):
    found = llava(
        tmp_path,
        {"conversations": said("hello", "hi")},
        {
            "id": 5,
            "image": ["0.png", "1.png"],
            "conversations": said("<image> or <image> ?", "no", "why ?", "so"),
        },
        {
            "id": "late",
            "image": "1.png",
            "conversations": said("hello", "hi", "and this ?\n<image>", "a bag"),
        },
        {"id": "sys", "conversations": [{"from": "system", "value": "be brief"}, *said("a", "b")]},
        {"id": "front", "image": "0.png", "conversations": said("what ?", "boot")},
        {"id": "5", "conversations": said("a", "b")},
    )
    assert [row["fault"] for row in found] == [""] * 6
    assert [len(row["images"]) for row in found] == [0, 2, 1, 0, 1, 0]
    assert [len(row["turns"]) for row in found] == [1, 2, 2, 1, 1, 1]
    assert found[2]["turns"][1]["question"] == "and this ?\n<image>"
    assert found[3]["system"] == "be brief"
    assert found[4]["turns"][0]["question"] == "<image>\nwhat ?"
    assert [row["id"] for row in found] == ["#0", "5", "late", "sys", "front", "5#5"]


def test_vqa_answers_are_read_from_their_file(tmp_path):
    domain = writers.coin(tmp_path)
    ten = [{"answer": f"a{k}"} for k in range(10)]
    for i, tree in enumerate(
        (
            {"data": [{"question_id": i, "answers": [t["answer"] for t in ten]} for i in range(4)]},
            {"info": {"data": [1]}, "annotations": [{"question_id": i, "answers": ten} for i in range(4)]},
            [{"question_id": i, "answers": ten} for i in range(4)],
        )
    ):
        writers.dump(tmp_path / f"answers{i}.json", tree)
        found = rows(tmp_path, {**domain, "annotations": f"answers{i}.json"}, "test")
        assert [row["answers"] for row in found] == [[f"a{k}" for k in range(10)]] * 4


def test_coins_boxes_are_the_references_of_grounding(tmp_path):
    writers.write_pictures(tmp_path)
    boxed = writers.question(0, answer_bbox="[0.1,0.2,0.3,0.4]", size=[8, 8])
    writers.dump(tmp_path / "test.json", [boxed])
    (row,) = rows(tmp_path, {"format": "coin", "test": "test.json"}, "test")
    assert row["answers"] == ["[0.1,0.2,0.3,0.4]"]


@pytest.mark.parametrize("name", sorted(writers.WRITERS))
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_same_files_in_another_folder_have_the_same_identity(name, split, tmp_path):
    places = (tmp_path / "one", tmp_path / "deeper" / "two")
    digests = {source(place, writers.WRITERS[name](place)).digest("d", split) for place in places}
    assert len(digests) == 1


def test_a_slice_of_a_split_on_the_hub_has_rows_and_identity_of_its_own(tmp_path):
    domain = writers.hub(tmp_path)
    parts = {part: {**domain, "train": f"train{part}"} for part in ("", "[:5]", "[5:]", "[:50%]")}
    found = {part: [row["id"] for row in rows(tmp_path, one)] for part, one in parts.items()}
    assert {part: len(ids) for part, ids in found.items()} == {"": 12, "[:5]": 5, "[5:]": 7, "[:50%]": 6}
    assert len({source(tmp_path, one).digest("d", "train") for one in parts.values()}) == len(parts)


def test_pictures_and_lists_of_them_are_left_as_bytes_by_the_hubs_sets(tmp_path, monkeypatch):
    one, two = ({"bytes": writers.picture(value), "path": None} for value in (10, 20))
    held = datasets.Dataset.from_dict(
        {"image": [one], "images": [[two, one]], "question": ["which ?"], "answer": ["boot"]},
        features=datasets.Features({
            "image": datasets.Image(), "images": datasets.List(datasets.Image()),
            "question": datasets.Value("string"), "answer": datasets.Value("string"),
        }),
    )  # fmt: skip
    (tmp_path / "set").mkdir()
    held.to_parquet(tmp_path / "set" / "train-00000-of-00001.parquet")
    monkeypatch.setattr(datasets.Image, "decode_example", None)
    (row,) = rows(tmp_path, {"format": "hub", "name": "set", "train": "train"})
    assert row["fault"] == ""
    assert row["images"] == [one, two, one]


def test_identity_follows_content_and_not_place(tmp_path):
    one = source(tmp_path / "one", writers.llava_json(tmp_path / "one"))
    two = source(tmp_path / "two", writers.llava_json(tmp_path / "two"))
    digest = one.digest("d", "train")
    assert two.digest("d", "train") == digest
    assert one.digest("d", "test") != digest
    records = json.loads((tmp_path / "two" / "train.json").read_text())
    records[3]["conversations"][1]["value"] = "another"
    writers.dump(tmp_path / "two" / "train.json", records)
    assert two.digest("d", "train") != digest


def test_rows_are_converted_once(tmp_path, monkeypatch):
    found = source(tmp_path, writers.llava_json(tmp_path))
    first = [dict(row) for row in found.load("d", "train")]
    monkeypatch.setattr(arrow, "_write", None)
    assert [dict(row) for row in found.load("d", "train")] == first


def test_a_process_loads_a_set_once_and_its_rows_are_those_of_its_identity(tmp_path, monkeypatch):
    asked, load = [], datasets.load_dataset

    def loading(where, subset, split):
        asked.append((where, subset, split))
        return load(where, subset, split=split)

    monkeypatch.setattr(datasets, "load_dataset", loading)
    domain = writers.hub(tmp_path)
    found = source(tmp_path, domain)
    digest = found.digest("d", "train")
    (tmp_path / "set" / "data" / "train-00001-of-00002.parquet").unlink()
    again = source(tmp_path, domain)
    assert (again.digest("d", "train"), again.size("d", "train")) == (digest, 12)
    assert len(again.load("d", "test")) == 4
    place = str(tmp_path / "set")
    assert asked == [(place, None, "train"), (place, None, "test")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "lava_json"}, ["data.domains.d.format", "did you mean 'llava_json'"]),
        ({"scorer": "exakt"}, ["data.domains.d.scorer", "did you mean 'exact'"]),
        ({"trian": "x"}, ["data.domains.d.trian", "did you mean 'train'"]),
        ({"train": "absent.json"}, ["data.domains.d.train", "absent.json", "no such file"]),
        ({"images": "absent"}, ["data.domains.d.images", "absent", "no such folder"]),
        ({"annotations": "x"}, ["data.domains.d.annotations", "llava_json does not read it"]),
        ({"train": ""}, ["data.domains.d", "train, val or test"]),
    ],
)
def test_a_mistake_in_a_domain_is_told_in_one_line(change, words, tmp_path):
    domain = {**writers.llava_json(tmp_path), "test": "", **change}
    with pytest.raises(UserError) as error:
        rows(tmp_path, domain)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("parquet", {"columns": {"question": "quary"}}, ["columns.question", "did you mean 'query'"]),
        ("parquet", {"columns": {"qestion": "query"}}, ["columns.qestion", "did you mean 'question'"]),
        ("parquet", {"columns": {}}, ["none of conversations, turns, question"]),
        ("parquet", {"train": "data/none-*"}, ["no Parquet files"]),
        ("hub", {"train": "trains"}, ["set", "trains", "cannot be loaded"]),
        ("hub", {"name": ""}, ["data.domains.d.name"]),
        ("prism", {"name": "IconQ"}, ["data.domains.d.name", "did you mean 'IconQA'"]),
        ("coin", {"annotations": "Instruction_Original"}, ["problems.json", "no such file"]),
    ],
)
def test_a_mistake_of_a_format_is_told_in_one_line(name, change, words, tmp_path):
    domain = {**writers.WRITERS[name](tmp_path), **change}
    with pytest.raises(UserError) as error:
        rows(tmp_path, domain, "test" if name == "coin" else "train")
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_task_dict_that_leads_out_of_the_root_is_refused(tmp_path):
    domain = writers.prism(tmp_path / "root")
    writers.dump(tmp_path / "secret.json", [])
    tasks = json.loads((tmp_path / "root" / "tasks.json").read_text())
    tasks[1]["train_data_path"] = "../secret.json"
    writers.dump(tmp_path / "root" / "tasks.json", tasks)
    with pytest.raises(UserError, match="leaves data.root"):
        rows(tmp_path / "root", domain)
