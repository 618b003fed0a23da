"""Vetting: every bad sample is counted and named, and too many stop the run."""

import io
from dataclasses import dataclass

import datasets
import numpy as np
import pytest
from PIL import Image

from workloads.config import DataConfig, ModelConfig
from workloads.data import pool, sources, vetting
from workloads.data.cache import ENVIRONMENT_KEY
from workloads.errors import UserError
from workloads.llava.build import build


@pytest.fixture(scope="module")
def prompter():
    return build(ModelConfig(), "fp32").prompter


def png(size=(96, 96), mode="RGB"):
    buffer = io.BytesIO()
    Image.fromarray(np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(*size, 3)).convert(mode).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


def rows(*samples):
    columns = {"id": [], "image": [], "question": [], "answer": [], "question_type": []}
    for i, (image, answer) in enumerate(samples):
        columns["id"].append(f"s{i}")
        columns["image"].append(image and {"bytes": image, "path": None})
        columns["question"].append("what is this ?")
        columns["answer"].append(answer)
        columns["question_type"].append("name")
    features = datasets.Features(
        {k: datasets.Value("string") for k in columns} | {"image": datasets.Image(decode=False)}
    )
    return datasets.Dataset.from_dict(columns, features=features)


def test_each_bad_sample_is_named_with_its_reason(prompter):
    data = rows(
        (png(), "boot"), (png()[:200], "boot"), (None, "boot"), (png(), "  "), (b"not an image", "boot"),
        (png(), "A" * 300), (png(mode="L"), "boot"),
    )  # fmt: skip
    verdicts = vetting.vet(data, prompter, max_length=128)
    faults = {row["id"]: v.fault for row, v in zip(data, verdicts, strict=True) if v.fault}
    assert sorted(faults) == ["s1", "s2", "s3", "s4", "s5"]
    assert "image" in faults["s1"]
    assert faults["s2"] == "image: missing"
    assert faults["s3"] == "answer: empty"
    assert "image" in faults["s4"]
    assert faults["s5"].startswith("length: ")
    assert all(v.digest for v in verdicts if not v.fault)


def test_accepted_and_rejected_make_the_total(prompter):
    data = rows((png(), "boot"), (None, "boot"))
    verdicts = vetting.vet(data, prompter, max_length=128)
    assert len(verdicts) == len(data)
    assert sum(bool(v.fault) != bool(v.digest) for v in verdicts) == len(data)


def test_digest_follows_pixels_and_text_and_not_the_file(prompter):
    image = Image.fromarray(np.full((96, 96, 3), 9, np.uint8))
    one, two = io.BytesIO(), io.BytesIO()
    image.save(one, "PNG", compress_level=1)
    image.save(two, "PNG", compress_level=9)
    data = rows((one.getvalue(), "boot"), (two.getvalue(), "boot"), (one.getvalue(), "bag"), (png(), "boot"))
    digests = [v.digest for v in vetting.vet(data, prompter, max_length=128)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def example(num_good, num_bad):
    bad = [pool.Rejected(id=f"b{i}", reason="image: missing") for i in range(num_bad)]
    data = rows(*[(None, "x")] * (num_good + num_bad))
    return pool.Pool(
        key="k", domain="general", rows=data, accepted=list(range(num_good)), rejected=bad, digests=[]
    )


def test_more_bad_samples_than_allowed_stop_the_run_with_one_line():
    assert len(pool.check_rejected([example(999, 1)], 0.001)) == 1
    with pytest.raises(UserError, match=r"data.max_rejected: 2 of 1000 .* b0: image: missing"):
        pool.check_rejected([example(998, 2)], 0.001)


def test_an_unknown_source_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'pocket'"):
        sources.find("poket")


@dataclass(frozen=True)
class Small:
    """A source of one good sample."""

    held: datasets.Dataset

    def load(self, domain, split):
        return self.held

    def digest(self, domain, split):
        return "1"

    def place(self, domain):
        return ""


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "of", lambda data: Small(rows((png(), "boot"))))
    monkeypatch.setenv(ENVIRONMENT_KEY, str(tmp_path))
    return DataConfig()


def test_an_unwritable_cache_is_told_in_one_line(small, prompter, tmp_path, monkeypatch):
    assert pool.load(small, "general", "val", prompter).accepted == [0]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(ENVIRONMENT_KEY, str(tmp_path / "file"))
    with pytest.raises(UserError) as error:
        pool.load(small, "general", "val", prompter)
    message = str(error.value)
    assert message.startswith(f"{ENVIRONMENT_KEY}: cannot write in {tmp_path / 'file'}")
    assert "Not a directory" in message
    assert "\n" not in message


def test_a_cache_that_is_whole_is_only_read(small, prompter, monkeypatch):
    first = pool.load(small, "general", "val", prompter)
    monkeypatch.setattr(vetting.record, "write_json", None)
    again = pool.load(small, "general", "val", prompter)
    assert (again.digests, again.lengths) == (first.digests, first.lengths)
    assert again.lengths[0] > 0


TALK = [
    {"question": "<image>\nwhat is this ?", "answer": "boot"},
    {"question": "and this ?\n<image>", "answer": "bag"},
]


def general(**row):
    return {
        "id": "g", "images": [], "system": "", "turns": TALK, "answers": ["bag"], "question_type": "name", **row
    }  # fmt: skip


def test_a_row_of_turns_and_images_is_decoded_in_order(tmp_path):
    one, two = png(), png((48, 96))
    (tmp_path / "two.png").write_bytes(two)
    images = [{"bytes": one, "path": None}, {"bytes": None, "path": str(tmp_path / "two.png")}]
    data = datasets.Dataset.from_list([general(images=images, system="be brief", answers=["bag", "sack"])])
    pools = pool.Pool(key="k", domain="d", rows=data, accepted=[0], rejected=[], digests=[])
    sample = pools.sample(0)
    assert [image.shape for image in sample.images_HWC] == [(96, 96, 3), (48, 96, 3)]
    assert all(
        np.array_equal(s, pool.decode(data)) for s, data in zip(sample.images_HWC, (one, two), strict=True)
    )
    assert (sample.system, sample.answers) == ("be brief", ("bag", "sack"))
    assert [(turn.question, turn.answer) for turn in sample.turns] == [tuple(t.values()) for t in TALK]
    assert (sample.question, sample.answer) == ("and this ?", "bag")


def test_the_short_form_is_one_turn_with_its_image_in_front():
    sample = pool.Pool(
        key="k", domain="d", rows=rows((png(), "boot")), accepted=[0], rejected=[], digests=[]
    ).sample(0)
    assert [(turn.question, turn.answer) for turn in sample.turns] == [("<image>\nwhat is this ?", "boot")]
    assert (sample.question, sample.answer, sample.answers) == ("what is this ?", "boot", ("boot",))
    assert len(sample.images_HWC) == 1


def test_last_turns_are_what_samples_say_in_both_forms():
    assert pool.last_turns(rows((png(), "boot"), (None, "bag"))) == (["what is this ?"] * 2, ["boot", "bag"])
    assert pool.last_turns(datasets.Dataset.from_list([general()])) == (["and this ?"], ["bag"])
