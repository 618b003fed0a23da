"""Slices of the averaged brain: which ones each split may show, and how one lies in the frame.

Differs: the volume is symmetric, so sagittal slices come from the right half only: the left repeats them.

Shape letters: X Y Z voxels (right, anterior, superior), A B the two axes of a slice in voxel order.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from workloads.data.pocket import assets
from workloads.data.pocket.scene import SIZE, SPLITS

# The voxel axis that a slice is cut across, and the range it is cut from, in mm.
CUTS = {"axial": (2, (-42, 66)), "coronal": (1, (-88, 56)), "sagittal": (0, (2, 58))}
# (axis along image rows, axis along image columns); image order runs from high to low voxel index.
VIEWS = {"axial": (1, 0), "coronal": (2, 0), "sagittal": (2, 1)}
# Slices per slab, in turn; two slices between slabs are never shown, so that 6 mm part different splits.
SLABS = (("train", 6), ("val", 3), ("train", 5), ("test", 3))
GAP = 2
# The voxel that an unshifted slice is centred on, along each axis.
MIDDLE = (49, 58, 38)


@dataclass(frozen=True, kw_only=True)
class Slab:
    """A run of neighbouring slices of one plane; all of one split."""

    plane: str
    number: int
    # Voxel indices along the axis that the plane is cut across.
    slices: tuple[int, ...]


@cache
def slabs() -> dict[str, dict[str, tuple[Slab, ...]]]:
    """Split -> plane -> slabs."""
    found: dict[str, dict[str, tuple[Slab, ...]]] = {split: {} for split in SPLITS}
    affine_44 = assets.brain().affine_44
    for plane, (axis, (low, high)) in CUTS.items():
        start, stop = (round((mm - affine_44[axis, 3]) / affine_44[axis, axis]) for mm in (low, high))
        number = 0
        while start <= stop:
            split, length = SLABS[number % len(SLABS)]
            slices = tuple(range(start, min(start + length, stop + 1)))
            slab = Slab(plane=plane, number=number, slices=slices)
            found[split][plane] = (*found[split].get(plane, ()), slab)
            start += length + GAP
            number += 1
    return found


@dataclass(frozen=True, kw_only=True)
class View:
    """One slice in the frame: which voxel each pixel shows."""

    plane: str
    index: int
    # Fixed-point (1/256) voxel index along the row axis of each image row, and so for columns.
    rows_q8: np.ndarray
    columns_q8: np.ndarray
    # Voxels per pixel in 1/256, then shift along rows and columns in pixels.
    layout: tuple[int, int, int]

    def cut(self, volume_XYZ: np.ndarray) -> np.ndarray:
        """The slice with the row axis first."""
        row_axis, column_axis = VIEWS[self.plane]
        plane_AB = np.take(volume_XYZ, self.index, axis=CUTS[self.plane][0])
        return plane_AB.T if row_axis > column_axis else plane_AB

    def voxel(self, x: int, y: int) -> tuple[int, int, int]:
        """Indices (right, anterior, superior) of the voxel nearest to a pixel's centre."""
        row_axis, column_axis = VIEWS[self.plane]
        found = {
            CUTS[self.plane][0]: self.index,
            row_axis: int(self.rows_q8[y] + 128) >> 8,
            column_axis: int(self.columns_q8[x] + 128) >> 8,
        }
        return found[0], found[1], found[2]


def lay(rng: np.random.Generator, plane: str, index: int) -> View:
    """The brain centred in the frame, give or take three pixels and a few per cent of scale."""
    volume = assets.brain().t1_XYZ
    step_q8 = int(rng.integers(242, 277))
    shifts = rng.integers(-3, 4, 2).tolist()
    places = []
    for axis, shift in zip(VIEWS[plane], shifts, strict=True):
        offsets = (SIZE - 1) / 2 - np.arange(SIZE) + shift  # from high to low index: image order is reversed
        places_q8 = MIDDLE[axis] * 256 + (offsets * step_q8).astype(np.int64)
        places.append(np.clip(places_q8, 0, (volume.shape[axis] - 1) * 256).astype(np.int32))
    return View(
        plane=plane,
        index=index,
        rows_q8=places[0],
        columns_q8=places[1],
        layout=(step_q8, shifts[0], shifts[1]),
    )
