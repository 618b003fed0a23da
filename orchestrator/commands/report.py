"""`report`: draw a study's page from its records."""

from orchestrator.commands.options import DEFAULT_ROOT, Root, StudyName, study_name
from orchestrator.terminal import console, say


def report(study: StudyName, root: Root = DEFAULT_ROOT) -> None:
    """Write the study's page, one HTML file that works offline."""
    from dashboards.page import write
    from orchestrator.store import Store

    store, name = Store(root), study_name(study)
    store.read_study(name)
    say(console(), str(write(store.study_folder(name), store.root)))
