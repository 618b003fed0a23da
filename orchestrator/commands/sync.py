"""`sync`: upload to MLflow what an outage has kept back, exactly once."""

from orchestrator.commands.options import DEFAULT_ROOT, Root, StudyName, TrackingUri, study_name
from orchestrator.terminal import console, say


def sync(study: StudyName, root: Root = DEFAULT_ROOT, tracking_uri: TrackingUri = "") -> None:
    """Upload what MLflow does not have yet."""
    from orchestrator import tracking
    from orchestrator.store import Store

    store, name = Store(root), study_name(study)
    store.read_study(name)
    uri = tracking.tracking_uri(store.study_folder(name), tracking_uri)
    tracking.probe(uri)
    with store.only_driver(name):
        tracker = tracking.Tracker(store, name, uri)
        tracker.push(final=True)
    say(console(), f"{len(tracker.mine['trials'])} trials of {name} are at {uri}")
