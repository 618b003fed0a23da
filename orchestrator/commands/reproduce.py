"""`reproduce`: a packaged study from plan to page in one command."""

import shlex
import sys
from typing import Annotated

import typer

from orchestrator.commands.options import DEFAULT_ROOT, Root, StudySpec, TrackingUri
from orchestrator.terminal import console


def reproduce(
    study: StudySpec,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Smallest size: shows that everything works.")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="All seeds and full budgets, with a verdict.")] = False,
    root: Root = DEFAULT_ROOT,
    tracking_uri: TrackingUri = "",
) -> None:
    """Plan, run, compare and draw a study; by default in its quick size."""
    from orchestrator import plan
    from orchestrator.finish import show
    from orchestrator.store import Store
    from orchestrator.study import load
    from orchestrator.sweep import Options, sweep
    from workloads.errors import require

    require(not (smoke and full), "--smoke", "with --full", "one of the two")
    out, store = console(), Store(root)
    loaded = load(study, "smoke" if smoke else "full" if full else "quick")
    if loaded.hypothesis:
        out.print(loaded.hypothesis, markup=False, highlight=False)
    out.print(plan.table(loaded, store))
    options = Options(tracking_uri=tracking_uri, command=shlex.join(["orchestrator", *sys.argv[1:]]))
    folder = sweep(loaded, store, out, options)
    show(folder, store, out, tracking_uri)
