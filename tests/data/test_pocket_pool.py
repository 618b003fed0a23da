"""Pools of the embedded benchmark: nested sizes, one content hash, a cache that outlives crash and race."""

import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from workloads.data.pocket import DOMAINS, QUESTION_TYPES, compose
from workloads.data.pocket import pool as module
from workloads.data.pocket.pool import pool
from workloads.errors import UserError

ROOT = Path(__file__).parents[2]


def content_hash(dataset):
    """SHA-256 over decoded pixels and text of every row, in order."""
    digest = hashlib.sha256()
    for row in dataset:
        text = [row[key] for key in ("id", "question", "answer", "question_type", "sources")]
        digest.update(repr(text).encode() + np.asarray(row["image"]).tobytes())
    return digest.hexdigest()


def arrow_files(folder):
    return sorted(path.name for path in folder.rglob("*.arrow"))


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_larger_pool_begins_with_the_smaller(domain, tmp_path):
    small = pool(domain, "val", 20, 3, cache_dir=tmp_path)
    large = pool(domain, "val", 45, 3, cache_dir=tmp_path)
    assert large["id"][:20] == small["id"]
    assert content_hash(large.select(range(20))) == content_hash(small)
    assert content_hash(large) != content_hash(small)
    assert len(set(large["id"])) == 45


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_row_is_the_composed_sample(domain, tmp_path):
    rows = pool(domain, "test", 12, 2, cache_dir=tmp_path)
    assert rows.column_names == ["id", "image", "question", "answer", "question_type", "sources"]
    for index, row in enumerate(rows):
        scene = compose(domain, "test", 2, index)
        (asked,) = [pair for pair in scene.qa if pair.question_type == row["question_type"]]
        assert (np.asarray(row["image"]) == scene.image).all()
        assert (row["question"], row["answer"]) == (asked.question, asked.answer)
        assert tuple(row["sources"]) == scene.sources


@pytest.mark.parametrize("domain", DOMAINS)
def test_question_types_are_balanced_in_a_pool(domain, tmp_path):
    count = len(QUESTION_TYPES[domain])
    shares = Counter(pool(domain, "train", 6 * count, cache_dir=tmp_path)["question_type"])
    assert shares == dict.fromkeys(QUESTION_TYPES[domain], 6)


def test_a_pool_is_built_once(tmp_path, monkeypatch):
    first = content_hash(pool("document", "val", 15, cache_dir=tmp_path))
    monkeypatch.setattr(module, "_build", None)
    assert content_hash(pool("document", "val", 15, cache_dir=tmp_path)) == first


def test_an_interrupted_build_leaves_nothing_and_is_made_good(tmp_path, monkeypatch):
    def fails(domain, split, seed, index):
        if index == 7:
            raise KeyboardInterrupt
        return compose(domain, split, seed, index)

    monkeypatch.setattr(module, "compose", fails)
    with pytest.raises(KeyboardInterrupt):
        pool("general", "val", 12, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert len(pool("general", "val", 12, cache_dir=tmp_path)) == 12


def test_a_half_written_build_of_a_killed_process_is_never_read(tmp_path):
    whole = content_hash(pool("general", "val", 12, cache_dir=tmp_path / "clean"))
    (name,) = arrow_files(tmp_path / "clean")
    stale = tmp_path / "cache" / ".building-killed"
    stale.mkdir(parents=True)
    (stale / name).write_bytes((tmp_path / "clean" / name).read_bytes()[:5000])
    assert content_hash(pool("general", "val", 12, cache_dir=tmp_path / "cache")) == whole


BUILDER = """
import sys
from pathlib import Path
from tests.data.test_pocket_pool import content_hash, pool
print("ready", flush=True)
sys.stdin.readline()
print(content_hash(pool("general", "train", 300, cache_dir=Path(sys.argv[1]))))
"""


def test_two_processes_that_build_at_once_read_the_same_pool(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    builders = [
        subprocess.Popen(
            [sys.executable, "-c", BUILDER, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(2)
    ]
    for builder in builders:
        assert builder.stdout.readline() == "ready\n"
    for builder in builders:
        builder.stdin.write("go\n")
        builder.stdin.flush()
    hashes = {builder.communicate(timeout=120)[0].strip() for builder in builders}
    assert hashes == {content_hash(pool("general", "train", 300, cache_dir=tmp_path))}
    assert [path.name for path in tmp_path.iterdir()] == arrow_files(tmp_path)


@pytest.mark.parametrize("size", [0, -3])
def test_a_pool_holds_at_least_one_sample(size, tmp_path):
    with pytest.raises(UserError, match=f"size: {size} is not allowed"):
        pool("general", "train", size, cache_dir=tmp_path)


def test_an_unknown_domain_writes_nothing(tmp_path):
    with pytest.raises(UserError, match="did you mean 'general'"):
        pool("generl", "train", 5, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_an_unwritable_cache_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cache_dir") as caught:
        pool("general", "train", 5, cache_dir=tmp_path / "file" / "cache")
    assert "\n" not in str(caught.value)
