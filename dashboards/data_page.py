"""Writes the page of an inspected source: one static HTML file with counts, faults and sample pictures, all escaped."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from workloads.errors import UserError, reason_of

_ASSETS = Path(__file__).parent / "assets"


def write(path: Path, name: str, parts: Sequence[Any], max_length: int) -> Path:
    """Write the page atomically and return its path; `parts` are `workloads.data.inspection.Inspected`.

    Raises `UserError` when it cannot be written.
    """
    html = render(name, parts, max_length)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(html)
        # mkstemp makes files that only their owner reads; a page is for showing.
        Path(temporary).chmod(0o644)
        return Path(temporary).replace(path)
    except OSError as error:
        raise UserError(f"--page: cannot write {path}: {reason_of(error)}") from None


def render(name: str, parts: Sequence[Any], max_length: int) -> str:
    """The page's HTML."""
    environment = Environment(
        loader=FileSystemLoader(_ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css = Markup((_ASSETS / "page.css").read_text(encoding="utf-8"))
    template = environment.get_template("data.html.j2")
    return template.render(css=css, name=name, parts=parts, max_length=max_length)
