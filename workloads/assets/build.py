"""Rebuild every committed asset, byte for byte, from the downloaded packages.

    python -m workloads.assets.build --downloads DIR [--out workloads/assets]

Differs: garments leave out `shirt` and `coat`, which at this size cannot be told from t-shirt and pullover;
emoji keep eleven coherent kinds; the brain is smoothed by [1 2 1]/4 and subsampled to 2 mm.
Glyph bitmaps are byte-equal under the FreeType of Pillow 13.0; everything else is integer arithmetic.

Shape letters: N pictures, H rows, W columns, X Y Z voxels (patient right, anterior, superior), F fonts,
S sizes, C characters.
"""

import argparse
import gzip
import io
import json
import string
import sys
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont

from workloads.assets.packages import PACKAGES, from_deb, from_tgz, from_wheel, verify
from workloads.assets.text import SPLITS, build_tables, build_words, deal
from workloads.errors import UserError

GARMENT_CLASSES = {
    0: "tshirt", 1: "trouser", 2: "pullover", 3: "dress", 5: "sandal", 7: "sneaker", 8: "bag", 9: "boot",
}  # fmt: skip
GARMENTS_PER_CLASS = {"train": 750, "val": 125, "test": 200}

FACE_GROUPS = ("affection", "concerned", "glasses", "hand", "hat", "negative", "neutral-skeptical", "sleepy",
               "smiling", "tongue", "unwell")  # fmt: skip
HAND_GROUPS = ("hand-fingers-closed", "hand-fingers-open", "hand-fingers-partial", "hand-single-finger")
EMOJI_GROUPS = {
    "face": tuple(f"face-{group}" for group in FACE_GROUPS),
    "hand": HAND_GROUPS,
    "heart": ("heart",),
    "flag": ("country-flag",),
    "clock": ("time",),
    "arrow": ("arrow",),
    "fruit": ("food-fruit",),
    "animal": ("animal-mammal",),
    "vehicle": ("transport-ground",),
    "building": ("place-building", "place-religious"),
    "plant": ("plant-flower", "plant-other"),
}
# Members of a group that do not look like one thing of their kind.
EMOJI_LEFT_OUT = """
 back end on soon top love_letter two_hearts revolving_hearts house_buildings gift_heart
heart_decoration heavy_heart_exclamation_mark_ornament mantelpiece_clock watch hourglass
alarm_clock stopwatch timer_clock hourglass_flowing_sand pig_nose feet guide_dog service_dog
station busstop traffic_light vertical_traffic_light construction rotating_light octagonal_sign
wheel oil_drum motorway railway_track skateboard roller_skate fuelpump manual_wheelchair
motorized_wheelchair mountain_railway bricks rock wood building_construction statue_of_liberty
kaaba rosette mushroom ear_of_rice empty_nest nest_with_eggs  leftwards_pushing_hand
rightwards_pushing_hand
"""
EMOJI_PER_KIND = 100
SKIN_TONES = ("1F3FB", "1F3FD", "1F3FF")

# Held-out fonts combine a family and a style that are trained on apart.
FONTS = {
    "DejaVuSans": "train",
    "DejaVuSans-Bold": "train",
    "DejaVuSans-Oblique": "train",
    "DejaVuSansMono": "train",
    "DejaVuSansMono-Bold": "train",
    "DejaVuSansMono-Oblique": "train",
    "DejaVuSerif": "train",
    "DejaVuSerif-Italic": "train",
    "DejaVuSerif-Bold": "val",
    "DejaVuSansMono-BoldOblique": "val",
    "DejaVuSans-BoldOblique": "test",
    "DejaVuSerif-BoldItalic": "test",
}
CHARACTERS = string.ascii_uppercase + string.digits + "$.="
CAP_HEIGHTS = (13, 17, 21)
GLYPH_HEIGHT, GLYPH_WIDTH, GLYPH_BASELINE, GLYPH_ORIGIN = 32, 40, 25, 5

Arrays = dict[str, np.ndarray]


def write_npz(path: Path, arrays: Arrays) -> None:
    """Write an .npz whose bytes depend on the arrays only: sorted members, a fixed date."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in sorted(arrays):
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.ascontiguousarray(arrays[name]), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, buffer.getvalue(), compresslevel=9)


def write_json(path: Path, value: object) -> None:
    """Write JSON whose bytes depend on the value only."""
    path.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=True) + "\n")


def build_garments(package: Path) -> Arrays:
    """Class-balanced garments: train and val from the train file, test from the test file."""
    picked: dict[str, list[np.ndarray]] = defaultdict(list)
    for file, splits in {"train": ("train", "val"), "t10k": ("test",)}.items():
        base = "usr/share/datasets/fashion-mnist"
        raw = gzip.decompress(from_deb(package, f"{base}/{file}-images-idx3-ubyte.gz"))
        images_NHW = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 28, 28)
        raw = gzip.decompress(from_deb(package, f"{base}/{file}-labels-idx1-ubyte.gz"))
        labels_N = np.frombuffer(raw, np.uint8, offset=8)
        for kind, label in enumerate(GARMENT_CLASSES):
            rows_N, start = np.flatnonzero(labels_N == label), 0
            for split in splits:
                chosen_N = rows_N[start : start + GARMENTS_PER_CLASS[split]]
                start += len(chosen_N)
                picked["images_NHW"].append(images_NHW[chosen_N])
                picked["kinds_N"].append(np.full(len(chosen_N), kind, np.uint8))
                picked["splits_N"].append(np.full(len(chosen_N), SPLITS.index(split), np.uint8))
                picked["rows_N"].append(chosen_N.astype(np.int32))
    arrays = {name: np.concatenate(parts) for name, parts in picked.items()}
    return arrays | {"kinds": np.array(list(GARMENT_CLASSES.values()))}


def _emoji_files(entries: list[dict]) -> list[tuple[str, str, str]]:
    """(kind, base code, image file) of every emoji kept, skin tones beside their base code."""
    kinds = {group: kind for kind, groups in EMOJI_GROUPS.items() for group in groups}
    kept, count = [], Counter()
    for entry in sorted(entries, key=lambda entry: entry["unified"]):
        kind = kinds.get(entry["subcategory"], "")
        skip = not entry["has_img_twitter"] or entry["short_name"] in EMOJI_LEFT_OUT.split()
        if not kind or skip or count[kind] >= EMOJI_PER_KIND:
            continue
        count[kind] += 1
        code = entry["unified"].lower()
        kept.append((kind, code, entry["image"]))
        tones = entry.get("skin_variations", {})
        kept += [(kind, code, tones[tone]["image"]) for tone in SKIN_TONES if tone in tones]
    return kept


def _halve(image: Image.Image) -> np.ndarray:
    """64-px RGBA -> 32 px by 2 x 2 means, colours weighted by alpha; uint8 (32, 32, 4)."""
    rgba_HWC = np.asarray(image.convert("RGBA"), np.int64)
    assert rgba_HWC.shape == (64, 64, 4)
    blocks = rgba_HWC.reshape(32, 2, 32, 2, 4)
    alpha_HW = blocks[..., 3].sum((1, 3))
    colour_HWC = (blocks[..., :3] * blocks[..., 3:]).sum((1, 3)) // np.maximum(alpha_HW, 1)[..., None]
    return np.concatenate([colour_HWC, alpha_HW[..., None] // 4], -1).astype(np.uint8)


def build_emoji(package: Path) -> Arrays:
    """32-px RGBA pictures of eleven kinds, split by base code; no picture occurs under two codes."""
    entries = json.loads(from_tgz(package, ["package/emoji.json"])["package/emoji.json"])
    files = _emoji_files(entries)
    raw = from_tgz(package, [f"package/img/twitter/64/{file}" for _, _, file in files])
    owners: dict[bytes, str] = {}
    rows = []
    for kind, code, file in files:
        image_HWC = _halve(Image.open(io.BytesIO(raw[f"package/img/twitter/64/{file}"])))
        if owners.setdefault(image_HWC.tobytes(), code) == code:
            rows.append((kind, code, image_HWC))
    split_of = {}
    for kind in EMOJI_GROUPS:
        codes = sorted({code for other, code, _ in rows if other == kind})
        split_of |= dict(zip(codes, deal(len(codes)), strict=True))
    kinds = list(EMOJI_GROUPS)
    return {
        "images_NHWC": np.stack([image for _, _, image in rows]),
        "kinds_N": np.array([kinds.index(kind) for kind, _, _ in rows], np.uint8),
        "splits_N": np.array([split_of[code] for _, code, _ in rows], np.uint8),
        "codes_N": np.array([code for _, code, _ in rows]),
        "kinds": np.array(kinds),
    }


def _smooth_and_halve(volume_XYZ: np.ndarray) -> np.ndarray:
    """Every second voxel along each axis after [1 2 1]/4 smoothing; voxel i lies where voxel 2 i lay."""
    for axis in range(3):
        moved = np.moveaxis(volume_XYZ.astype(np.int64), axis, 0)
        padded = np.concatenate([moved[:1], moved, moved[-1:]])
        smooth = padded[:-2] + 2 * padded[1:-1] + padded[2:]
        volume_XYZ = np.moveaxis(smooth[::2], 0, axis)
    return ((volume_XYZ + 32) // 64).astype(np.uint8)


def build_brain(package: Path) -> Arrays:
    """T1, grey and white at 2 mm; affine_44 maps (i, j, k, 1) to mm (right, anterior, superior)."""
    arrays, affine_44 = {}, np.eye(4)
    for name, file in {"t1": "t1", "grey": "gm", "white": "wm"}.items():
        member = f"nilearn/datasets/data/mni_icbm152_{file}_tal_nlin_sym_09a_converted.nii.gz"
        raw = gzip.decompress(from_wheel(package, member))
        header = np.frombuffer(raw, np.dtype("<i2"), 8, offset=40)
        assert header[0] == 3, "a 3-dimensional NIfTI-1 volume"
        assert np.frombuffer(raw, np.dtype("<i2"), 1, offset=70)[0] == 2, "uint8 voxels"
        start = int(np.frombuffer(raw, np.dtype("<f4"), 1, offset=108)[0])
        volume_XYZ = np.frombuffer(raw, np.uint8, offset=start).reshape(header[1:4], order="F")
        affine_44[:3] = np.frombuffer(raw, np.dtype("<f4"), 12, offset=280).reshape(3, 4)
        arrays[f"{name}_XYZ"] = _smooth_and_halve(volume_XYZ)
    return arrays | {"affine_44": affine_44 @ np.diag([2.0, 2.0, 2.0, 1.0])}


def _font_of_cap_height(data: bytes, cap_height: int) -> ImageFont.FreeTypeFont:
    for size in range(cap_height, 3 * cap_height):
        font = ImageFont.truetype(io.BytesIO(data), size, layout_engine=ImageFont.Layout.BASIC)
        if -font.getbbox("H", anchor="ls")[1] >= cap_height:
            return font
    raise AssertionError(f"no size of this font has capitals {cap_height} px high")


def build_glyphs(package: Path) -> Arrays:
    """Coverage (0-255) and advance (px) of every character, by font and height of the capitals."""
    shape = (len(FONTS), len(CAP_HEIGHTS), len(CHARACTERS))
    coverage_FSCHW = np.zeros((*shape, GLYPH_HEIGHT, GLYPH_WIDTH), np.uint8)
    advance_FSC = np.zeros(shape, np.uint8)
    for f, name in enumerate(FONTS):
        data = from_wheel(package, f"matplotlib/mpl-data/fonts/ttf/{name}.ttf")
        for s, cap_height in enumerate(CAP_HEIGHTS):
            font = _font_of_cap_height(data, cap_height)
            for c, character in enumerate(CHARACTERS):
                left, top, right, bottom = font.getbbox(character, anchor="ls")
                assert -GLYPH_ORIGIN <= left < right <= GLYPH_WIDTH - GLYPH_ORIGIN, (name, character)
                assert -GLYPH_BASELINE <= top < bottom <= GLYPH_HEIGHT - GLYPH_BASELINE, (name, character)
                mask, offset = font.getmask2(character, mode="L", anchor="ls")
                y, x = GLYPH_BASELINE + offset[1], GLYPH_ORIGIN + offset[0]
                width, height = mask.size
                coverage_FSCHW[f, s, c, y : y + height, x : x + width] = np.array(mask).reshape(height, width)
                advance_FSC[f, s, c] = round(font.getlength(character))
    return {
        "coverage_FSCHW": coverage_FSCHW,
        "advance_FSC": advance_FSC,
        "cap_heights_S": np.array(CAP_HEIGHTS, np.uint8),
        "characters": np.array(list(CHARACTERS)),
        "fonts_F": np.array(list(FONTS)),
        "splits_F": np.array([SPLITS.index(split) for split in FONTS.values()], np.uint8),
        "baseline_origin": np.array([GLYPH_BASELINE, GLYPH_ORIGIN], np.uint8),
    }


def build(downloads: Path, out: Path) -> None:
    """Write every asset into `out`. Raises UserError when a package is missing or not the pinned one."""
    paths = verify(downloads)
    write_npz(out / "garments.npz", build_garments(paths["fashion_mnist"]))
    write_npz(out / "emoji.npz", build_emoji(paths["emoji"]))
    write_npz(out / "brain.npz", build_brain(paths["brain"]))
    write_npz(out / "glyphs.npz", build_glyphs(paths["fonts"]))
    write_json(out / "words.json", build_words(paths["words"]))
    write_json(out / "tables.json", build_tables(paths["tables"]))


def main() -> int:
    """Parse the command line and build; 1 after a user's mistake, told in one line."""
    needs = "\n".join(f"  {package.fetch}" for package in PACKAGES.values())
    parser = argparse.ArgumentParser(
        prog="python -m workloads.assets.build",
        description="Rebuild the committed assets from downloaded packages.",
        epilog=f"Fill the download folder with:\n{needs}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--downloads", type=Path, required=True, help="folder that holds the package files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    arguments = parser.parse_args()
    try:
        build(arguments.downloads, arguments.out)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    for path in sorted(arguments.out.glob("*.npz")) + sorted(arguments.out.glob("*.json")):
        print(f"{path.stat().st_size:>9,} {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
