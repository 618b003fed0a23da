"""`metrics`: every aggregate of an accuracy matrix, from a file."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from orchestrator.terminal import console, say

# Aggregate -> what it is, in a few words.
_WORDS = {
    "final": "mean over tasks after the last stage (ACC, AP, MFN)",
    "mft": "mean over tasks right after their own stage",
    "maa": "mean over stages of the mean over tasks seen so far (MAP)",
    "bwt_T": "change since each task's own stage: sum over tasks / T",
    "bwt_Tminus1": "change since each task's own stage: sum over tasks / (T − 1)",
    "forgetting": "best earlier score − last score, mean over tasks but the last",
    "fwt": "score before a task's own stage − score in row `before`, mean over tasks 2 to T",
    "zero_shot_later": "score at stages before a task's own, mean over tasks 2 to T",
    "zero_shot_never": "score after the last stage on tasks that are never trained",
}


def metrics(
    matrix: Annotated[
        Path, typer.Argument(metavar="MATRIX", help="A .json or .csv file: a row a stage, a column a task.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the continual metrics of an accuracy matrix, in its own units."""
    from workloads.evaluation.continual import aggregates
    from workloads.evaluation.matrix_file import read

    found = read(matrix)
    values = aggregates(found)
    if as_json:
        say(console(), json.dumps(values, allow_nan=False))
        return
    table = Table("metric", title=escape(f"{matrix.name}: T = {len(found.tasks)} tasks"))
    table.add_column("value", justify="right")
    table.add_column("what it is")
    for name, value in values.items():
        table.add_row(name, "–" if value is None else f"{value:.6g}", _WORDS[name])
    console().print(table)
