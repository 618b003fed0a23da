"""What the methods of a comparison need and can do, in words, as their records declare it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dashboards.results import StudyResults

# Headings of what `words` returns.
COLUMNS = ("routes by", "router hears task loss", "task id", "stateful", "mergeable")
_TASK_ID = {(True, True): "always", (True, False): "in training", (False, True): "at inference"}


@dataclass(frozen=True, kw_only=True)
class MethodRow:
    """One arm's method; one cell for each of `COLUMNS`."""

    arm: str
    method: str
    words: tuple[str, ...]
    # Adapter weights in all and those that one token meets, and the ranks of the plain LoRAs nearest to both.
    adapter_weights: int
    adapter_active: int
    iso_total: int
    iso_active: int


def words(capabilities: Mapping[str, Any]) -> tuple[str, ...]:
    """Declared capabilities as words, in the order of `COLUMNS`."""
    routing = str(capabilities["routing"])
    needs = (bool(capabilities["needs_task_id_train"]), bool(capabilities["needs_task_id_infer"]))
    return (
        routing,
        "–" if routing == "none" else _word(capabilities["router_hears_task_loss"]),
        _TASK_ID.get(needs, "no"),
        _word(capabilities["stateful"]),
        _word(capabilities["mergeable"]),
    )


def method_rows(results: "StudyResults") -> list[MethodRow]:
    """One row for each arm that has a finished run."""
    firsts = {arm: runs[0] for arm in results.arms if (runs := results.runs(arm))}
    return [
        MethodRow(
            arm=arm,
            method=str(run.config["adapter"]["name"]),
            words=words(run.capabilities),
            adapter_weights=run.cost.adapter_weights,
            adapter_active=run.cost.adapter_active,
            iso_total=run.cost.iso_total,
            iso_active=run.cost.iso_active,
        )
        for arm, run in firsts.items()
    ]


def _word(yes: object) -> str:
    return "yes" if yes else "no"
