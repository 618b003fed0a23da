"""What the page shows of the comparison: verdict, difference panels, bars, heat map, question types."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dashboards.figures import nice_limit, tone
from dashboards.results import StudyResults
from dashboards.rows import MEAN, METRICS, Claim, Summary, type_columns
from dashboards.units import UNITS, told
from workloads.evaluation.conflict import SOLO, Breakdown, Contrast, Roles, find
from workloads.evaluation.statistics import MIN_SEEDS, Interval
from workloads.record import Scale

# Metric -> what a panel asks, and its answers when the interval is below 0, above 0, around 0.
_QUESTIONS = {
    "recovery": ("Better than LoRA on the mix?", ("no, they lose", "yes", "unclear")),
    "double": ("Better than twice the samples?", ("no, they lose", "yes", "unclear")),
    "iso": ("Better than as many weights?", ("no, they lose", "yes", "unclear")),
}
_GAP_QUESTIONS = {
    "mix": "Does mixing cost LoRA?",
    "double": "Still, with twice the samples?",
    "iso": "Still, with the experts' weights?",
}
_GAP_ANSWERS = ("yes", "no, it gains", "unclear")
_OTHER_COLOURS = 6


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One contrast, drawn: its mean first, where it has one, then its domains."""

    question: str
    # Empty below five seeds.
    answer: str
    tone: str
    symbol: str
    contrast: Contrast
    # Scale -> name and difference of the rows that share an axis.
    rows: dict[Scale, list[tuple[str, Interval]]]


@dataclass(frozen=True, kw_only=True)
class PanelRow:
    """Panels of one side of the comparison."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, kw_only=True)
class BarPanel:
    """Scores of all arms on one domain, or their mean."""

    title: str
    # Label, colour, score.
    bars: tuple[tuple[str, str, Interval], ...]
    # Name of a baseline -> score.
    marks: dict[str, float]
    scale: Scale
    # Score at which the bars' axis ends.
    top: float
    # Why there are no bars.
    reason: str


@dataclass(frozen=True, kw_only=True)
class HeatCell:
    """One difference to solo: how strongly to tint it (0 to 100 %), and towards which colour."""

    interval: Interval
    scale: Scale
    strength: int
    colour: str


@dataclass(frozen=True, kw_only=True)
class HeatRow:
    """One arm of the heat map."""

    arm: str
    mixture: str
    # One per column of the map; None where there is no score.
    cells: tuple[HeatCell | None, ...]


def card_tone(claim: Claim) -> str:
    """CSS class of a verdict card."""
    return {"reproduced": "gain", "not reproduced": "loss", "inconclusive": "flat"}.get(claim.word, "none")


def card_limits(summary: Summary) -> dict[Scale, float]:
    """End of the axis that the verdict cards of a scale share."""
    found = [claim.contrast.difference for claim in summary.claims if claim.contrast]
    return _limits((each.scale, each.mean) for each in found if each.scale and each.mean)


def panel_rows(summary: Summary) -> list[PanelRow]:
    """Panels of plain LoRA's gaps, then of each arm of experts."""
    roles = summary.results.roles
    gaps = (_panel(summary, "gap", arm, _GAP_QUESTIONS[part]) for part, arm in _plain_arms(roles))
    title = "Plain LoRA on the mix, against LoRA on each domain alone"
    rows = [PanelRow(title=title, panels=tuple(panel for panel in gaps if panel))]
    for arm in roles.mole:
        panels = (_panel(summary, metric, arm, question) for metric, (question, _) in _QUESTIONS.items())
        title = f"{arm}, the headline" if arm == roles.headline else arm
        rows.append(PanelRow(title=title, panels=tuple(panel for panel in panels if panel)))
    return [row for row in rows if row.panels]


def panel_limits(rows: Sequence[PanelRow]) -> dict[Scale, float]:
    """End of the axis that all panels' rows of a scale share."""
    parts = [part for row in rows for panel in row.panels for part in panel.rows.items()]
    return _limits((scale, interval) for scale, lines in parts for _, interval in lines)


def bar_panels(summary: Summary) -> list[BarPanel]:
    """Bars of the mean and of each domain: solo (each domain's own arm) and every arm that is not solo."""
    colours = arm_colours(summary.results)
    results = summary.results
    hidden = {*results.blind_arms, *(results.roles.solo.values() if summary.solo else ())}
    parts = [(SOLO, "solo", summary.solo)] if summary.solo else []
    parts += [(row.arm, colours[row.arm], row.scores) for row in summary.arms if row.arm not in hidden]
    baselines = baseline_scores(summary.results)
    panels = []
    for domain in (MEAN, *summary.results.domains):
        scores = [(name, colour, _score(part, domain)) for name, colour, part in parts if part]
        bars = tuple((name, colour, score) for name, colour, score in scores if score)
        marks = {name: by_domain[domain] for name, by_domain in baselines.items() if domain in by_domain}
        scale = results.scale if domain == MEAN else results.scales[domain]
        if scale is None:
            panels.append(_without_bars(domain, told(results.scales)))
            continue
        ends = [score.mean for _, _, score in bars] + [*marks.values()]
        top = UNITS[scale].bar or nice_limit(ends, UNITS[scale].least)
        panels.append(BarPanel(title=domain, bars=bars, marks=marks, scale=scale, top=top, reason=""))
    return panels


def baseline_scores(results: StudyResults) -> dict[str, dict[str, float]]:
    """Baseline -> domain -> score, and its mean when every domain has one and all share a scale.

    `majority` is from the records; `blind` is the best mean score of an arm that never sees an image.
    """
    majority: dict[str, float] = {}
    blind: dict[str, float] = {}
    for record in results.records.values():
        for domain, score in record.scores.items():
            if score.majority is not None:
                majority[domain] = max(score.majority, majority.get(domain, 0.0))
    for arm in results.blind_arms:
        for domain, items in results.scores[arm].items():
            blind[domain] = max(float(items.scores_SI.mean()), blind.get(domain, 0.0))
    out = {name: scores for name, scores in (("majority", majority), ("blind", blind)) if scores}
    for by_domain in out.values():
        if results.scale and all(domain in by_domain for domain in results.domains):
            by_domain[MEAN] = sum(by_domain[domain] for domain in results.domains) / len(results.domains)
    return out


def heat_rows(summary: Summary) -> list[HeatRow]:
    """Every mixed arm against solo: a cell for each domain, then the mean."""
    gaps = [contrast for contrast in summary.contrasts if contrast.metric == "gap"]
    order = {row.arm: place for place, row in enumerate(summary.arms)}
    limits = heat_limits(summary)
    rows = []
    for contrast in sorted(gaps, key=lambda contrast: order[contrast.arm]):
        found = contrast.difference
        cells = [
            _heat_cell(found.by_domain.get(domain), scale, limits)
            for domain, scale in summary.results.scales.items()
        ]
        cells.append(_heat_cell(found.mean, found.scale, limits))
        mixture = mixture_text(summary.results, contrast.arm)
        rows.append(HeatRow(arm=contrast.arm, mixture=mixture, cells=tuple(cells)))
    return rows


def heat_limits(summary: Summary) -> dict[Scale, float]:
    """Difference at which the heat map's colours are strongest, on each scale."""
    gaps = [contrast.difference for contrast in summary.contrasts if contrast.metric == "gap"]
    means: dict[Scale, list[float]] = {}
    for gap in gaps:
        for domain, interval in gap.by_domain.items():
            means.setdefault(summary.results.scales[domain], []).append(interval.mean)
        if gap.scale and gap.mean:
            means[gap.scale].append(gap.mean.mean)
    return {scale: nice_limit(values, 2.5 * UNITS[scale].least) for scale, values in means.items()}


def unit_words(results: StudyResults) -> str:
    """What each domain's scores are, where not all are shares of answers that are right."""
    if set(results.scorers.values()) <= {"exact-1"}:
        return ""
    scorers, scales = results.scorers, results.scales
    return ", ".join(f"{d} by {scorers[d]} in {UNITS[scale].name}" for d, scale in scales.items())


def mixture_text(results: StudyResults, arm: str) -> str:
    """Samples that the arm trains on: `general 2,000 + document 1,000`, or `2,000 of each domain`."""
    runs = results.runs(arm)
    if not runs:
        return ""
    data = runs[0].config["data"]
    counts = {domain: round(weight * data["samples"]) for domain, weight in data["mixture"].items()}
    if len(counts) > 1 and set(counts) == set(results.domains) and len(set(counts.values())) == 1:
        return f"{next(iter(counts.values())):,} of each domain"
    return " + ".join(f"{domain} {count:,}" for domain, count in counts.items() if count)


def type_table(summary: Summary) -> tuple[list[str], list[tuple[str, str]]]:
    """Columns of the question-type table: arms for its scores, (metric, arm) for its differences."""
    roles = summary.results.roles
    arms = [row.arm for row in summary.arms if row.scores and row.arm not in roles.solo.values()]
    return ([SOLO] if summary.solo else []) + arms, type_columns(summary)


def arm_colours(results: StudyResults) -> dict[str, str]:
    """Arm -> CSS variable: by role where it has one, else one of six, the same for all points of a grid."""
    roles = results.roles
    named = dict.fromkeys([SOLO, *roles.solo.values()], "solo")
    named |= {arm: part for part, arm in _plain_arms(roles)}
    named |= {arm: f"mole{min(place, 2)}" for place, arm in enumerate(roles.mole, start=1)}
    others = [arm for arm in results.arms if arm not in named]
    families = {family: place for place, family in enumerate(dict.fromkeys(map(_family, others)))}
    return named | {arm: f"c{families[_family(arm)] % _OTHER_COLOURS + 1}" for arm in others}


def legend(results: StudyResults) -> dict[str, str]:
    """Name -> CSS variable of the colours in use: solo arms and the points of a grid are one name each."""
    colours = arm_colours(results)
    arms = [arm for arm in colours if arm in results.scores]
    return {SOLO if colours[arm] == "solo" else _family(arm): colours[arm] for arm in arms}


def _panel(summary: Summary, metric: str, arm: str, question: str) -> Panel | None:
    contrast = find(summary.contrasts, metric, arm)
    if contrast is None:
        return None
    found = contrast.difference
    answers = _GAP_ANSWERS if metric == "gap" else _QUESTIONS[metric][1]
    is_clear = found.mean is not None and found.num_seeds >= MIN_SEEDS
    kind = tone(found.mean) if found.mean else "flat"
    rows: dict[Scale, list[tuple[str, Interval]]] = {}
    if found.scale and found.mean:
        rows[found.scale] = [(MEAN, found.mean)]
    for domain, interval in found.by_domain.items():
        rows.setdefault(summary.results.scales[domain], []).append((domain, interval))
    return Panel(
        question=question,
        answer=answers[("loss", "gain", "flat").index(kind)] if is_clear else "",
        tone=kind if is_clear else "none",
        symbol=METRICS[metric][0],
        contrast=contrast,
        rows=rows,
    )


def _without_bars(title: str, reason: str) -> BarPanel:
    return BarPanel(title=title, bars=(), marks={}, scale="fraction", top=1.0, reason=reason)


def _limits(parts: Iterable[tuple[Scale, Interval]]) -> dict[Scale, float]:
    """A round number for each scale that holds both ends of all its intervals."""
    ends: dict[Scale, list[float]] = {}
    for scale, interval in parts:
        ends.setdefault(scale, []).extend((interval.low, interval.high))
    return {scale: nice_limit(values, UNITS[scale].least) for scale, values in ends.items()}


def _family(arm: str) -> str:
    """An arm's name without the grid point that the orchestrator writes after an @."""
    return arm.split("@")[0]


def _plain_arms(roles: Roles) -> list[tuple[str, str]]:
    """(role, arm) of plain LoRA on the mix."""
    parts = (("mix", roles.mix), ("double", roles.double), ("iso", roles.iso))
    return [(part, arm) for part, arm in parts if arm]


def _score(part: Breakdown, domain: str) -> Interval | None:
    return part.mean if domain == MEAN else part.by_domain.get(domain)


def _heat_cell(
    interval: Interval | None, scale: Scale | None, limits: Mapping[Scale, float]
) -> HeatCell | None:
    if interval is None or scale is None:
        return None
    strength = round(70 * min(abs(interval.mean) / limits[scale], 1.0))
    colour = "loss" if interval.mean < 0 else "gain"
    return HeatCell(interval=interval, scale=scale, strength=strength, colour=colour)
