"""`bench`: what the methods cost beside their peers, measured side by side on this machine."""

import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.table import Table

from orchestrator.terminal import console

_MET = {True: "yes", False: "no", None: "–"}


def bench(
    repeats: Annotated[int, typer.Option("--repeats", help="Timed repeats of each side, 2 or more.")] = 31,
    only: Annotated[str, typer.Option("--only", help="A case's name, or its beginning.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, with versions.")] = False,
) -> None:
    """Time methods against their peers on one thread: median ratio, quartiles, and the limit of each."""
    from workloads.benchmarks.cases import select
    from workloads.errors import require

    require(repeats >= 2, "--repeats", repeats, "a whole number of 2 or more")
    cases = select(only)
    from workloads.benchmarks.measure import measure, to_tree  # torch: after what can be told without it

    results = []
    for result in measure(cases, repeats):
        results.append(result)
        progress = f"{len(results)} of {len(cases)}: {result.case.name} {result.times.ratio:.3f}"
        print(progress, file=sys.stderr, flush=True)
    if as_json:
        print(json.dumps(to_tree(results, repeats), indent=1))
        return
    console().print(table(results, repeats))


def table(results: Sequence[Any], repeats: int) -> Table:
    """One line a case; the ratio is ours / peer."""
    out = Table(
        "case", "divided by", caption=f"medians of {repeats} interleaved repeats, quartiles in brackets"
    )
    for column in ("ours ms", "peer ms", "ratio", "quartiles", "limit"):
        out.add_column(column, justify="right")
    out.add_column("met")
    for result in results:
        case, times = result.case, result.times
        ours, peer = (f"{seconds * 1e3:.1f}" for seconds in times.seconds)
        quartiles = f"\\[{times.quartiles[0]:.2f}, {times.quartiles[1]:.2f}]"
        row = (case.name, case.against(), ours, peer, f"{times.ratio:.2f}", quartiles, _limit(case))
        out.add_row(*row, _MET[result.met])
    return out


def _limit(case: Any) -> str:
    """The limit as it was set: how slow ours may be, or how much faster it has to be."""
    if case.limit is None:
        return "–"
    text = f"{case.limit:.2f}" if case.limit >= 1 else f"{case.limit:.2f} ({1 / case.limit:.2f}x faster)"
    return f"aim {text}" if case.aim else text
