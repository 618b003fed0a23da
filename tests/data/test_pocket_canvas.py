"""Fixed-point drawing agrees with float64 loops."""

import numpy as np
import pytest

from workloads.data.pocket import canvas
from workloads.data.pocket.scene import Mark


@pytest.mark.parametrize(("source", "target"), [(28, 26), (28, 57), (32, 32), (32, 64)])
def test_resizing_is_bilinear_over_pixel_centres(source, target):
    image = np.random.default_rng(0).integers(0, 256, (source, source), dtype=np.uint8)
    got = canvas.resize(image, target)
    for row in range(target):
        for column in range(target):
            parts = []
            for place in (row, column):
                middle = min(max((place + 0.5) * source / target - 0.5, 0.0), source - 1.0)
                low = min(int(middle), source - 2)
                parts.append((low, middle - low))
            (top, down), (left, right) = parts
            block = image[top : top + 2, left : left + 2].astype(float)
            wanted = (
                block[0, 0] * (1 - down) * (1 - right)
                + block[0, 1] * (1 - down) * right
                + block[1, 0] * down * (1 - right)
                + block[1, 1] * down * right
            )
            # Places are rounded down to 1/256 px (at most one level along each axis), values to a whole.
            assert abs(float(got[row, column]) - wanted) <= 3.0


def test_pasting_blends_by_opacity():
    rng = np.random.default_rng(1)
    before = rng.integers(0, 256, (96, 96, 3)).astype(np.int16)
    colour = rng.integers(0, 256, (10, 12, 3)).astype(np.int32)
    alpha = rng.integers(0, 256, (10, 12)).astype(np.int32)
    alpha[0, :2] = (0, 255)
    after = before.copy()
    canvas.paste(after, colour, alpha, 5, 7)
    for row in range(10):
        for column in range(12):
            share = alpha[row, column] / 255
            wanted = before[7 + row, 5 + column] * (1 - share) + colour[row, column] * share
            assert (abs(after[7 + row, 5 + column] - wanted) <= 1.0).all()
    assert (after[7, 5] == before[7, 5]).all()
    assert (after[7, 6] == colour[0, 1]).all()
    after[7:17, 5:17] = before[7:17, 5:17]
    assert (after == before).all(), "nothing outside the patch changes"


def test_a_mark_leaves_its_middle_open_and_stays_in_its_box():
    image = np.zeros((96, 96, 3), np.uint8)
    mark = Mark(x=30, y=60)
    canvas.draw_mark(image, mark)
    left, top, right, bottom = canvas.mark_box(mark)
    drawn = image.any(2)
    assert not drawn[58:63, 28:33].any()
    assert drawn.sum() == drawn[top:bottom, left:right].sum() > 30


def test_a_free_mark_is_clear_of_borders_the_midline_and_all_boxes():
    rng = np.random.default_rng(2)
    boxes = [(0, 0, 96, 30), (20, 40, 60, 80)]
    for _ in range(200):
        mark = canvas.free_mark(rng, off_middle=True, boxes=boxes)
        for place in (mark.x, mark.y):
            assert 5 <= place <= 90
            assert min(abs(place + 0.5 - 19.2 * k) for k in range(1, 5)) >= 3
        assert abs(mark.x + 0.5 - 48) >= 8
        for left, top, right, bottom in boxes:
            inside = [
                (x, y)
                for x in range(mark.x - 5, mark.x + 6)
                for y in range(mark.y - 5, mark.y + 6)
                if left <= x < right and top <= y < bottom
            ]
            assert inside == []
