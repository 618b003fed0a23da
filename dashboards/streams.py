"""A study's stream read back: for each arm, order and seed the scores on every task after every stage.

Shape letters: T stages, and as many tasks.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from dashboards.results import BOUNDS, StudyResults, TrialState
from workloads.errors import UserError
from workloads.evaluation import forms
from workloads.evaluation.continual import Cells, Matrix, Parts, assembled, by_task, never_trained
from workloads.record import RunRecord, Scale

# Task or domain -> score.
Scores = Mapping[str, float | None]
_Value = TypeVar("_Value")

# Scale of a domain that no finished run was scored on.
_UNKNOWN: Scale = "fraction"
# Status of a trial -> how it is told of a stage.
_WORDS = {"pending": "is still to run", "running": "is running"}


@dataclass(frozen=True, kw_only=True)
class Chain:
    """One arm in one order with one seed."""

    arm: str
    order: str
    seed: int
    # In the order of training.
    tasks: tuple[str, ...]
    # By stage, as all that follows; None where a stage is still to finish.
    runs: tuple[RunRecord | None, ...]
    # Scores on `tasks` after each stage, and on the domains that no stage trains.
    rows: tuple[Cells | None, ...]
    never: tuple[Cells | None, ...]
    # Share of the outputs on each task that have the form of its answers, after the last stage; None where no form is
    # known. Empty until that stage is finished.
    forms: Scores
    # Scores before any training, if the study has them for this seed.
    before: Cells | None
    # None until all stages are finished and scored on what they have seen; then `missing` is empty.
    matrix: Matrix | None
    missing: str


@dataclass(frozen=True, kw_only=True)
class Stream:
    """All chains of a study, and the runs around them."""

    # In the first order of the study; then the scored domains that no stage trains.
    tasks: tuple[str, ...]
    never: tuple[str, ...]
    # Of each task and each domain that is never trained; None for a mixture of domains on several scales.
    scales: dict[str, Scale | None]
    # As the study lists them.
    orders: tuple[str, ...]
    chains: tuple[Chain, ...]
    # Role -> arm of that role -> seed -> scores; of tasks trained alone those of each task by its own run.
    bounds: dict[str, dict[str, dict[int, Scores]]]
    # The same of the share of outputs that have the form of their task's answers.
    bound_forms: dict[str, dict[str, dict[int, Scores]]]
    # Role -> arm, as the study gives them.
    roles: Mapping[str, str]

    @property
    def scale(self) -> Scale | None:
        """The scale that all tasks share, if there is one."""
        return _shared(self.scales[task] for task in self.tasks)

    @property
    def never_scale(self) -> Scale | None:
        """The scale that all domains share which no stage trains, if there is one."""
        return _shared(self.scales[domain] for domain in self.never)

    @property
    def arms(self) -> list[str]:
        """Arms that run in orders, as the study lists them."""
        return list(dict.fromkeys(chain.arm for chain in self.chains))

    def of(self, arm: str, order: str = "") -> list[Chain]:
        """An arm's chains, by order as the study lists them and seed; all orders when none is given."""
        mine = [chain for chain in self.chains if chain.arm == arm and order in ("", chain.order)]
        return sorted(mine, key=lambda chain: (self.orders.index(chain.order), chain.seed))

    def bound(self, role: str, chain: Chain) -> Scores:
        """What the arm of a role scores at the chain's seed and grid point; empty without such a run."""
        _, mark, point = chain.arm.partition("@")
        name = f"{self.roles.get(role, '')}{mark}{point}"
        return self.bounds.get(role, {}).get(name, {}).get(chain.seed, {})


def stream_of(results: StudyResults) -> Stream | None:
    """The stream of a study; None when it has none.

    Raises `UserError` when the runs were scored on different numbers of items of a domain.
    """
    staged = [trial for trial in results.trials if trial.stage and trial.order]
    if not staged:
        return None
    _check_items(results)
    parts = {t.task: t.domains or (t.task,) for t in results.trials if t.stage}
    records = results.records.values()
    never = never_trained(parts, (run.scores for run in records))
    first = [trial for trial in staged if trial.order == staged[0].order]
    tasks = dict.fromkeys(trial.task for trial in sorted(first, key=lambda trial: trial.stage))
    parts |= {domain: (domain,) for domain in never}
    known: dict[str, Scale] = {d: score.scale for run in records for d, score in run.scores.items()}
    found = Stream(
        tasks=tuple(tasks),
        never=never,
        scales={name: _shared(known.get(d, _UNKNOWN) for d in domains) for name, domains in parts.items()},
        orders=tuple(dict.fromkeys(trial.order for trial in staged)),
        chains=(),
        bounds=_bounds(results, parts, {key: run.scores for key, run in results.records.items()}, by_task),
        bound_forms=_bounds(results, parts, results.forms, forms.by_task),
        roles=results.bounds,
    )
    by_key: dict[tuple[str, str, int], list[TrialState]] = {}
    for trial in staged:
        by_key.setdefault((trial.arm, trial.order, trial.seed), []).append(trial)
    chains = tuple(_chain(found, trials, results, parts) for trials in by_key.values())
    return replace(found, chains=chains)


def missing_lines(stream: Stream, most: int = 20) -> list[str]:
    """What is not there (yet) for the stream's numbers, one line each."""
    lines = [
        f"no arm is named as {role} in the study's comparison" for role in BOUNDS if role not in stream.roles
    ]
    for role, arm in stream.roles.items():
        runs = {name: seeds for name, seeds in stream.bounds[role].items() if seeds}
        if not runs:
            lines.append(f"{role}: no finished run of {arm}")
    chains = [c for c in stream.chains if c.missing]
    lines += [f"{c.arm}, order {c.order}, seed {c.seed}: {c.missing}" for c in chains[:most]]
    return lines + ([f"and {len(chains) - most} more trials"] if len(chains) > most else [])


def _chain(
    stream: Stream,
    trials: Sequence[TrialState],
    results: StudyResults,
    parts: Parts,
) -> Chain:
    trials = sorted(trials, key=lambda trial: trial.stage)
    tasks = tuple(trial.task for trial in trials)
    learned = {task: parts[task] for task in tasks}
    others = {domain: [domain] for domain in stream.never}
    runs = tuple(results.records.get(trial.fingerprint) for trial in trials)
    last = results.forms.get(trials[-1].fingerprint)
    rows = tuple(run and tuple(by_task(run.scores, learned).values()) for run in runs)
    head = Chain(
        arm=trials[0].arm,
        order=trials[0].order,
        seed=trials[0].seed,
        tasks=tasks,
        runs=runs,
        rows=rows,
        never=tuple(run and tuple(by_task(run.scores, others).values()) for run in runs),
        forms={} if last is None else forms.by_task(last, learned),
        before=None,
        matrix=None,
        missing=_missing(trials, rows),
    )
    scores = stream.bound("before", head)
    before = tuple(scores.get(task) for task in tasks) if scores else None
    done = [run.scores for run in runs if run]
    whole = None if head.missing else assembled(learned, done, scores or None, stream.never)
    return replace(head, before=before, matrix=whole)


def _missing(trials: Sequence[TrialState], rows: Sequence[Cells | None]) -> str:
    """What a chain lacks for its matrix, in words."""
    for trial, row in zip(trials, rows, strict=True):
        if row is None:
            rest = len(trials) - trial.stage
            after = f", and {rest} after it" if rest else ""
            return f"stage {trial.stage} ({trial.task}) {_WORDS.get(trial.status, trial.status)}{after}"
    tasks = [trial.task for trial in trials]
    for place, row in enumerate(rows):
        unscored = [task for task, cell in zip(tasks[: place + 1], row or (), strict=False) if cell is None]
        if unscored:
            return (
                f"stage {place + 1} ({tasks[place]}) has no score on {', '.join(unscored)}, learned by then"
            )
    return ""


def _bounds(
    results: StudyResults,
    parts: Parts,
    values: Mapping[str, _Value],
    over: Callable[[_Value, Parts], Scores],
) -> dict[str, dict[str, dict[int, Scores]]]:
    """Of each role, its arm at each point of a grid, by seed: what `over` makes of the values of its runs."""
    found: dict[str, dict[str, dict[int, Scores]]] = {role: {} for role in BOUNDS if role in results.bounds}
    for role, arms in found.items():
        for trial in results.trials:
            value = values.get(trial.fingerprint)
            if value is None or trial.arm.split("@")[0] != results.bounds[role] or trial.order:
                continue
            names = [trial.task] if trial.stage else list(parts)
            seeds = arms.setdefault(trial.arm, {})
            own = over(value, {name: parts[name] for name in names})
            seeds[trial.seed] = {**seeds.get(trial.seed, {}), **own}
    return found


def _shared(scales: Iterable[Scale | None]) -> Scale | None:
    found = set(scales)
    return found.pop() if len(found) == 1 else None


def _check_items(results: StudyResults) -> None:
    """Raise `UserError` unless every domain was scored on as many items of one split in all runs."""
    first: dict[str, tuple[str, str]] = {}
    for fingerprint, run in results.records.items():
        split = run.config.get("eval", {}).get("split", "test")
        for domain, score in run.scores.items():
            asked = f"{score.num_items} of {split}"
            other, told = first.setdefault(domain, (fingerprint, asked))
            if told != asked:
                both = f"{other} on {told}, {fingerprint} on {asked}"
                raise UserError(f"{domain!r} was scored on different items: {both}")
