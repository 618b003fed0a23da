"""Studies have one driver and runs one writer; what cannot be written is told at once."""

import json
import multiprocessing
import os
import time

import pytest

from orchestrator.store import Ledger, Store, run_lock
from workloads.errors import UserError


def _rows(*states):
    return [
        {
            "arm": f"a{i}",
            "seed": 0,
            "fingerprint": str(i),
            "status": s,
            "error": "",
            "started": 0.0,
            "ended": 0.0,
        }
        for i, s in enumerate(states)
    ]


def test_a_second_driver_gets_one_line_with_the_first_ones_process(tmp_path):
    store = Store(tmp_path)
    with (
        store.only_driver("tiny"),
        pytest.raises(UserError, match=f"process {os.getpid()} is running it already"),
        store.only_driver("tiny"),
    ):
        pass
    assert not store.is_driven("tiny")
    with store.only_driver("tiny"):
        assert store.is_driven("tiny")


def test_a_root_under_a_file_is_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write in"):
        Store(tmp_path / "file" / "studies").require_writable()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_proving_that_a_root_can_be_written_leaves_no_file(tmp_path):
    Store(tmp_path).require_writable()
    assert list(tmp_path.iterdir()) == []


def _hold(folder, events):
    with run_lock(folder):
        events.put(("in", os.getpid(), time.monotonic()))
        time.sleep(0.2)
        events.put(("out", os.getpid(), time.monotonic()))


def test_two_processes_never_hold_the_same_run(tmp_path):
    context = multiprocessing.get_context("fork")
    events = context.Queue()
    processes = [context.Process(target=_hold, args=(tmp_path / "run", events)) for _ in range(3)]
    for process in processes:
        process.start()
    seen = sorted((events.get(timeout=20) for _ in range(6)), key=lambda event: event[2])
    for process in processes:
        process.join()
    assert [kind for kind, _, _ in seen] == ["in", "out"] * 3
    assert all(seen[i][1] == seen[i + 1][1] for i in (0, 2, 4))


def test_the_ledger_is_whole_after_every_change(tmp_path):
    ledger = Ledger(tmp_path, {"trials": _rows("pending", "pending", "finished")})
    ledger.mark("0", "running", 5.0)
    ledger.mark("1", "failed", 6.0, "it broke")
    rows = json.loads((tmp_path / "study.json").read_text())["trials"]
    assert [row["status"] for row in rows] == ["running", "failed", "finished"]
    assert (rows[0]["started"], rows[1]["ended"], rows[1]["error"]) == (5.0, 6.0, "it broke")
    ledger.interrupt(7.0)
    rows = json.loads((tmp_path / "study.json").read_text())["trials"]
    assert [row["status"] for row in rows] == ["interrupted", "failed", "finished"]


def test_a_drawn_trial_is_added_once(tmp_path):
    ledger = Ledger(tmp_path, {"trials": []})
    for row in (*_rows("pending"), *_rows("pending")):
        ledger.add(row)
    assert len(ledger.rows) == 1


def test_a_study_that_is_not_there_names_those_that_are(tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "study.json").write_text("{}")
    with pytest.raises(UserError, match=r"started studies: tiny; did you mean 'tiny'"):
        Store(tmp_path).read_study("tinny")
    (tmp_path / "tiny" / "study.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        Store(tmp_path).read_study("tiny")


def test_a_finished_run_is_found_by_the_beginning_of_its_fingerprint(tmp_path):
    store = Store(tmp_path)
    for name in ("abc1", "abd2"):
        store.run_folder(name).mkdir(parents=True)
        (store.run_folder(name) / "record.json").write_text("{}")
    store.run_folder("abc9").mkdir()  # not finished
    assert store.find_run("abc") == store.run_folder("abc1")
    with pytest.raises(UserError, match=r"'ab' begins 2 finished runs: abc1, abd2"):
        store.find_run("ab")
    with pytest.raises(UserError, match="'x' is no finished run"):
        store.find_run("x")
