"""Streams of three stages: hooks act, the past is as the records say, and a stage that was killed ends the same."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from tests.llava.sentences import write_encoder
from tests.training.runs import ROOT, do, do_stages, small, stages
from tests.training.test_run import losses, numbers
from workloads import adapters, record
from workloads.data import mixture
from workloads.errors import UserError
from workloads.identity import fingerprint
from workloads.record import Ancestor
from workloads.run import run

TASKS = ("general", "document", "biomedical")
PARTS = {task: {task: 1.0} for task in TASKS}
# 24 samples a stage: 3 steps, each followed by a checkpoint but the last.
SECTIONS = {
    "execution": {"report_every": 1, "checkpoint_every": 1},
    "optim": {"lr": 0.01},
    "eval": {"samples": 4, "max_new_tokens": 2},
}
EWC = {"regulariser": "ewc", "weight": 50.0, "fisher_samples": 6}
REPLAY = {"replay": "reservoir", "replay_share": 0.25}
CASES = {
    "lora": ("lora", {}),
    "ewc": ("lora", EWC),
    "lwf": ("lora", {"regulariser": "lwf"}),
    "replay": ("lora", REPLAY),
    "balanced_ewc": ("lora", {**EWC, "replay": "balanced", "replay_share": 0.3}),
    "branch_lora": ("branch_lora", EWC),
    "o_lora": ("o_lora", {}),
}


def configs_of(case, root, parts=PARTS):
    """The configurations of a case's stages; a sentence encoder is written to `root`."""
    adapter, continual = CASES[case]
    fields = {} if adapter == "lora" else {"tasks": list(parts)}
    if adapter == "branch_lora":
        if not (root / "encoder").exists():
            write_encoder(root / "encoder")
        fields |= {"task_routers": True, "encoder": str(root / "encoder"), "min_tunable": 1, "top_k": 2}
    fields |= {"dropout": 0.1} if case in ("lora", "replay") else {}
    return stages(parts, continual, adapter, adapter_fields=fields, **SECTIONS)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The folder of all runs of this file."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def done(root):
    """A function that runs a case's stages once: configurations, records and reports."""
    known = {}

    def of(case):
        if case not in known:
            configs = configs_of(case, root)
            known[case] = (configs, do_stages(configs, root))
        return known[case]

    return of


def adapter_of(root, config):
    return adapters.read(root / fingerprint(config) / record.ADAPTER)


def moved(before, after):
    """Names of the weights that differ."""
    assert before.keys() == after.keys()
    return {name for name, weight in after.items() if not torch.equal(weight, before[name])}


@pytest.mark.parametrize("case", ["branch_lora", "lora", "lwf", "o_lora", "replay"])
def test_a_third_stage_broken_off_and_resumed_ends_with_equal_numbers(case, done, root, tmp_path):
    configs, results = done(case)
    last, before = configs[2], fingerprint(configs[1])
    (tmp_path / fingerprint(configs[0])).symlink_to(root / fingerprint(configs[0]))
    (tmp_path / before).symlink_to(root / before)
    folder = tmp_path / fingerprint(last)

    def stop(metrics, _):
        if metrics["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(last, stop, folder)
    assert (folder / record.CHECKPOINT / "step-00000001").is_dir()
    resumed, rest = do(last, folder)
    whole, reports = results[2]
    assert resumed.num_resumes == 1
    assert numbers(resumed) == numbers(whole)
    assert resumed.lineage == whole.lineage
    assert (resumed.selected, resumed.selector_accuracy) == (whole.selected, whole.selector_accuracy)
    assert losses(rest)[-1] == losses(reports)[-1]
    assert moved(adapter_of(root, last), adapters.read(folder / record.ADAPTER)) == set()


CHILD = """
import sys, time
from pathlib import Path
from tests.training.test_stages import configs_of
from workloads.run import run
from workloads.identity import fingerprint

def report(metrics, folder):
    print(metrics["step"], flush=True)
    time.sleep(0.5)

root = Path(sys.argv[1])
config = configs_of("balanced_ewc", root)[2]
run(config, report, root / fingerprint(config))
"""


def test_a_third_stage_killed_and_resumed_ends_with_equal_numbers(done, root, tmp_path):
    configs, results = done("balanced_ewc")
    for config in configs[:2]:
        (tmp_path / fingerprint(config)).symlink_to(root / fingerprint(config))
    folder = tmp_path / fingerprint(configs[2])
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert child.stdout
    while child.stdout.readline().strip() != "2":
        assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not record.is_finished(folder)
    resumed, _ = do(configs[2], folder)
    assert resumed.num_resumes == 1
    assert numbers(resumed) == numbers(results[2][0])
    assert moved(adapter_of(root, configs[2]), adapters.read(folder / record.ADAPTER)) == set()


def test_every_stage_says_where_it_comes_from(done):
    configs, results = done("lora")
    names = [Ancestor(fingerprint=fingerprint(c), task=c.continual.task) for c in configs]
    assert [result.lineage for result, _ in results] == [[], names[:1], names[:2]]
    assert [result.num_replayed for result, _ in results] == [0, 0, 0]
    assert all(result.selector_accuracy is None and result.selected == {} for result, _ in results)


def test_the_first_stage_is_the_same_run_whatever_is_done_about_the_past(done, root):
    plain = {"dropout": 0.0}
    first = {
        fingerprint(stages(PARTS, CASES[case][1], "lora", adapter_fields=plain)[0])
        for case in ("lora", "ewc", "lwf", "replay", "balanced_ewc")
    }
    assert len(first) == 1
    configs, _ = done("ewc")
    assert not (root / fingerprint(configs[0]) / record.PAST).exists()


def test_ended_tasks_freeze_their_branches_and_every_task_has_a_router_and_keys_of_its_own(done, root):
    configs, results = done("branch_lora")
    kept = [adapter_of(root, config) for config in configs]
    frozen = [weights["branch_memory.frozen_LN"] for weights in kept]
    # Of 4 branches the task's top 2 are frozen, and then as many as leave one that is tunable.
    assert set(frozen[0].sum(dim=1).tolist()) == {2}
    assert all(bool((later >= earlier).all()) for earlier, later in pairwise(frozen))
    assert int(frozen[2].sum(dim=1).max()) == 3
    assert [int(weights["branch_memory.num_ended"]) for weights in kept] == [1, 2, 3]
    linears = sorted({name.removesuffix(".trunk_A") for name in kept[0] if name.endswith(".trunk_A")})
    assert len(linears) == len(frozen[0])
    order = [name.removesuffix(".trunk_A") for name in linear_order(configs[0])]
    for place in (1, 2):
        new = moved(kept[place - 1], kept[place])
        for path, fixed in zip(order, frozen[place - 1].tolist(), strict=True):
            stuck = {f"{path}.branch_{n}_B" for n, one in enumerate(fixed) if one}
            assert not stuck & new
        routers = {name.rsplit("_", 1)[1] for name in new if ".router_" in name}
        keys = {name.rsplit("_", 1)[1] for name in new if "_key_" in name}
        assert (routers, keys) == ({str(place)}, {str(place)})
        assert any(name.endswith(f"branch_{n}_B") for name in new for n in range(4))
    trained = [result.cost.trainable for result, _ in results]
    assert trained[0] > trained[1] >= trained[2]


def linear_order(config):
    """Paths of the trunks in the order in which the method placed them."""
    from workloads.adapters.base import Trace
    from workloads.llava.build import build

    model = build(config.model, "fp32").model
    adapters.attach(model, config.adapter, Trace())
    return [name for name, _ in model.named_parameters() if name.endswith(".trunk_A")]


def test_the_selectors_accuracy_is_the_share_of_items_of_seen_tasks_given_their_own(done, root):
    configs, results = done("branch_lora")
    for place, (result, _) in enumerate(results):
        folder = root / fingerprint(configs[place])
        rows = [json.loads(line) for line in (folder / record.PREDICTIONS).read_text().splitlines()]
        seen = TASKS[: place + 1]
        own = [row for row in rows if row["domain"] in seen]
        right = sum(row["selected"] == row["domain"] for row in own)
        assert result.selector_accuracy == right / len(own)
        (event,) = (e for e in record.read_events(folder) if e["event"] == "eval")
        assert event["selector_accuracy"] == right / len(own)
        counted = {task: dict(Counter(r["selected"] for r in own if r["domain"] == task)) for task in seen}
        assert result.selected == counted
        assert {row["selected"] for row in rows} <= set(seen), "only what was learned is selected"
        assert record.load(folder) == result
    assert results[0][0].selector_accuracy == 1.0


def test_every_stage_trains_its_slot_and_leaves_those_before_it(done, root):
    configs, results = done("o_lora")
    kept = [adapter_of(root, config) for config in configs]
    for place in (1, 2):
        slots = {
            name.rsplit("slot", 1)[1][0] for name in moved(kept[place - 1], kept[place]) if "slot" in name
        }
        assert slots == {str(place)}
    terms = [{"orthogonality_loss" in r for r in reports if r["event"] == "train"} for _, reports in results]
    assert terms == [{False}, {True}, {True}]


def test_ewc_has_no_pull_at_the_start_and_holds_what_mattered_nearer_than_plain_training_does(root, done):
    configs, results = done("ewc")
    second, third = ([r["ewc_loss"] for r in of[1] if r["event"] == "train"] for of in results[1:])
    assert second[0] == 0.0, "the only anchors are the start"
    assert all(pull > 0 for pull in [*second[1:], *third])
    plain = stages(PARTS, {}, **SECTIONS)
    do_stages(plain[:2], root)
    held = load_file(root / fingerprint(configs[1]) / record.PAST)

    def distance(config):
        weights = adapter_of(root, config)
        names = [name.removeprefix("mean.") for name in held if name.startswith("mean.")]
        return sum(
            float((held[f"precision.{n}"] * (weights[n] - held[f"mean.{n}"]) ** 2).sum()) for n in names
        )

    assert distance(configs[1]) < 0.8 * distance(plain[1])


def test_ewc_ends_the_same_whether_or_not_the_stage_before_left_its_past_behind(done, root, tmp_path):
    configs, results = done("ewc")
    for config in configs[:2]:
        shutil.copytree(root / fingerprint(config), tmp_path / fingerprint(config))
    (tmp_path / fingerprint(configs[1]) / record.PAST).unlink()
    again, _ = do(configs[2], tmp_path / fingerprint(configs[2]))
    assert numbers(again) == numbers(results[2][0])
    one, two = (load_file(runs / fingerprint(configs[2]) / record.PAST) for runs in (root, tmp_path))
    assert moved(one, two) == set()
    assert again.cost.past_seconds > 0


def test_lwf_starts_at_no_distance_from_its_teacher(done):
    _, results = done("lwf")
    for _, reports in results[1:]:
        distances = [r["lwf_loss"] for r in reports if r["event"] == "train"]
        assert distances[0] == pytest.approx(0.0, abs=1e-6)
        assert distances[1] > 1e-6


def test_replay_adds_its_share_of_all_earlier_samples(done):
    _, plain = done("lora")
    _, results = done("replay")
    assert [result.num_replayed for result, _ in results] == [0, 6, 12]
    assert [result.num_samples for result, _ in results] == [24, 30, 36]
    shares = results[2][0].sample_shares
    assert shares["biomedical"] == pytest.approx(24 / 36)
    assert shares["general"] + shares["document"] == pytest.approx(12 / 36)
    assert results[0][0].stream_hash == plain[0][0].stream_hash
    assert results[1][0].stream_hash != plain[1][0].stream_hash


def test_pictures_seen_once_change_nothing_of_the_past(done, root, tmp_path):
    configs, results = done("balanced_ewc")
    for config in configs[:2]:
        (tmp_path / fingerprint(config)).symlink_to(root / fingerprint(config))
    seen = replace(configs[2], execution=replace(configs[2].execution, feature_cache=True))
    again, reports = do(seen, tmp_path / fingerprint(seen))
    assert again.stream_hash == results[2][0].stream_hash
    for (_, one), (_, two) in zip(losses(reports), losses(results[2][1]), strict=True):
        assert one == pytest.approx(two, abs=1e-4)


def test_a_stage_may_be_a_mixture_and_its_name_is_the_task(root, tmp_path):
    parts = {"pages_and_photos": {"general": 1.0, "document": 0.5}, "biomedical": {"biomedical": 1.0}}
    configs = configs_of("branch_lora", root, parts)
    results = do_stages(configs, tmp_path)
    first, last = (result for result, _ in results)
    assert first.selected == {"pages_and_photos": {"pages_and_photos": 8}}
    assert {task: sum(found.values()) for task, found in last.selected.items()} == {
        "pages_and_photos": 8,
        "biomedical": 4,
    }


def test_a_past_that_cannot_be_looked_up_is_told_in_one_line(done, root, tmp_path):
    configs, _ = done("ewc")
    first, second = map(fingerprint, configs[:2])

    def refused(config, words):
        with pytest.raises(UserError) as error:
            do(config, tmp_path / "run")
        assert all(word in str(error.value) for word in words), str(error.value)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "run").exists()

    shutil.copytree(root / second, tmp_path / second)
    refused(configs[2], ["init_from", second, f"which needs {first}"])
    shutil.copytree(root / first, tmp_path / first)
    long = replace(configs[2], data=replace(configs[2].data, max_length=127))
    refused(long, ["data.max_length: 127 is not allowed", "128"])
    nameless = replace(configs[2], continual=replace(configs[2].continual, task=""))
    refused(nameless, ["continual.task: '' is not allowed", "'document'"])
    share = replace(configs[2].continual, replay="balanced", replay_share=0.001)
    refused(replace(configs[2], continual=share), ["continual.replay_share: 0.001", "48 earlier samples"])
    path = tmp_path / first / record.RECORD
    path.write_text(json.dumps({**json.loads(path.read_text()), "stream_hash": "0" * 16}))
    refused(configs[2], ["init_from", first, "no longer there"])


def test_an_unknown_task_is_told_before_anything_is_written(tmp_path):
    config = small("o_lora", adapter_fields={"tasks": ["general"]}, continual={"task": "genral"})
    with pytest.raises(UserError, match="did you mean 'general'"):
        do(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_samples_of_a_stage_are_those_of_the_same_run_alone():
    """A stage's own samples depend on its own settings: the task before it moves none."""
    one, two = stages(PARTS, REPLAY)[1], stages(dict(reversed(PARTS.items())), REPLAY)[1]
    accepted = {task: range(100) for task in TASKS}
    assert mixture.stream(one.data, accepted, one.seed) == mixture.stream(two.data, accepted, two.seed)


def test_a_method_that_is_told_tasks_answers_what_was_never_trained_as_the_present_one(tmp_path):
    """Its items reach mtl_lora under the stage's name, since biomedical is none of the method's tasks."""
    parts = {"pages": {"document": 1.0}, "general": {"general": 1.0}}
    fields = {"tasks": list(parts), "rank_per_expert": 2}
    (config, _) = stages(parts, {}, "mtl_lora", adapter_fields=fields, **SECTIONS)
    result, _ = do(config, tmp_path)
    assert sorted(result.scores) == sorted(TASKS)
    assert result.lineage == []
