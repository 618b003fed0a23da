"""The committed pictures, words and tables as arrays, by split; loaded once a process.

Shape letters: N pictures, H rows, W columns, C channels, X Y Z voxels (right, anterior, superior), F fonts,
S sizes.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from workloads.data.pocket.scene import SPLITS

FOLDER = Path(__file__).parents[2] / "assets"
# What samples are composed from.
FILES = ("brain.npz", "emoji.npz", "garments.npz", "glyphs.npz", "tables.json", "words.json")


def _arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / name, allow_pickle=False) as archive:
        return dict(archive)


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Garments (N, 28, 28) or emoji (N, 32, 32, 4), uint8, and where each belongs."""

    images: np.ndarray
    kinds: tuple[str, ...]
    # Source name of each picture, e.g. "garment:123"; skin tones of one emoji share theirs.
    sources: tuple[str, ...]
    # Split -> kind -> one array of picture indices per source.
    members: dict[str, dict[str, list[np.ndarray]]]


def _pictures(images: np.ndarray, kinds_K: np.ndarray, kinds_N: np.ndarray, splits_N: np.ndarray,
              sources: list[str]) -> Pictures:  # fmt: skip
    kinds = tuple(str(kind) for kind in kinds_K)
    members: dict[str, dict[str, dict[str, list[int]]]] = {
        split: {kind: {} for kind in kinds} for split in SPLITS
    }
    for index, source in enumerate(sources):
        group = members[SPLITS[splits_N[index]]][kinds[kinds_N[index]]]
        group.setdefault(source, []).append(index)
    grouped = {
        split: {kind: [np.array(rows) for rows in group.values()] for kind, group in by_kind.items()}
        for split, by_kind in members.items()
    }
    return Pictures(images=images, kinds=kinds, sources=tuple(sources), members=grouped)


@cache
def garments() -> Pictures:
    """Grey garments of eight kinds, bright on black."""
    raw = _arrays("garments.npz")
    sources = [f"garment:{index}" for index in range(len(raw["kinds_N"]))]
    return _pictures(raw["images_NHW"], raw["kinds"], raw["kinds_N"], raw["splits_N"], sources)


@cache
def emoji() -> Pictures:
    """RGBA emoji of eleven kinds."""
    raw = _arrays("emoji.npz")
    sources = [f"emoji:{code}" for code in raw["codes_N"]]
    return _pictures(raw["images_NHWC"], raw["kinds"], raw["kinds_N"], raw["splits_N"], sources)


@dataclass(frozen=True, kw_only=True)
class Brain:
    """T1 intensity and tissue probability (0-255) at 2 mm; only the brain itself is not black."""

    t1_XYZ: np.ndarray
    grey_XYZ: np.ndarray
    white_XYZ: np.ndarray
    # (i, j, k, 1) -> mm (right, anterior, superior) of the origin.
    affine_44: np.ndarray


@cache
def brain() -> Brain:
    """The averaged brain."""
    return Brain(**_arrays("brain.npz"))


@dataclass(frozen=True, kw_only=True)
class Font:
    """Bitmaps of one font at the three cap heights."""

    name: str
    # Per size, character -> coverage (32, 40) uint8 with the pen at `origin` on row `baseline`.
    coverage: tuple[dict[str, np.ndarray], ...]
    # Per size, character -> step of the pen in pixels.
    advance: tuple[dict[str, int], ...]
    cap_heights: tuple[int, ...]
    baseline: int
    origin: int


@cache
def fonts() -> dict[str, list[Font]]:
    """Split -> fonts."""
    raw = _arrays("glyphs.npz")
    characters = [str(character) for character in raw["characters"]]
    baseline, origin = (int(value) for value in raw["baseline_origin"])
    by_split: dict[str, list[Font]] = {split: [] for split in SPLITS}
    for f, name in enumerate(raw["fonts_F"]):
        steps = [[int(step) for step in row] for row in raw["advance_FSC"][f]]
        font = Font(
            name=str(name),
            coverage=tuple(dict(zip(characters, row, strict=True)) for row in raw["coverage_FSCHW"][f]),
            advance=tuple(dict(zip(characters, row, strict=True)) for row in steps),
            cap_heights=tuple(int(height) for height in raw["cap_heights_S"]),
            baseline=baseline,
            origin=origin,
        )
        by_split[SPLITS[raw["splits_F"][f]]].append(font)
    return by_split


@cache
def words() -> dict[str, dict[int, list[str]]]:
    """Split -> length -> lower-case words."""
    raw = json.loads((FOLDER / "words.json").read_text())
    return {split: {n: [w for w in raw[split] if len(w) == n] for n in (3, 4, 5)} for split in SPLITS}


@cache
def tables() -> dict[str, dict[str, list[float]]]:
    """Split -> table name -> values, largest first."""
    raw = json.loads((FOLDER / "tables.json").read_text())
    by_split: dict[str, dict[str, list[float]]] = {split: {} for split in SPLITS}
    for name, table in sorted(raw.items()):
        by_split[table["split"]][name] = sorted((value for _, value in table["rows"]), reverse=True)
    return by_split


@cache
def version() -> str:
    """Hash of everything a composed sample depends on: the asset files and this package's source."""
    digest = hashlib.sha256()
    for path in [FOLDER / name for name in FILES] + sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]
