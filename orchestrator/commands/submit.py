"""`submit`: the same sweep as a job on a running Ray cluster."""

from typing import Annotated

import typer

from orchestrator.commands.options import DEFAULT_ROOT, Changes, Profile, Root, StudySpec, TrackingUri
from orchestrator.terminal import console, say


def submit(
    study: StudySpec,
    address: Annotated[str, typer.Option("--address", help="Ray's dashboard.")] = "http://127.0.0.1:8265",
    profile: Profile = "full",
    changes: Changes = None,
    root: Root = DEFAULT_ROOT,
    tracking_uri: TrackingUri = "",
) -> None:
    """Send a study to a cluster; `status` follows it. The root must be a folder that all nodes share."""
    from orchestrator import jobs
    from orchestrator.plan import planned
    from orchestrator.store import Store
    from orchestrator.study import load

    store = Store(root)
    loaded = load(study, profile, changes or [])
    planned(loaded)
    job = jobs.submit(loaded, store, address, tracking_uri)
    say(console(), f"Submitted {loaded.name} as {job} to {address}")
    say(console(), f"Follow it: orchestrator status {loaded.name} --root {store.root}")
