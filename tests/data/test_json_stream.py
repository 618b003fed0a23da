"""Streamed JSON: the same values as a parser that reads the whole file, and all that is whole before a break."""

import json
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads.data import json_stream
from workloads.data.json_stream import Fault, items
from workloads.data.rows import NOT_UTF8
from workloads.errors import UserError

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3),
    max_leaves=8,
)


def written(folder, data, name="x.json"):
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@settings(max_examples=60, deadline=None)
@given(st.lists(VALUES, max_size=6), st.sampled_from([None, 1]), st.integers(1, 40))
def test_values_are_those_of_a_parser_that_reads_all(values, indent, chunk):
    data = json.dumps(values, indent=indent, ensure_ascii=chunk % 2 == 0).encode()
    chunks = [data[i : i + chunk] for i in range(0, len(data), chunk)]
    assert list(json_stream._of_list(None, chunks, "")) == values


@settings(max_examples=60, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=6), st.data())
def test_a_file_cut_anywhere_keeps_what_was_whole(values, data):
    whole = json.dumps(values).encode()
    cut = data.draw(st.integers(0, len(whole) - 1))
    *kept, last = json_stream._of_list(None, [whole[:cut]] if cut else [], "")
    assert isinstance(last, Fault)
    assert f"byte {cut}, after record {len(kept)}" in last.reason
    # A number at the end may be a shorter one, which only what follows would tell.
    sure = len(kept) - 1 if kept and isinstance(kept[-1], int | Decimal) else len(kept)
    assert kept[:sure] == values[:sure]


def test_a_list_under_a_key_is_found_and_others_are_not(tmp_path):
    tree = {"info": {"data": [1, 2]}, "other": [3], "data": [{"a": [4]}, 5], "more": {"data": [6]}}
    assert list(items(written(tmp_path, json.dumps(tree)), "data")) == [{"a": [4]}, 5]


@pytest.mark.parametrize("text", ['{"a": 1}', "3", '"x"', "{}"])
def test_a_file_without_a_list_is_refused(text, tmp_path):
    with pytest.raises(UserError, match="holds no list of records"):
        list(items(written(tmp_path, text)))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"[1, 2, x]", "after record 2, before byte 9: lexical error"),
        (b"[1] x", "trailing garbage"),
        ('[{"a": 1}]'.encode("utf-16"), "after record 0"),
        (b"[1, NaN]", "after record 1"),
    ],
)
def test_what_is_no_json_from_some_place_on_stops_with_that_place(data, words, tmp_path):
    with pytest.raises(UserError) as error:
        list(items(written(tmp_path, data)))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_bytes_that_are_not_utf8_spoil_their_record_alone(tmp_path):
    data = b'\xef\xbb\xbf[{"a": "x\xffy"}, {"a": "\xc3\xa9"}]'
    assert list(items(written(tmp_path, data))) == [{"a": f"x{NOT_UTF8}y"}, {"a": "é"}]


def test_deep_nesting_costs_its_record_alone(tmp_path):
    deep = "[" * 5000 + "]" * 5000
    values = list(items(written(tmp_path, f"[1, {deep}, {{}}, [{deep}, 2], 3]")))
    assert [values[i] for i in (0, 2, 4)] == [1, {}, 3]
    assert all("nested deeper" in values[i].reason for i in (1, 3))


def test_every_bad_line_is_a_fault_with_its_number(tmp_path):
    path = written(tmp_path, b'{"a": 1}\n\n{"a": \n[2]\n' + b"[" * 100_000 + b"\n3", "x.jsonl")
    found = list(items(path))
    assert [found[i] for i in (0, 2, 4)] == [{"a": 1}, [2], 3]
    assert [found[i].reason.split(":")[0] for i in (1, 3)] == ["line 3", "line 5"]


def test_an_absent_file_is_told_in_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        list(items(tmp_path / "absent.json"))
