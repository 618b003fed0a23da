"""Checks what `orchestrator reproduce twice-the-samples --smoke` left: table, records, MLflow runs and page.

python .ci/check_reproduce.py ROOT TERMINAL_OUTPUT
"""

import json
import sys
from pathlib import Path

from mlflow import MlflowClient

STUDY = "twice_the_samples_smoke"


def main(root: Path, output: str) -> None:
    """Raise AssertionError on anything missing."""
    folder = root / STUDY
    trials = json.loads((folder / "study.json").read_text())["trials"]
    arms = {trial["arm"] for trial in trials}
    assert len(arms) >= 8, arms
    assert all(trial["status"] == "finished" for trial in trials), trials
    for trial in trials:
        record = json.loads((root / "runs" / trial["fingerprint"] / "record.json").read_text())
        assert record["fingerprint"] == trial["fingerprint"]
        assert trial["arm"] in output, f"{trial['arm']} is not in the table"
    page = (folder / "report.html").read_text()
    assert all(arm in page for arm in arms)
    assert "no verdict" in output.lower(), "one seed gives no verdict, and says so"

    client = MlflowClient(f"sqlite:///{(folder / 'mlflow.db').resolve()}")
    experiment = client.get_experiment_by_name(STUDY)
    assert experiment, "no MLflow experiment"
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if run.data.tags["kind"] == "study"]
    children = [run for run in runs if run.data.tags["kind"] == "trial"]
    assert len(parents) == 1, runs
    assert {run.data.tags["arm"] for run in children} == arms
    for run in children:
        assert run.info.status == "FINISHED"
        domain = run.data.tags["arm"].removeprefix("solo_")
        domain = domain if domain != run.data.tags["arm"] else "general"
        assert {"score", f"score/{domain}", "peak_bytes"} <= run.data.metrics.keys()
        names = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
        assert {"record.json", "predictions.jsonl", "adapter"} <= names, names
    names = {artifact.path for artifact in client.list_artifacts(parents[0].info.run_id)}
    assert "report.html" in names, names
    print(f"{len(children)} trials in {root}: table, records, MLflow and page are there")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]).read_text())
