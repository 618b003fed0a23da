"""`version`: the versions that a record would state."""

import importlib.metadata
import platform

from rich.table import Table

from orchestrator.terminal import console

_PACKAGES = (
    "llava-conflict-lab",
    "torch",
    "transformers",
    "deepspeed",
    "ray",
    "mlflow",
    "datasets",
    "omegaconf",
    "numpy",
)


def version() -> None:
    """Show the versions of this package and of what it stands on."""
    table = Table("package", "version")
    table.add_row("python", platform.python_version())
    for name in _PACKAGES:
        try:
            table.add_row(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            table.add_row(name, "not installed")
    console().print(table)
