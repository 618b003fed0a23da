"""Small sets on disk in every format: pictures, and files of records as their benchmarks lay them out."""

import io
import json

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from workloads.config import read_yaml


def picture(value=7, side=96, kind="PNG"):
    """Bytes of a one-coloured picture, as large as those of the pocket model."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), value, np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def write_pictures(folder, num=4):
    """Pictures 0.png, 1.png, ... in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(num):
        (folder / f"{i}.png").write_bytes(picture(10 * i))


def dump(path, tree):
    """A JSON file, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


def talk(i, **parts):
    """A record of LLaVA's."""
    said = [{"from": "human", "value": "<image>\nwhat is this ?"}, {"from": "gpt", "value": f"thing {i}"}]
    return {"id": f"r{i}", "image": f"{i % 4}.png", "conversations": said, **parts}


def question(i, **parts):
    """A test record of CoIN, CVIT or UCIT."""
    return {
        "question_id": i,
        "image": f"./{i % 4}.png",
        "text": "what is this ?",
        "answer": f"thing {i}",
        **parts,
    }


def llava_json(root, num=12):
    write_pictures(root / "images")
    dump(root / "train.json", [talk(i) for i in range(num)])
    dump(root / "test.json", [talk(i) for i in range(6)])
    return {"format": "llava_json", "train": "train.json", "test": "test.json", "images": "images"}


def coin(root):
    """CoIN's folders with ScienceQA, whose answers are kept apart."""
    write_pictures(root / "images")
    folder = root / "Instruction_Original" / "ScienceQA"
    dump(folder / "train.json", [talk(i) for i in range(12)])
    dump(folder / "test.json", [{**question(i), "answer": None} for i in range(4)])
    dump(
        root / "ScienceQA" / "problems.json", {str(i): {"answer": i % 3, "choices": "abc"} for i in range(9)}
    )
    dump(root / "ScienceQA" / "pid_splits.json", {"train": ["7", "8"], "test": ["0", "1", "2", "3"]})
    return {
        "format": "coin",
        "train": "Instruction_Original/ScienceQA/train.json",
        "test": "Instruction_Original/ScienceQA/test.json",
        "images": "images",
        "annotations": "ScienceQA",
        "scorer": "science_qa",
    }


def cvit(root):
    """CVIT's folders with Flickr30k, whose answers are lists."""
    write_pictures(root / "images")
    folder = root / "Instructions_Single" / "Flickr30k"
    dump(folder / "train.json", [talk(i) for i in range(12)])
    dump(folder / "val.json", [question(i, answer=[f"a thing {i} .", "it ."]) for i in range(4)])
    return {
        "format": "cvit",
        "train": "Instructions_Single/Flickr30k/train.json",
        "test": "Instructions_Single/Flickr30k/val.json",
        "images": "images",
        "scorer": "cider_d",
    }


def ucit(root):
    """UCIT's folders with VizWiz, whose captions stand in COCO's form."""
    write_pictures(root / "UCIT" / "datasets")
    folder = root / "UCIT" / "instructions" / "VizWiz"
    dump(folder / "train.json", [talk(i) for i in range(12)])
    dump(folder / "test.json", [question(i, answer="") for i in range(3)])
    captions = [
        {"image_id": i, "id": 10 * i + k, "caption": f"caption {k} of {i}"} for i in range(3) for k in (0, 1)
    ]
    dump(folder / "val_coco_type.json", {"images": [{"id": i} for i in range(3)], "annotations": captions})
    return {
        "format": "ucit",
        "train": "UCIT/instructions/VizWiz/train.json",
        "test": "UCIT/instructions/VizWiz/test.json",
        "images": "UCIT/datasets",
        "annotations": "UCIT/instructions/VizWiz/val_coco_type.json",
        "scorer": "cider_d",
    }


def prism(root):
    """A list of Prism's task dicts, with the files of one of them."""
    write_pictures(root / "images")
    dump(root / "train.json", [talk(i) for i in range(12)])
    dump(root / "test.json", [question(i) for i in range(4)])
    task = {
        "cur_task": 1, "name": "IconQA", "train_data_path": str(root / "train.json"),
        "test_data_path": "test.json", "eval_annotation_path": "test.json", "output_dir": "out",
        "image_folder": "images", "previous_task": None, "eval": {"needs_conversion": False},
    }  # fmt: skip
    dump(root / "tasks.json", [{"name": "other"}, task])
    return {"format": "prism", "train": "tasks.json", "test": "tasks.json", "name": "IconQA"}


def table(num, start=0):
    """An Arrow table with pictures and question and answer columns under names of its own."""
    rows = range(start, start + num)
    return pa.table(
        {
            "image": [{"bytes": picture(10 * (i % 4)), "path": f"{i}.png"} for i in rows],
            "query": ["what is this ?" for _ in rows],
            "label": [[f"thing {i}", f"things {i}"] for i in rows],
        }
    )


def parquet_set(root):
    (root / "data").mkdir(parents=True, exist_ok=True)
    parquet.write_table(table(7), root / "data" / "train-00000-of-00002.parquet")
    parquet.write_table(table(5, 7), root / "data" / "train-00001-of-00002.parquet")
    parquet.write_table(table(4), root / "data" / "test-00000-of-00001.parquet")
    return {
        "format": "parquet", "train": "data/train-*.parquet", "test": "data/test-*.parquet",
        "columns": {"question": "query", "answers": "label"}, "scorer": "relaxed",
    }  # fmt: skip


def hub(root):
    parquet_set(root / "set")
    return {
        "format": "hub", "name": "set", "train": "train", "test": "test",
        "columns": {"question": "query", "answers": "label"}, "scorer": "relaxed",
    }  # fmt: skip


WRITERS = {
    "llava_json": llava_json, "coin": coin, "cvit": cvit, "ucit": ucit, "prism": prism,
    "parquet": parquet_set, "hub": hub,
}  # fmt: skip


def lay_out(root, recipe):
    """Files of six records, and their pictures, wherever a recipe's file says that its domains have some."""
    for domain in read_yaml(recipe)["data"]["domains"].values():
        write_pictures(root / domain["images"])
        for split in ("train", "test"):
            if split in domain:
                asks = split == "test" and domain["format"] != "llava_json"
                dump(root / domain[split], [(question if asks else talk)(i) for i in range(6)])
        if "annotations" in domain:
            annotate(root / domain["annotations"], domain["scorer"])


def annotate(place, scorer):
    """The answers to six questions in the form that goes with a scorer: ScienceQA's folder, VQA's file, COCO's."""
    ids = [str(i) for i in range(6)]
    if scorer == "science_qa":
        dump(place / "problems.json", {i: {"answer": int(i) % 3, "choices": "abc"} for i in ids})
        dump(place / "pid_splits.json", {"train": [], "test": ids})
    elif scorer == "vqa":
        dump(place, {"data": [{"question_id": int(i), "answers": ["a thing"] * 10} for i in ids]})
    else:
        captions = [{"image_id": int(i), "id": int(i), "caption": f"a thing {i} ."} for i in ids]
        dump(place, {"images": [{"id": int(i)} for i in ids], "annotations": captions})
