"""`run`: one run in this process, without Ray or MLflow."""

import time
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.commands.options import DEFAULT_ROOT, Root
from orchestrator.terminal import console


def run(
    recipe: Annotated[str, typer.Argument(help="A recipe's YAML file or a packaged name.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Do one run here and print its scores."""
    import orchestrator.single as single
    from orchestrator.store import Store

    begin = time.time()
    folder, record, fresh = single.run_here(recipe, overrides or [], Store(root), console())
    single.show(record, Path(folder), console(), time.time() - begin if fresh else None)
