"""`score`: the scores of a predictions file, computed again from that file alone."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from orchestrator.terminal import console, say

if TYPE_CHECKING:
    from workloads.evaluation.predictions import Rescored


def score(
    file: Annotated[Path, typer.Argument(metavar="PREDICTIONS", help="A run's predictions.jsonl.")],
    scorer: Annotated[
        str, typer.Option("--scorer", help="Score all rows with it. Default: the row's own, or exact.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compute the scores of a predictions file again."""
    from workloads.evaluation import predictions

    found = predictions.rescore(predictions.read(file), scorer)
    if as_json:
        typer.echo(json.dumps(_tree(found), indent=1, allow_nan=False))
        return
    out = console()
    out.print(_table(found))
    for line in _lines(found):
        say(out, line)


def _tree(found: "Rescored") -> dict[str, Any]:
    """The result as JSON; of the rows that differ only the number and the first one."""
    tree = asdict(found)
    differences = tree.pop("differences")
    return {**tree, "num_differing": len(differences), "first_difference": next(iter(differences), None)}


def _table(found: "Rescored") -> Table:
    from workloads.evaluation.scorers import TOP

    table = Table("domain", "question type", "scorer", "scale")
    for column in ("items", "score"):
        table.add_column(column, justify="right")
    for group in found.groups:
        scale = f"{group.scale}, 0 to {TOP[group.scale]:g}"
        kinds = [("all", (group.score, group.num_items)), *group.by_type.items()]
        for kind, (value, count) in kinds:
            names = (group.domain, kind, group.version, scale)
            table.add_row(*(escape(name) for name in names), str(count), f"{value:.4f}")
    return table


def _lines(found: "Rescored") -> list[str]:
    """What is to be said below the table."""
    if found.mean is None:
        scales = ", ".join(f"{group.domain} {group.version} on {group.scale}" for group in found.groups)
        lines = [f"no mean over domains, since the scales differ: {scales}"]
    else:
        lines = [f"mean over domains: {found.mean:.4f} ({found.groups[0].scale})"]
    if found.outdated:
        lines.append(f"the file names other versions of the scorers: {', '.join(found.outdated)}")
    if found.num_compared == 0:
        return [*lines, "no recorded score to compare with"]
    if not found.differences:
        return [*lines, f"all {found.num_compared} recorded scores are the same"]
    first, count = found.differences[0], f"{len(found.differences)} of {found.num_compared}"
    values = f"{first.recorded:g} recorded, {first.recomputed:g} recomputed"
    return [
        *lines,
        f"{count} recorded scores differ; the first is {first.id!r} of {first.domain!r}: {values}",
    ]
