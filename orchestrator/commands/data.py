"""`data inspect` and `data convert`: what a source holds, and the same as Parquet."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from orchestrator.terminal import console, say

if TYPE_CHECKING:
    from workloads.config import DataConfig
    from workloads.data.inspection import Inspected

app = typer.Typer(no_args_is_help=True)

Spec = Annotated[
    str,
    typer.Argument(
        metavar="SPEC", help="A recipe, a study (files or packaged names), or a file of a section `data`."
    ),
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")]


@app.command()
def inspect(
    spec: Spec,
    overrides: Overrides = None,
    model: Annotated[
        str, typer.Option("--model", help="A base model, whose tokens lengths are counted in.")
    ] = "",
    page: Annotated[Path | None, typer.Option("--page", help="Write a page with sample pictures.")] = None,
) -> None:
    """Count records, faults, duplicates and tokens; show samples."""
    from workloads.config import ModelConfig
    from workloads.data import inspection

    data, prompter = read(spec, overrides or []), None
    if model:
        from workloads.llava.build import prompter_of

        prompter = prompter_of(ModelConfig(name_or_path=model))
    found = list(inspection.inspect(data, prompter))
    out = console()
    out.print(_table(found, data.max_length))
    for part in found:
        if part.rejected:
            name, reason = part.rejected[0]
            where = f"{part.domain} {part.split}"
            say(out, f"{where}: {part.num_bad} bad records; the first is {name}: {reason}")
    if page is not None:
        from dashboards import data_page

        say(out, str(data_page.write(page, spec, found, data.max_length)))


@app.command()
def convert(
    spec: Spec,
    out: Annotated[Path, typer.Option("--out", help="A new folder.")],
    overrides: Overrides = None,
) -> None:
    """Write a source as Parquet with its pictures inside."""
    from workloads.data import conversion

    done = conversion.convert(read(spec, overrides or []), out)
    for part in done:
        say(
            console(),
            f"{part.domain} {part.split}: {part.num_written} records, {part.num_rejected} rejected",
        )
    say(console(), f"{out}: `data.yaml` is the section that reads it")


def read(spec: str, overrides: Sequence[str]) -> "DataConfig":
    """The section `data` behind a spec with `data.KEY=VALUE` words; raises `UserError`."""
    from workloads.config import apply_overrides, data_from_tree
    from workloads.errors import require

    tree = {"data": _section(spec)}
    for word in overrides:
        require(word.startswith("data."), "override", word, "write data.KEY=VALUE")
    return data_from_tree(apply_overrides(tree, overrides)["data"])


def _section(spec: str) -> dict[str, Any]:
    """The plain section `data` of a recipe, of a study's first arm, or of a file that is one."""
    from orchestrator import study
    from orchestrator.trials import arm_tree
    from workloads.config import read_yaml

    path = Path(spec)
    if path.suffix not in (".yaml", ".yml"):
        recipe = study.RECIPES / f"{spec}.yaml"
        path = recipe if recipe.is_file() else study.find(spec)
    tree = read_yaml(path)
    if "arms" in tree:
        loaded = study.load(str(path))
        return dict(arm_tree(loaded, loaded.arms[0]).get("data", {}))
    return dict(tree.get("data") or {}) if "data" in tree else tree


def _table(found: Sequence["Inspected"], max_length: int) -> Table:
    from workloads.data.inspection import MISSING, PERCENTILES

    table = Table("domain", "split")
    columns = ["records", "bad", "images missing", "duplicates"]
    if any(part.lengths for part in found):
        columns += [f"tokens {p} %" for p in PERCENTILES] + [f"over {max_length}"]
    for column in columns:
        table.add_column(column, justify="right")
    for part in found:
        cells = [part.num_records, part.num_bad, part.faults.get(MISSING, 0), part.num_duplicates]
        if part.lengths:
            cells += [*part.lengths.values(), part.num_too_long]
        table.add_row(escape(part.domain), part.split, *(f"{cell:,}" for cell in cells))
    return table
