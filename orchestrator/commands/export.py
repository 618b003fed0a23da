"""`export`: a finished run's adapter as its own folder, as a LoRA for PEFT, or merged into its base."""

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.commands.options import DEFAULT_ROOT, Root
from orchestrator.terminal import console, say


def export(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A finished run's fingerprint, or its beginning.")
    ],
    out: Annotated[Path, typer.Option("--out", help="A new folder.")],
    form: Annotated[str, typer.Option("--form", help="adapter, peft or merged.")] = "adapter",
    task: Annotated[
        str | None, typer.Option("--task", help="The task whose LoRA is meant, where there are several.")
    ] = None,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Write a finished run's adapter for other software."""
    from typing import get_args

    from orchestrator.store import Store
    from workloads.errors import require
    from workloads.export import Form
    from workloads.export import export as write

    forms: tuple[Form, ...] = get_args(Form)
    require(form in forms, "--form", form, f"one of {', '.join(forms)}", forms)
    write(Store(root).find_run(run), out, next(f for f in forms if f == form), task)
    say(console(), str(out))
