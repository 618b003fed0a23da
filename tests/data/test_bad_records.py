"""Bad records: each has its reason, none is dropped, none ends in a traceback; paths stay in their folder."""

import json
import os
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data import writers
from workloads.config import DataConfig, ModelConfig, data_from_tree
from workloads.data import images, pool, sources
from workloads.data.cache import ENVIRONMENT_KEY
from workloads.errors import UserError
from workloads.llava.build import build

DOMAIN = {"format": "llava_json", "train": "train.json", "images": "images"}


@pytest.fixture(scope="module")
def prompter():
    return build(ModelConfig(), "fp32").prompter


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_KEY, str(tmp_path_factory.mktemp("cache")))


def config(root, domain=DOMAIN, **parts) -> DataConfig:
    return data_from_tree({"source": "files", "root": str(root), "domains": {"d": domain}, **parts})


def loaded(root, records, prompter, **parts):
    writers.write_pictures(root / "images")
    writers.dump(root / "train.json", records)
    return pool.load(config(root, **parts), "d", "train", prompter)


def faults(found):
    return {bad.id: bad.reason for bad in found.rejected}


def said(*pairs):
    return [{"from": role, "value": value} for role, value in pairs]


HUMAN, GPT = ("human", "what ?"), ("gpt", "boot")
BAD = {
    "no_object": (3, "record: not an object"),
    "no_talk": ({}, "conversations: not a list"),
    "talk_is_text": ({"conversations": "hello"}, "conversations: not a list"),
    "turn_is_text": ({"conversations": ["hello", "hi"]}, "conversations: a turn"),
    "empty_talk": ({"conversations": []}, "conversations: not a list"),
    "gpt_first": ({"conversations": said(GPT, HUMAN)}, "roles: gpt, human"),
    "two_humans": ({"conversations": said(HUMAN, HUMAN, GPT)}, "roles: human, human, gpt"),
    "no_answer": ({"conversations": said(HUMAN)}, "roles: human"),
    "late_system": ({"conversations": said(HUMAN, GPT, ("system", "x"))}, "roles: human, gpt, system"),
    "odd_role": ({"conversations": said(("owl", "hoo"), GPT)}, "roles: 'owl'"),
    "no_value": ({"conversations": [{"from": "human"}, {"from": "gpt", "value": "a"}]}, "value: not a text"),
    "empty_answer": ({"conversations": said(HUMAN, ("gpt", " \n"))}, "answer: empty"),
    "empty_question": ({"conversations": said(("human", " "), GPT)}, "question: empty"),
    "image_in_answer": ({"conversations": said(HUMAN, ("gpt", "<image>"))}, "answer: holds <image>"),
    "too_long": ({"conversations": said(HUMAN, ("gpt", "A" * 400))}, "length: "),
    "place_without_image": ({"conversations": said(("human", "<image>"), GPT)}, "image: 1 places for 0 images"),
    "two_places": (
        {"image": "0.png", "conversations": said(("human", "<image> <image>"), GPT)}, "image: 2 places for 1 images"
    ),
    "image_is_number": ({"image": 5, "conversations": said(HUMAN, GPT)}, "image: not a path"),
    "half_surrogate": ({"image": "\ud800.png", "conversations": said(HUMAN, GPT)}, "image"),
    "missing": ({"image": "no.png", "conversations": said(HUMAN, GPT)}, "image: missing"),
    "a_folder": ({"image": "folder", "conversations": said(HUMAN, GPT)}, "image: not a file"),
    "truncated": ({"image": "cut.jpg", "conversations": said(HUMAN, GPT)}, "image: "),
    "truncated_gif": ({"image": "cut.gif", "conversations": said(HUMAN, GPT)}, "image: "),
    "truncated_webp": ({"image": "cut.webp", "conversations": said(HUMAN, GPT)}, "image: "),
    "bomb": ({"image": "bomb.png", "conversations": said(HUMAN, GPT)}, "3600000000 pixels"),
    "text": ({"image": "text.png", "conversations": said(HUMAN, GPT)}, "image: none of PNG, JPEG"),
    "parent": ({"image": "../secret.png", "conversations": said(HUMAN, GPT)}, "leaves the image folder"),
    "parent_within": ({"image": "a/../../secret.png", "conversations": said(HUMAN, GPT)}, "leaves the image folder"),
    "absolute": ({"image": "/etc/hostname", "conversations": said(HUMAN, GPT)}, "is absolute"),
    "drive": ({"image": "C:\\x.png", "conversations": said(HUMAN, GPT)}, "is absolute"),
    "link": ({"image": "link.png", "conversations": said(HUMAN, GPT)}, "symbolic link leaves the image folder"),
    "link_folder": ({"image": "out/secret.png", "conversations": said(HUMAN, GPT)}, "symbolic link leaves"),
    "nul": ({"image": "a\0.png", "conversations": said(HUMAN, GPT)}, "is no path"),
    "long_name": ({"image": "a" * 5000, "conversations": said(HUMAN, GPT)}, "image: cannot be read"),
    "pipe": ({"image": "pipe", "conversations": said(HUMAN, GPT)}, "image: not a file"),
}  # fmt: skip


def prepare(root):
    """Pictures that are none, and ways out of the folder."""
    folder = root / "images"
    (folder / "folder").mkdir(parents=True)
    for name, kind in (("cut.jpg", "JPEG"), ("cut.gif", "GIF"), ("cut.webp", "WEBP")):
        whole = writers.picture(side=64, kind=kind)
        (folder / name).write_bytes(whole[: len(whole) // 2])
    good = writers.picture()
    header = good[12:16] + 2 * (60_000).to_bytes(4, "big") + good[24:29]
    checked = header + zlib.crc32(header).to_bytes(4, "big")
    (folder / "bomb.png").write_bytes(good[:12] + checked + good[33:])
    (folder / "text.png").write_text("hello")
    (root / "outside").mkdir()
    for secret in (root / "secret.png", root / "outside" / "secret.png"):
        secret.write_bytes(good)
    (folder / "link.png").symlink_to(root / "secret.png")
    (folder / "out").symlink_to(root / "outside")
    (folder / "inner.png").symlink_to(folder / "0.png")
    os.mkfifo(folder / "pipe")


def test_every_bad_record_is_named_with_its_reason_and_good_ones_stay(prompter, tmp_path):
    prepare(tmp_path)
    records = [
        {"id": name, **record} if isinstance(record, dict) else record for name, (record, _) in BAD.items()
    ]
    good = [
        {"id": "good", "conversations": said(HUMAN, GPT)},
        {"id": "inner", "image": "inner.png", "conversations": said(HUMAN, GPT)},
        {"id": "within", "image": "folder/../0.png", "conversations": said(HUMAN, GPT)},
    ]
    found = loaded(tmp_path, [*records, *good], prompter)
    named = faults(found)
    named["no_object"] = named.pop("#0")
    assert set(named) == set(BAD)
    for name, (_, reason) in BAD.items():
        assert reason in named[name], f"{name}: {named[name]}"
    assert [found.rows[i]["id"] for i in found.accepted] == ["good", "inner", "within"]
    assert len(found.accepted) + len(found.rejected) == len(records) + len(good)


def test_a_file_cut_off_is_one_reject_with_its_place(prompter, tmp_path):
    whole = json.dumps([writers.talk(i) for i in range(10)])
    writers.write_pictures(tmp_path / "images")
    (tmp_path / "train.json").write_text(whole[: len(whole) - 30])
    found = pool.load(config(tmp_path), "d", "train", prompter)
    assert len(found.accepted) == 9
    assert faults(found) == {"#9": f"file: cut off at byte {len(whole) - 30}, after record 9"}
    with pytest.raises(UserError, match=r"data.max_rejected: 1 of 10 samples are bad"):
        pool.check_rejected([found], 0.001)


def test_a_picture_that_came_later_is_found(prompter, tmp_path):
    records = [writers.talk(0), writers.talk(1, image="late.png")]
    found = loaded(tmp_path, records, prompter)
    assert faults(found) == {"r1": "image: missing"}
    (tmp_path / "images" / "late.png").write_bytes(writers.picture(99))
    found = loaded(tmp_path, records, prompter)
    assert (found.accepted, found.rejected) == ([0, 1], [])
    assert all(found.digests)
    assert found.sample(1).images_HWC[0][0, 0, 0] == 99


@pytest.mark.parametrize(
    ("later", "reason"), [(None, "missing"), (b"no picture", "none of PNG, JPEG, GIF, WEBP")]
)
def test_a_picture_that_went_after_it_was_vetted_is_told_in_one_line(later, reason, prompter, tmp_path):
    found = loaded(tmp_path, [writers.talk(0), writers.talk(1)], prompter)
    place = tmp_path / "images" / "1.png"
    place.unlink() if later is None else place.write_bytes(later)
    assert found.sample(0).id == "r0"
    with pytest.raises(UserError, match=f"^data: d r1: image: {reason}.*; it could be read") as error:
        found.sample(1)
    assert "\n" not in str(error.value)


def test_digests_tell_text_pictures_and_their_order_apart(prompter, tmp_path):
    two = said(("human", "<image><image>"), GPT)
    records = [
        {"image": ["0.png", "1.png"], "conversations": two},
        {"image": ["1.png", "0.png"], "conversations": two},
        {"image": ["0.png", "1.png"], "conversations": [*two, *said(HUMAN, GPT)]},
        {"image": ["0.png", "1.png"], "conversations": two, "system": "be brief"},
        {"image": ["0.png", "1.png"], "conversations": two, "id": "again"},
    ]
    found = loaded(tmp_path, records, prompter, max_length=256)
    assert not found.rejected
    assert len(set(found.digests)) == 4
    assert found.digests[0] == found.digests[4]
    assert found.lengths[0] == found.lengths[1] < found.lengths[2]


TEXTS = st.one_of(
    st.text(max_size=5),
    st.sampled_from(["<image>", "0.png", "../x", "/etc/passwd", "human", "gpt", "what ?", ""]),
)
SCALARS = st.none() | st.booleans() | st.integers(-5, 10**30) | st.floats() | TEXTS
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
TURN = st.fixed_dictionaries({}, optional={"from": TEXTS | JUNK, "value": TEXTS | JUNK})
RECORD = st.fixed_dictionaries(
    {},
    optional={
        "id": JUNK, "question_id": JUNK, "image": TEXTS | st.lists(TEXTS, max_size=3) | JUNK, "system": JUNK,
        "conversations": st.lists(TURN | JUNK, max_size=4) | JUNK, "text": TEXTS | JUNK, "answer": TEXTS | JUNK,
        "question_type": JUNK,
    },
)  # fmt: skip


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    records=st.lists(RECORD | JUNK, max_size=5),
    name=st.sampled_from(["llava_json", "coin", "cvit", "ucit"]),
    file=st.sampled_from(["train.json", "train.jsonl"]),
)
def test_malformed_records_are_accepted_or_rejected_and_never_more(
    records, name, file, prompter, tmp_path_factory
):
    root = tmp_path_factory.mktemp("set")
    writers.write_pictures(root / "images", 1)
    finite = json.loads(json.dumps(records), parse_constant=lambda _: 0)
    text = json.dumps(finite) if file == "train.json" else "".join(json.dumps(r) + "\n" for r in finite)
    (root / file).write_text(text)
    found = pool.load(config(root, {**DOMAIN, "format": name, "train": file}), "d", "train", prompter)
    assert len(found.rows) == len(found.accepted) + len(found.rejected) == len(records)
    assert len({row["id"] for row in found.rows}) == len(records)
    assert all(bad.reason and "\n" not in bad.reason for bad in found.rejected)
    for index in found.accepted:
        sample = found.sample(index)
        assert all(turn.answer.strip() for turn in sample.turns)


@settings(max_examples=80, deadline=None)
@given(noise=st.binary(max_size=200), data=st.data())
def test_malformed_files_are_told_in_one_line_or_read(noise, data, tmp_path_factory):
    root = tmp_path_factory.mktemp("set")
    whole = json.dumps([writers.talk(i) for i in range(3)]).encode()
    place = data.draw(st.integers(0, len(whole)))
    (root / "train.json").write_bytes(whole[:place] + noise + whole[place + len(noise) // 2 :])
    source = sources.of(config(root, {**DOMAIN, "images": ""}))
    rows, refusal = [], ""
    try:
        rows = source.load("d", "train")
    except UserError as error:
        refusal = str(error)
    assert "\n" not in refusal
    if not refusal:
        assert len({row["id"] for row in rows}) == len(rows)
        assert source.size("d", "train") == sum(not row["fault"] for row in rows)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 300), st.sampled_from(images.FORMATS))
def test_malformed_pictures_are_decoded_or_refused(noise, place, kind):
    whole = writers.picture(side=16, kind=kind)
    place = min(place, len(whole))
    found = ""
    try:
        found = images.decode(whole[:place] + noise + whole[place + len(noise) :])
    except ValueError as error:
        found = str(error)
    assert found.startswith("image: ") if isinstance(found, str) else found.shape[2] == 3
