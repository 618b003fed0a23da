"""Conflict metrics: what mixing domains costs LoRA, what experts win back, if they beat twice the samples.

Source:  With n samples of each domain, a metric is a difference of two arms, paired by seed and item,
         per domain and as the mean over domains:
           gap       an arm on the mix, n - LoRA on d alone, n
           recovery  experts on the mix, n - LoRA on the mix, n
           double    experts on the mix, n - LoRA on the mix, 2n
           iso       experts on the mix, n - LoRA on the mix, n, with as many weights as the experts
         `double` is the claim of Chen, Jie, Ma 2024, LLaVA-MoLE, arXiv:2401.16160.
Differs: The paper compares single runs; here every difference has an interval over items and seeds.

Shape letters: S seeds, I items.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from workloads.evaluation.statistics import FloatArray, Interval, interval, mean_interval, over_seeds
from workloads.record import Scale

SOLO = "solo"


@dataclass(frozen=True, kw_only=True, eq=False)
class ItemScores:
    """Item scores on one domain: of an arm, on the domain's scale, or differences of two arms."""

    seeds: tuple[int, ...]
    ids: tuple[str, ...]
    # Question type of each item.
    question_types: tuple[str, ...]
    scores_SI: FloatArray
    scale: Scale = "fraction"
    # The items have no scores of their own, but parts of one score of all: their mean says nothing of some of them.
    whole: bool = False

    def __post_init__(self) -> None:
        assert self.scores_SI.shape == (len(self.seeds), len(self.ids)), "scores are seeds x items"
        assert len(self.question_types) == len(self.ids), "one question type for each item"


# Domain -> item scores.
ArmScores = Mapping[str, ItemScores]


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Which arm plays which part in a comparison; an empty name means that no arm does."""

    # Domain -> arm trained on that domain alone.
    solo: Mapping[str, str] = field(default_factory=dict)
    mix: str = ""
    # LoRA on the mix with twice the samples.
    double: str = ""
    # LoRA on the mix with as many weights as the experts have.
    iso: str = ""
    mole: tuple[str, ...] = ()
    # The arm of `mole` that the study's verdict is about.
    headline: str = ""


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """Scores or differences with their intervals: per domain, per question type, means over domains."""

    by_domain: dict[str, Interval]
    # Question type -> domain -> interval.
    by_type: dict[str, dict[str, Interval]]
    # Question type -> mean over the domains that ask it, where they share a scale.
    type_mean: dict[str, Interval]
    # The scale of all domains; where they have several, it is None, and so are the means.
    scale: Scale | None
    mean: Interval | None
    # The mean again, with a t-interval over seeds only.
    seeds_only: Interval | None

    @property
    def num_seeds(self) -> int:
        """Seeds of every interval."""
        return next(iter(self.by_domain.values())).num_seeds


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """One metric of one arm against its reference."""

    # gap, recovery, double or iso.
    metric: str
    arm: str
    # An arm, or `solo`: each domain's own arm.
    against: str
    difference: Breakdown
    # Seeds that one of the two sides has and the other has not (yet).
    seeds_left_out: tuple[int, ...]


def breakdown(scores: ArmScores) -> Breakdown:
    """Intervals of one arm's scores, or of the differences that `paired` gives."""
    seeds = {domain: items.seeds for domain, items in scores.items()}
    if len(set(seeds.values())) != 1:
        raise ValueError(f"the domains have different seeds: {seeds}")
    types = sorted({name for items in scores.values() for name in items.question_types})
    by_type_SI = {name: parts for name in types if (parts := _of_type(scores, name))}
    scale = _shared(scores, scores)
    means_S = [items.scores_SI.mean(axis=1) for items in scores.values()]
    return Breakdown(
        by_domain={domain: interval(items.scores_SI) for domain, items in scores.items()},
        by_type={name: {d: interval(v) for d, v in parts.items()} for name, parts in by_type_SI.items()},
        type_mean={
            name: mean_interval(list(parts.values()))
            for name, parts in by_type_SI.items()
            if _shared(scores, parts)
        },
        scale=scale,
        mean=mean_interval([items.scores_SI for items in scores.values()]) if scale else None,
        seeds_only=over_seeds(np.mean(means_S, axis=0)) if scale else None,
    )


def paired(left: ArmScores, right: ArmScores) -> dict[str, ItemScores]:
    """`left - right` for each domain, paired by seed and item id.

    Raises `ValueError` that names the domains, seeds or ids that only one side has.
    """
    _same("domains", left, right)
    return {domain: _difference(domain, left[domain], right[domain]) for domain in left}


def contrasts(
    scores: Mapping[str, ArmScores], roles: Roles, trained_on: Mapping[str, Collection[str]]
) -> tuple[Contrast, ...]:
    """All metrics that `scores` (arm -> domain -> item scores) allows, over the seeds that both sides have.

    Every arm that is not a solo arm gets a gap, on those domains of `trained_on[arm]` that have a solo arm;
    the other metrics are for the arms of `roles.mole`, on all domains. Raises `ValueError` when two sides
    were scored on different items.
    """
    sides = dict(scores)
    if roles.solo and all(domain in scores.get(arm, {}) for domain, arm in roles.solo.items()):
        sides[SOLO] = {domain: scores[arm][domain] for domain, arm in roles.solo.items()}
    solo_arms = set(roles.solo.values())
    plan = [("gap", arm, SOLO) for arm in scores if arm not in solo_arms]
    for metric, reference in (("recovery", roles.mix), ("double", roles.double), ("iso", roles.iso)):
        plan += [(metric, arm, reference) for arm in roles.mole]
    found = [_contrast(*row, sides, trained_on) for row in plan if row[1] in sides and row[2] in sides]
    return tuple(contrast for contrast in found if contrast is not None)


def find(found: Iterable[Contrast], metric: str, arm: str) -> Contrast | None:
    """The contrast of that name and arm, if it could be computed."""
    return next((contrast for contrast in found if (contrast.metric, contrast.arm) == (metric, arm)), None)


def select_seeds(scores: ArmScores, seeds: Sequence[int]) -> dict[str, ItemScores]:
    """The same scores for `seeds` only, in that order; raises `ValueError` for a seed that is not there."""
    return {domain: _select(items, seeds, items.ids, domain) for domain, items in scores.items()}


def _contrast(
    metric: str,
    arm: str,
    against: str,
    sides: Mapping[str, ArmScores],
    trained_on: Mapping[str, Collection[str]],
) -> Contrast | None:
    left, right = sides[arm], sides[against]
    if metric == "gap":
        shared = [domain for domain in left if domain in right and domain in trained_on[arm]]
        left, right = ({domain: side[domain] for domain in shared} for side in (left, right))
    if not left:
        return None
    seed_sets = [set(items.seeds) for side in (left, right) for items in side.values()]
    common = sorted(set.intersection(*seed_sets))
    if not common:
        return None
    left_out = tuple(sorted(set.union(*seed_sets) - set(common)))
    try:
        difference = paired(select_seeds(left, common), select_seeds(right, common))
    except ValueError as error:
        raise ValueError(f"{metric} of {arm} against {against}: {error}") from None
    found = breakdown(difference)
    return Contrast(metric=metric, arm=arm, against=against, difference=found, seeds_left_out=left_out)


def _difference(domain: str, left: ItemScores, right: ItemScores) -> ItemScores:
    _same(f"{domain}: seeds", left.seeds, right.seeds)
    _same(f"{domain}: items", left.ids, right.ids)
    right = _select(right, left.seeds, left.ids, domain)
    _same(f"{domain}: scales", [left.scale], [right.scale])
    if left.question_types != right.question_types:
        types = zip(left.ids, left.question_types, right.question_types, strict=True)
        odd = [name for name, one, other in types if one != other]
        raise ValueError(f"{domain}: items with two question types: {_few(odd)}")
    return ItemScores(
        seeds=left.seeds,
        ids=left.ids,
        question_types=left.question_types,
        scores_SI=left.scores_SI - right.scores_SI,
        scale=left.scale,
        whole=left.whole,
    )


def _select(items: ItemScores, seeds: Sequence[int], ids: Sequence[str], domain: str) -> ItemScores:
    row_of = {seed: row for row, seed in enumerate(items.seeds)}
    column_of = {name: column for column, name in enumerate(items.ids)}
    missing = [seed for seed in seeds if seed not in row_of]
    if missing:
        raise ValueError(f"{domain}: no scores for seeds {_few(missing)}")
    rows, columns = [row_of[seed] for seed in seeds], [column_of[name] for name in ids]
    return ItemScores(
        seeds=tuple(seeds),
        ids=tuple(ids),
        question_types=tuple(items.question_types[column] for column in columns),
        scores_SI=items.scores_SI[np.ix_(rows, columns)],
        scale=items.scale,
        whole=items.whole,
    )


def _of_type(scores: ArmScores, question_type: str) -> dict[str, FloatArray]:
    """Scores of the items of one question type, for the domains that ask it and whose items have scores."""
    parts: dict[str, FloatArray] = {}
    for domain, items in scores.items():
        if items.whole:
            continue
        columns = [column for column, name in enumerate(items.question_types) if name == question_type]
        if columns:
            parts[domain] = items.scores_SI[:, columns]
    return parts


def _shared(scores: ArmScores, domains: Iterable[str]) -> Scale | None:
    """The one scale of `domains`, if they have one."""
    scales: set[Scale] = {scores[domain].scale for domain in domains}
    return scales.pop() if len(scales) == 1 else None


def _same(what: str, left: Iterable[object], right: Iterable[object]) -> None:
    """Both sides hold the same things, each once; raises `ValueError` that names what differs."""
    left_counts, right_counts = Counter(list(left)), Counter(list(right))
    twice = [thing for counts in (left_counts, right_counts) for thing, count in counts.items() if count > 1]
    if twice:
        raise ValueError(f"{what} given twice: {_few(twice)}")
    only_left, only_right = left_counts.keys() - right_counts.keys(), right_counts.keys() - left_counts.keys()
    if only_left or only_right:
        raise ValueError(f"{what} differ: only left {_few(only_left)}; only right {_few(only_right)}")


def _few(things: Iterable[object]) -> str:
    """Up to five of `things`, in order, for an error message."""
    names = sorted(map(str, things))
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(names[:5]) or "none") + more
