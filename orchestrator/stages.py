"""A stream's study.json put together again: trials of several stages, their matrices, and what sharing saved."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.store import Store
from workloads.evaluation.continual import Matrix, assembled, by_task, never_trained
from workloads.record import DomainScore, load

Row = Mapping[str, Any]
Scores = Mapping[str, DomainScore]


@dataclass(frozen=True, kw_only=True)
class Chain:
    """One trial of a stream: an arm in one order with one seed; the tasks of an arm `alone` stand in no order."""

    arm: str
    seed: int
    order: str
    # By stage; where there is no order, as the study lists the tasks.
    rows: tuple[Row, ...]

    @property
    def name(self) -> str:
        """Arm, seed and order in one word."""
        return "/".join([self.arm, str(self.seed), *([self.order] if self.order else [])])

    @property
    def last(self) -> str:
        """Fingerprint of the last stage, which stands for all before it."""
        return self.rows[-1]["fingerprint"]

    def status(self, is_over: bool) -> str:
        """One status for all stages; `is_over` says that nobody works on the study any more."""
        found = {row["status"] for row in self.rows}
        if found == {"finished"}:
            return "finished"
        for status in ("running", "failed", "stopped", "interrupted"):
            if status in found:
                return status
        return "interrupted" if is_over else "running" if found != {"pending"} else "pending"


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """What stages cost that several trials share: once, instead of once for each."""

    num_asked: int
    num_run: int
    samples: int
    seconds: float = 0.0

    @property
    def num_saved(self) -> int:
        """Runs that did not have to be done again."""
        return self.num_asked - self.num_run


def chains(rows: Iterable[Row]) -> list[Chain]:
    """The trials that have stages, in the order of their first rows; `rows` of other runs are left out."""
    found: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        if row.get("stage"):
            found.setdefault((row["arm"], row["seed"], row["order"]), []).append(row)
    return [
        Chain(arm=arm, seed=seed, order=order, rows=tuple(sorted(mine, key=lambda row: row["stage"])))
        for (arm, seed, order), mine in found.items()
    ]


def sharing(rows: Iterable[Row], store: Store) -> Sharing:
    """What the finished stages of a study saved, from their records."""
    staged = Counter(row["fingerprint"] for row in rows if row.get("stage"))
    asked = {key: count for key, count in staged.items() if store.finished(key)}
    records = {key: load(store.run_folder(key)) for key in asked}
    return Sharing(
        num_asked=sum(asked.values()),
        num_run=len(asked),
        samples=sum((asked[key] - 1) * record.num_samples for key, record in records.items()),
        seconds=sum((asked[key] - 1) * record.cost.seconds for key, record in records.items()),
    )


def matrix(chain: Chain, scores: Sequence[Scores], before: Scores | None) -> Matrix | None:
    """Scores on every task after every stage; `None` when a stage was not scored on a task that it has seen.

    `scores` has the domains' scores of each stage in order, `before` those before any training.
    """
    parts = {str(row["task"]): trained_on(row) for row in chain.rows}
    never = never_trained(parts, scores)
    everything = {**parts, **{domain: [domain] for domain in never}}
    return assembled(parts, scores, None if before is None else by_task(before, everything), never)


def trained_on(row: Row) -> list[str]:
    """The domains of a stage's own data."""
    return [domain for domain, weight in row["config"]["data"]["mixture"].items() if weight > 0]
