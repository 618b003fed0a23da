"""`plan`: what a study will take, before it starts."""

from typing import Annotated

import typer

from orchestrator.commands.options import DEFAULT_ROOT, Changes, Profile, Root, StudySpec
from orchestrator.terminal import console, say


def plan(
    study: StudySpec,
    profile: Profile = "full",
    changes: Changes = None,
    root: Root = DEFAULT_ROOT,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="First measure each method with a short real run.")
    ] = False,
) -> None:
    """Show trials, samples, tokens, weights, memory, disk and hours of a study, measured and by formula."""
    from orchestrator import plan as planning
    from orchestrator import sizing
    from orchestrator.store import Store
    from orchestrator.study import load

    store, out = Store(root), console()
    loaded = load(study, profile, changes or [])
    if calibrate:
        store.require_writable()
        planning.calibrate(planning.representatives(loaded), store, out)
    out.print(planning.table(loaded, store))
    found = sizing.sizing(loaded)
    out.print(found.memory)
    for line in found.lines:
        say(out, line)
