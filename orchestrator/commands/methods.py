"""`methods`: the adapter methods there are, what each needs and can do, and what it costs on the pocket model."""

import ast
import importlib
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from orchestrator.terminal import console, say

_COLUMNS = ("method", "version", "routes by", "router hears task loss", "task id", "stateful", "mergeable")
_TASK_ID = {(True, True): "always", (True, False): "in training", (False, True): "at inference"}


def methods() -> None:
    """List the adapter methods: capabilities, version, weights on the pocket model."""
    import workloads
    from workloads.config import methods as names

    out, lines, missing = console(), [], []
    table = Table(*_COLUMNS)
    for column in ("weights on pocket", "met by a token"):
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
    can: Any = found.capabilities
    cells = [
        version,
        can.routing,
        "" if can.routing == "none" else _word(can.router_hears_task_loss),
        _TASK_ID.get((can.needs_task_id_train, can.needs_task_id_infer), "no"),
        _word(can.stateful),
        _word(can.mergeable),
        f"{found.num_weights:,}",
        f"{found.num_active:,}",
    ]
    return cells, ""


def _word(yes: bool) -> str:
    return "yes" if yes else "no"
