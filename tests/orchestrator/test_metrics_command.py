"""`orchestrator metrics`: the aggregates of a matrix as JSON and as a table; mistakes are one line, exit code 2."""

import json

import pytest
from typer.testing import CliRunner

from orchestrator.__main__ import app
from orchestrator.commands import metrics
from workloads.evaluation.continual import AGGREGATES

TREE = {
    "tasks": ["garment", "emoji", "digits"],
    "before": [10, 20, 5],
    "matrix": [[70, 24, 6], [50, 80, 11], [40, 60, 90]],
}
EXPECTED = {
    "final": (40 + 60 + 90) / 3,
    "mft": (70 + 80 + 90) / 3,
    "maa": (70 + (50 + 80) / 2 + (40 + 60 + 90) / 3) / 3,
    "bwt_T": (-30 - 20) / 3,
    "bwt_Tminus1": (-30 - 20) / 2,
    "forgetting": (30 + 20) / 2,
    "fwt": ((24 - 20) + (11 - 5)) / 2,
    "zero_shot_later": (24 + (6 + 11) / 2) / 2,
    "zero_shot_never": None,
}
CSV = """stage,garment,emoji,digits
before,10,20,5
after garment,70,24,6
after emoji,50,80,11
after digits,40,60,90
"""


def run(*words):
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, ["metrics", *map(str, words)])


@pytest.mark.parametrize(("name", "text"), [("m.json", json.dumps(TREE)), ("m.csv", CSV)])
def test_json_is_one_object_with_every_aggregate(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    done = run(path, "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    assert json.loads(done.stdout) == pytest.approx(EXPECTED)
    assert path.read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_lower_triangle_has_null_for_what_needs_the_rest(tmp_path):
    path = tmp_path / "m.json"
    path.write_text(json.dumps({"tasks": TREE["tasks"], "matrix": [[70], [50, 80], [40, 60, 90]]}))
    needs_more = ("fwt", "zero_shot_later")
    expected = {name: None if name in needs_more else value for name, value in EXPECTED.items()}
    assert json.loads(run(path, "--json").stdout) == pytest.approx(expected)


def test_numbers_in_json_are_not_rounded_or_rescaled(tmp_path):
    path = tmp_path / "m.json"
    value = 0.12345678901234568
    path.write_text(json.dumps({"tasks": ["a"], "matrix": [[value]]}))
    found = json.loads(run(path, "--json").stdout)
    assert found["final"] == found["mft"] == found["maa"] == value
    assert found["bwt_T"] == 0
    assert found["bwt_Tminus1"] is found["forgetting"] is found["fwt"] is None


def cells(text):
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    return {row[0]: row[1:] for row in rows}


def test_the_table_has_a_value_and_words_for_every_aggregate(tmp_path):
    path = tmp_path / "m[1].csv"
    path.write_text(CSV)
    done = run(path)
    assert (done.exit_code, done.stderr) == (0, "")
    assert "m[1].csv: T = 3 tasks" in done.stdout
    found = cells(done.stdout)
    assert list(found) == list(EXPECTED)
    for name, (value, words) in found.items():
        assert value == ("–" if EXPECTED[name] is None else f"{EXPECTED[name]:.6g}")
        assert words
    assert found["bwt_T"][1].endswith("/ T")
    assert found["bwt_Tminus1"][1].endswith("/ (T − 1)")


def test_words_and_aggregates_go_together():
    assert metrics._WORDS.keys() == AGGREGATES.keys()


@pytest.mark.parametrize("flags", [(), ("--json",)])
@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "m.json",
            '{"tasks": ["a", "b"], "matrix": [[1], [null, 1]]}',
            "m.json: row 2, column 'a': no score",
        ),
        ("m.json", '{"tasks": ["a"], "matrix": [[NaN]]}', "m.json: row 1, column 'a': nan is not a finite"),
        ("m.json", '{"tasks": ["a", "b"], "matrix": [[1], [1, 1, 1]]}', "m.json: row 2: 3 scores"),
        ("m.json", '{"tasks": [], "matrix": []}', "m.json: no tasks"),
        ("m.json", "", "m.json: the file is empty"),
        ("m.json", "{", "m.json: not valid JSON"),
        ("m.csv", "stage,a,b\none,1,\ntwo,,1\n", "m.csv: row 2, column 'a': no score"),
        ("m.csv", "stage,a\none,nan\n", "m.csv: row 1, column 'a': nan is not a finite"),
        ("m.csv", "stage,a,b,c\none,1\ntwo,1,1\nthree,1,1,1,1\n", "m.csv: row 3: 4 scores"),
        ("m.csv", "", "m.csv: the file is empty"),
        ("m.csv", None, "m.csv: no such file"),
        ("m.xlsx", "", "a .json or .csv file"),
    ],
)
def test_a_bad_matrix_is_one_line_and_exit_code_2(tmp_path, name, text, expected, flags):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    done = run(path, *flags)
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert expected in line


def test_it_answers_without_torch_ray_or_mlflow(tmp_path):
    import subprocess
    import sys

    path = tmp_path / "m.csv"
    path.write_text(CSV)
    code = (
        "import sys; from orchestrator.__main__ import app;"
        f"app(['metrics', {str(path)!r}], standalone_mode=False);"
        "print(sorted({'torch', 'ray', 'mlflow', 'transformers', 'deepspeed', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
