"""`status`: where the studies under a root are, from their files and their cluster's job."""

import time
from collections import Counter
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from orchestrator.commands.options import DEFAULT_ROOT, Root, study_name
from orchestrator.terminal import console


def status(
    study: Annotated[
        str, typer.Argument(metavar="[STUDY]", help="A started study; all of them without one.")
    ] = "",
    root: Root = DEFAULT_ROOT,
    logs: Annotated[bool, typer.Option("--logs", help="Print the log of the submitted job.")] = False,
) -> None:
    """Show how far studies are."""
    from orchestrator import jobs
    from orchestrator.store import Store
    from workloads.errors import UserError

    store, out = Store(root), console()
    if not study:
        names = sorted({*store.studies(), *jobs.submitted(store)})
        if not names:
            raise UserError(f"--root: no study has started in {store.root}")
        out.print(overview(store, names))
        return
    name = study_name(study)
    job = jobs.state(store, name)
    if job:
        out.print(f"job {job.id} at {job.address}: {job.status} {job.message}", markup=False, soft_wrap=True)
    if logs:
        out.print(jobs.logs(store, name), markup=False, highlight=False)
    if name in store.studies():
        out.print(detail(current(store, name)))
    elif not job:
        store.read_study(name)


def current(store: Any, name: str) -> dict[str, Any]:
    """study.json, in which a trial runs only while its study has a driver: a killed one could not say so."""
    tree = store.read_study(name)
    for row in tree["trials"]:
        if row["status"] == "running" and not store.is_driven(name):
            row.update(status="interrupted", ended=row["started"])
    return tree


def overview(store: Any, names: list[str]) -> Table:
    """One line per study."""
    table = Table("study", "finished", "running", "failed", "left", "started")
    for name in names:
        if name not in store.studies():
            table.add_row(name, "submitted")
            continue
        tree = current(store, name)
        count = Counter(row["status"] for row in tree["trials"])
        done = count["finished"] + count["stopped"]
        left = len(tree["trials"]) - done - count["running"] - count["failed"]
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(tree["created"]))
        table.add_row(name, str(done), str(count["running"]), str(count["failed"]), str(left), started)
    return table


def detail(tree: dict[str, Any]) -> Table:
    """One line per trial."""
    staged = any(row.get("stage") for row in tree["trials"])
    places = ("order", "stage", "task") if staged else ()
    table = Table("arm", "seed", *places, "state", "time", "fingerprint", "error", title=tree["name"])
    for row in tree["trials"]:
        end = row["ended"] if row["status"] not in ("running", "pending") else time.time()
        seconds = f"{end - row['started']:.0f} s" if row["started"] and row["status"] != "pending" else ""
        table.add_row(
            escape(row["arm"]),
            str(row["seed"]),
            *(escape(str(row.get(place) or "")) for place in places),
            row["status"],
            seconds,
            row["fingerprint"],
            escape(row["error"]),
        )
    return table
