"""The terminal's tables of a study, and of what MLflow has for `compare`. Scores in points, 0 to 100."""

from collections.abc import Sequence

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dashboards.load import CompareRow
from dashboards.methods import COLUMNS, method_rows
from dashboards.results import FINISHED, StudyResults
from dashboards.rows import (
    MEAN,
    METRICS,
    Claim,
    Summary,
    bracket,
    signed,
    spread,
    summarise,
    type_columns,
    unfinished_lines,
    with_spread,
)
from workloads.evaluation.statistics import Interval, over_seeds


def summary(results: StudyResults) -> RenderableType:
    """The study's tables for a terminal: scores, differences, question types, verdicts, unfinished trials."""
    rows = summarise(results)
    parts: list[RenderableType] = [Text(_headline(results), style="bold"), Text(results.hypothesis)]
    if results.scores:
        parts.append(_scores_table(rows))
        parts.append(_methods_table(results))
    if rows.contrasts:
        parts += [_differences_table(rows), _types_table(rows)]
    parts += [Text(claim_line(claim), style="bold" if claim.is_headline else "") for claim in rows.claims]
    parts += [Text(line, style="red") for line in unfinished_lines(results)]
    return Group(*parts)


def comparison(rows: Sequence[CompareRow]) -> RenderableType:
    """One line per study and arm, from MLflow's metrics; intervals over seeds only, items taken as fixed."""
    names = [name.removeprefix("score/") for row in rows for name in row.metrics if name.startswith("score/")]
    domains = list(dict.fromkeys(name for name in names if "/" not in name))
    columns = ["score", *(f"score/{domain}" for domain in domains)]
    table = _table("Scores in points, ± 95 % t-interval over seeds (items fixed)")
    for name in ("study", "arm", "method", *COLUMNS):
        table.add_column(name)
    for name in ("seeds", "mean", *domains):
        table.add_column(Text(name), justify="right")
    for study, arm, method in dict.fromkeys((row.study, row.arm, row.method) for row in rows):
        mine = [row for row in rows if (row.study, row.arm, row.method) == (study, arm, method)]
        values = {c: np.array([row.metrics[c] for row in mine if c in row.metrics]) for c in columns}
        cells = [with_spread(over_seeds(values[c])) if len(values[c]) else "–" for c in columns]
        num_seeds = f"{len(values['score'])}/{len(mine)}"
        words = next((row.words for row in mine if row.words), ("–",) * len(COLUMNS))
        table.add_row(*(Text(cell) for cell in (study, arm, method, *words, num_seeds, *cells)))
    return table


def claim_line(claim: Claim) -> str:
    """One sentence with the verdict of one arm, or why there is none."""
    label = "Verdict" if claim.is_headline else "Also"
    if claim.contrast is None:
        return f"{label}, {claim.arm}: no verdict; {claim.reason}"
    mean = claim.contrast.difference.mean
    against = f"W = {signed(mean.mean)} {bracket(mean)} points against {claim.contrast.against}"
    word = claim.word + (", provisional" if claim.is_provisional else "") if claim.word else ""
    return f"{label}, {claim.arm}: {word or 'no verdict; ' + claim.reason} ({against})"


def _headline(results: StudyResults) -> str:
    done = sum(trial.status == FINISHED for trial in results.trials)
    return f"{results.name}: {done} of {len(results.trials)} trials finished"


def _table(title: str) -> Table:
    return Table(title=Text(title), title_justify="left", header_style="bold", pad_edge=False, box=None)


def _scores_table(rows: Summary) -> Table:
    domains = rows.results.domains
    table = _table("Scores in points, ± 95 % interval over items and seeds")
    for name in ("arm", "method"):
        table.add_column(name)
    for name in ("trained", "active", "seeds", *domains, MEAN):
        table.add_column(Text(name), justify="right")
    for row in rows.arms:
        if row.scores is None:
            continue
        by_domain = [row.scores.by_domain.get(domain) for domain in domains]
        cells = [with_spread(cell) if cell else "–" for cell in (*by_domain, row.scores.mean)]
        weights = (f"{row.trainable:,}", f"{row.adapter_active:,}")
        seeds = f"{row.num_finished}/{row.num_trials}"
        table.add_row(*(Text(cell) for cell in (row.arm, row.method, *weights, seeds, *cells)))
    if rows.solo:
        by_domain = [rows.solo.by_domain.get(domain) for domain in domains]
        cells = [with_spread(cell) if cell else "–" for cell in (*by_domain, rows.solo.mean)]
        table.add_row(*(Text(cell) for cell in ("solo, each on its own", "", "", "", "", *cells)))
    return table


def _methods_table(results: StudyResults) -> Table:
    table = _table("Methods: what they need and can do, and the plain LoRA with about as many weights")
    for name in ("arm", "method", *COLUMNS):
        table.add_column(name)
    for name in ("as rank, in all", "as rank, by token"):
        table.add_column(name, justify="right")
    for row in method_rows(results):
        ranks = (str(row.iso_total or "–"), str(row.iso_active or "–"))
        table.add_row(*(Text(cell) for cell in (row.arm, row.method, *row.words, *ranks)))
    return table


def _differences_table(rows: Summary) -> Table:
    domains = rows.results.domains
    table = _table("Differences in points, paired by seed and item, 95 % interval over items and seeds")
    table.add_column("metric")
    table.add_column("arm − reference")
    for name in ("seeds", MEAN, *domains):
        table.add_column(Text(name), justify="right")
    for contrast in rows.contrasts:
        mean, by_domain = contrast.difference.mean, contrast.difference.by_domain
        label = (METRICS[contrast.metric][0], f"{contrast.arm} − {contrast.against}", str(mean.num_seeds))
        cells = [_difference(by_domain.get(domain)) for domain in domains]
        table.add_row(*(Text(cell) for cell in (*label, f"{signed(mean.mean)} {bracket(mean)}", *cells)))
    return table


def _types_table(rows: Summary) -> Table:
    columns = type_columns(rows)
    table = _table("Differences by question type, in points")
    table.add_column("question type")
    table.add_column("domain")
    for name in ("items", *(f"{METRICS[metric][0]} {arm}" for metric, arm in columns)):
        table.add_column(Text(name), justify="right")
    for row in rows.types:
        cells = [_difference(row.differences.get(key)) for key in columns]
        table.add_row(*(Text(cell) for cell in (row.question_type, row.domain, str(row.num_items), *cells)))
    return table


def _difference(interval: Interval | None) -> str:
    return f"{signed(interval.mean)} {spread(interval)}" if interval else "–"
