"""`compare`: scores of studies or single runs side by side, read from MLflow."""

from typing import Annotated

import typer

from orchestrator.commands.options import DEFAULT_ROOT, Root, TrackingUri, study_name
from orchestrator.terminal import console


def compare(
    references: Annotated[list[str], typer.Argument(metavar="STUDY_OR_RUN...")],
    root: Root = DEFAULT_ROOT,
    tracking_uri: TrackingUri = "",
) -> None:
    """Compare studies (by name) and runs (by fingerprint or MLflow run id)."""
    from dashboards import load, tables
    from orchestrator.store import Store

    store = Store(root)
    started = set(store.studies())
    names = [study_name(word) if study_name(word) in started else word for word in references]
    console().print(tables.comparison(load.compare(names, store.root, tracking_uri)))
