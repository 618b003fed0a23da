"""MLflow's runs of trials with stages: written once, found again without a ledger, shared stages under one trial."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from orchestrator.stages import Chain, chains, matrix
from orchestrator.store import Store
from orchestrator.tracking import SYNC, Tracker, make_client, tracking_uri
from workloads.adapters.base import Capabilities
from workloads.evaluation.continual import aggregates, forgetting, fwt
from workloads.evaluation.matrix_file import as_tree, read
from workloads.record import Cost, DomainScore, RunRecord, append_event, save, write_json

TASKS = ("a", "b")
# Score on a, b and c, which no stage trains, by run.
SCORES = {
    "0000": (0.1, 0.2, 0.3),
    "aaaa": (0.8, 0.3, 0.35),
    "bbbb": (0.5, 0.9, 0.4),
    "cccc": (0.7, 0.8, 0.45),
}


def _record(key: str, scales: dict) -> RunRecord:
    cost = Cost(
        seconds=10.0,
        train_seconds=6.0,
        eval_seconds=2.0,
        samples_per_second=1.0,
        tokens_per_second=1.0,
        peak_bytes=1,
        trainable=1,
        adapter_weights=1,
        adapter_active=1,
    )
    scores = {
        domain: DomainScore(
            score=score,
            num_items=10,
            loss=1.0,
            by_type={},
            majority=0.0,
            scale=scales.get(domain, "fraction"),
        )
        for domain, score in zip("abc", SCORES[key], strict=True)
    }
    return RunRecord(
        fingerprint=key,
        name=key,
        seed=0,
        config={},
        identity={},
        environment={},
        capabilities=asdict(Capabilities()),
        stream_hash="",
        eval_hash="",
        sample_shares={},
        token_shares={},
        num_steps=5,
        num_samples=40,
        num_rejected=0,
        train_loss={},
        scores=scores,
        cost=cost,
    )


# Domain -> what every run says; one word or two are the form that `short` asks for.
SAID = {"a": ["x", "x y z", "x y", "x"], "b": ["x y z", "x"], "c": ["x"]}


class Study:
    """A study of two arms that share their first stage, and of the model before training, written by hand."""

    def __init__(self, root: Path) -> None:
        self.store = Store(root)
        # Domain -> scale, where that is not a fraction.
        self.scales = {}
        self.folder = self.store.study_folder("tiny")
        self.folder.mkdir(parents=True)
        self.rows = [
            self._row("x", "given", 1, "aaaa"),
            self._row("y", "given", 1, "aaaa"),
            self._row("x", "given", 2, "bbbb"),
            self._row("y", "given", 2, "cccc"),
            self._row("base", "", 0, "0000"),
        ]
        self.write()

    def _row(self, arm: str, order: str, stage: int, key: str) -> dict:
        task = TASKS[stage - 1] if stage else ""
        data = {"mixture": {task: 1.0}, "source": "files", "domains": {d: {"form": "short"} for d in TASKS}}
        config = {"name": f"{arm}/{stage}", "adapter": {"name": "lora"}, "data": data}
        return {
            "arm": arm, "seed": 0, "point": {}, "order": order, "stage": stage, "task": task, "fingerprint": key,
            "config": config, "status": "pending", "error": "", "started": 1000.0, "ended": 0.0,
        }  # fmt: skip

    def write(self) -> None:
        tree = {"name": "tiny", "hypothesis": "h", "created": 999.0, "comparison": {"before": "base"}}
        write_json(self.folder / "study.json", {**tree, "trials": self.rows})

    def state(self, key: str, status: str, error: str = "") -> None:
        for row in self.rows:
            if row["fingerprint"] == key:
                row.update(status=status, error=error, ended=0.0 if status == "running" else 2000.0)
        self.write()

    def finish(self, key: str) -> None:
        folder = self.store.run_folder(key)
        folder.mkdir(parents=True)
        scores = {f"score/{domain}": score for domain, score in zip("abc", SCORES[key], strict=True)}
        append_event(folder, {"event": "train", "time": 1001.0, "step": 5, "loss": 1.0})
        append_event(
            folder, {"event": "eval", "time": 1002.0, "step": 5, "score": 0.5, **scores, "peak_bytes": 7}
        )
        rows = [
            {"id": str(i), "domain": domain, "question_type": "q", "raw": raw, "answer": "x"}
            for domain, said in SAID.items()
            for i, raw in enumerate(said)
        ]
        (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        save(_record(key, self.scales), folder)
        self.state(key, "finished")

    def push(self, final: bool = False) -> None:
        Tracker(self.store, "tiny", tracking_uri(self.folder)).push(final=final)

    def runs(self) -> dict:
        """Name -> run of everything in MLflow."""
        self.client = make_client(tracking_uri(self.folder))
        experiment = self.client.get_experiment_by_name("tiny")
        found = self.client.search_runs([experiment.experiment_id])
        out = {run.info.run_name: run for run in found}
        assert len(out) == len(found)
        return out


def _finish_all(study: Study) -> None:
    for key in SCORES:
        study.finish(key)


def _check(study: Study) -> None:
    runs = study.runs()
    assert set(runs) == {"tiny", "x/0/given", "y/0/given", "base/0", "x/1", "x/2", "y/2"}
    parents = {name: run.data.tags.get("mlflow.parentRunId") for name, run in runs.items()}
    ids = {name: run.info.run_id for name, run in runs.items()}
    assert {parents[name] for name in ("x/0/given", "y/0/given", "base/0")} == {ids["tiny"]}
    assert (parents["x/1"], parents["x/2"], parents["y/2"]) == (
        ids["x/0/given"],
        ids["x/0/given"],
        ids["y/0/given"],
    )
    assert runs["y/0/given"].data.tags["shared/a"] == ids["x/1"]
    assert not any(tag.startswith("shared/") for tag in runs["x/0/given"].data.tags)
    for name, last in (("x/0/given", "bbbb"), ("y/0/given", "cccc")):
        run = runs[name]
        first, second = SCORES["aaaa"], SCORES[last]
        assert run.info.status == "FINISHED"
        assert run.data.metrics["final"] == pytest.approx((second[0] + second[1]) / 2)
        assert run.data.metrics["bwt_T"] == pytest.approx((second[0] - first[0]) / 2)
        assert run.data.metrics["fwt"] == pytest.approx(first[1] - SCORES["0000"][1])
        assert run.data.metrics["zero_shot_never"] == second[2]
        assert run.data.metrics["mif"] == pytest.approx((3 / 4 + 1 / 2) / 2)
        history = study.client.get_metric_history(run.info.run_id, "score/a")
        assert [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] == [
            (1, first[0]),
            (2, second[0]),
        ]
        assert "peak_bytes" not in run.data.metrics
        assert len(study.client.get_metric_history(run.info.run_id, "fwt")) == 1
    for name in ("x/1", "x/2", "y/2"):
        assert len(study.client.get_metric_history(runs[name].info.run_id, "loss")) == 1


def test_pushing_again_and_again_adds_nothing(tmp_path):
    study = Study(tmp_path)
    study.state("aaaa", "running")
    study.push()
    assert {run.info.status for name, run in study.runs().items() if name != "tiny"} == {"RUNNING"}
    _finish_all(study)
    for _ in range(3):
        study.push(final=True)
    _check(study)


def test_a_lost_ledger_finds_trials_and_stages_again_by_their_tags(tmp_path):
    study = Study(tmp_path)
    study.finish("aaaa")
    study.state("bbbb", "running")
    study.push()
    (study.folder / SYNC).unlink()
    for key in ("bbbb", "cccc", "0000"):
        study.finish(key)
    study.push(final=True)
    _check(study)


def test_the_row_before_any_training_is_added_when_it_is_known(tmp_path):
    study = Study(tmp_path)
    for key in ("aaaa", "bbbb", "cccc"):
        study.finish(key)
    study.push()
    assert "fwt" not in study.runs()["x/0/given"].data.metrics
    study.finish("0000")
    study.push(final=True)
    _check(study)
    run = study.runs()["x/0/given"]
    path = study.client.download_artifacts(run.info.run_id, "matrix.json", str(tmp_path))
    found = read(Path(path))
    assert (found.before, found.rows) == ((0.1, 0.2), ((0.8, 0.3), (0.5, 0.9)))
    assert (found.never_trained, found.never_before) == ({"c": (0.35, 0.4)}, {"c": 0.3})
    assert set(found.scales.values()) == {"fraction"}


def test_a_trial_is_what_its_stages_are(tmp_path):
    study = Study(tmp_path)
    study.finish("aaaa")
    study.push()
    study.state("bbbb", "failed", "it broke")
    study.push()
    runs = study.runs()
    assert (runs["x/0/given"].info.status, runs["x/0/given"].data.tags["error"]) == ("FAILED", "it broke")
    assert runs["y/0/given"].info.status == "RUNNING"
    study.push(final=True)
    assert study.runs()["y/0/given"].info.status == "KILLED"
    study.state("bbbb", "running")
    study.push()
    assert study.runs()["x/0/given"].info.status == "RUNNING"


def test_tasks_trained_alone_are_one_trial_with_each_tasks_own_score(tmp_path):
    study = Study(tmp_path)
    firsts = [study._row("alone", "", 1, key) for key in ("aaaa", "cccc")]
    firsts[1].update(task="b", config={**firsts[1]["config"], "data": {"mixture": {"b": 1.0}}})
    study.rows = [row for row in study.rows if row["fingerprint"] == "aaaa"] + firsts
    study.rows[2]["config"]["name"], study.rows[3]["config"]["name"] = "alone/a", "alone/b"
    study.finish("aaaa")
    study.finish("cccc")
    study.push(final=True)
    runs = study.runs()
    alone = runs["alone/0"]
    assert alone.info.status == "FINISHED"
    assert alone.data.metrics == {"score/a": SCORES["aaaa"][0], "score/b": SCORES["cccc"][1]}
    assert alone.data.tags["shared/a"] == runs["x/1"].info.run_id
    assert runs["alone/b"].data.tags["mlflow.parentRunId"] == alone.info.run_id
    assert not study.client.list_artifacts(alone.info.run_id)


def _chain(*parts: dict[str, float]) -> Chain:
    rows = tuple(
        {"task": f"t{i}", "stage": i, "fingerprint": str(i), "config": {"data": {"mixture": part}}}
        for i, part in enumerate(parts, start=1)
    )
    return Chain(arm="x", seed=0, order="given", rows=rows)


def _scores(**values: float) -> dict[str, DomainScore]:
    return {
        name: DomainScore(score=value, num_items=1, loss=0.0, by_type={}, majority=0.0)
        for name, value in values.items()
    }


def test_a_stage_of_several_tasks_is_scored_by_their_mean(tmp_path):
    chain = _chain({"a": 1.0, "b": 0.5, "gone": 0.0}, {"c": 1.0})
    stages = [_scores(a=0.2, b=0.6, c=0.1, d=0.9), _scores(a=0.1, b=0.1, c=0.7, d=0.8)]
    found = matrix(chain, stages, None)
    assert found.rows == (pytest.approx((0.4, 0.1)), pytest.approx((0.1, 0.7)))
    assert found.never_trained == {"d": (0.9, 0.8)}
    assert forgetting(found) == pytest.approx(0.3)
    assert fwt(found) is None
    path = tmp_path / "matrix.json"
    path.write_text(json.dumps(as_tree(found)))
    assert read(path) == found


def test_nothing_that_was_recorded_is_left_out_whatever_its_scale(tmp_path):
    chain = _chain({"a": 1.0}, {"b": 1.0})
    stages = [_scores(a=0.5, b=0.1, c=0.3, d=0.2), _scores(a=0.4, b=0.6, c=0.2, d=1.4)]
    stages = [{**each, "d": replace(each["d"], scale="cider")} for each in stages]
    found = matrix(chain, stages, _scores(a=0.0, b=0.1, c=0.2))
    assert found.never_trained == {"c": (0.3, 0.2), "d": (0.2, 1.4)}
    assert found.never_before == {"c": 0.2, "d": None}
    assert aggregates(found)["zero_shot_never"] is None
    assert aggregates(found)["final"] == pytest.approx(0.5)
    path = tmp_path / "matrix.json"
    path.write_text(json.dumps(as_tree(found)))
    assert read(path) == found


def test_scores_on_several_scales_are_uploaded_and_have_no_aggregates(tmp_path):
    study = Study(tmp_path)
    study.scales = {"b": "cider"}
    _finish_all(study)
    study.push(final=True)
    run = study.runs()["x/0/given"]
    assert "scales" in run.data.tags["aggregates"]
    assert not {"final", "forgetting", "fwt"} & set(run.data.metrics)
    assert run.data.metrics["zero_shot_never"] == 0.4
    path = study.client.download_artifacts(run.info.run_id, "matrix.json", str(tmp_path))
    found = read(Path(path))
    assert found.rows == ((0.8, 0.3), (0.5, 0.9))
    assert set(aggregates(found).items()) - {("zero_shot_never", 0.4)} == {
        (name, None) for name in aggregates(found) if name != "zero_shot_never"
    }


def test_a_domain_with_the_name_of_a_stage_that_trains_others_is_not_taken_for_it():
    chain = _chain({"a": 1.0}, {"b": 1.0})
    found = matrix(chain, [_scores(a=0.5, b=0.1, t1=0.9), _scores(a=0.4, b=0.6, t1=0.9)], None)
    assert (found.tasks, found.never_trained) == (("t1", "t2"), {})


def test_a_task_that_was_not_scored_is_absent_above_the_diagonal_and_no_matrix_below(tmp_path):
    chain = _chain({"a": 1.0}, {"b": 1.0})
    found = matrix(chain, [_scores(a=0.5), _scores(a=0.4, b=0.6)], None)
    assert found.rows == ((0.5, None), (0.4, 0.6))
    assert matrix(chain, [_scores(a=0.5), _scores(b=0.6)], None) is None


def test_runs_of_no_stream_have_no_chains():
    assert chains([{"arm": "a", "seed": 0, "fingerprint": "0", "status": "finished"}]) == []
