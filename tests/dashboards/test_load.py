"""Reading a study back: what is taken from disk, what is refused, and rows from a real MLflow database."""

import json
import subprocess
import sys

import numpy as np
import pytest

from dashboards.load import compare, study_results
from dashboards.methods import COLUMNS
from workloads.errors import UserError

ARMS = {"lora_mix": (0.6, 0.5, 0.8), "mole_hard": (0.7, 0.6, 0.8)}


def read(folder):
    return study_results(folder, folder.parent)


def test_item_scores_are_those_of_the_prediction_files(study):
    results = read(study)
    assert results.domains == ["general", "document", "biomedical"]
    for trial in results.trials[::7]:
        lines = (study.parent / "runs" / trial.fingerprint / "predictions.jsonl").read_text().splitlines()
        for row in map(json.loads, lines):
            items = results.scores[trial.arm][row["domain"]]
            place = items.seeds.index(trial.seed), items.ids.index(row["id"])
            assert items.scores_SI[place] == row["score"]
            assert items.question_types[place[1]] == row["question_type"]


def test_a_finished_study_is_complete(study):
    results = read(study)
    assert len(results.trials) == 64
    assert {trial.status for trial in results.trials} == {"finished"}
    assert results.scores["mole_hard"]["general"].seeds == tuple(range(8))
    assert results.roles.headline == "mole_hard"
    assert [run.seed for run in results.runs("lora_mix")] == list(range(8))


def test_curves_run_over_the_samples_of_their_domain(study):
    results = read(study)
    solo, mix = (results.curves[results.runs(arm)[0].fingerprint] for arm in ("solo_general", "lora_mix"))
    assert set(solo) == {"general"}
    assert solo["general"][-1][0] == pytest.approx(2000)
    # A third of every step's 16 samples is of this domain.
    assert mix["general"][-1][0] == pytest.approx(2000)
    assert mix["general"][0][0] == pytest.approx(25 * 16 / 3)


def test_a_resumed_runs_repeated_steps_count_once(write_study, tmp_path):
    folder = write_study(tmp_path, chances={"lora_mix": (0.5, 0.5, 0.5)}, seeds=[0], num_items=12)
    run = next((tmp_path / "runs").iterdir())
    before = read(folder).curves[run.name]["general"]
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    with (run / "events.jsonl").open("a") as file:
        file.write(lines[1].replace("loss/general", "loss/ignored"))
        file.write(json.dumps({**json.loads(lines[2]), "loss/general": 9.0}) + "\n")
        file.write('{"cut off')
    after = read(folder).curves[run.name]["general"]
    assert len(after) == len(before) - 1
    assert after[1] == (before[2][0], 9.0)


def test_a_record_counts_whatever_the_ledger_says(write_study, tmp_path):
    folder = write_study(tmp_path, chances=ARMS, seeds=[0, 1], num_items=12)
    ledger = json.loads((folder / "study.json").read_text())
    for row in ledger["trials"]:
        row["status"] = "running"
    ledger["trials"][0]["fingerprint"] = "0" * 16
    ledger["trials"][0]["status"] = "finished"
    (folder / "study.json").write_text(json.dumps(ledger))
    results = read(folder)
    assert [trial.status for trial in results.trials] == ["lost", "finished", "finished", "finished"]
    assert results.trials[0].error == "its run folder has no record"
    assert results.scores["lora_mix"]["general"].seeds == (1,)


def test_solo_arms_are_found_by_their_mixture_when_no_role_names_them(write_study, tmp_path):
    chances = dict.fromkeys(("solo_general", "solo_document", "lora_mix"), (0.5, 0.5, 0.5))
    results = read(write_study(tmp_path, chances=chances, seeds=[0], num_items=12, comparison={}))
    assert results.roles.solo == {"general": "solo_general", "document": "solo_document"}
    assert results.trained_on("lora_mix") == ["general", "document", "biomedical"]


def test_blind_arms_are_known(write_study, tmp_path):
    chances = ARMS | {"blind": (0.2, 0.1, 0.3)}
    assert read(write_study(tmp_path, chances=chances, seeds=[0], num_items=12)).blind_arms == ["blind"]


@pytest.fixture
def small(write_study, tmp_path):
    return write_study(tmp_path, chances=ARMS, seeds=[0, 1], num_items=12)


def run_of(folder, arm, seed):
    trials = json.loads((folder / "study.json").read_text())["trials"]
    names = {(trial["arm"], trial["seed"]): trial["fingerprint"] for trial in trials}
    return folder.parent / "runs" / names[arm, seed]


def rewrite(path, change):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows[:-1], "biomedical has 11 items .* the record says 12"),
        (lambda rows: [*rows, rows[0]], "general-test-0' of 'general' is there twice"),
        (lambda rows: [{**rows[0], "score": 1 - rows[0]["score"]}, *rows[1:]], "general has 12 items"),
        (lambda rows: [{**rows[0], "answer": "other"}, *rows[1:]], "general-test-0' asks something else"),
        (lambda rows: [{**rows[0], "id": "new"}, *rows[1:]], "scored on different items"),
        (lambda rows: [{**rows[0], "domain": "moon"}, *rows[1:]], "'moon' is there twice, or of no scored"),
    ],
)
def test_contradictory_predictions_are_refused_in_one_line(small, change, words):
    rewrite(run_of(small, "lora_mix", 1) / "predictions.jsonl", change)
    with pytest.raises(UserError, match=words) as caught:
        read(small)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("predictions.jsonl", "{", "not JSON lines"),
        ("predictions.jsonl", None, "missing, though the run has a record"),
        ("record.json", "{}", "not a record of this version"),
        ("record.json", "[]", "not a record of this version"),
    ],
)
def test_broken_run_files_are_refused_in_one_line(small, name, text, words):
    path = run_of(small, "lora_mix", 1) / name
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        read(small)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tree: tree | {"schema_version": 2}, "schema_version: 2 is not allowed"),
        (lambda tree: [], "schema_version: None is not allowed"),
        (lambda tree: tree | {"trials": [{**tree["trials"][0], "fingerprint": "../../x"}]}, "'../../x'"),
        (
            lambda tree: tree | {"trials": [{**t, "seed": 0} for t in tree["trials"]]},
            "two finished runs of seed 0",
        ),
    ],
)
def test_broken_studies_are_refused_in_one_line(small, change, words):
    path = small / "study.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(UserError, match=words) as caught:
        read(small)
    assert "\n" not in str(caught.value)


def test_a_record_in_the_wrong_folder_is_refused(small):
    mine, other = run_of(small, "lora_mix", 0), run_of(small, "mole_hard", 0)
    (mine / "record.json").write_text((other / "record.json").read_text())
    with pytest.raises(UserError, match=f"the record of '{other.name}' in the folder of {mine.name}"):
        read(small)


def test_a_study_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere/study\.json: no such study"):
        study_results(tmp_path / "nowhere", tmp_path)


@pytest.fixture(scope="module")
def mlflow_root(tmp_path_factory):
    """Two studies in SQLite databases of their own, written by MLflow's client."""
    from mlflow import MlflowClient

    root = tmp_path_factory.mktemp("tracked")
    for study in ("first", "second"):
        (root / study).mkdir()
        client = MlflowClient(f"sqlite:///{root / study / 'mlflow.db'}")
        experiment = client.create_experiment(study, artifact_location=(root / study / "artifacts").as_uri())
        client.create_run(experiment, tags={"kind": "study", "study": study})
        for seed in range(3):
            tags = {"kind": "trial", "study": study, "arm": "lora_mix", "seed": str(seed), "method": "lora"}
            tags["fingerprint"] = f"{study[0].encode().hex()}{seed:014x}"
            run = client.create_run(experiment, tags=tags)
            for step, score in ((10, 0.1), (20, 0.5 + seed / 10)):
                client.log_metric(run.info.run_id, "score", score, step=step)
                client.log_metric(run.info.run_id, "score/general", score, step=step)
            for name, word in zip(COLUMNS, ("none", "–", "always", "no", "yes"), strict=True):
                if seed == 0:
                    client.set_tag(run.info.run_id, name, word)
            client.set_terminated(run.info.run_id)
    return root


def test_compare_reads_a_study_by_name_with_the_last_scores(mlflow_root):
    rows = compare(["first"], mlflow_root)
    labels = {(row.study, row.arm, row.method, row.status) for row in rows}
    assert labels == {("first", "lora_mix", "lora", "finished")}
    assert {row.seed: row.metrics["score"] for row in rows} == pytest.approx({0: 0.5, 1: 0.6, 2: 0.7})
    told = ("none", "–", "always", "no", "yes")
    assert {row.seed: row.words for row in rows} == {0: told, 1: (), 2: ()}


def test_compare_finds_runs_by_fingerprint_and_by_run_id_once(mlflow_root):
    row = compare([f"{b's'.hex()}{1:014x}"], mlflow_root)[0]
    assert (row.study, row.seed) == ("second", 1)
    rows = compare([row.run_id, row.fingerprint, "second"], mlflow_root)
    assert sorted(row.seed for row in rows) == [0, 1, 2]


def test_compare_reads_the_tracking_uri_it_is_given(mlflow_root, tmp_path):
    uri = f"sqlite:///{mlflow_root / 'second' / 'mlflow.db'}"
    assert {row.study for row in compare(["second"], tmp_path, uri)} == {"second"}


@pytest.mark.parametrize("reference", ["fist", "0" * 16, "f" * 32])
def test_compare_names_what_it_cannot_find(mlflow_root, reference):
    with pytest.raises(UserError, match=f"'{reference}' is no study and no run") as caught:
        compare([reference], mlflow_root)
    assert ("did you mean 'first'" in str(caught.value)) == (reference == "fist")


def test_compare_creates_no_database(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        compare(["x"], tmp_path, f"sqlite:///{tmp_path / 'new.db'}")
    assert list(tmp_path.iterdir()) == []


def test_scores_are_floats_of_seeds_by_items(study):
    items = read(study).scores["lora_mix"]["document"]
    assert items.scores_SI.shape == (8, 60)
    assert items.scores_SI.dtype == np.float64


def test_pages_and_tables_load_neither_torch_nor_ray_nor_mlflow():
    code = (
        "import sys, dashboards.page, dashboards.tables, dashboards.load;"
        "print([m for m in ('torch', 'ray', 'mlflow', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
