"""Accuracy matrices from files: both forms give what was written; every mistake is one line that says where."""

import csv
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads.errors import UserError
from workloads.evaluation.continual import Matrix, aggregates
from workloads.evaluation.matrix_file import as_tree, read

names = st.text(min_size=1, max_size=8).map(str.strip).filter(lambda name: name and name.isprintable())
scores = st.floats(-1e6, 1e6) | st.integers(-100, 100)


@st.composite
def tables(draw):
    """(tasks, rows, before): rows end at the diagonal or go on, with gaps; before is there or not."""
    tasks = draw(st.lists(names, min_size=1, max_size=5, unique=True))
    size = len(tasks)
    rows = []
    for t in range(1, size + 1):
        rest = draw(st.just([]) | st.lists(scores | st.none(), min_size=size - t, max_size=size - t))
        rows.append([*draw(st.lists(scores, min_size=t, max_size=t)), *rest])
    before = draw(st.none() | st.lists(scores | st.none(), min_size=size, max_size=size))
    return tasks, rows, before


def check(path, tasks, rows, before):
    matrix = read(path)
    assert matrix.tasks == tuple(tasks)
    assert matrix.before == (None if before is None else tuple(before))
    assert [list(row[: len(given)]) for row, given in zip(matrix.rows, rows, strict=True)] == rows
    assert all(set(row[len(given) :]) <= {None} for row, given in zip(matrix.rows, rows, strict=True))
    values = [value for row in matrix.rows for value in row if value is not None]
    assert all(type(value) is float for value in values)
    assert matrix.never_trained == {}


@given(tables(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_matrix_in_json_is_read_as_it_is(tmp_path_factory, table, always):
    tasks, rows, before = table
    tree = {"tasks": tasks, "matrix": rows}
    if always or before is not None:
        tree["before"] = before
    path = tmp_path_factory.mktemp("json") / "m.json"
    path.write_text(json.dumps(tree), encoding="utf-8")
    check(path, *table)


@given(
    tables(), st.sampled_from(["before", " Before "]), st.booleans(), st.sampled_from(["utf-8", "utf-8-sig"])
)
@settings(max_examples=150, deadline=None)
def test_a_matrix_in_csv_is_read_as_it_is(tmp_path_factory, table, label, blank_lines, encoding):
    tasks, rows, before = table
    path = tmp_path_factory.mktemp("csv") / "m.csv"
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["stage", *tasks])
        if before is not None:
            writer.writerow([label, *before])
        for stage, row in enumerate(rows, start=1):
            writer.writerow([f"after {stage}", *row])
            file.write("\r\n" if blank_lines else "")
    check(path, *table)


@st.composite
def matrices(draw):
    """A matrix with columns of tasks that no stage trains, scores before any training, and scales."""
    tasks, rows, before = draw(tables())
    size, optional = len(tasks), st.floats(-1e6, 1e6) | st.none()
    others = draw(st.lists(names.filter(lambda name: name not in tasks), max_size=3, unique=True))
    never = {name: tuple(draw(st.lists(optional, min_size=size, max_size=size))) for name in others}
    scaled = draw(st.lists(st.sampled_from([*tasks, *others]), unique=True))
    return Matrix(
        tasks=tuple(tasks),
        rows=tuple((*map(as_float, row), *[None] * (size - len(row))) for row in rows),
        before=None if before is None else tuple(map(as_float, before)),
        never_trained=never,
        never_before={name: draw(optional) for name in others if draw(st.booleans())},
        scales={name: draw(st.sampled_from(["fraction", "percent", "cider"])) for name in scaled},
    )


def as_float(value):
    return None if value is None else float(value)


@given(matrices())
@settings(max_examples=150, deadline=None)
def test_what_is_written_is_read_as_it_was(tmp_path_factory, matrix):
    path = tmp_path_factory.mktemp("json") / "m.json"
    path.write_text(json.dumps(as_tree(matrix), allow_nan=False), encoding="utf-8")
    assert read(path) == matrix


def test_scores_on_several_scales_in_a_file_have_no_mean(tmp_path):
    path = tmp_path / "m.json"
    never = {"c": [0.1, 0.2], "d": [1.5, 2.5]}
    path.write_text(json.dumps({**GOOD, "never_trained": never, "scales": {"d": "cider", "c": "fraction"}}))
    assert aggregates(read(path))["zero_shot_never"] is None
    assert aggregates(read(path))["final"] == pytest.approx(0.75)
    path.write_text(json.dumps({**GOOD, "never_trained": never, "scales": {"a": "percent", "b": "fraction"}}))
    found = aggregates(read(path))
    assert found.pop("zero_shot_never") == pytest.approx(1.35)
    assert set(found.values()) == {None}


def refused(path, *expected):
    with pytest.raises(UserError) as caught:
        read(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert len(line.splitlines()) == 1
    assert len(line) < len(str(path)) + 160
    for words in expected:
        assert words in line


GOOD = {"tasks": ["a", "b"], "matrix": [[0.7], [0.6, 0.9]]}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"matrix": [[0.7], [None, 0.9]]}, ("row 2, column 'a': no score",)),
        ({"matrix": [[None, 0.1], [0.6, 0.9]]}, ("row 1, column 'a': no score",)),
        ({"matrix": [[0.7], [0.6]]}, ("row 2, column 'b': no score",)),
        ({"matrix": [[], [0.6, 0.9]]}, ("row 1, column 'a': no score",)),
        ({"matrix": [[0.7]]}, ("1 rows for 2 tasks",)),
        ({"matrix": [[0.7], [0.6, 0.9], [1, 1]]}, ("3 rows for 2 tasks",)),
        ({"matrix": [[0.7, 0.1, 0.2], [0.6, 0.9]]}, ("row 1: 3 scores", "1 (to the diagonal) or 2")),
        ({"matrix": [[0.7], [0.6, 0.9, 0.1]]}, ("row 2: 3 scores; allowed: 2",)),
        ({"tasks": ["a", "b", "c"], "matrix": [[1, 2], [1, 2], [1, 2, 3]]}, ("row 1: 2 scores", "or 3")),
        ({"matrix": []}, ("matrix is empty",)),
        ({"matrix": 5}, ("matrix: 5.0 is not a list",)),
        ({"matrix": [0.7, [0.6, 0.9]]}, ("row 1: 0.7 is not a list",)),
        ({"matrix": [[0.7], [float("nan"), 0.9]]}, ("row 2, column 'a': nan is not a finite score",)),
        ({"matrix": [[0.7], [0.6, float("inf")]]}, ("row 2, column 'b': inf",)),
        ({"matrix": [[0.7], [0.6, 10**400]]}, ("row 2, column 'b': inf",)),
        ({"matrix": [[0.7], [0.6, 1.5e308]]}, ("row 2, column 'b': 1.5e+308",)),
        ({"matrix": [[0.7], ["0.6", 0.9]]}, ("row 2, column 'a': '0.6' is not a number",)),
        ({"matrix": [[True], [0.6, 0.9]]}, ("row 1, column 'a': True is not a number",)),
        ({"matrix": [[0.7, False], [0.6, 0.9]]}, ("row 1, column 'b': False is not a number",)),
        ({"matrix": [[[0.7]], [0.6, 0.9]]}, ("row 1, column 'a': [0.7] is not a number",)),
        ({"matrix": [["x\n" * 900], [0.6, 0.9]]}, ("row 1, column 'a'", "is not a number")),
        ({"before": [0.1]}, ("row 'before': 1 scores; allowed: 2",)),
        ({"before": [0.1, 0.1, 0.1]}, ("row 'before': 3 scores; allowed: 2",)),
        ({"before": [0.1, "x"]}, ("row 'before', column 'b': 'x' is not a number",)),
        ({"before": 0.1}, ("row 'before': 0.1 is not a list",)),
        ({"tasks": ["a", "a"]}, ("task 'a' is there twice, in columns 1 and 2",)),
        ({"tasks": []}, ("no tasks",)),
        ({"tasks": "ab"}, ("tasks: 'ab' is not a list",)),
        ({"tasks": ["a", 2]}, ("column 2: 2.0 is not the name of a task",)),
        ({"tasks": ["a", " "]}, ("column 2: ' ' is not the name of a task",)),
        ({"befor": [0.1, 0.1]}, ("unknown key 'befor'", "did you mean 'before'")),
        ({"a\nkey": 1}, ("unknown key 'a key'",)),
        ({"never_trained": []}, ("never_trained: [] is not an object",)),
        (
            {"never_trained": {"a": [1, 1]}},
            ("never_trained: 'a' is not allowed; a task that no stage trains",),
        ),
        ({"never_trained": {" ": [1, 1]}}, ("never_trained: ' ' is not the name of a task",)),
        ({"never_trained": {"c": 1}}, ("task 'c', never trained: 1.0 is not a list",)),
        ({"never_trained": {"c": [1]}}, ("task 'c', never trained: 1 scores; allowed: 2",)),
        ({"never_trained": {"c": [1, "x"]}}, ("'c', never trained", "'after stage 2': 'x' is not a number")),
        ({"never_before": {"c": 1}}, ("never_before: 'c' is not allowed",)),
        (
            {"never_trained": {"c": [1, 1]}, "never_before": {"c": float("nan")}},
            ("'c', never trained, column 'before': nan is not a finite score",),
        ),
        ({"scales": {"c": "percent"}}, ("scales: 'c' is not allowed; tasks: a, b",)),
        ({"scales": {"a": "percnt"}}, ("scales.a: 'percnt' is not allowed", "did you mean 'percent'")),
        ({"scales": {"a": ["percent"]}}, ("scales.a: ['percent'] is not allowed",)),
    ],
)
def test_a_mistake_in_json_is_one_line_that_says_where(tmp_path, change, expected):
    path = tmp_path / "m.json"
    path.write_text(json.dumps({**GOOD, **change}))
    refused(path, *expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "the file is empty"),
        (" \n", "the file is empty"),
        ("tasks: [a]", "not valid JSON: Expecting value: line 1"),
        ('{"tasks": ["a"], "matrix": [[1],]}', "not valid JSON"),
        ('{"tasks": ["a"], "matrix": [[1]], "matrix": [[2]]}', "'matrix' is not allowed; each key once"),
        (
            '{"tasks": ["a"], "matrix": [[1' + "0" * 9999 + "]]}",
            "row 1, column 'a': inf is not a finite score",
        ),
        ('{"tasks": ["a"], "matrix": [[-Infinity]]}', "row 1, column 'a': -inf is not a finite score"),
        ("[" * 100_000, "not valid JSON"),
        ("[[1.0]]", "is not an object with the keys tasks, matrix, before"),
        ("{}", "no key 'tasks'"),
        ('{"tasks": ["a"]}', "no key 'matrix'"),
    ],
)
def test_a_file_that_holds_no_such_json_is_one_line(tmp_path, text, expected):
    path = tmp_path / "m.json"
    path.write_text(text)
    refused(path, expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "the file is empty"),
        ("stage\n", "no tasks"),
        ("stage,a,b\n", "matrix is empty"),
        ("stage,a,b\nbefore,1,1\n", "matrix is empty"),
        ("stage,a,b\none,1,\ntwo,,2\n", "row 2, column 'a': no score"),
        ("stage,a,b\none,1,\ntwo,1,\n", "row 2, column 'b': no score"),
        ("stage,a,b\none,1,\ntwo\n", "row 2, column 'a': no score"),
        ("stage,a,b\none,1,1\n", "1 rows for 2 tasks"),
        ("stage,a,b\none,1,1,1\ntwo,1,1\n", "row 1: 3 scores; allowed: 1 (to the diagonal) or 2"),
        ("stage,a,b,c\none,1,1\ntwo,1,1\nthree,1,1,1", "row 1: 2 scores; allowed: 1 (to the diagonal) or 3"),
        ("stage,a,b\none,1,nan\ntwo,1,1\n", "row 1, column 'b': nan is not a finite score"),
        ("stage,a,b\none,1,\ntwo,1e999,1\n", "row 2, column 'a': inf is not a finite score"),
        ("stage,a,b\none,1,-\ntwo,1,1\n", "row 1, column 'b': '-' is not a number"),
        ("stage,a,b\none,1_0,\ntwo,1,1\n", "row 1, column 'a': '1_0' is not a number"),
        ("stage,a,b\none,true,\ntwo,1,1\n", "row 1, column 'a': 'true' is not a number"),
        ("stage,a,b\none,71.5%,\ntwo,1,1\n", "row 1, column 'a': '71.5%' is not a number"),
        ("stage,a,b\nbefore,1\none,1,\ntwo,1,1\n", "row 'before': 1 scores; allowed: 2"),
        ("stage,a,b\nbefore,1,x\none,1,\ntwo,1,1\n", "row 'before', column 'b': 'x' is not a number"),
        ("stage,a,b\none,1,\nbefore,1,1\ntwo,1,1\n", "row 2 is 'before'; it can only be the first"),
        ("stage,a,a\none,1,\ntwo,1,1\n", "task 'a' is there twice, in columns 1 and 2"),
        ("stage,a,\none,1,\ntwo,1,1\n", "column 2: '' is not the name of a task"),
        ("stage;a;b\none;1;\ntwo;1;1\n", "no tasks"),
        ('stage,a,b\none,"1', "not valid CSV"),
    ],
)
def test_a_mistake_in_csv_is_one_line_that_says_where(tmp_path, text, expected):
    path = tmp_path / "m.csv"
    path.write_text(text)
    refused(path, expected)


def test_what_cannot_be_read_is_one_line(tmp_path):
    refused(tmp_path / "nowhere.json", "no such file")
    (tmp_path / "folder.csv").mkdir()
    refused(tmp_path / "folder.csv", "cannot be read: Is a directory")
    (tmp_path / "m.csv").write_bytes(b"stage,caf\xe9\none,1\n")
    refused(tmp_path / "m.csv", "not UTF-8 text")


def test_other_kinds_of_files_are_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"m\.txt' is not allowed; a \.json or \.csv file"):
        read(tmp_path / "m.txt")
    (tmp_path / "M.JSON").write_text('{"tasks": ["a"], "matrix": [[1]], "before": null}')
    assert read(tmp_path / "M.JSON").before is None
