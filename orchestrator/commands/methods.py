"""`methods`: the adapter methods there are, each with its file's first sentence."""

import ast
from pathlib import Path

from rich.table import Table

from orchestrator.terminal import console


def methods() -> None:
    """List the adapter methods."""
    import workloads
    from workloads.config import methods as names

    table = Table("method", "what it is")
    for name in names():
        path = Path(workloads.__path__[0]) / "adapters" / f"{name}.py"
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        table.add_row(name, text.splitlines()[0] if text else "")
    console().print(table)
