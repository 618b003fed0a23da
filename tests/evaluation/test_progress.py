"""What is kept of answers: whole batches of one layout, exactly; whatever a kill leaves behind is read."""

import json
import math

import pytest
import torch

from workloads.evaluation.progress import Progress
from workloads.training import engine

LAYOUT = "worker 0 of 1, batches of 2"
# Sums that a decimal of a few digits would not hold.
VALUES = (1 / 3, math.pi * 1e9, 2.0**-40 + 1, 1e-320)


@pytest.fixture(scope="module", autouse=True)
def _group():
    engine.join()


def filled(path, num_batches=3):
    progress = Progress(["a", "b"], path, LAYOUT)
    for k in range(num_batches):
        progress.sums["a"][0] += VALUES[k]
        progress.sums["b"][1] += k
        progress.count("a", torch.tensor([[k + 0.1, 2.0], [3.0, VALUES[k]]], dtype=torch.float64))
        progress.add([{"id": f"{k}-{i}", "raw": "ä\n\u2028"} for i in range(2)])
    return progress


def state(progress):
    experts = {domain: load.tolist() for domain, load in progress.experts_LE.items()}
    return progress.num_batches, progress.rows, progress.sums, experts


def test_what_was_kept_is_read_back_exactly(tmp_path):
    before = filled(tmp_path / "x")
    assert state(Progress(["a", "b"], tmp_path / "x", LAYOUT)) == state(before)
    assert before.num_batches == 3


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_torn_last_line_is_left_out_and_written_again(cut, tmp_path):
    path = tmp_path / "x"
    whole = filled(path)
    text = path.read_bytes()
    path.write_bytes(text[:-cut])
    again = Progress(["a", "b"], path, LAYOUT)
    assert state(again) == state(filled(None, 2))
    again.sums["a"][0] += VALUES[2]
    again.sums["b"][1] += 2
    again.count("a", torch.tensor([[2.1, 2.0], [3.0, VALUES[2]]], dtype=torch.float64))
    again.add(whole.rows[4:])
    assert state(Progress(["a", "b"], path, LAYOUT)) == state(whole)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: b"",
        lambda text: text[:5],
        lambda text: text.replace(b"batches of 2", b"batches of 3", 1),
        lambda text: b"\0" * len(text),
        lambda text: b"[]\n" + text,
    ],
)
def test_what_is_of_another_layout_or_broken_is_not_gone_on_with(change, tmp_path):
    path = tmp_path / "x"
    filled(path)
    path.write_bytes(change(path.read_bytes()))
    fresh = Progress(["a", "b"], path, LAYOUT)
    assert state(fresh) == (0, [], {"a": [0.0, 0.0], "b": [0.0, 0.0]}, {})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"layout": LAYOUT}]


def test_workers_go_on_with_the_batch_that_all_of_them_have(tmp_path, monkeypatch):
    path = tmp_path / "x"
    filled(path)
    monkeypatch.setattr(engine, "gather_objects", lambda own: [own, 1])
    assert state(Progress(["a", "b"], path, LAYOUT)) == state(filled(None, 1))
    monkeypatch.setattr(engine, "gather_objects", lambda own: [own, 5])
    assert Progress(["a", "b"], path, LAYOUT).num_batches == 1


def test_time_before_a_kill_counts(tmp_path):
    path = tmp_path / "x"
    filled(path, 1)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], json.dumps({**json.loads(lines[1]), "seconds": 1000.0})]) + "\n")
    assert 1000.0 <= Progress(["a", "b"], path, LAYOUT).seconds < 1100.0


def test_without_a_file_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    filled(None)
    assert list(tmp_path.iterdir()) == []
