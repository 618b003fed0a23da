"""What the page shows of the comparison: verdict, difference panels, bars, heat map, question types."""

from collections.abc import Sequence
from dataclasses import dataclass

from dashboards.figures import nice_limit, tone
from dashboards.results import StudyResults
from dashboards.rows import MEAN, METRICS, Claim, Summary, type_columns
from workloads.evaluation.conflict import SOLO, Breakdown, Contrast, Roles, find
from workloads.evaluation.statistics import MIN_SEEDS, Interval

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
    """One contrast, drawn: its mean first, then its domains."""

    question: str
    # Empty below five seeds.
    answer: str
    tone: str
    symbol: str
    contrast: Contrast
    rows: tuple[tuple[str, Interval], ...]


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


@dataclass(frozen=True, kw_only=True)
class HeatCell:
    """One difference to solo: how strongly to tint it (0 to 100 %), and towards which colour."""

    interval: Interval
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


def card_limit(summary: Summary) -> float:
    """End of the axis that the verdict cards share."""
    means = [claim.contrast.difference.mean for claim in summary.claims if claim.contrast]
    return nice_limit(end for mean in means for end in (mean.low, mean.high))


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


def panel_limit(rows: Sequence[PanelRow]) -> float:
    """End of the axis that all panels share."""
    intervals = [interval for row in rows for panel in row.panels for _, interval in panel.rows]
    return nice_limit(end for interval in intervals for end in (interval.low, interval.high))


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
        panels.append(BarPanel(title=domain, bars=bars, marks=marks))
    return panels


def baseline_scores(results: StudyResults) -> dict[str, dict[str, float]]:
    """Baseline -> domain -> score, and its mean when every domain has one.

    `majority` is from the records; `blind` is the best mean score of an arm that never sees an image.
    """
    majority: dict[str, float] = {}
    blind: dict[str, float] = {}
    for record in results.records.values():
        for domain, score in record.scores.items():
            majority[domain] = max(score.majority, majority.get(domain, 0.0))
    for arm in results.blind_arms:
        for domain, items in results.scores[arm].items():
            blind[domain] = max(float(items.scores_SI.mean()), blind.get(domain, 0.0))
    out = {name: scores for name, scores in (("majority", majority), ("blind", blind)) if scores}
    for by_domain in out.values():
        if results.domains and all(domain in by_domain for domain in results.domains):
            by_domain[MEAN] = sum(by_domain[domain] for domain in results.domains) / len(results.domains)
    return out


def heat_rows(summary: Summary) -> list[HeatRow]:
    """Every mixed arm against solo: a cell for each domain, then the mean."""
    gaps = [contrast for contrast in summary.contrasts if contrast.metric == "gap"]
    order = {row.arm: place for place, row in enumerate(summary.arms)}
    limit = heat_limit(summary)
    rows = []
    for contrast in sorted(gaps, key=lambda contrast: order[contrast.arm]):
        by_domain = contrast.difference.by_domain
        intervals = [*(by_domain.get(domain) for domain in summary.results.domains), contrast.difference.mean]
        cells = tuple(_heat_cell(interval, limit) if interval else None for interval in intervals)
        mixture = mixture_text(summary.results, contrast.arm)
        rows.append(HeatRow(arm=contrast.arm, mixture=mixture, cells=cells))
    return rows


def heat_limit(summary: Summary) -> float:
    """Difference at which the heat map's colours are strongest."""
    gaps = [contrast.difference for contrast in summary.contrasts if contrast.metric == "gap"]
    return nice_limit([i.mean for gap in gaps for i in (*gap.by_domain.values(), gap.mean)], least=0.05)


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
    mean = contrast.difference.mean
    answers = _GAP_ANSWERS if metric == "gap" else _QUESTIONS[metric][1]
    place = ("loss", "gain", "flat").index(tone(mean))
    return Panel(
        question=question,
        answer=answers[place] if mean.num_seeds >= MIN_SEEDS else "",
        tone=tone(mean) if mean.num_seeds >= MIN_SEEDS else "none",
        symbol=METRICS[metric][0],
        contrast=contrast,
        rows=((MEAN, mean), *contrast.difference.by_domain.items()),
    )


def _family(arm: str) -> str:
    """An arm's name without the grid point that the orchestrator writes after an @."""
    return arm.split("@")[0]


def _plain_arms(roles: Roles) -> list[tuple[str, str]]:
    """(role, arm) of plain LoRA on the mix."""
    parts = (("mix", roles.mix), ("double", roles.double), ("iso", roles.iso))
    return [(part, arm) for part, arm in parts if arm]


def _score(part: Breakdown, domain: str) -> Interval | None:
    return part.mean if domain == MEAN else part.by_domain.get(domain)


def _heat_cell(interval: Interval, limit: float) -> HeatCell:
    strength = round(70 * min(abs(interval.mean) / limit, 1.0))
    return HeatCell(interval=interval, strength=strength, colour="loss" if interval.mean < 0 else "gain")
