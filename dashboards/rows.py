"""Result rows of one study, computed once for the terminal and the page; scores are kept on their scales."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dashboards.results import FINISHED, StudyResults
from dashboards.units import common, told
from workloads.evaluation.conflict import Breakdown, Contrast, Roles, breakdown, contrasts, find, select_seeds
from workloads.evaluation.statistics import MIN_SEEDS, Interval, verdict
from workloads.record import Scale

# Metric -> symbol, what it asks.
METRICS = {
    "gap": ("Δ", "cost of mixing: against LoRA on each domain alone"),
    "recovery": ("R", "won back: against LoRA on the same mix"),
    "double": ("W", "against LoRA on the mix with twice the samples"),
    "iso": ("R iso", "against LoRA on the mix with as many weights"),
}
MEAN = "mean"


@dataclass(frozen=True, kw_only=True)
class ArmRow:
    """One arm: what it is, how it scored, and its conflict metrics."""

    arm: str
    # Its part in the comparison, in words; empty without one.
    role: str
    method: str
    num_finished: int
    num_trials: int
    # Trained weights, those of the adapter, and the adapter weights that one token meets; 0 when unknown.
    trainable: int
    adapter_weights: int
    adapter_active: int
    # None until a run has finished.
    scores: Breakdown | None
    # Metric -> contrast, where it could be computed.
    contrasts: dict[str, Contrast]
    # Empty for arms that the claim is not about, and below five seeds.
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The twice-the-samples claim for one arm of experts."""

    arm: str
    is_headline: bool
    # reproduced, not reproduced, inconclusive, or empty: then `reason` says why.
    word: str
    reason: str
    # Trials of the two arms are still to finish, so that the word may change.
    is_provisional: bool
    contrast: Contrast | None


@dataclass(frozen=True, kw_only=True)
class TypeRow:
    """One question type on one domain, or its mean over the domains that ask it."""

    question_type: str
    # A domain, or `mean`.
    domain: str
    scale: Scale
    num_items: int
    # Arm -> score; `solo` for each domain's own arm.
    scores: dict[str, Interval]
    # (metric, arm) -> difference.
    differences: dict[tuple[str, str], Interval]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Everything computed from one study, once, for the terminal and the page."""

    results: StudyResults
    contrasts: tuple[Contrast, ...]
    arms: tuple[ArmRow, ...]
    # Scores of `solo`, each domain by its own arm; None without all of them.
    solo: Breakdown | None
    claims: tuple[Claim, ...]
    types: tuple[TypeRow, ...]


def summarise(results: StudyResults) -> Summary:
    """Compute all rows; raises `ValueError` when arms were scored on different items."""
    sighted = {arm: scores for arm, scores in results.scores.items() if arm not in results.blind_arms}
    found = contrasts(sighted, results.roles, {arm: results.trained_on(arm) for arm in sighted})
    arms = tuple(_arm_row(arm, results, found) for arm in ordered_arms(results))
    solo = _solo(results)
    return Summary(
        results=results,
        contrasts=found,
        arms=arms,
        solo=solo,
        claims=tuple(_claim(arm, results, found) for arm in results.roles.mole),
        types=_type_rows(results, arms, solo, found),
    )


def ordered_arms(results: StudyResults) -> list[str]:
    """Arms with a role first, solo to experts, then the rest as the study lists them."""
    roles = results.roles
    first = [*roles.solo.values(), roles.mix, roles.double, roles.iso, *roles.mole]
    return [arm for arm in dict.fromkeys([*first, *results.arms]) if arm in results.arms]


def role_of(arm: str, roles: Roles) -> str:
    """What `arm` is in the comparison, in words."""
    solo = [domain for domain, name in roles.solo.items() if name == arm]
    if solo:
        return f"LoRA, {' and '.join(solo)} alone"
    if arm in roles.mole:
        return "experts on the mix" + (", headline" if arm == roles.headline else "")
    parts = {roles.mix: "", roles.double: ", twice the samples", roles.iso: ", as many weights as experts"}
    return f"LoRA on the mix{parts[arm]}" if arm in parts and arm else ""


def type_columns(rows: Summary) -> list[tuple[str, str]]:
    """(metric, arm) of the differences shown per question type: gap of the mix, R and W of experts."""
    roles = rows.results.roles
    wanted = [("gap", roles.mix), *((m, arm) for arm in roles.mole for m in ("recovery", "double"))]
    have = {(contrast.metric, contrast.arm) for contrast in rows.contrasts}
    return [key for key in wanted if key in have]


def unfinished_lines(results: StudyResults) -> list[str]:
    """One line for each trial without a record that failed or was cut short, and one for those to come."""
    states = [trial for trial in results.trials if trial.status != FINISHED]
    lines = [
        f"{trial.status}: {trial.name}" + (f": {trial.error}" if trial.error else "")
        for trial in states
        if trial.status not in ("pending", "running")
    ]
    waiting = len(states) - len(lines)
    return lines + ([f"{waiting} of {len(results.trials)} trials are still to finish"] if waiting else [])


def _arm_row(arm: str, results: StudyResults, found: Iterable[Contrast]) -> ArmRow:
    runs = results.runs(arm)
    trials = [trial for trial in results.trials if trial.arm == arm]
    cost = runs[0].cost if runs else None
    mine = {contrast.metric: contrast for contrast in found if contrast.arm == arm}
    double = mine["double"].difference.mean if "double" in mine else None
    is_claimed = arm in results.roles.mole
    return ArmRow(
        arm=arm,
        role="images removed" if arm in results.blind_arms else role_of(arm, results.roles),
        method=str(runs[0].config["adapter"]["name"]) if runs else "",
        num_finished=sum(trial.status == FINISHED for trial in trials),
        num_trials=len(trials),
        trainable=cost.trainable if cost else 0,
        adapter_weights=cost.adapter_weights if cost else 0,
        adapter_active=cost.adapter_active if cost else 0,
        scores=breakdown(results.scores[arm]) if arm in results.scores else None,
        contrasts=mine,
        verdict=verdict(double) if double and is_claimed else "",
    )


def _solo(results: StudyResults) -> Breakdown | None:
    solo = results.roles.solo
    known = {domain for domain, arm in solo.items() if domain in results.scores.get(arm, {})}
    # A mean over some of the domains would stand beside means over all.
    if not known or known != set(results.domains):
        return None
    scores = {domain: results.scores[solo[domain]][domain] for domain in results.domains}
    # Solo arms of an unfinished study may not have the same seeds yet.
    common = set.intersection(*(set(items.seeds) for items in scores.values()))
    return breakdown(select_seeds(scores, sorted(common))) if common else None


def _claim(arm: str, results: StudyResults, found: Iterable[Contrast]) -> Claim:
    contrast = find(found, "double", arm)
    mean = contrast.difference.mean if contrast else None
    word = verdict(mean) if mean else ""
    pair = (arm, results.roles.double)
    if contrast is None:
        missing = [name for name in pair if name and name not in results.scores]
        reason = f"no finished run of {' and '.join(missing) or 'both arms with one seed'} yet"
    elif mean is None:
        reason = told({domain: results.scales[domain] for domain in contrast.difference.by_domain})
    else:
        num_seeds = mean.num_seeds
        reason = f"{num_seeds} seed{'s' * (num_seeds > 1)}, and a verdict takes at least {MIN_SEEDS}"
    return Claim(
        arm=arm,
        is_headline=arm == results.roles.headline,
        word=word,
        reason="" if word else reason,
        is_provisional=any(trial.arm in pair and trial.status != FINISHED for trial in results.trials),
        contrast=contrast,
    )


def _type_rows(
    results: StudyResults, arms: Sequence[ArmRow], solo: Breakdown | None, found: Sequence[Contrast]
) -> tuple[TypeRow, ...]:
    scores = {row.arm: row.scores for row in arms if row.scores} | ({"solo": solo} if solo else {})
    parts = [part.by_type for part in scores.values()]
    asked: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for by_type in parts for name in by_type):
        asked[name] = list(dict.fromkeys(domain for by_type in parts for domain in by_type.get(name, {})))
    # Shared question types first: their mean says more.
    names = sorted(asked, key=lambda name: (-len(asked[name]), name))
    rows = []
    for name in names:
        scales: dict[str, Scale] = {domain: results.scales[domain] for domain in asked[name]}
        shared = common(scales)
        places: list[tuple[str, Scale]] = [
            *scales.items(),
            *([(MEAN, shared)] if shared and len(scales) > 1 else []),
        ]
        rows += [_type_row(name, domain, scale, scores, found) for domain, scale in places]
    return tuple(rows)


def _type_row(
    name: str, domain: str, scale: Scale, scores: Mapping[str, Breakdown], found: Sequence[Contrast]
) -> TypeRow:
    intervals = {arm: cell for arm, part in scores.items() if (cell := _type_cell(part, name, domain))}
    differences = {(c.metric, c.arm): _type_cell(c.difference, name, domain) for c in found}
    return TypeRow(
        question_type=name,
        domain=domain,
        scale=scale,
        num_items=max(interval.num_items for interval in intervals.values()),
        scores=intervals,
        differences={key: cell for key, cell in differences.items() if cell},
    )


def _type_cell(part: Breakdown, question_type: str, domain: str) -> Interval | None:
    if domain == MEAN:
        return part.type_mean.get(question_type)
    return part.by_type.get(question_type, {}).get(domain)
