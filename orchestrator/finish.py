"""What a study ends with: table, time, MLflow's location, page; and an error when trials failed."""

from pathlib import Path

import typer
from rich.console import Console

from orchestrator.stages import sharing
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
        ahead = used.get("ahead_seconds", 0.0)
        text += f", {ahead:.0f} of them for features ahead" if ahead >= 1 else ""
        say(out, f"{text}; runs took {used['run_seconds']:.0f} s, overhead {used['overhead']:.2f}")
    shared = sharing(study["trials"], store)
    if shared.num_asked:
        asked = f"{shared.num_asked} stages of all trials are {shared.num_run} runs"
        saved = f"{shared.num_saved} runs, {shared.samples:,} samples and {shared.seconds:.0f} s of runs"
        say(out, f"Sharing: {asked}; saved {saved}")
    say(out, f"MLflow: {tracking_uri(folder, uri)} (experiment {study['name']})")
    say(out, f"Page: {folder / PAGE}")
    if any(row["status"] == "failed" for row in study["trials"]):
        raise typer.Exit(1)
