"""Reports of loaders and folders that are put in their place: one message for all models, and no half of anything."""

import pytest

from workloads.errors import UserError
from workloads.llava import parts, strict

NONE = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ({"missing_keys": {"b", "a"}}, "--tower: FOLDER has missing keys: a, b"),
        ({"unexpected_keys": ["pooler.b", "c"]}, "--tower: FOLDER has unexpected keys: c"),
        ({"mismatched_keys": [("d", (1,), (2,))]}, "--tower: FOLDER has mismatched keys: ('d', (1,), (2,))"),
        ({"missing_keys": set("hgfedcba")}, "--tower: FOLDER has missing keys: a, b, c, d, e"),
    ],
)
def test_weights_that_a_loader_reports_are_told_under_their_key(report, expected, tmp_path):
    with pytest.raises(UserError) as error:
        strict.loaded("--tower", tmp_path, {**NONE, **report}, ignored="pooler.")
    assert str(error.value) == expected.replace("FOLDER", str(tmp_path))


def test_only_names_that_are_ignored_do_not_count(tmp_path):
    report = {**NONE, "missing_keys": ["pooler.weight", "the.pooler.bias"]}
    strict.loaded("--tower", tmp_path, report, ignored="pooler.")
    strict.loaded("--tower", tmp_path, NONE)
    with pytest.raises(UserError, match=r"pooler\.weight"):
        strict.loaded("--tower", tmp_path, report)


def made(folder, text):
    folder.mkdir()
    (folder / "config.json").write_text(text)
    return folder


def test_of_two_processes_that_make_a_folder_the_first_ones_stays(tmp_path):
    parts.put(made(tmp_path / "one", "one"), tmp_path / "model")
    parts.put(made(tmp_path / "two", "two"), tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_text() == "one"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a file").write_text("")
    with pytest.raises(OSError, match="not empty"):
        parts.put(tmp_path / "two", tmp_path / "other")
