"""Streams read back: matrices as a slow loop over the files finds them, metrics, what is missing, and scales."""

import json
import statistics

import numpy as np
import pytest
from scipy import stats

from dashboards.load import has_stream, study_results
from dashboards.stream_rows import COLUMNS, crossed, rectangle, summarise_stream
from dashboards.streams import missing_lines, stream_of
from dashboards.tables import stream_comparison, summary
from orchestrator.commands.compare import compare
from tests.dashboards.stream_study import MIXTURES, NEVER, ORDERS, TASKS, make_stream
from tests.dashboards.test_tables import text_of
from workloads.errors import UserError
from workloads.evaluation.continual import Matrix, aggregates


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """3 orders x 3 seeds x 2 arms x 3 stages. Not to be changed."""
    return make_stream(tmp_path_factory.mktemp("streams"))


def read(folder):
    return study_results(folder, folder.parent)


def cell(run, task):
    """Mean over the task's domains, from a record's JSON."""
    found = [run["scores"][domain]["score"] for domain in MIXTURES.get(task, {task: 1.0})]
    return sum(found) / len(found)


def files(folder):
    """(arm, order, seed, stage, task) -> record's JSON."""
    tree = json.loads((folder / "study.json").read_text())
    out = {}
    for row in tree["trials"]:
        path = folder.parent / "runs" / row["fingerprint"] / "record.json"
        if path.is_file():
            key = (row["arm"], row["order"], row["seed"], row["stage"], row["task"])
            out[key] = json.loads(path.read_text())
    return out


def slow_matrix(folder, arm, order, seed):
    runs, tasks = files(folder), ORDERS[order]
    stages = [runs[arm, order, seed, place + 1, task] for place, task in enumerate(tasks)]
    base = runs["base", "", seed, 0, ""]
    return Matrix(
        tasks=tasks,
        rows=tuple(tuple(cell(run, task) for task in tasks) for run in stages),
        before=tuple(cell(base, task) for task in tasks),
        never_trained={domain: tuple(cell(run, domain) for run in stages) for domain in NEVER},
        never_before={domain: cell(base, domain) for domain in NEVER},
        scales=dict.fromkeys([*tasks, *NEVER], "fraction"),
    )


def test_every_matrix_is_the_one_that_its_files_hold(folder):
    stream = stream_of(read(folder))
    assert (stream.tasks, stream.never, stream.orders) == (TASKS, NEVER, tuple(ORDERS))
    assert len(stream.chains) == 2 * 3 * 3
    for chain in stream.chains:
        assert chain.matrix == slow_matrix(folder, chain.arm, chain.order, chain.seed)


def test_metrics_of_one_order_have_t_intervals_over_seeds(folder):
    found = summarise_stream(stream_of(read(folder)))
    for arm in ("lora", "ewc"):
        for row in found.by_order[arm]:
            by_seed = [aggregates(slow_matrix(folder, arm, row.order, seed)) for seed in range(3)]
            for name in by_seed[0]:
                values = [each[name] for each in by_seed]
                half = stats.t.ppf(0.975, 2) * statistics.stdev(values) / 3**0.5
                assert row.values[name].mean == pytest.approx(sum(values) / 3)
                assert row.values[name].half_width == pytest.approx(half)


def test_an_arms_own_means_are_over_orders_and_seeds_and_never_narrower_than_over_seeds(folder):
    found = summarise_stream(stream_of(read(folder)))
    for row in found.arms:
        assert (row.num_orders, row.num_seeds, row.num_whole, row.num_chains) == (3, 3, 9, 9)
        for name, interval in row.values.items():
            if name in ("intransigence", "mif"):
                continue
            table = [
                [aggregates(slow_matrix(folder, row.arm, order, seed))[name] for seed in range(3)]
                for order in ORDERS
            ]
            assert interval.mean == pytest.approx(sum(map(sum, table)) / 9)
            by_seed = [sum(column) / 3 for column in zip(*table, strict=True)]
            variance = statistics.variance(by_seed) / 3
            assert (interval.half_width / stats.t.ppf(0.975, interval.df)) ** 2 >= variance - 1e-15


def test_chains_that_share_everything_but_the_orders_name_count_once_a_seed():
    """Three orders that give the same scores are no more samples than one."""
    by_seed = np.array([0.2, 0.5, 0.6, 0.3])
    same, one = crossed(np.repeat(by_seed[:, None], 3, axis=1)), crossed(by_seed[:, None])
    half = stats.t.ppf(0.975, 3) * statistics.stdev(by_seed) / 2
    for found in (same, one):
        assert (found.mean, found.df) == (pytest.approx(0.4), pytest.approx(3))
        assert found.half_width == pytest.approx(half)


def test_chains_of_a_seed_that_rise_and_fall_together_are_not_taken_as_samples_of_their_own():
    """Over many studies whose seeds move all orders alike, the interval holds the truth as often as it says."""
    dice = np.random.default_rng(0)
    held, naive = 0, 0
    for _ in range(600):
        scores_SO = dice.normal(size=(4, 1)) + 0.3 * dice.normal(size=(1, 3)) + 0.3 * dice.normal(size=(4, 3))
        found = crossed(scores_SO)
        held += found.low <= 0 <= found.high
        flat = stats.t.ppf(0.975, 11) * scores_SO.std(ddof=1) / 12**0.5
        naive += abs(scores_SO.mean()) <= flat
    assert held / 600 >= 0.93
    assert naive / 600 < 0.85


def test_intransigence_is_against_the_same_seeds_runs_of_each_task_alone(folder):
    runs, found = files(folder), summarise_stream(stream_of(read(folder)))
    row = next(row for row in found.by_order["ewc"] if row.order == "reversed")
    by_seed = []
    for seed in range(3):
        matrix = slow_matrix(folder, "ewc", "reversed", seed)
        lost = [
            cell(runs["alone", "", seed, 1, task], task) - matrix.rows[i][i]
            for i, task in enumerate(matrix.tasks)
        ]
        by_seed.append(sum(lost) / len(lost))
    assert row.values["intransigence"].mean == pytest.approx(sum(by_seed) / 3)


FORMS = {"garment": "short", "digits": "short", "chart": "short", "plane": "short", NEVER[0]: "short"}


def slow_mif(folder, key):
    """Mean over the tasks of the share of one- and two-word outputs, from the file of predictions."""
    path = folder.parent / "runs" / key / "predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    of_task = []
    for task in TASKS:
        parts = []
        for domain in MIXTURES[task]:
            said = [row["raw"] for row in rows if row["domain"] == domain]
            parts.append(sum(len(raw.split()) <= 2 for raw in said) / len(said))
        of_task.append(sum(parts) / len(parts))
    return sum(of_task) / len(of_task)


def test_mif_is_the_share_of_outputs_in_their_tasks_form_after_the_last_stage(tmp_path):
    folder = make_stream(tmp_path, arms=("lora",), forms=FORMS, scales={"digits": "cider"})
    trials = json.loads((folder / "study.json").read_text())["trials"]
    found = summarise_stream(stream_of(read(folder)))
    for row in found.by_order["lora"]:
        ends = [t["fingerprint"] for t in trials if (t["order"], t["stage"]) == (row.order, 3)]
        values = [slow_mif(folder, key) for key in ends]
        assert len(set(values)) == 3
        half = stats.t.ppf(0.975, 2) * statistics.stdev(values) / 3**0.5
        assert row.values["mif"].mean == pytest.approx(sum(values) / 3)
        assert row.values["mif"].half_width == pytest.approx(half)
    bounds = {row.role: row.values["mif"] for row in found.bounds}
    for role, arm in (("before", "base"), ("joint", "joint")):
        own = [slow_mif(folder, t["fingerprint"]) for t in trials if t["arm"] == arm]
        assert bounds[role].mean == pytest.approx(sum(own) / 3)
    assert bounds["alone"] is not None
    text = text_of(stream_comparison(read(folder)))
    assert text.count("joint (all at once)") == 2
    assert f"{100 * bounds['joint'].mean:.1f} ± " in text


def test_a_task_without_a_form_leaves_no_mif(tmp_path):
    known = {domain: form for domain, form in FORMS.items() if domain != "plane"}
    folder = make_stream(tmp_path, arms=("lora",), forms=known, seeds=[0, 1], orders=("given",))
    found = summarise_stream(stream_of(read(folder)))
    assert [row.values["mif"] for row in (*found.arms, *found.bounds)] == [None] * 4
    assert text_of(stream_comparison(read(folder))).count("joint (all at once)") == 1


def test_bounds_are_means_over_the_tasks_by_the_runs_outside_every_order(folder):
    runs = files(folder)
    bounds = {row.role: row for row in summarise_stream(stream_of(read(folder))).bounds}
    for role, arm in (("before", "base"), ("joint", "joint")):
        own = [[cell(runs[arm, "", seed, 0, ""], task) for task in TASKS] for seed in range(3)]
        assert bounds[role].values["final"].mean == pytest.approx(np.mean(own))
    own = [[cell(runs["alone", "", seed, 1, task], task) for task in TASKS] for seed in range(3)]
    assert bounds["alone"].values["final"].mean == pytest.approx(np.mean(own))
    assert bounds["alone"].values["zero_shot_never"] is None
    never = [cell(runs["joint", "", seed, 0, ""], domain) for seed in range(3) for domain in NEVER]
    assert bounds["joint"].values["zero_shot_never"].mean == pytest.approx(np.mean(never))


def test_the_worst_order_is_the_one_with_the_lowest_mean(folder):
    found = summarise_stream(stream_of(read(folder))).sensitivity["lora"]
    means = {
        order: sum(sum(slow_matrix(folder, "lora", order, seed).rows[-1]) / 3 for seed in range(3)) / 3
        for order in ORDERS
    }
    assert found.worst_order == min(means, key=means.get)
    assert found.worst.mean == pytest.approx(min(means.values()))
    assert found.mean.mean == pytest.approx(sum(means.values()) / 3)


def test_an_unfinished_stream_counts_whole_orders_and_says_what_is_missing(tmp_path):
    unfinished = {
        ("lora", "reversed", seed, stage): ("pending", "") for seed in (0, 1, 2) for stage in (2, 3)
    }
    unfinished |= {
        ("ewc", "given", 2, 2): ("failed", "loss is not finite"),
        ("ewc", "given", 2, 3): ("failed", ""),
    }
    folder = make_stream(tmp_path, orders=("given", "reversed"), unfinished=unfinished)
    results = read(folder)
    stream = stream_of(results)
    found = {row.arm: row for row in summarise_stream(stream).arms}
    assert (found["lora"].num_orders, found["lora"].num_seeds, found["lora"].num_whole) == (1, 3, 3)
    assert (found["ewc"].num_orders, found["ewc"].num_seeds, found["ewc"].num_whole) == (2, 2, 5)
    half = next(chain for chain in stream.chains if (chain.arm, chain.order) == ("lora", "reversed"))
    assert [row is None for row in half.rows] == [False, True, True]
    lines = missing_lines(stream)
    assert "lora, order reversed, seed 0: stage 2 (digits) is still to run, and 1 after it" in lines
    assert "ewc, order given, seed 2: stage 2 (digits) failed, and 1 after it" in lines
    text = text_of(summary(results))
    assert "missing: ewc, order given, seed 2: stage 2 (digits) failed, and 1 after it" in text
    assert "failed: ewc, seed 2, order given, stage 2 (digits): loss is not finite" in text


def test_without_bounds_what_needs_them_is_left_empty_and_told(tmp_path):
    folder = make_stream(tmp_path, bounds=(), orders=("given",), seeds=[0, 1])
    found = summarise_stream(stream_of(read(folder)))
    for row in found.arms:
        empty = {name for name in COLUMNS if row.values[name] is None}
        assert empty == {"fwt", "intransigence", "mif"}
    assert "no arm is named as before in the study's comparison" in missing_lines(found.stream)


def test_seeds_that_no_two_orders_share_leave_the_order_that_has_most(tmp_path):
    late = [("given", 0), ("reversed", 1), ("reversed", 2)]
    unfinished = {("lora", order, seed, 3): ("running", "") for order, seed in late}
    folder = make_stream(tmp_path, arms=("lora",), orders=("given", "reversed"), unfinished=unfinished)
    grid = rectangle(stream_of(read(folder)).of("lora"))
    assert {order: [chain.seed for chain in part] for order, part in grid.items()} == {"given": [1, 2]}


def test_no_mean_is_taken_over_tasks_on_several_scales(tmp_path):
    folder = make_stream(tmp_path, scales={"digits": "cider"}, seeds=[0, 1], orders=("given",))
    results = read(folder)
    found = summarise_stream(stream_of(results))
    assert not found.sensitivity
    for row in (*found.arms, *found.bounds):
        for name, value in row.values.items():
            assert value is None or name in ("zero_shot_never", "mif")
    text = text_of(summary(results))
    assert "no mean over domains, since their scales differ" in text
    assert "scales differ" in text.split("ewc")[1]


def test_a_matrix_holds_never_trained_tasks_on_several_scales_and_takes_no_mean_of_them(tmp_path):
    folder = make_stream(tmp_path, scales={NEVER[0]: "cider"}, seeds=[0, 1], orders=("given",))
    found = summarise_stream(stream_of(read(folder)))
    for chain in found.stream.chains:
        assert set(chain.matrix.never_trained) == set(NEVER)
        assert aggregates(chain.matrix)["zero_shot_never"] is None
    for row in found.arms:
        assert row.values["zero_shot_never"] is None
        assert row.values["final"] is not None


def test_tasks_on_one_other_scale_keep_its_unit(tmp_path):
    trained = dict.fromkeys(("garment", "digits", "chart", "plane"), "cider")
    folder = make_stream(tmp_path, scales=trained, seeds=[0, 1], orders=("given",))
    found = summarise_stream(stream_of(read(folder)))
    assert found.stream.scale == "cider"
    assert found.stream.never_scale == "fraction"
    own = [sum(slow_matrix(folder, "lora", "given", seed).rows[-1]) / 3 for seed in (0, 1)]
    line = next(
        line for line in text_of(stream_comparison(read(folder))).splitlines() if line.startswith("lora")
    )
    assert f"{sum(own) / 2:.3f} ± " in line


def test_a_domain_scored_on_other_items_in_one_run_is_refused(tmp_path):
    folder = make_stream(tmp_path, seeds=[0], orders=("given",))
    tree = json.loads((folder / "study.json").read_text())
    last = next(row["fingerprint"] for row in tree["trials"] if row["stage"] == 3)
    path = tmp_path / "runs" / last / "record.json"
    record = json.loads(path.read_text())
    record["scores"]["digits"]["num_items"] = 12
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match="'digits' was scored on different items"):
        stream_of(read(folder))


def test_points_of_a_grid_take_the_bounds_of_their_own_point(tmp_path):
    folder = make_stream(tmp_path, arms=("lora@x=1", "lora@x=2"), orders=("given",), seeds=[0])
    tree = json.loads((folder / "study.json").read_text())
    for row in tree["trials"]:
        row["arm"] = f"{row['arm']}@x=2" if row["arm"] == "base" else row["arm"]
    (folder / "study.json").write_text(json.dumps(tree))
    known = {chain.arm: chain.before is not None for chain in stream_of(read(folder)).chains}
    assert known == {"lora@x=1": False, "lora@x=2": True}


def test_studies_without_a_stream_have_none(study):
    results = read(study)
    assert stream_of(results) is None
    assert not has_stream(study)
    assert "Stream of" not in text_of(summary(results))


def test_the_table_names_every_arm_bound_and_metric(folder):
    assert has_stream(folder)
    text = text_of(stream_comparison(read(folder)))
    for word in ("lora", "ewc", "base (untrained)", "joint (all at once)", "alone (each alone)"):
        assert word in text
    for column in COLUMNS.values():
        assert column.heading in text
    assert "3 × 3" in text


def test_compare_prints_a_streams_tables_from_its_records(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    compare([folder.name], root=folder.parent)
    text = capsys.readouterr().out
    assert "Stream of 3 tasks" in text
    assert "ewc" in text
