"""Feature files: rows come back to the bit, and what is not whole is missing."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from workloads.data.features import Features

SHAPE = (2, 3, 4)


def row(seed, dtype=torch.float32):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_come_back_to_the_bit_also_in_another_object(dtype, tmp_path):
    written = Features(tmp_path, 7, SHAPE, dtype)
    written.write(5, row(5, dtype))
    written.write(0, row(0, dtype))
    for features in (written, Features(tmp_path, 7, SHAPE, dtype)):
        assert features.missing(range(7)) == [1, 2, 3, 4, 6]
        for index in (0, 5):
            assert torch.equal(features.read(index), row(index, dtype))


def test_a_row_of_zeros_is_a_row(tmp_path):
    features = Features(tmp_path, 2, SHAPE, torch.float32)
    features.write(1, torch.zeros(SHAPE))
    assert features.missing([0, 1]) == [0]


@settings(max_examples=30, deadline=None)
@given(place=st.integers(0, 2 * 3 * 4 * 4 - 1), value=st.integers(1, 255))
def test_any_changed_byte_makes_its_row_missing_and_no_other(place, value, tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    features = Features(folder, 3, SHAPE, torch.float32)
    for index in range(3):
        features.write(index, row(index))
    with (folder / "rows").open("r+b") as file:
        file.seek(features.row_bytes + place)
        old = file.read(1)[0]
        file.seek(features.row_bytes + place)
        file.write(bytes([old ^ value]))
    again = Features(folder, 3, SHAPE, torch.float32)
    assert again.missing(range(3)) == [1]
    again.write(1, row(1))
    assert again.missing(range(3)) == []


def test_a_file_cut_short_loses_only_what_was_cut(tmp_path):
    features = Features(tmp_path, 3, SHAPE, torch.float32)
    for index in range(3):
        features.write(index, row(index))
    data = (tmp_path / "rows").read_bytes()
    (tmp_path / "rows").write_bytes(data[: 2 * features.row_bytes + 5])
    again = Features(tmp_path, 3, SHAPE, torch.float32)
    assert again.missing(range(3)) == [2]
    assert torch.equal(again.read(1), row(1))
