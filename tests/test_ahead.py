"""What runs look up, made ahead: a run then computes no feature itself, and what is not whole is made anew."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest

from tests.data import writers
from tests.llava import checkpoints
from tests.training.runs import do, small
from workloads import ahead, footprint
from workloads.data.cache import ENVIRONMENT_KEY
from workloads.data.features import Features
from workloads.identity import fingerprint

NUM = 40
CUES = {"vce": True, "vce_levels": [-2, -3], "vce_heads": 2}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A small checkpoint, two domains on disk and an empty cache; makes configurations of runs on them."""
    monkeypatch.setenv(ENVIRONMENT_KEY, str(tmp_path / "cache"))
    checkpoints.write(tmp_path / "llava")
    domains = {name: writers.llava_json(tmp_path / name, NUM) for name in ("a", "b")}
    for name, domain in domains.items():
        domain.update({key: f"{name}/{domain[key]}" for key in ("train", "test", "images")})

    def make(
        adapter="lora", mixture=None, samples=5, cached=True, evaluated=("a", "b"), model=None, **sections
    ):
        data = {
            "source": "files", "root": str(tmp_path), "domains": domains, "samples": samples,
            "mixture": mixture or {"a": 1.0, "b": 2.0},
        }  # fmt: skip
        return small(
            adapter, model={"name_or_path": str(tmp_path / "llava"), **(model or {})}, data=data,
            eval={"split": "test", "samples": 3, "domains": list(evaluated)},
            execution={"feature_cache": cached}, **sections,
        )  # fmt: skip

    return make


def made(configs, part=0, parts=1):
    """Do a part of the work; returns the images that were to be done of each kind, and the faults."""
    steps = list(ahead.make(configs, part, parts))
    for work in ("pictures", "features"):
        of = [step for step in steps if step.work == work]
        assert sum(step.total for step in of) == sum(step.done for step in of)
    totals = {step.work: step.total for step in steps if step.total}
    return totals, [step.fault for step in steps if step.fault]


def rows_on_disk(cache):
    """Pool -> indices of the rows that have a stamp, of all features in a cache."""
    stamps = {path.parent.name: np.fromfile(path, "<i8") for path in cache.glob("features/*/*/stamps")}
    return {name: np.flatnonzero(values).tolist() for name, values in stamps.items()}


def test_what_is_made_ahead_is_what_the_runs_meet_and_no_more(world, tmp_path, monkeypatch):
    configs = [world(), world(seed=1), world("mole", mixture={"a": 1.0}, samples=7), world(evaluated=["a"])]
    for i, config in enumerate(configs):
        do(config, tmp_path / f"run{i}")
    wanted = rows_on_disk(tmp_path / "cache")
    monkeypatch.setenv(ENVIRONMENT_KEY, str(tmp_path / "other"))
    totals, faults = made(configs)
    assert rows_on_disk(tmp_path / "other") == wanted
    assert (totals["features"], faults) == (sum(map(len, wanted.values())), [])
    assert 20 < totals["features"] < 2 * NUM
    # What plan foretells is what is there.
    images, size = footprint.features([*configs, world(cached=False, seed=9)])
    assert images == totals["features"]
    assert size == held_on_disk(tmp_path / "other")


def held_on_disk(cache):
    """Bytes of all rows that are there."""
    total = 0
    for path in cache.glob("features/*/*/rows"):
        stamps = np.fromfile(path.with_name("stamps"), "<i8")
        total += np.count_nonzero(stamps) * path.stat().st_size // len(stamps)
    return total


def test_a_run_behind_it_makes_nothing_and_is_the_run_without_to_the_bit(world, tmp_path, monkeypatch):
    live, _ = do(world(cached=False), tmp_path / "live")
    assert made([world()])[0].keys() == {"features"}
    assert made([world(cached=False, seed=5)]) == ({}, [])
    monkeypatch.setattr(Features, "write", None)
    assert made([world()]) == ({}, [])
    kept, _ = do(world(), tmp_path / "kept")
    parts = ("scores", "train_loss", "stream_hash", "eval_hash", "fingerprint")
    assert [getattr(kept, part) for part in parts] == [getattr(live, part) for part in parts]
    predictions = [(tmp_path / name / "predictions.jsonl").read_bytes() for name in ("live", "kept")]
    assert predictions[0] == predictions[1]


def test_parts_are_disjoint_and_whole_in_any_order(world, tmp_path, monkeypatch):
    configs = [world(samples=0, mixture={"a": 1.0, "b": 1.0}), world(seed=1)]
    whole, _ = made(configs)
    rows = rows_on_disk(tmp_path / "cache")
    monkeypatch.setenv(ENVIRONMENT_KEY, str(tmp_path / "other"))
    monkeypatch.setattr(ahead, "_CHUNK", 8)
    parts = [made(configs, part, 3)[0] for part in (2, 0, 1)]
    assert sum(part["features"] for part in parts) == whole["features"]
    assert all(0 < part["features"] < whole["features"] for part in parts)
    assert rows_on_disk(tmp_path / "other") == rows


def test_runs_that_see_alike_load_the_base_once(world, monkeypatch):
    built, real = [], ahead.build
    monkeypatch.setattr(ahead, "build", lambda *args: built.append(args) or real(*args))
    configs = [world(name, seed=seed) for name in ("lora", "mole") for seed in range(3)]
    made([*configs, world(model=CUES)])
    assert len(built) == 1
    half = replace(world(), optim=replace(world().optim, dtype="bf16"))
    totals, _ = made([world(), half])
    assert [dtype for _, dtype in built[1:]] == ["fp32", "bf16", "fp32", "bf16"]
    assert totals == {"features": 5 + 10 + 2 * 3}


def test_of_several_bases_one_is_in_memory_at_a_time(world, monkeypatch):
    real, alive, most = ahead.build, weakref.WeakSet(), []

    def build(*words):
        gc.collect()
        most.append(len(alive))
        llava = real(*words)
        alive.add(llava.model)
        return llava

    monkeypatch.setattr(ahead, "build", build)
    made([world(), replace(world(), optim=replace(world().optim, dtype="bf16"))])
    # Each is loaded to look, and those with rows to make once more; none while another is held.
    assert most == [0, 0, 0, 0]


def test_cues_and_the_blind_baseline_have_rows_of_their_own_and_verdicts_in_common(world, tmp_path):
    first, _ = made([world()])
    blind = replace(world(), data=replace(world().data, blind=True))
    assert made([world(), blind]) == ({"features": first["features"]}, [])
    assert made([world(), world(model=CUES)]) == ({"features": first["features"]}, [])
    both = [world(), blind, world(model=CUES)]
    assert footprint.features(both) == (3 * first["features"], held_on_disk(tmp_path / "cache"))


def test_stages_are_made_before_any_has_run_and_see_nothing_else_then(world, tmp_path, monkeypatch):
    look = {"regulariser": "ewc", "replay": "balanced", "replay_share": 0.5, "fisher_samples": 4}
    parts = ({"a": 1.0}, {"b": 1.0})
    configs = [
        world(mixture=parts[i], samples=8, continual={"task": task, **look}, init_from=before)
        for i, (task, before) in enumerate((("one", ""), ("two", "0" * 16)))
    ]
    totals, faults = made(configs)
    assert (totals["features"], faults) == (8 + 8 + 3 + 3, [])
    monkeypatch.setattr(Features, "write", None)
    record, _ = do(configs[0], tmp_path / "runs" / fingerprint(configs[0]))
    second = replace(configs[1], init_from=record.fingerprint)
    again, _ = do(second, tmp_path / "runs" / fingerprint(second))
    assert again.num_replayed == 4


def damaged(change, cache):
    """The one training pool's features after `change`: rows and stamps as they were, and how many rows are lost."""
    (folder,) = {path.parent for path in cache.glob("features/*/*-a-train-*/rows")}
    rows, stamps = (folder / name for name in ("rows", "stamps"))
    before = rows.read_bytes(), stamps.read_bytes()
    there = np.flatnonzero(np.fromfile(stamps, "<i8"))
    width = len(before[0]) // NUM
    return rows, stamps, before, change(rows, stamps, width, there)


def cut(rows, stamps, width, there):
    """The file ends in the middle of its last row."""
    rows.write_bytes(rows.read_bytes()[: there[-1] * width + 5])
    return 1


def zeroed(rows, stamps, width, there):
    values = np.fromfile(stamps, "<i8")
    values[there[2]] = 0
    stamps.write_bytes(values.tobytes())
    return 1


def garbage(rows, stamps, width, there):
    data = bytearray(rows.read_bytes())
    data[there[1] * width + 3] ^= 255
    rows.write_bytes(bytes(data))
    return 1


def no_stamps(rows, stamps, width, there):
    stamps.unlink()
    return len(there)


def test_rows_that_are_not_whole_are_found_and_made_anew(world, tmp_path):
    made([world()])
    for change in (cut, zeroed, garbage, no_stamps):
        rows, stamps, before, lost = damaged(change, tmp_path / "cache")
        assert made([world()]) == ({"features": lost}, [])
        assert (rows.read_bytes(), stamps.read_bytes()) == before


def test_another_preprocessing_has_all_rows_to_make(world, tmp_path):
    first, _ = made([world()])
    wanted = {"features": first["features"]}
    about = tmp_path / "llava" / "preprocessor_config.json"
    for old, new in (("0.48145466", "0.4"), ('"resample": 3', '"resample": 2')):
        about.write_text(about.read_text().replace(old, new))
        assert made([world()]) == (wanted, [])
    assert made([world(model={"image_aspect": "pad"})]) == (wanted, [])


def test_a_run_that_will_fail_is_left_to_itself_with_its_fault_and_the_others_are_made(
    world, tmp_path, monkeypatch
):
    good, _ = made([world()])
    monkeypatch.setenv(ENVIRONMENT_KEY, str(tmp_path / "other"))
    much = [world(samples=10 * NUM, seed=seed) for seed in (0, 1)]
    short = replace(world(seed=3), data=replace(world().data, max_rejected=0.0, max_length=11))
    wide = world(model={**CUES, "vce_levels": [-2, -99]})
    steps = list(ahead.make([*much, short, wide, world()]))
    faults = [step.fault for step in steps if step.fault]
    starts = (
        "data.samples",
        "data.samples",
        "data.max_rejected: 92 of 92 samples are bad",
        "model.vce_levels",
    )
    assert all(fault.startswith(start) for fault, start in zip(faults, starts, strict=True))
    assert sum(step.done for step in steps if step.work == "features") == good["features"]
    first = next(i for i, step in enumerate(steps) if step.work == "features")
    assert not any(step.fault for step in steps[first:])


def test_a_budget_in_tokens_counts_as_all_samples(world):
    config = replace(world(), data=replace(world().data, tokens=200, samples=0))
    images, size = footprint.features([config])
    assert images == 2 * NUM + 2 * 3
    assert size == images * footprint.row_bytes(config)
