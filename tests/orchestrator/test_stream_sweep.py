"""Real sweeps over a small stream: equal beginnings run once, failures stay in their chain, kill -9 changes nothing."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from orchestrator.stages import chains
from orchestrator.store import Store
from orchestrator.streams import expanded
from orchestrator.study import load as load_study
from orchestrator.tracking import make_client, tracking_uri
from workloads.evaluation.continual import aggregates
from workloads.evaluation.matrix_file import read
from workloads.record import ADAPTER, PREDICTIONS, load, read_events

REPO = Path(__file__).parents[2]
TASKS = ["general", "document", "biomedical"]
OTHER = ["general", "biomedical", "document"]
BASE = {"method": "lora", "stream": "joint", "set": {"data.samples": 4, "optim.lr": 1.0e-12}}
EWC = {"method": "lora", "set": {"continual.regulariser": "ewc", "continual.fisher_samples": 8}}
STUDY = {
    "recipe": "recipe.yaml",
    "stream": {"stages": TASKS, "orders": ["given", OTHER]},
    "arms": {"lora": {}, "ewc": EWC, "base": BASE},
    "comparison": {"before": "base"},
    "set": {"execution.checkpoint_every": 3},
    "resources": {"slots": 2},
}


@pytest.fixture(scope="module")
def write(base, tmp_path_factory):
    """A function that writes a study of stages of eight steps each, and returns its path."""
    recipe = {
        "model": {"name_or_path": str(base)},
        "data": {"samples": 64},
        "adapter": {"name": "lora", "rank": 2},
        "optim": {"global_batch": 8, "lr": 0.002},
        "eval": {"samples": 6, "split": "val", "max_new_tokens": 4},
        "execution": {"report_every": 1, "eval_batch": 24},
    }

    def make(**changes) -> Path:
        folder = tmp_path_factory.mktemp("files")
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        path = folder / "tiny.yaml"
        path.write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
        return path

    return make


def _call(*words: object) -> list[str]:
    return [sys.executable, "-m", "orchestrator", *map(str, words)]


def _sweep(study: Path, root: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200"}
    command = _call("sweep", study, "--root", root)
    return subprocess.run(
        command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


@pytest.fixture(scope="module")
def swept(write, tmp_path_factory):
    """Store and output of a whole sweep in which one stage fails: the second of `ewc` in the order given."""
    store, study = Store(tmp_path_factory.mktemp("swept")), write()
    trials = expanded(load_study(str(study)))
    broken = next(t for t in trials if (t.arm, t.spot.order, t.spot.stage) == ("ewc", "given", 2))
    # A folder in the place of a file: the run cannot write what it starts with.
    (store.run_folder(broken.fingerprint) / "config.json").mkdir(parents=True)
    done = _sweep(study, store.root)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return store, done.stdout


def _mlflow(store: Store):
    client = make_client(tracking_uri(store.study_folder("tiny")))
    experiment = client.get_experiment_by_name("tiny")
    return client, client.search_runs([experiment.experiment_id])


def _rows(store: Store):
    return store.read_study("tiny")["trials"]


def test_equal_beginnings_run_once_and_the_sweep_says_what_that_saved(swept):
    store, out = swept
    rows = _rows(store)
    assert len(rows) == 2 * 2 * 3 + 1
    # The first stage is one run for both arms and orders; what follows is not shared.
    staged = [row for row in rows if row["stage"]]
    assert len({row["fingerprint"] for row in staged if row["stage"] == 1}) == 1
    assert len({row["fingerprint"] for row in staged}) == 1 + 2 * 2 * 2
    for chain in chains(rows):
        before = ""
        for row in chain.rows:
            assert row["config"]["init_from"] == before
            before = row["fingerprint"]
            if row["status"] == "finished":
                ran = load(store.run_folder(before)).config
                # A shared run has the name of the first trial that it belongs to, and a first stage no past.
                own = row["config"]
                assert {**ran, "name": "", "continual": {}} == {**own, "name": "", "continual": {}}
                same = ran["continual"] if row["stage"] > 1 else {"task": row["task"]}
                assert same.items() <= own["continual"].items()
    first = load(store.run_folder(staged[0]["fingerprint"]))
    assert "10 stages of all trials are 7 runs" in out
    assert f"saved 3 runs, {3 * first.num_samples} samples and {3 * first.cost.seconds:.0f} s" in out


def test_a_failed_stage_ends_its_own_chain_and_no_other(swept):
    store, out = swept
    rows = {(row["arm"], row["order"], row["stage"]): row for row in _rows(store)}
    states = {key: row["status"] for key, row in rows.items()}
    bad = {("ewc", "given", 2): "failed", ("ewc", "given", 3): "failed"}
    assert states == {**dict.fromkeys(states, "finished"), **bad}
    assert "cannot be written" in rows["ewc", "given", 2]["error"]
    line = "stage 2 (document) of order given failed"
    assert rows["ewc", "given", 3]["error"] == line
    assert f"ewc/0/given/3 biomedical failed: {line}" in out


def test_mlflow_has_study_trials_and_stages_with_matrices_that_metrics_reads(swept, tmp_path):
    store, _ = swept
    client, runs = _mlflow(store)
    kinds = {
        kind: [run for run in runs if run.data.tags["kind"] == kind] for kind in ("study", "trial", "stage")
    }
    (study,) = kinds["study"]
    assert {run.data.tags["mlflow.parentRunId"] for run in kinds["trial"]} == {study.info.run_id}
    trials = {(run.data.tags["arm"], run.data.tags.get("order", "")): run for run in kinds["trial"]}
    orders = {(arm, order) for arm in ("lora", "ewc") for order in ("given", "explicit-0")}
    assert set(trials) == {*orders, ("base", "")}
    stages = {run.data.tags["fingerprint"]: run for run in kinds["stage"]}
    assert len(kinds["stage"]) == len(stages) == 9
    rows = _rows(store)
    start = load(store.run_folder(next(row["fingerprint"] for row in rows if row["arm"] == "base"))).scores
    for chain in chains(rows):
        run = trials[chain.arm, chain.order]
        assert run.info.run_name == chain.name
        for row in chain.rows:
            tags, shared = stages[row["fingerprint"]].data.tags, f"shared/{row['task']}"
            own = tags["mlflow.parentRunId"] == run.info.run_id
            assert run.data.tags.get(shared) == (None if own else stages[row["fingerprint"]].info.run_id)
            assert (tags["stage"], tags["task"]) == (str(row["stage"]), row["task"])
        if (chain.arm, chain.order) == ("ewc", "given"):
            assert (run.info.status, run.data.tags["error"]) == ("FAILED", chain.rows[1]["error"])
            assert not client.list_artifacts(run.info.run_id)
            continue
        assert run.info.status == "FINISHED"
        _check_matrix(client, run, chain, store, start, tmp_path)
    marks = [key for run in trials.values() for key in run.data.tags if key.startswith("shared/")]
    assert marks == ["shared/general"] * 3
    for row in rows:
        if row["stage"] and row["status"] == "finished":
            files = {item.path for item in client.list_artifacts(stages[row["fingerprint"]].info.run_id)}
            assert files == {"record.json", "predictions.jsonl", "adapter"}


def _check_matrix(client, run, chain, store, start, folder):
    """The artifact, the aggregates and the scores by stage, against the records of the chain."""
    tasks = TASKS if chain.order == "given" else OTHER
    scores = [load(store.run_folder(row["fingerprint"])).scores for row in chain.rows]
    matrix = read(Path(client.download_artifacts(run.info.run_id, "matrix.json", str(folder))))
    assert matrix.tasks == tuple(tasks)
    assert matrix.rows == tuple(tuple(found[task].score for task in tasks) for found in scores)
    assert matrix.before == tuple(start[task].score for task in tasks)
    for name, value in aggregates(matrix).items():
        assert run.data.metrics.get(name) == value
    for i, task in enumerate(tasks):
        history = client.get_metric_history(run.info.run_id, f"score/{task}")
        assert [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] == [
            (stage, row[i]) for stage, row in enumerate(matrix.rows, start=1)
        ]


def _wait(condition, process: subprocess.Popen[str], seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)


def _numbers(folder: Path):
    """All of a record but where and how long it ran."""
    tree = asdict(load(folder))
    gone = {"cost", "environment", "num_resumes", "name"}
    return {key: value for key, value in tree.items() if key not in gone and key != "config"}


def test_a_sweep_killed_in_the_middle_of_a_stage_ends_with_the_numbers_of_one_that_was_not(
    swept, write, tmp_path
):
    reference, _ = swept
    study = write(arms={"lora": {}}, comparison={})
    store = Store(tmp_path / "studies")
    chain = [trial for trial in expanded(load_study(str(study))) if trial.spot.order == "given"]
    second = store.run_folder(chain[1].fingerprint)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(_call("sweep", study, "--root", store.root), cwd=REPO, **quiet)
    _wait(lambda: any(event["step"] >= 4 for event in read_events(second)), process)
    process.kill()
    process.wait()
    assert store.finished(chain[0].fingerprint)
    assert not store.finished(chain[1].fingerprint)
    sync = store.study_folder("tiny") / "sync.json"
    told = {
        run["run"]
        for known in json.loads(sync.read_text())["uris"].values()
        for run in known["chains"].values()
    }
    first = (store.run_folder(chain[0].fingerprint) / "record.json").stat().st_mtime_ns
    done = _sweep(study, store.root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (store.run_folder(chain[0].fingerprint) / "record.json").stat().st_mtime_ns == first
    assert load(second).num_resumes == 1
    rows = _rows(store)
    assert {row["status"] for row in rows} == {"finished"}
    for key in {row["fingerprint"] for row in rows}:
        mine, theirs = store.run_folder(key), reference.run_folder(key)
        assert _numbers(mine) == _numbers(theirs)
        assert (mine / PREDICTIONS).read_text() == (theirs / PREDICTIONS).read_text()
        weights, wanted = (load_file(next((f / ADAPTER).glob("*.safetensors"))) for f in (mine, theirs))
        assert all(weights[name].equal(wanted[name]) for name in wanted)
    _, runs = _mlflow(store)
    trials = {run.info.run_id for run in runs if run.data.tags["kind"] == "trial"}
    assert len(trials) == 2
    assert told <= trials
    assert len([run for run in runs if run.data.tags["kind"] == "stage"]) == 5
