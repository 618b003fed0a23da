"""The terminal's tables of a study, and of what MLflow has for `compare`; each domain in its own unit."""

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
    summarise,
    type_columns,
    unfinished_lines,
)
from dashboards.stream_tables import stream_parts
from dashboards.units import NO_MEAN, UNITS, bracket, common, heading, signed, spread, told, with_spread
from workloads.evaluation.conflict import Breakdown
from workloads.evaluation.statistics import Interval, over_seeds
from workloads.record import Scale


def summary(results: StudyResults) -> RenderableType:
    """The study's tables for a terminal: scores, differences, question types, verdicts, unfinished trials."""
    rows = summarise(results)
    parts: list[RenderableType] = [Text(_headline(results), style="bold"), Text(results.hypothesis)]
    parts += stream_parts(results)
    if results.scores:
        parts.append(_scores_table(rows))
    if results.records:
        parts.append(_methods_table(results))
    if rows.contrasts:
        parts += [_differences_table(rows), _types_table(rows)]
    parts += [Text(line) for line in (told(results.scales),) if line]
    parts += [Text(claim_line(claim), style="bold" if claim.is_headline else "") for claim in rows.claims]
    parts += [Text(line, style="red") for line in unfinished_lines(results)]
    return Group(*parts)


def stream_comparison(results: StudyResults) -> RenderableType:
    """The tables of a study with a stream, from its records."""
    return Group(Text(_headline(results), style="bold"), *stream_parts(results))


def comparison(rows: Sequence[CompareRow]) -> RenderableType:
    """One line per study and arm, from MLflow's metrics; intervals over seeds only, items taken as fixed."""
    names = [name.removeprefix("score/") for row in rows for name in row.metrics if name.startswith("score/")]
    domains = list(dict.fromkeys(name for name in names if "/" not in name))
    table = _table(f"{_title(rows)}, ± 95 % t-interval over seeds (items fixed)")
    ordered = any(row.order for row in rows)
    for name in ("study", "arm", *(["order"] if ordered else []), "method", *COLUMNS):
        table.add_column(name)
    for name in ("seeds", "mean", *domains):
        table.add_column(Text(name), justify="right")
    for key in dict.fromkeys((row.study, row.arm, row.order, row.method) for row in rows):
        mine = [row for row in rows if (row.study, row.arm, row.order, row.method) == key]
        labels = [key[0], key[1], *([key[2] or "–"] if ordered else []), key[3]]
        scored = [row for row in mine if any(f"score/{domain}" in row.metrics for domain in domains)]
        words = next((row.words for row in mine if row.words), ("–",) * len(COLUMNS))
        cells = [_over_seeds(mine, f"score/{domain}", _scale(mine, domain)) for domain in domains]
        own: dict[str, Scale] = {
            d: _scale(mine, d) for d in domains if any(f"score/{d}" in row.metrics for row in mine)
        }
        mean = (
            NO_MEAN if len(set(own.values())) > 1 else _over_seeds(mine, "score", common(own) or "fraction")
        )
        num_seeds = f"{len(scored)}/{len(mine)}"
        table.add_row(*(Text(cell) for cell in (*labels, *words, num_seeds, mean, *cells)))
    return table


def _title(rows: Sequence[CompareRow]) -> str:
    """What the scores of some runs are in."""
    scales: dict[str, Scale] = {domain: scale for row in rows for domain, scale in row.scales.items()}
    others = ", ".join(heading(domain, scale) for domain, scale in scales.items())
    return f"Scores in points, but for {others}" if others else "Scores in points"


def _scale(rows: Sequence[CompareRow], domain: str) -> Scale:
    named: list[Scale] = [row.scales[domain] for row in rows if domain in row.scales]
    return named[0] if named else "fraction"


def _over_seeds(rows: Sequence[CompareRow], metric: str, scale: Scale) -> str:
    """Mean and interval of a metric over the runs that have it."""
    values = np.array([row.metrics[metric] for row in rows if metric in row.metrics])
    return with_spread(over_seeds(values), scale) if len(values) else "–"


def claim_line(claim: Claim) -> str:
    """One sentence with the verdict of one arm, or why there is none."""
    label = "Verdict" if claim.is_headline else "Also"
    if claim.contrast is None:
        return f"{label}, {claim.arm}: no verdict; {claim.reason}"
    difference = claim.contrast.difference
    if difference.mean is None or difference.scale is None:
        return f"{label}, {claim.arm}: no verdict; {claim.reason}"
    scale, unit = difference.scale, UNITS[difference.scale].name
    shown = f"{signed(difference.mean.mean, scale)} {bracket(difference.mean, scale)} {unit}"
    against = f"W = {shown} against {claim.contrast.against}"
    word = claim.word + (", provisional" if claim.is_provisional else "") if claim.word else ""
    return f"{label}, {claim.arm}: {word or 'no verdict; ' + claim.reason} ({against})"


def _headline(results: StudyResults) -> str:
    done = sum(trial.status == FINISHED for trial in results.trials)
    return f"{results.name}: {done} of {len(results.trials)} trials finished"


def _table(title: str) -> Table:
    return Table(title=Text(title), title_justify="left", header_style="bold", pad_edge=False, box=None)


def _scores_table(rows: Summary) -> Table:
    table = _table(f"Scores in {_units(rows)}, ± 95 % interval over items and seeds")
    for name in ("arm", "method"):
        table.add_column(name)
    for name in ("trained", "active", "seeds", *_headings(rows), MEAN):
        table.add_column(Text(name), justify="right")
    for row in rows.arms:
        if row.scores is None:
            continue
        cells = _score_cells(rows, row.scores)
        weights = (f"{row.trainable:,}", f"{row.adapter_active:,}")
        seeds = f"{row.num_finished}/{row.num_trials}"
        table.add_row(*(Text(cell) for cell in (row.arm, row.method, *weights, seeds, *cells)))
    if rows.solo:
        cells = _score_cells(rows, rows.solo)
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
    scales = rows.results.scales
    table = _table(
        f"Differences in {_units(rows)}, paired by seed and item, 95 % interval over items and seeds"
    )
    table.add_column("metric")
    table.add_column("arm − reference")
    for name in ("seeds", MEAN, *_headings(rows)):
        table.add_column(Text(name), justify="right")
    for contrast in rows.contrasts:
        found = contrast.difference
        label = (METRICS[contrast.metric][0], f"{contrast.arm} − {contrast.against}", str(found.num_seeds))
        mean = NO_MEAN
        if found.mean and found.scale:
            mean = f"{signed(found.mean.mean, found.scale)} {bracket(found.mean, found.scale)}"
        cells = [_difference(found.by_domain.get(domain), scale) for domain, scale in scales.items()]
        table.add_row(*(Text(cell) for cell in (*label, mean, *cells)))
    return table


def _types_table(rows: Summary) -> Table:
    columns = type_columns(rows)
    table = _table(f"Differences by question type, in {_units(rows)}")
    table.add_column("question type")
    table.add_column("domain")
    for name in ("items", *(f"{METRICS[metric][0]} {arm}" for metric, arm in columns)):
        table.add_column(Text(name), justify="right")
    for row in rows.types:
        cells = [_difference(row.differences.get(key), row.scale) for key in columns]
        domain = heading(row.domain, row.scale) if rows.results.scale is None else row.domain
        table.add_row(*(Text(cell) for cell in (row.question_type, domain, str(row.num_items), *cells)))
    return table


def _units(rows: Summary) -> str:
    """What numbers are in where nothing else is said."""
    scale = rows.results.scale
    return UNITS[scale].name if scale else "points, or as the domain says"


def _headings(rows: Summary) -> list[str]:
    """The domains, with their units where they have several."""
    scales = rows.results.scales
    return list(scales) if rows.results.scale else [heading(*part) for part in scales.items()]


def _score_cells(rows: Summary, scores: Breakdown) -> list[str]:
    """Every domain's score, then the mean."""
    shown = [
        with_spread(scores.by_domain[domain], scale) if domain in scores.by_domain else "–"
        for domain, scale in rows.results.scales.items()
    ]
    return [*shown, with_spread(scores.mean, scores.scale) if scores.mean and scores.scale else NO_MEAN]


def _difference(interval: Interval | None, scale: Scale) -> str:
    return f"{signed(interval.mean, scale)} {spread(interval, scale)}" if interval else "–"
