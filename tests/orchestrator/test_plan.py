"""The plan adds up what a study's runs hold, and knows costs from the calibration and from finished runs."""

import json

import pytest
from rich.console import Console

from orchestrator import plan
from orchestrator.plan import Rate
from orchestrator.store import Store
from orchestrator.study import load
from workloads.config import from_tree

RATE = Rate(
    train_seconds=0.01,
    eval_seconds=0.1,
    other_seconds=2.0,
    tokens_per_sample=70.0,
    peak_bytes=800_000_000,
    disk_bytes=1_000_000,
    trainable=5000,
)


def _text(renderable) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(renderable)
    return console.export_text()


@pytest.fixture
def study(write_study):
    arms = {"lora": {}, "double": {"method": "lora", "set": {"data.mixture": "all_doubled"}}}
    return load(str(write_study(arms=arms, seeds=[0, 1, 2], resources={"slots": 2})))


def test_without_a_measurement_the_plan_says_so_and_still_counts(study, tmp_path):
    text = _text(plan.table(study, Store(tmp_path)))
    # Three seeds of 3 x 32 and of 3 x 64 samples.
    assert f"{3 * (96 + 192):,}" in text
    assert "6 runs to do, 2 at once" in text
    assert f"of 6: {plan.UNKNOWN}" in text


def test_with_a_calibration_time_memory_and_disk_are_sums_over_the_runs(study, tmp_path):
    store = Store(tmp_path)
    rates = {plan.key_of(trial.config): vars(RATE) for trial in plan.representatives(study)}
    assert len(rates) == 1
    store.calibration.write_text(json.dumps({"schema_version": 1, "rates": rates}))
    text = _text(plan.table(study, store))
    single = 96 * 0.01 + 24 * 0.1 + 2.0
    double = 192 * 0.01 + 24 * 0.1 + 2.0
    total = 3 * (single + double) / 2
    assert f"about 0:{round(total):02d}" in text
    assert f"{(1.2e9 + 2 * 8e8) / 1e9:.1f} GB of memory" in text
    assert "6 MB of disk" in text
    assert f"{96 * 70:,}" in text
    assert "5,000" in text


def test_calibration_measures_with_a_real_run_and_is_kept(write_study, tmp_path):
    made = load(str(write_study(set={"data.mixture": "general_only", "eval.domains": ["general"]})))
    store = Store(tmp_path / "studies")
    store.require_writable()
    (trial,) = plan.representatives(made)
    plan.calibrate([trial], store, Console(quiet=True))
    rate = plan.rates(store, [])[plan.key_of(trial.config)]
    assert rate.train_seconds > 0
    assert rate.eval_seconds > 0
    assert rate.peak_bytes > 10**8
    assert rate.trainable > 0
    assert 60 < rate.tokens_per_sample < 128
    assert not (tmp_path / "studies" / "runs").exists()


def test_a_rate_with_visual_cues_is_another_one():
    def key(**model):
        tree = {"model": model, "adapter": {"name": "lora"}, "data": {"mixture": {"general": 1.0}}}
        return plan.key_of(from_tree(tree))

    assert key() == key(vce_heads=2) != key(vce=True) != key(vce=True, vce_heads=2)
