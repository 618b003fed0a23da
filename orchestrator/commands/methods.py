"""`methods`: the adapter methods there are, what each needs and can do, and what it costs on the pocket model."""

import ast
import importlib
from dataclasses import asdict
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from dashboards.methods import COLUMNS, words
from orchestrator.terminal import console, say


def methods() -> None:
    """List the adapter methods: capabilities, version, weights on the pocket model."""
    import workloads
    from workloads.config import methods as names

    out, lines, missing = console(), [], []
    table = Table("method", "version", *COLUMNS)
    for column in ("weights on pocket", "as LoRA rank", "met by a token", "as LoRA rank"):
        table.add_column(column, justify="right")
    for name in names():
        path = Path(workloads.__path__[0]) / "adapters" / f"{name}.py"
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines.append(text.splitlines()[0] if text else name)
        cells, reason = _described(name)
        table.add_row(*(escape(cell) for cell in (name, *cells)))
        missing += [f"{name} is not measured: {reason}"] if reason else []
    out.print(table)
    for line in (*lines, *missing):
        say(out, line)


def _described(name: str) -> tuple[list[str], str]:
    """The cells after a method's name, at its arm's settings; and why some are empty, if they are."""
    from search_spaces.adapters import ARMS
    from workloads.adapters.parts import iso
    from workloads.errors import UserError

    version = str(importlib.import_module(f"workloads.adapters.{name}").VERSION)
    try:
        found = iso.on_pocket(name, ARMS.get(name, {}))
    except UserError as error:
        return [version], str(error)
    shape = iso.shape_of("pocket")
    counts = [
        cell
        for num_weights in (found.num_weights, found.num_active)
        for cell in (f"{num_weights:,}", str(iso.rank_of(shape, num_weights)))
    ]
    return [version, *words(asdict(found.capabilities)), *counts], ""
