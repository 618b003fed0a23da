"""One run in this process: a recipe with overrides, its progress, its record."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dashboards.units import UNITS, heading, points
from orchestrator.progress import Progress, duration
from orchestrator.store import Store, run_lock
from orchestrator.study import RECIPES
from search_spaces.adapters import ARMS
from search_spaces.mixtures import MIXTURES
from workloads.config import RunConfig, apply_overrides, from_tree, read_yaml
from workloads.errors import require
from workloads.identity import fingerprint
from workloads.record import RunRecord, Scale, load, mean_score, no_mean


def recipe_config(recipe: str, overrides: Iterable[str]) -> RunConfig:
    """A recipe (file or packaged name) with `key=value` words; raises `UserError`."""
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        names = sorted(p.stem for p in RECIPES.glob("*.yaml"))
        require(recipe in names, "recipe", recipe, f"a .yaml file or one of {', '.join(names)}", names)
        path = RECIPES / f"{recipe}.yaml"
    tree, words = read_yaml(path), list(overrides)
    for word in words:
        key, _, value = word.partition("=")
        if key == "adapter.name" and value != tree.get("adapter", {}).get("name"):
            # Another method has other settings: those of the recipe's own method go.
            tree["adapter"] = {"name": value, **ARMS.get(value, {})}
        if key == "data.mixture":
            require(value in MIXTURES, key, value, f"one of {', '.join(MIXTURES)}", MIXTURES)
            tree.setdefault("data", {})["mixture"] = MIXTURES[value]
    return from_tree(apply_overrides(tree, [word for word in words if not word.startswith("data.mixture=")]))


def run_here(
    recipe: str, overrides: Iterable[str], store: Store, console: Console
) -> tuple[Path, RunRecord, bool]:
    """Do the run unless it is finished; returns its folder, its record, and whether it was done now."""
    config = recipe_config(recipe, overrides)
    require(
        config.execution.workers == 1,
        "execution.workers",
        config.execution.workers,
        "1 here; `sweep` starts more",
    )
    key = fingerprint(config)
    store.require_writable()
    folder = store.run_folder(key)
    with run_lock(folder):
        if store.finished(key):
            return folder, load(folder), False
        from workloads.run import run

        with Progress(console, total=1, done=0) as progress:
            progress.begin(key)

            def report(event: Mapping[str, Any], _: Path | None) -> None:
                progress.event(key, event)

            record = run(config, report, folder)
    return folder, record, True


def show(record: RunRecord, folder: Path, console: Console, seconds: float | None) -> None:
    """Print a run's scores with their standard errors over its items, their mean, and where it is."""
    table = Table("domain", "scorer", "score", "± s.e.", "items", "loss", "majority")
    for domain, score in record.scores.items():
        shown = [
            "–" if value is None else points(value, score.scale)
            for value in (score.score, score.error, score.majority)
        ]
        numbers = (*shown[:2], str(score.num_items), f"{score.loss:.3f}", shown[2])
        table.add_row(*map(escape, (heading(domain, score.scale), score.scorer_version, *numbers)))
    console.print(table)
    mean = mean_score(record.scores)
    scales: dict[str, Scale] = {domain: score.scale for domain, score in record.scores.items()}
    if mean is None:
        console.print(no_mean(scales), markup=False, highlight=False, soft_wrap=True)
    else:
        scale = next(iter(scales.values()))
        text = f"mean over domains: {points(mean, scale)} {UNITS[scale].name}"
        console.print(text, markup=False, highlight=False)
    how = f"done in {duration(seconds)}" if seconds is not None else "was finished already"
    console.print(f"{record.fingerprint} {how}: {folder}", highlight=False, soft_wrap=True)
