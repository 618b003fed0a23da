"""`plan`: what a study will take, before it starts."""

from typing import Annotated

import typer

from orchestrator.commands.options import DEFAULT_ROOT, Profile, Root, StudySpec
from orchestrator.terminal import console


def plan(
    study: StudySpec,
    profile: Profile = "full",
    root: Root = DEFAULT_ROOT,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="First measure each method with a short real run.")
    ] = False,
) -> None:
    """Show trials, samples, tokens, weights, memory, disk and hours of a study."""
    from orchestrator import plan as planning
    from orchestrator.store import Store
    from orchestrator.study import load

    store, out = Store(root), console()
    loaded = load(study, profile)
    if calibrate:
        store.require_writable()
        planning.calibrate(planning.representatives(loaded), store, out)
    out.print(planning.table(loaded, store))
