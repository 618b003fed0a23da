"""Options that several commands share, so that each is spelled and explained once."""

from pathlib import Path
from typing import Annotated

import typer

Root = Annotated[
    Path,
    typer.Option("--root", envvar="ORCHESTRATOR_ROOT", help="Folder of all runs and studies."),
]
StudySpec = Annotated[str, typer.Argument(metavar="STUDY", help="A study's YAML file or a packaged name.")]
StudyName = Annotated[str, typer.Argument(metavar="STUDY", help="Name of a started study, or its YAML file.")]
Profile = Annotated[
    str, typer.Option("--profile", help="The study's size: full, or a profile that it names.")
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Over the study's own `set`, such as data.root=FOLDER."),
]
TrackingUri = Annotated[
    str,
    typer.Option(
        "--tracking-uri",
        envvar="MLFLOW_TRACKING_URI",
        help="MLflow to write to. Default: SQLite in the study's folder.",
    ),
]
RayAddress = Annotated[
    str, typer.Option("--address", help="A running Ray cluster, HOST:PORT or 'auto'. Default: a local one.")
]
DEFAULT_ROOT = Path("studies")


def study_name(spec: str) -> str:
    """The name of a started study from what a user types: a name, a name with dashes, or its YAML file."""
    return (Path(spec).stem if spec.endswith((".yaml", ".yml")) else spec).replace("-", "_")
