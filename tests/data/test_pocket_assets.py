"""Committed assets: small, without pickles, with their notices; their arithmetic agrees with plain loops."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from workloads.assets import build, packages
from workloads.errors import UserError

ASSETS = Path(__file__).parents[2] / "workloads" / "assets"


def data_files():
    return [path for path in ASSETS.iterdir() if path.suffix in (".npz", ".json")]


def test_the_assets_stay_within_eight_megabytes():
    assert 1_000_000 < sum(path.stat().st_size for path in data_files()) <= 8_000_000


def test_every_asset_has_a_section_with_its_notice():
    text = (ASSETS / "NOTICES.md").read_text()
    sections = dict(re.findall(r"^## (\S+): (.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert sections.keys() == {path.name for path in data_files()}
    for name, section in sections.items():
        assert "Changes:" in section or name == "glyphs.npz"
        assert re.search(r"[Cc]opyright|[Pp]ublic domain|public domain", section)
    for table in json.loads((ASSETS / "tables.json").read_text()):
        assert re.search(rf"^\| {table.split('-')[0]}", sections["tables.json"], re.MULTILINE), table


def test_arrays_load_without_pickle():
    for path in ASSETS.glob("*.npz"):
        with np.load(path, allow_pickle=False) as archive:
            assert all(archive[name].dtype.kind in "uifU" for name in archive.files)


def test_every_glyph_stands_on_the_line_and_capitals_have_their_height():
    raw = dict(np.load(ASSETS / "glyphs.npz"))
    baseline = int(raw["baseline_origin"][0])
    letter = raw["characters"].tolist().index("H")
    for sizes in raw["coverage_FSCHW"]:
        for cap_height, glyphs in zip(raw["cap_heights_S"].tolist(), sizes, strict=True):
            assert (glyphs.max((1, 2)) > 128).all(), "every character has ink"
            rows = np.flatnonzero(glyphs[letter].max(1) > 64)
            assert abs(len(rows) - cap_height) <= 1
            assert rows[-1] == baseline - 1


def test_a_missing_package_is_named_with_the_command_that_gets_it(tmp_path):
    with pytest.raises(UserError, match="apt-get download dataset-fashion-mnist") as caught:
        packages.verify(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_package_with_other_bytes_is_refused(tmp_path):
    for package in packages.PACKAGES.values():
        (tmp_path / package.file).write_bytes(b"not it")
    wrong = hashlib.sha256(b"not it").hexdigest()
    with pytest.raises(UserError, match=wrong) as caught:
        packages.verify(tmp_path)
    assert "\n" not in str(caught.value)


def test_halving_a_picture_is_the_alpha_weighted_mean_of_its_blocks():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    pixels[:8, :8, 3] = 0
    got = build._halve(Image.fromarray(pixels))
    for row in range(32):
        for column in range(32):
            block = pixels[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(4, 4).astype(float)
            alpha = block[:, 3].sum()
            assert got[row, column, 3] == int(alpha / 4)
            for channel in range(3):
                colour = (block[:, channel] * block[:, 3]).sum() / alpha if alpha else 0.0
                assert got[row, column, channel] == int(colour)


def test_smoothing_keeps_every_second_voxel_in_place():
    volume = np.random.default_rng(1).integers(0, 256, (5, 7, 9), dtype=np.uint8)
    got = build._smooth_and_halve(volume)
    assert got.shape == (3, 4, 5)
    weights = {-1: 0.25, 0: 0.5, 1: 0.25}
    for i in range(3):
        for j in range(4):
            for k in range(5):
                total = 0.0
                for a, wa in weights.items():
                    for b, wb in weights.items():
                        for c, wc in weights.items():
                            x = min(max(2 * i + a, 0), 4)
                            y = min(max(2 * j + b, 0), 6)
                            z = min(max(2 * k + c, 0), 8)
                            total += wa * wb * wc * float(volume[x, y, z])
                assert abs(float(got[i, j, k]) - total) <= 0.5


def test_equal_arrays_make_equal_files(tmp_path):
    arrays = {"b": np.arange(6).reshape(2, 3), "a": np.array(["x", "yy"])}
    build.write_npz(tmp_path / "one.npz", arrays)
    build.write_npz(tmp_path / "two.npz", dict(reversed(arrays.items())))
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    with np.load(tmp_path / "one.npz", allow_pickle=False) as archive:
        for name, value in arrays.items():
            assert (archive[name] == value).all()
