"""Splits of the embedded benchmark share no source, and a sample depends on its arguments only."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from workloads.data.pocket import DOMAINS, SPLITS, compose
from workloads.data.pocket.slices import CUTS, slabs
from workloads.errors import UserError

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "workloads" / "assets"
PAIRS = (("train", "val"), ("train", "test"), ("val", "test"))


def assert_apart(by_split):
    """No member of one split is in another, and no split is empty."""
    for one, other in PAIRS:
        assert by_split[one]
        assert by_split[other]
        assert not set(by_split[one]) & set(by_split[other])


@pytest.mark.parametrize("domain", DOMAINS)
def test_composed_samples_of_two_splits_share_no_source(domain):
    found = {split: set() for split in SPLITS}
    for split in SPLITS:
        for index in range(400):
            found[split].update(compose(domain, split, index % 3, index).sources)
    assert_apart(found)


@pytest.mark.parametrize(
    ("file", "images", "codes"), [("garments", "images_NHW", None), ("emoji", "images_NHWC", "codes_N")]
)
def test_no_picture_and_no_emoji_code_is_in_two_splits(file, images, codes):
    raw = dict(np.load(ASSETS / f"{file}.npz"))
    pixels, names = {split: set() for split in SPLITS}, {split: set() for split in SPLITS}
    for index, split in enumerate(raw["splits_N"]):
        pixels[SPLITS[split]].add(raw[images][index].tobytes())
        names[SPLITS[split]].add(str(raw[codes][index]) if codes else index)
    assert_apart(pixels)
    assert_apart(names)


def test_every_kind_has_pictures_in_every_split():
    for file in ("garments", "emoji"):
        raw = dict(np.load(ASSETS / f"{file}.npz"))
        pairs = set(zip(raw["kinds_N"].tolist(), raw["splits_N"].tolist(), strict=True))
        assert len(pairs) == 3 * len(raw["kinds"])


def test_garments_are_class_balanced_in_every_split():
    raw = dict(np.load(ASSETS / "garments.npz"))
    for split in range(3):
        counts = np.bincount(raw["kinds_N"][raw["splits_N"] == split])
        assert len(set(counts.tolist())) == 1


def test_words_fonts_and_tables_are_in_one_split_each():
    assert_apart(json.loads((ASSETS / "words.json").read_text()))
    glyphs = dict(np.load(ASSETS / "glyphs.npz"))
    fonts = {
        split: set(glyphs["fonts_F"][glyphs["splits_F"] == i].tolist()) for i, split in enumerate(SPLITS)
    }
    assert_apart(fonts)
    tables = json.loads((ASSETS / "tables.json").read_text())
    published = {split: set() for split in SPLITS}
    for name, table in tables.items():
        # All tables cut from one published data set go together.
        published[table["split"]].add(name.split("-")[0])
    assert_apart(published)


def test_slabs_of_different_splits_are_at_least_four_mm_apart():
    affine = np.load(ASSETS / "brain.npz")["affine_44"]
    for plane, (axis, _) in CUTS.items():
        edges = []
        for split in SPLITS:
            for slab in slabs()[split][plane]:
                for index in slab.slices:
                    middle = float(affine[axis, axis]) * index + float(affine[axis, 3])
                    edges.append((split, middle - 1.0, middle + 1.0))  # a slice is 2 mm thick
        for split, low, high in edges:
            for other, other_low, other_high in edges:
                if split != other:
                    assert max(low - other_high, other_low - high) >= 4.0


def test_no_sagittal_slice_has_a_mirror_image_in_another_split():
    raw = dict(np.load(ASSETS / "brain.npz"))
    assert (raw["t1_XYZ"] == raw["t1_XYZ"][::-1]).all(), "the averaged brain is symmetric"
    shown = {split: {i for slab in slabs()[split]["sagittal"] for i in slab.slices} for split in SPLITS}
    last = raw["t1_XYZ"].shape[0] - 1
    for one in SPLITS:
        for other in SPLITS:
            assert not {last - i for i in shown[one]} & shown[other]


def test_a_scan_shows_a_slice_of_the_slab_it_names():
    for split in SPLITS:
        for index in range(60):
            scene = compose("biomedical", split, 1, index)
            _, plane, number = scene.sources[0].split(":")
            (slab,) = [slab for slab in slabs()[split][plane] if slab.number == int(number)]
            assert scene.facts.plane == plane
            assert scene.facts.slice_index in slab.slices


@pytest.mark.parametrize("domain", DOMAINS)
def test_six_hundred_test_items_are_all_different(domain):
    scenes = [compose(domain, "test", 0, index) for index in range(600)]
    assert len({(scene.sources, repr(scene.facts)) for scene in scenes}) == 600
    assert len({scene.image.tobytes() for scene in scenes}) == 600


PROBE = """
import hashlib
from workloads.data.pocket import DOMAINS, SPLITS, compose
total = hashlib.sha256()
for domain in DOMAINS:
    for split in SPLITS:
        for index in (3, 0, 17):
            scene = compose(domain, split, 4, index)
            text = repr((scene.facts, scene.qa, scene.caption, scene.sources))
            total.update(scene.image.tobytes() + text.encode())
print(total.hexdigest())
"""


def test_a_fresh_process_composes_the_same_bytes_in_any_order():
    environment = os.environ | {"PYTHONHASHSEED": "123", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, env=environment, check=True
    )
    total = hashlib.sha256()
    kept = {}
    for domain in reversed(DOMAINS):
        for split in SPLITS:
            for index in (17, 0, 3):
                kept[domain, split, index] = compose(domain, split, 4, index)
    for domain in DOMAINS:
        for split in SPLITS:
            for index in (3, 0, 17):
                scene = kept[domain, split, index]
                text = repr((scene.facts, scene.qa, scene.caption, scene.sources))
                total.update(scene.image.tobytes() + text.encode())
    assert ran.stdout.strip() == total.hexdigest()


@pytest.mark.parametrize(
    "change", [("general", "train", 5, 7), ("general", "train", 4, 8), ("general", "val", 4, 7)]
)
def test_seed_index_and_split_each_change_the_sample(change):
    assert (compose(*change).image != compose("general", "train", 4, 7).image).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("documents", "train", 0, 0), "domain: 'documents' is not allowed; .*did you mean 'document'"),
        (("general", "tset", 0, 0), "split: 'tset' is not allowed; .*did you mean 'test'"),
        (("general", "test", -1, 0), "seed"),
    ],
)
def test_a_wrong_argument_is_told_in_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        compose(*arguments)
    assert "\n" not in str(caught.value)
