"""The progress line counts trials, adds up speeds and estimates the time left from shares of steps done."""

import io

import pytest
from rich.console import Console

from orchestrator import progress
from orchestrator.progress import Progress, duration


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def _progress(total: int, done: int = 0) -> Progress:
    return Progress(Console(file=io.StringIO(), width=200), total=total, done=done)


def test_the_line_adds_up_what_runs(clock):
    shown = _progress(total=6, done=2)
    for key, step in (("a", 30), ("b", 10)):
        shown.begin(key)
        shown.event(key, {"event": "train", "step": step, "num_steps": 40, "samples_per_second": 50.0})
    clock[0] += 60
    # One whole trial's worth of steps in 60 s, three more to go.
    assert shown.line() == "2/6 trials, 2 running, 100 samples/s, 1:00 gone, 3:00 left"


def test_evaluation_keeps_share_and_speed(clock):
    shown = _progress(total=1)
    shown.begin("a")
    shown.event("a", {"event": "train", "step": 40, "num_steps": 40, "samples_per_second": 50.0})
    shown.event("a", {"event": "eval", "step": 40})
    assert shown.running["a"] == (1.0, 50.0)


def test_a_failed_trial_is_told_at_once_with_its_reason(clock):
    shown = _progress(total=2)
    shown.begin("a")
    shown.end("a", "mole/3", failed="adapter.rank: 0 is not allowed")
    text = shown.console.file.getvalue()
    assert "mole/3 failed: adapter.rank: 0 is not allowed" in text
    assert "1/2 trials, 0 running, 1 failed" in shown.line()


def test_markup_in_a_reason_is_printed_as_it_is(clock):
    shown = _progress(total=1)
    shown.end("a", "x", failed="[red]oops[/red]")
    assert "[red]oops[/red]" in shown.console.file.getvalue()


def test_durations_read_like_a_clock():
    assert [duration(s) for s in (0, 59.6, 61, 3723)] == ["0:00", "1:00", "1:01", "1:02:03"]


def test_work_before_the_trials_has_the_line_until_they_begin(clock):
    shown = _progress(total=2)
    clock[0] += 7
    for more in (100, 200, 0):
        shown.ahead("features", more, 0)
    assert shown.line() == "features: 0/300 images, 0:00 gone"
    clock[0] += 10
    shown.ahead("features", 0, 100)
    assert shown.line() == "features: 100/300 images, 10 images/s, 0:10 gone, 0:20 left"
    clock[0] += 16
    shown.show()
    clock[0] += 4
    shown.ahead("features", 0, 200)
    clock[0] += 5
    shown.end_ahead()
    assert shown.console.file.getvalue().splitlines() == [
        "features: 100/300 images, 10 images/s, 0:10 gone, 0:20 left",
        "features: 100/300 images, 4 images/s, 0:26 gone, 0:52 left",
        "features: 300/300 images, 10 images/s, 0:30 gone",
    ]
    # The trials' own time starts behind them.
    shown.begin("a")
    shown.event("a", {"event": "train", "step": 20, "num_steps": 40, "samples_per_second": 5.0})
    clock[0] += 30
    assert shown.line() == "0/2 trials, 1 running, 5 samples/s, 0:30 gone, 1:30 left"


def test_without_work_before_the_trials_nothing_is_said(clock):
    shown = _progress(total=2)
    shown.ahead("", 0, 0)
    shown.end_ahead()
    assert shown.console.file.getvalue() == ""
