"""Answers about brain slices agree with the affine and the raw probability maps, voxel by voxel."""

import functools
from collections import Counter
from pathlib import Path

import numpy as np
from scipy import ndimage

from workloads.data.pocket import SPLITS, compose

ASSETS = Path(__file__).parents[2] / "workloads" / "assets"


@functools.cache
def scenes():
    return [compose("biomedical", split, 5, index) for split in SPLITS for index in range(120)]


def answers(scene):
    return {pair.question_type: pair.answer for pair in scene.qa}


def mark_centres(scene):
    """(x, y) of every mark, found by its colours in the picture."""
    image = scene.image.astype(int)
    magenta = (image == (255, 0, 255)).all(2)
    yellow = (image == (255, 255, 0)).all(2)
    labels, count = ndimage.label(magenta | yellow, structure=np.ones((3, 3)))
    centres = ndimage.center_of_mass(np.ones(labels.shape), labels, range(1, count + 1))
    return [(x, y) for y, x in centres]


def test_dots_are_counted_as_they_appear():
    numerals = ("i", "ii", "iii", "iv", "v", "vi")
    for scene in scenes():
        found = len(mark_centres(scene))
        assert answers(scene).get("count") == (numerals[found - 1] if found else None)
        assert (scene.facts.mark is not None) == (found == 1)


@functools.cache
def brain_affine():
    return np.load(ASSETS / "brain.npz")["affine_44"]


def voxel_mm(voxel):
    """mm right, anterior, superior of a voxel, one product at a time."""
    affine = brain_affine()
    return [sum(float(affine[i, k]) * voxel[k] for k in range(3)) + float(affine[i, 3]) for i in range(3)]


def test_the_side_is_the_patients_in_radiological_display():
    asked = [scene for scene in scenes() if "side" in answers(scene)]
    assert len(asked) >= 60
    assert {scene.facts.plane for scene in asked} == {"axial", "coronal"}
    for scene in asked:
        ((x, _),) = mark_centres(scene)
        right_mm = voxel_mm(scene.facts.voxel)[0]
        assert abs(right_mm) >= 12
        assert answers(scene)["side"] == ("right" if right_mm > 0 else "left")
        assert (x + 0.5 < 48) == (right_mm > 0), "image left is the patient's right"


def test_anatomical_places_follow_the_patients_axes():
    axes = {
        0: ("dexter", "dextrad", "median", "sinistrad", "sinister"),
        1: ("anterior", "anteriad", "central", "posteriad", "posterior"),
        2: ("superior", "craniad", "midway", "caudad", "inferior"),
    }
    planes = {"axial": (1, 0), "coronal": (2, 0), "sagittal": (2, 1)}
    places = {(plane, axis): [] for plane, pair in planes.items() for axis in pair}
    for scene in scenes():
        if "where" in answers(scene):
            mm, plane = voxel_mm(scene.facts.voxel), scene.facts.plane
            for word, axis in zip(answers(scene)["where"].split(), planes[plane], strict=True):
                places[plane, axis].append((axes[axis].index(word), mm[axis]))
    for found in places.values():
        assert len(found) >= 30
        levels, mm = np.array(found).T
        assert np.corrcoef(levels, mm)[0, 1] < -0.9, "from right, front and above to left, back and below"


def test_the_voxel_at_the_mark_is_found_by_laying_the_slice_back():
    cut_axis = {"axial": 2, "coronal": 1, "sagittal": 0}
    view_axes = {"axial": (1, 0), "coronal": (2, 0), "sagittal": (2, 1)}
    centre = (49, 58, 38)
    checked = 0
    for scene in scenes():
        if scene.facts.voxel is None:
            continue
        ((x, y),) = mark_centres(scene)
        step, *shifts = scene.facts.view
        plane = scene.facts.plane
        assert scene.facts.voxel[cut_axis[plane]] == scene.facts.slice_index
        for axis, pixel, shift in zip(view_axes[plane], (y, x), shifts, strict=True):
            # Image order runs from right, front and above to left, back and below.
            exact = centre[axis] + (47.5 - pixel + shift) * step / 256
            assert abs(scene.facts.voxel[axis] - exact) <= 0.5 + 1 / 256
        checked += 1
    assert checked >= 150


def test_the_picture_shows_the_voxel_that_the_facts_name():
    t1 = np.load(ASSETS / "brain.npz")["t1_XYZ"].astype(float)
    pairs = []
    for scene in scenes():
        if scene.facts.voxel:
            i, j, k = scene.facts.voxel
            mark = scene.facts.mark
            pairs.append((t1[i, j, k], float(scene.image[mark.y, mark.x].mean())))
    seen = np.array(pairs)
    assert len(seen) >= 150
    assert np.corrcoef(seen.T)[0, 1] > 0.85


def test_tissue_is_asked_only_where_the_probability_maps_are_decisive():
    raw = dict(np.load(ASSETS / "brain.npz"))
    seen = Counter()
    for scene in scenes():
        if scene.facts.voxel is None:
            continue
        grey, white = (float(raw[name][scene.facts.voxel]) / 255 for name in ("grey_XYZ", "white_XYZ"))
        tissue = answers(scene).get("at_mark")
        seen[tissue] += 1
        if tissue is None:
            assert max(grey, white) <= 0.81
        else:
            assert {"grey": grey, "white": white, "fluid": 1 - grey - white}[tissue] > 0.8
    assert all(seen[tissue] >= 20 for tissue in ("grey", "white", "fluid"))
