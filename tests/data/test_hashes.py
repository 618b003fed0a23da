"""Digests of files: equal to those of the whole content, read once, and no damage to what is kept can change one."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from workloads.data import hashes
from workloads.data.cache import ENVIRONMENT_KEY

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_KEY, str(tmp_path / "cache"))
    hashes._digest.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def reads(monkeypatch):
    """The paths that were read from beginning to end."""
    seen, real = [], hashes._read
    monkeypatch.setattr(hashes, "_read", lambda path: seen.append(path) or real(path))
    return seen


def large(path, content=b"a"):
    """A file of 2 MB that was last changed long ago, as far as the hashes can tell."""
    path.write_bytes(content * (2_000_000 // len(content)))
    return path


@pytest.fixture
def settled(monkeypatch):
    monkeypatch.setattr(hashes, "_SETTLED", -1e9)


def forget():
    """What a process that starts anew knows: nothing."""
    hashes._digest.cache_clear()


def true(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_unchanged_large_file_is_read_once_by_all_processes(cache, reads, settled, tmp_path):
    path = large(tmp_path / "weights")
    for _ in range(3):
        forget()
        assert hashes.sha256(path) == true(path)
    assert reads == [path]
    code = (
        "import sys; from pathlib import Path; from workloads.data import hashes\n"
        "hashes._read = None\n"
        "print(hashes.sha256(Path(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        cwd=ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == true(path)


def in_place(path):
    with path.open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"b")


def with_the_old_time(path):
    before = path.stat().st_mtime_ns
    in_place(path)
    os.utime(path, ns=(before, before))


def replaced(path):
    before = path.stat().st_mtime_ns
    other = large(path.with_name("other"), b"c")
    os.utime(other, ns=(before, before))
    other.replace(path)


@pytest.mark.parametrize(
    "change", [in_place, with_the_old_time, replaced, lambda path: path.write_bytes(b"")]
)
def test_a_changed_file_is_read_again(change, cache, settled, tmp_path):
    path = large(tmp_path / "weights")
    first = hashes.sha256(path)
    change(path)
    forget()
    assert hashes.sha256(path) == true(path) != first


def test_a_file_that_has_just_changed_is_not_kept(cache, reads, tmp_path):
    path = large(tmp_path / "weights")
    for _ in range(2):
        forget()
        hashes.sha256(path)
    assert reads == [path, path]
    assert not (cache / "digests").exists()


def test_a_file_that_had_just_changed_when_its_reading_began_is_not_kept_however_long_that_takes(
    cache, tmp_path, monkeypatch
):
    path, real, late = large(tmp_path / "weights"), hashes._read, time.time() + 60
    clock = SimpleNamespace(time=time.time)
    monkeypatch.setattr(hashes, "time", clock)

    def slow(path):
        clock.time = lambda: late
        return real(path)

    monkeypatch.setattr(hashes, "_read", slow)
    hashes.sha256(path)
    assert not (cache / "digests").exists()


def test_small_files_leave_nothing_behind(cache, settled, tmp_path):
    (tmp_path / "small").write_text("x")
    assert hashes.sha256(tmp_path / "small") == true(tmp_path / "small")
    assert not cache.exists()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10_000), value=st.integers(1, 255), cut=st.booleans())
def test_no_damage_to_what_is_kept_changes_a_digest(place, value, cut, cache, settled, tmp_path):
    path = tmp_path / "weights"
    if not path.exists():
        large(path)
    forget()
    hashes.sha256(path)
    (kept,) = (cache / "digests").iterdir()
    data = bytearray(kept.read_bytes())
    place %= len(data)
    if cut:
        kept.write_bytes(bytes(data[:place]))
    else:
        data[place] ^= value
        kept.write_bytes(bytes(data))
    forget()
    assert hashes.sha256(path) == true(path)


@pytest.mark.parametrize(
    "content", ["", "null", "[]", '{"key": 1}', '{"digest": null, "key": [], "check": 0}']
)
def test_what_is_no_entry_is_written_anew(content, cache, reads, settled, tmp_path):
    path = large(tmp_path / "weights")
    hashes.sha256(path)
    (kept,) = (cache / "digests").iterdir()
    kept.write_text(content)
    forget()
    assert hashes.sha256(path) == true(path)
    assert json.loads(kept.read_text())["digest"] == true(path)
    assert len(reads) == 2


def test_a_digest_that_is_kept_of_another_path_is_not_this_ones(cache, settled, tmp_path):
    one, other = large(tmp_path / "one"), large(tmp_path / "other", b"b")
    hashes.sha256(one)
    (first,) = (cache / "digests").iterdir()
    hashes.sha256(other)
    (second,) = set((cache / "digests").iterdir()) - {first}
    second.write_bytes(first.read_bytes())
    forget()
    assert hashes.sha256(other) == true(other)


def test_a_cache_that_cannot_be_written_costs_time_alone(reads, settled, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(ENVIRONMENT_KEY, str(tmp_path / "file"))
    path = large(tmp_path / "weights")
    for _ in range(2):
        forget()
        assert hashes.sha256(path) == true(path)
    assert len(reads) == 2


def test_order_and_names_count_where_they_should(cache, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("1")
    other.write_text("2")
    assert hashes.hash_files([one, other]) != hashes.hash_files([other, one])
    before = hashes.hash_contents([one]), hashes.hash_files([one])
    moved = one.rename(tmp_path / "moved")
    assert hashes.hash_contents([moved]) == before[0]
    assert hashes.hash_files([moved]) != before[1]
