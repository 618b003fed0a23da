"""StudyResults: one study as its records tell it, with the item scores of each arm.

Shape letters: S seeds, I items.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dashboards.runs import Curves, Questions, Run
from dashboards.units import common
from workloads.errors import UserError
from workloads.evaluation.conflict import ItemScores, Roles
from workloads.record import RunRecord, Scale

FINISHED = "finished"
# Roles of a comparison around a stream: the model before any training, all tasks at once, each task alone.
BOUNDS = ("before", "joint", "alone")

# Arm -> seed -> fingerprint, of finished runs.
SeedsByArm = Mapping[str, Mapping[int, str]]


@dataclass(frozen=True, kw_only=True)
class TrialState:
    """One line of the study's ledger."""

    arm: str
    seed: int
    fingerprint: str
    # `finished` when there is a record, whatever the ledger says.
    status: str
    error: str
    # Label of the order in which tasks are trained; a run outside every order has none.
    order: str = ""
    # Counted from 1; 0: no stage of a stream.
    stage: int = 0
    # Name of the stage's task, and the domains that it trains on; empty without a stage, the latter in old studies.
    task: str = ""
    domains: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Arm, seed and place in the stream, in words."""
        order = f", order {self.order}" if self.order else ""
        stage = f", stage {self.stage} ({self.task})" if self.stage else ""
        return f"{self.arm}, seed {self.seed}{order}{stage}"


@dataclass(frozen=True, kw_only=True)
class StudyResults:
    """All that a page or a table shows of one study."""

    name: str
    hypothesis: str
    profile: str
    command: str
    # Unix seconds; 0 when unknown.
    created: float
    roles: Roles
    trials: tuple[TrialState, ...]
    # Role of `BOUNDS` -> arm.
    bounds: Mapping[str, str]
    # By fingerprint; finished runs only, as all that follows.
    records: dict[str, RunRecord]
    # Arm -> domain -> item scores; arms that run in stages are left out.
    scores: dict[str, dict[str, ItemScores]]
    curves: dict[str, Curves]
    # wall_seconds, ahead_seconds, slots, overhead; empty until the driver has written them.
    time: dict[str, float]
    # Domain -> share of outputs that have the form of its answers; runs that end a stream, or are outside every order.
    forms: dict[str, dict[str, float]]

    @property
    def arms(self) -> list[str]:
        """All arms in the order of the study, finished or not."""
        return list(dict.fromkeys(trial.arm for trial in self.trials))

    @property
    def staged_arms(self) -> list[str]:
        """Arms that run in stages."""
        return list(dict.fromkeys(trial.arm for trial in self.trials if trial.stage))

    @property
    def domains(self) -> list[str]:
        """All scored domains, those with a solo arm first."""
        scored = dict.fromkeys(domain for by_domain in self.scores.values() for domain in by_domain)
        return list(dict.fromkeys([*(d for d in self.roles.solo if d in scored), *scored]))

    @property
    def scales(self) -> dict[str, Scale]:
        """Scale of every scored domain, the same for all runs."""
        found: dict[str, Scale] = {
            domain: score.scale for run in self.records.values() for domain, score in run.scores.items()
        }
        return {domain: found[domain] for domain in self.domains}

    @property
    def scale(self) -> Scale | None:
        """The scale that all domains share, if there is one."""
        return common(self.scales)

    @property
    def scorers(self) -> dict[str, str]:
        """Version of every domain's scorer, the same for all runs."""
        return {d: s.scorer_version for run in self.records.values() for d, s in run.scores.items()}

    @property
    def blind_arms(self) -> list[str]:
        """Finished arms that never see an image: baselines, no part of the comparison."""
        return [arm for arm in self.scores if self.runs(arm)[0].config["data"].get("blind", False)]

    def trained_on(self, arm: str) -> list[str]:
        """Domains that a finished arm trains on."""
        mixture = self.runs(arm)[0].config["data"]["mixture"]
        return [domain for domain, weight in mixture.items() if weight > 0]

    def runs(self, arm: str) -> list[RunRecord]:
        """Finished runs of an arm, by seed; a stage that several orders share is there once."""
        mine = [t for t in self.trials if t.arm == arm and t.fingerprint in self.records]
        keys = dict.fromkeys(trial.fingerprint for trial in sorted(mine, key=lambda trial: trial.seed))
        return [self.records[key] for key in keys]

    def last_runs(self, arm: str) -> list[RunRecord]:
        """Finished runs that show how an arm ends, by seed: with stages, the last ones of its first order."""
        mine = [trial for trial in self.trials if trial.arm == arm]
        if not any(trial.stage for trial in mine):
            return self.runs(arm)
        order = next((trial.order for trial in mine if trial.order), "")
        last = max((trial.stage for trial in mine if trial.order == order), default=0)
        ends = [
            t for t in mine if order and (t.order, t.stage) == (order, last) and t.fingerprint in self.records
        ]
        return [self.records[trial.fingerprint] for trial in sorted(ends, key=lambda trial: trial.seed)]


def seeds_of(arm: str, trials: Sequence[TrialState]) -> dict[int, str]:
    """Seed -> fingerprint of the arm's finished runs; `UserError` when one seed has two."""
    out: dict[int, str] = {}
    for trial in (trial for trial in trials if trial.arm == arm and trial.status == FINISHED):
        other = out.setdefault(trial.seed, trial.fingerprint)
        if other != trial.fingerprint:
            both = f"{other} and {trial.fingerprint}"
            raise UserError(f"arm {arm!r} has two finished runs of seed {trial.seed}: {both}")
    return dict(sorted(out.items()))


def check_scorers(runs: Mapping[str, Run]) -> None:
    """Raise `UserError` unless every domain was scored by one version of one scorer."""
    first: dict[str, tuple[str, str]] = {}
    for fingerprint, run in runs.items():
        for domain, score in run.record.scores.items():
            other, version = first.setdefault(domain, (fingerprint, score.scorer_version))
            if version != score.scorer_version:
                both = f"{other} by {version}, {fingerprint} by {score.scorer_version}"
                raise UserError(f"{domain!r} was not scored by one scorer: {both}")


def item_scores(
    arm: str, seeds: Mapping[int, str], runs: Mapping[str, Run], questions: Questions
) -> dict[str, ItemScores]:
    """Domain -> scores (S, I) of one arm, all of whose runs were asked the same items, or `UserError`."""
    first, *others = seeds.values()
    asked = {domain: set(scores) for domain, scores in runs[first].items.items()}
    for other in others:
        if {domain: set(scores) for domain, scores in runs[other].items.items()} != asked:
            raise UserError(f"arm {arm!r}: runs {first} and {other} were scored on different items")
    out: dict[str, ItemScores] = {}
    for domain, scores in runs[first].items.items():
        ids = tuple(scores)
        rows = [[runs[fingerprint].items[domain][name] for name in ids] for fingerprint in seeds.values()]
        out[domain] = ItemScores(
            seeds=tuple(seeds),
            ids=ids,
            question_types=tuple(questions[domain, name].question_type for name in ids),
            scores_SI=np.array(rows, dtype=np.float64),
            scale=runs[first].record.scores[domain].scale,
            whole=domain in runs[first].whole,
        )
    return out


def read_roles(tree: Mapping[str, Any], by_arm: SeedsByArm, runs: Mapping[str, Run]) -> Roles:
    """The roles that the study gives; arms trained on one domain alone are solo when it names none."""
    mole = tree.get("mole") or ()
    return Roles(
        solo=dict(tree.get("solo") or _single_domain_arms(by_arm, runs)),
        mix=str(tree.get("mix", "")),
        double=str(tree.get("double", "")),
        iso=str(tree.get("iso", "")),
        mole=(mole,) if isinstance(mole, str) else tuple(mole),
        headline=str(tree.get("headline", "")),
    )


def _single_domain_arms(by_arm: SeedsByArm, runs: Mapping[str, Run]) -> dict[str, str]:
    """Domain -> the one plain LoRA arm trained on it alone; a domain with several such arms has none."""
    out: dict[str, list[str]] = {}
    for arm, seeds in by_arm.items():
        config = runs[next(iter(seeds.values()))].record.config
        domains = [domain for domain, weight in config["data"]["mixture"].items() if weight > 0]
        is_plain = config["adapter"]["name"] == "lora" and not config["data"].get("blind", False)
        if len(domains) == 1 and is_plain:
            out.setdefault(domains[0], []).append(arm)
    return {domain: arms[0] for domain, arms in out.items() if len(arms) == 1}
