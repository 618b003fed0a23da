"""What is told of a library's or the system's error: one line, whatever the error holds."""

from pathlib import Path

import pytest

from workloads.errors import first_line, reason_of


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("no such key", "no such key"),
        ("\n\n  no such key \n    full_key: a\n", "no such key"),
        ("", "ValueError"),
        (" \n\t\n", "ValueError"),
    ],
)
def test_of_an_error_its_first_line_that_says_something_is_told(text, line):
    assert first_line(ValueError(text)) == line


@pytest.mark.parametrize("length", [199, 200, 201, 5000])
def test_a_long_line_is_cut_and_says_so(length):
    told = first_line(ValueError("x" * length))
    assert len(told) == min(length, 200)
    assert told.endswith("…") == (length > 200)


def test_of_a_system_error_its_words_are_told_without_number_and_path():
    with pytest.raises(OSError, match="Errno") as caught:
        Path("/nowhere/at/all").read_bytes()
    assert reason_of(caught.value) == "No such file or directory"


@pytest.mark.parametrize(("error", "told"), [(OSError("disk is odd"), "disk is odd"), (OSError(), "OSError")])
def test_of_a_system_error_without_words_none_is_never_told(error, told):
    assert reason_of(error) == told
