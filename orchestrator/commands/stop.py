"""`stop`: end a submitted job; what it recorded stays."""

from orchestrator.commands.options import DEFAULT_ROOT, Root, StudyName, study_name
from orchestrator.terminal import console, say


def stop(study: StudyName, root: Root = DEFAULT_ROOT) -> None:
    """Stop a study that was submitted to a cluster."""
    from orchestrator import jobs
    from orchestrator.store import Store

    job = jobs.stop(Store(root), study_name(study))
    say(console(), f"Asked the cluster to stop {job}")
