"""What a study ends with: table, time, MLflow's location, page; and an error when trials failed."""

from pathlib import Path

import typer
from rich.console import Console

from orchestrator.store import Store
from orchestrator.terminal import say
from orchestrator.tracking import PAGE, tracking_uri


def show(folder: Path, store: Store, out: Console, uri: str) -> None:
    """Print the results of a study; ends the command with 1 when trials failed."""
    from dashboards import load, tables

    out.print(tables.summary(load.study_results(folder, store.root)))
    study = store.read_study(folder.name)
    used = study["time"]
    if used["run_seconds"]:
        text = f"Time: {used['wall_seconds']:.0f} s with {used['slots']} trials at once"
        say(out, f"{text}; runs took {used['run_seconds']:.0f} s, overhead {used['overhead']:.2f}")
    say(out, f"MLflow: {tracking_uri(folder, uri)} (experiment {study['name']})")
    say(out, f"Page: {folder / PAGE}")
    if any(row["status"] == "failed" for row in study["trials"]):
        raise typer.Exit(1)
