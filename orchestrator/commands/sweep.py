"""`sweep`: run a study on Ray; the same command again goes on where it stopped."""

import shlex
import sys

from orchestrator.commands.options import (
    DEFAULT_ROOT,
    Changes,
    Profile,
    RayAddress,
    Root,
    StudySpec,
    TrackingUri,
)
from orchestrator.terminal import console


def sweep(
    study: StudySpec,
    profile: Profile = "full",
    changes: Changes = None,
    root: Root = DEFAULT_ROOT,
    tracking_uri: TrackingUri = "",
    address: RayAddress = "",
) -> None:
    """Run a study; what is finished is not run again."""
    from orchestrator.finish import show
    from orchestrator.store import Store
    from orchestrator.study import load
    from orchestrator.sweep import Options
    from orchestrator.sweep import sweep as run_sweep

    out, store = console(), Store(root)
    options = Options(
        address=address, tracking_uri=tracking_uri, command=shlex.join(["orchestrator", *sys.argv[1:]])
    )
    folder = run_sweep(load(study, profile, changes or []), store, out, options)
    show(folder, store, out, tracking_uri)
