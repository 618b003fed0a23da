"""Writes a study's page: one static HTML file that needs neither network nor script.

All text reaches the page through a template that escapes it; figures are drawn in Python as inline SVG.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from dashboards import details, figures, methods, rows, stream_figures, stream_views, units, views
from dashboards.load import study_results
from dashboards.results import FINISHED, StudyResults
from workloads.evaluation.conflict import SOLO, ItemScores, find
from workloads.evaluation.statistics import MIN_SEEDS

PAGE = "report.html"
# Arms with longer names get their label above the bar.
_LONG_NAME = 16
_ASSETS = Path(__file__).parent / "assets"


def write(study_folder: Path, root: Path) -> Path:
    """Write `report.html` into the study's folder, atomically, and return its path.

    `root` is the folder whose `runs` the study's runs are in. Works for studies in progress. Raises
    `UserError` when the study cannot be read and `ValueError` when its arms were scored on different items.
    """
    html = render(study_results(study_folder, root))
    handle, temporary = tempfile.mkstemp(dir=study_folder, prefix=f".{PAGE}.")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(html)
    # mkstemp makes files that only their owner reads; a page is for showing.
    Path(temporary).chmod(0o644)
    return Path(temporary).replace(study_folder / PAGE)


def render(results: StudyResults) -> str:
    """The page's HTML."""
    environment = Environment(
        loader=FileSystemLoader(_ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "points": units.points,
        "signed": units.signed,
        "bracket": units.bracket,
        "spread": units.spread,
        "duration": details.duration,
        "when": details.when,
        "title": _title,
        "breakable": _breakable,
    }
    environment.globals |= {
        "interval_row": figures.interval_row,
        "difference_axis": figures.difference_axis,
        "bar_row": figures.bar_row,
        "expert_map": figures.expert_map,
        "curve_panel": figures.curve_panel,
        "task_curves": stream_figures.task_curves,
        "strip_row": stream_figures.strip_row,
        "strip_axis": stream_figures.strip_axis,
        "scatter": stream_figures.scatter,
        "tone": figures.tone,
        "card_tone": views.card_tone,
        "mixture_text": views.mixture_text,
    }
    return environment.get_template("page.html.j2").render(_context(results))


def _context(results: StudyResults) -> dict[str, Any]:
    summary = rows.summarise(results)
    panel_rows = views.panel_rows(summary)
    type_arms, type_differences = views.type_table(summary)
    shared, differing = details.configuration(results)
    identity, environment = details.versions(results)
    return {
        "css": Markup((_ASSETS / "page.css").read_text(encoding="utf-8")),
        "study": results,
        "summary": summary,
        "metrics": rows.METRICS,
        "min_seeds": MIN_SEEDS,
        "most_seeds": max((len(items.seeds) for items in _scored(results)), default=0),
        "has_long_names": any(len(arm) > _LONG_NAME for arm in results.arms),
        "finished": sum(trial.status == FINISHED for trial in results.trials),
        "unfinished": [trial for trial in results.trials if trial.status != FINISHED],
        "premise": find(summary.contrasts, "gap", results.roles.mix),
        "panel_rows": panel_rows,
        "panel_limits": views.panel_limits(panel_rows),
        "card_limits": views.card_limits(summary),
        "bar_panels": views.bar_panels(summary),
        "baselines": views.baseline_scores(results),
        "heat_rows": views.heat_rows(summary),
        "heat_limits": units.limit_words(views.heat_limits(summary)),
        "units": units.UNITS,
        "unit_words": views.unit_words(results),
        "no_mean": units.told(results.scales),
        "scales_differ": units.NO_MEAN,
        "type_arms": type_arms,
        "type_differences": type_differences,
        "experts": details.expert_views(results),
        "curves": details.curve_panels(results),
        "legend": views.legend(results),
        "costs": details.cost_rows(results),
        "methods": methods.method_rows(results),
        "method_columns": methods.COLUMNS,
        "run_seconds": details.run_seconds(results),
        "num_rejected": details.rejected(results.records.values()),
        "sources": sorted({str(run.config["data"]["source"]) for run in results.records.values()}),
        "shared": shared,
        "differing": differing,
        "identity": identity,
        "environment": environment,
        "solo": SOLO,
        "stream": stream_views.view_of(results),
    }


def _scored(results: StudyResults) -> list[ItemScores]:
    return [items for by_domain in results.scores.values() for items in by_domain.values()]


def _breakable(name: str) -> Markup:
    """The escaped name, with places where a narrow column may break it."""
    text = escape(name)
    for sign in "_,@":
        text = text.replace(sign, Markup(f"{sign}<wbr>"))
    return text


def _title(name: str) -> str:
    """twice_the_samples -> Twice the samples."""
    words = name.replace("_", " ")
    return words[:1].upper() + words[1:]
