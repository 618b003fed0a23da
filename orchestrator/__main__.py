"""The command line: a user's mistake ends in one line on stderr and exit code 2; `--debug` shows more."""

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from orchestrator.commands import (
    bench,
    check,
    compare,
    data,
    export,
    methods,
    metrics,
    plan,
    prepare,
    report,
    reproduce,
    run,
    score,
    status,
    stop,
    submit,
    sweep,
    sync,
    ui,
    version,
)
from workloads.errors import UserError

INTERRUPTED = 130


class _Group(TyperGroup):
    """Commands whose `UserError` and Ctrl-C become one line each."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            if ctx.params.get("debug"):
                raise
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            print("interrupted; what is recorded is kept, the same command goes on", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of mistakes too.")] = False,
) -> None:
    """Distributed experiments on data conflict in LLaVA: mixtures of LoRA experts against plain LoRA."""


for _module in (
    check, plan, run, sweep, submit, stop, status, compare, report, reproduce, sync, ui, export, methods,
    metrics, score, bench, prepare, version,
):  # fmt: skip
    app.command()(getattr(_module, _module.__name__.rsplit(".", 1)[-1]))
app.add_typer(data.app, name="data", help="Look at a source of samples, or write it as Parquet.")


def main() -> None:
    """Entry point of the `orchestrator` script."""
    app()


if __name__ == "__main__":
    main()
