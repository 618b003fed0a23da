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


TASKS = ["general", "document", "biomedical"]
REPLAY = {"method": "lora", "set": {"continual.replay": "reservoir", "continual.replay_share": 0.25}}


@pytest.fixture
def staged(write_study):
    """Two orders that begin alike; 64 samples a stage, and replay beside plain stages."""
    stream = {"stages": TASKS, "orders": ["given", ["general", "biomedical", "document"]]}
    arms = {"lora": {}, "replay": REPLAY, "alone": {"method": "lora", "stream": "alone"}}
    return load(str(write_study(arms=arms, stream=stream, set={"data.samples": 64}, resources={"slots": 2})))


def test_a_stream_is_planned_with_shared_stages_once_and_replayed_samples_counted(staged, tmp_path):
    text = " ".join(_text(plan.table(staged, Store(tmp_path))).split())
    # Two orders of lora share a first stage with each other, with replay's, and with the first task alone.
    runs = 5 + 4 + 2
    # The second stage of replay sees a quarter of 64 again, the third a quarter of 128.
    samples = 64 * runs + 2 * (16 + 32)
    assert f"{runs} runs to do, 2 at once" in text
    assert f"{samples:,}" in text
    stages = 2 * 2 * 3 + 3
    saved = stages - runs
    share = round(100 * 64 * saved / (samples + 64 * saved))
    assert f"{stages} stages of all trials are {runs} runs" in text
    assert f"saves {saved} runs and {64 * saved} samples ({share} %)" in text


def test_no_number_of_slots_makes_a_chain_shorter(write_study, tmp_path):
    study = load(str(write_study(stream={"stages": TASKS}, set={"data.samples": 64}, resources={"slots": 8})))
    store = Store(tmp_path)
    rates = {plan.key_of(trial.config): vars(RATE) for trial in plan.representatives(study)}
    assert len(rates) == 1
    store.calibration.write_text(json.dumps({"schema_version": 1, "rates": rates}))
    one = 64 * 0.01 + 24 * 0.1 + 2.0
    assert f"about 0:{round(3 * one):02d}" in _text(plan.table(study, store))


def test_orders_of_a_methods_tasks_cost_the_same_and_a_look_back_does_not(staged, write_study):
    keys = {(t.arm, t.spot.stage): plan.key_of(t.config) for t in plan.planned(staged)}
    assert keys["lora", 1] == keys["lora", 3] != keys["replay", 2] == keys["replay", 3]
    stream = {"stages": TASKS, "orders": ["given", "reversed"]}
    study = load(str(write_study(arms={"o_lora": {}}, stream=stream)))
    assert len(plan.representatives(study)) == 1


def test_a_look_back_is_measured_at_a_second_stage(write_study, tmp_path):
    settings = {"eval.domains": ["general"], "eval.samples": 4, "optim.global_batch": 2}
    stream = {"stages": ["general", "document"]}
    study = load(str(write_study(arms={"replay": REPLAY}, stream=stream, set=settings)))
    store = Store(tmp_path / "studies")
    store.require_writable()
    plan.calibrate(plan.representatives(study), store, Console(quiet=True))
    known = plan.rates(store, [])
    assert set(known) == {plan.key_of(trial.config) for trial in plan.planned(study)}
    assert len(known) == 2
