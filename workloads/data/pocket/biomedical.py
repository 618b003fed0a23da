"""Brain slices: one averaged T1 volume cut along three planes, marked with dots, asked as radiologists do.

Source:  MNI152 nonlinear symmetric 2009a (Fonov et al. 2009).
Differs: axial and coronal slices are in radiological display (image left is the patient's right); sagittal
slices face the image's left.

Shape letters: H rows, W columns.
"""

import numpy as np

from workloads.data.pocket import assets, canvas
from workloads.data.pocket.questions import PLANES, answer
from workloads.data.pocket.scene import EDGE_CLEARANCE, SIZE, Facts, Mark, Part
from workloads.data.pocket.slices import View, lay, slabs

# Probability (0-255) from which a tissue is decisive, and the most that grey and white may leave to fluid.
DECISIVE, TRACE = 205, 26
# Least T1 intensity of fluid (what is darker is the edge of the brain mask) and of a place for a dot.
FLUID_T1, LEAST_T1 = 30, 90
# Least distance of a mark from the midline for its side to be asked, in mm.
MIDLINE_MM = 12.0
MAX_DOTS = 6
DOT_GAP = 3


def _tissue(voxel: tuple[int, int, int]) -> str | None:
    """Grey, white or fluid where the probability maps are decisive, else None."""
    brain = assets.brain()
    grey, white = int(brain.grey_XYZ[voxel]), int(brain.white_XYZ[voxel])
    if grey >= DECISIVE:
        return "grey"
    if white >= DECISIVE:
        return "white"
    return "fluid" if grey + white <= TRACE and brain.t1_XYZ[voxel] >= FLUID_T1 else None


def _patient_right(view: View, mark: Mark) -> bool | None:
    """Whether the mark is in the patient's right half; None in sagittal slices and near the midline."""
    if view.plane == "sagittal" or mark.right_of_middle() is None:
        return None
    right_mm = float((assets.brain().affine_44 @ np.array([*view.voxel(mark.x, mark.y), 1.0]))[0])
    return None if abs(right_mm) < MIDLINE_MM else right_mm > 0


def _dots(rng: np.random.Generator, shown_HW: np.ndarray, count: int, off_middle: bool) -> list[Mark]:
    """Up to `count` marks on the brain, clear of each other and cell borders (`off_middle`: midline too)."""
    dots: list[Mark] = []
    for x, y in canvas.candidate_marks(rng, 200).tolist():
        if len(dots) == count:
            break
        mark = Mark(x=x, y=y)
        if not shown_HW[y, x] or (off_middle and mark.right_of_middle() is None):
            continue
        box = canvas.mark_box(mark)
        if not any(canvas.overlaps(box, canvas.mark_box(dot), DOT_GAP) for dot in dots):
            dots.append(mark)
    return dots


def _tissue_dot(rng: np.random.Generator, view: View) -> list[Mark]:
    """One mark on decisive tissue, each tissue present being equally likely."""
    brain = assets.brain()
    nearest = (view.rows_q8 + 128 >> 8)[:, None], (view.columns_q8 + 128 >> 8)[None]
    grey_HW, white_HW, t1_HW = (
        view.cut(volume)[nearest].astype(np.int32)
        for volume in (brain.grey_XYZ, brain.white_XYZ, brain.t1_XYZ)
    )
    fluid_HW = (t1_HW >= FLUID_T1) & (grey_HW + white_HW <= TRACE)
    tissues = (grey_HW >= DECISIVE, white_HW >= DECISIVE, fluid_HW)
    for tissue in rng.permutation(3):
        inner_HW = tissues[tissue][EDGE_CLEARANCE:-EDGE_CLEARANCE, EDGE_CLEARANCE:-EDGE_CLEARANCE]
        rows, columns = np.nonzero(inner_HW)
        if len(rows):
            chosen = rng.integers(len(rows))
            return [Mark(x=int(columns[chosen]) + EDGE_CLEARANCE, y=int(rows[chosen]) + EDGE_CLEARANCE)]
    return []


def _marks(rng: np.random.Generator, view: View, shown_HW: np.ndarray, focus: str) -> list[Mark]:
    if focus == "at_mark":
        return _tissue_dot(rng, view)
    if focus in ("side", "where"):
        return _dots(rng, shown_HW, 1, off_middle=focus == "side")
    count = int(rng.integers(1, MAX_DOTS + 1)) if focus == "count" else int(rng.integers(0, 3))
    return _dots(rng, shown_HW, count, off_middle=False)


def _facts(view: View, marks: list[Mark]) -> Facts:
    parts = tuple(Part(label="dot", value=0.0, box=canvas.mark_box(mark)) for mark in marks)
    only = marks[0] if len(marks) == 1 else None
    voxel = view.voxel(only.x, only.y) if only else None
    return Facts(
        domain="biomedical",
        layout="scan",
        parts=parts,
        mark=only,
        name=view.plane,
        count=len(marks) or None,
        mark_right=_patient_right(view, only) if only else None,
        mark_cell=only.cell() if only else None,
        at_mark=_tissue(voxel) if voxel else None,
        plane=view.plane,
        slice_index=view.index,
        view=view.layout,
        voxel=voxel,
    )


def draw(rng: np.random.Generator, split: str, focus: str) -> tuple[np.ndarray, Facts, tuple[str, ...]]:
    """A marked slice that answers `focus`: (96, 96, 3) uint8, its facts and its sources."""
    planes = PLANES[:2] if focus == "side" else PLANES
    plane = planes[rng.integers(len(planes))]
    group = slabs()[split][plane]
    slices = [(slab, index) for slab in group for index in slab.slices]
    slab, index = slices[rng.integers(len(slices))]
    view = lay(rng, plane, index)
    t1_HW = canvas.sample(view.cut(assets.brain().t1_XYZ).astype(np.int32), view.rows_q8, view.columns_q8)
    gain = int(rng.integers(205, 282))
    noise_HW = rng.integers(-4, 5, (SIZE // 2, SIZE // 2), dtype=np.int16).repeat(2, 0).repeat(2, 1)
    level_HW = np.where(t1_HW > 0, np.clip((t1_HW * gain >> 8) + noise_HW, 0, 255), 0).astype(np.uint8)
    image_HWC = np.repeat(level_HW[:, :, None], 3, axis=2)
    marks = _marks(rng, view, t1_HW > LEAST_T1, focus)
    facts = _facts(view, marks)
    for mark in marks:
        canvas.draw_mark(image_HWC, mark)
    source = f"slab:{plane}:{slab.number}"
    if answer(facts, focus) is None:  # the slice has no room for what was asked: draw another
        return draw(rng, split, focus)
    return image_HWC, facts, (source,)
