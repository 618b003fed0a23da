"""`compare`: scores of studies or single runs side by side, from MLflow; of streams, what is learned and forgotten."""

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
    # The numbers of a stream take all its stages, which are on disk; a server is asked for what it knows.
    streams = [] if tracking_uri else [n for n in names if n in started and load.has_stream(store.root / n)]
    for name in streams:
        console().print(tables.stream_comparison(load.study_results(store.root / name, store.root)))
    others = [name for name in names if name not in streams]
    if others:
        console().print(tables.comparison(load.compare(others, store.root, tracking_uri)))
