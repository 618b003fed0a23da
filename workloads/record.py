"""RunRecord: what one run did and what came out, as plain data in record.json; loads without torch.

A run's folder holds `config.json`, `events.jsonl` (one JSON object per report), `predictions.jsonl`,
`rejected.jsonl` (bad samples, when there are any), `adapter/`, `past.safetensors` (what EWC holds weights to) and,
once the run is finished, `record.json`.
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from workloads.errors import require

CONFIG = "config.json"
RECORD = "record.json"
EVENTS = "events.jsonl"
PREDICTIONS = "predictions.jsonl"
REJECTED = "rejected.jsonl"
ADAPTER = "adapter"
CHECKPOINT = "checkpoint"
PAST = "past.safetensors"
RECORD_VERSION = 1
# In an event with scores: start of the keys that name a domain's scale where it is no fraction, and key of the words
# that stand in place of a mean over domains.
SCALE_OF = "scale/"
NO_MEAN = "no_mean"
Scale = Literal["fraction", "percent", "cider"]
# Scale -> the best score on it; 0 is the worst on each.
TOP: Mapping[Scale, float] = {"fraction": 1.0, "percent": 100.0, "cider": 10.0}


@dataclass(frozen=True, kw_only=True)
class DomainScore:
    """Score of one domain by its own scorer, on that scorer's scale."""

    score: float
    num_items: int
    # Mean loss per supervised token on the scored items, in nats.
    loss: float
    # Question type -> (score, number of items).
    by_type: dict[str, tuple[float, int]]
    # Score of always giving the most frequent training answer to each question; None where there is no such answer:
    # in a domain that has no training split, and in captions.
    majority: float | None
    # Name and version of the scorer.
    scorer: str = "exact"
    scorer_version: str = "exact-1"
    scale: Scale = "fraction"
    # Standard error over the items; None for a single item, and in records that do not tell.
    error: float | None = None


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What the run took on the machine it ran on."""

    # Seconds: whole run, its training loop, its evaluation.
    seconds: float
    train_seconds: float
    eval_seconds: float
    samples_per_second: float
    tokens_per_second: float
    # Largest resident set of the first worker, in bytes.
    peak_bytes: int
    # Weights that are trained (all, the adapter's alone), and the adapter weights that one token meets.
    trainable: int
    adapter_weights: int
    adapter_active: int
    # Ranks of the plain LoRAs with about as many weights as the adapter in all, and as one token meets; 0 is unknown.
    iso_total: int = 0
    iso_active: int = 0
    # Looking back at earlier stages, before training: Fisher, teacher.
    past_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Ancestor:
    """An earlier stage that a run's adapter comes from."""

    fingerprint: str
    # Empty: it was no stage of a stream.
    task: str


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One finished run."""

    schema_version: int = RECORD_VERSION
    fingerprint: str
    name: str
    seed: int
    # `workloads.config.to_tree` of the run's configuration.
    config: dict[str, Any]
    # Hashes and versions that entered the fingerprint: model, data, method, scorer, image processor.
    identity: dict[str, str]
    # Versions of packages, python, git commit, platform; how the adapter computes, where it has several ways.
    environment: dict[str, str]
    # Capabilities that the method declares.
    capabilities: dict[str, Any]
    # Hash of the decoded training samples in the order they were seen.
    stream_hash: str
    # Hash of the decoded evaluation items.
    eval_hash: str
    # Domain -> share of samples, of supervised tokens.
    sample_shares: dict[str, float]
    token_shares: dict[str, float]
    num_steps: int
    num_samples: int
    num_rejected: int
    # Domain -> mean training loss over the last tenth of the steps, nats per supervised token.
    train_loss: dict[str, float]
    scores: dict[str, DomainScore]
    # Domain -> layer -> share of tokens on each expert, on the evaluation items; empty without a router.
    routing: dict[str, list[list[float]]] = field(default_factory=dict)
    cost: Cost
    # How often the run was resumed.
    num_resumes: int = 0
    # The stages before this one, the first one first.
    lineage: list[Ancestor] = field(default_factory=list)
    # Samples of earlier stages among `num_samples`.
    num_replayed: int = 0
    # Task -> task that the method selected -> number of evaluation items, over the tasks learned so far; empty where
    # the method selects none. The share of items whose own task was selected; None without such items.
    selected: dict[str, dict[str, int]] = field(default_factory=dict)
    selector_accuracy: float | None = None


def mean_score(scores: Mapping[str, DomainScore]) -> float | None:
    """Mean over domains; None when their scores lie on different scales."""
    if len({score.scale for score in scores.values()}) > 1:
        return None
    return sum(score.score for score in scores.values()) / len(scores)


def mean_over(scores: Mapping[str, DomainScore], domains: Sequence[str]) -> float | None:
    """Mean over `domains`; None where one of them was not scored, or their scales differ."""
    return mean_score({d: scores[d] for d in domains}) if all(d in scores for d in domains) else None


def no_mean(scales: Mapping[str, Scale]) -> str:
    """Why domains have no mean, from the scale of each."""
    told = ", ".join(f"{domain} 0 to {TOP[scale]:g} ({scale})" for domain, scale in scales.items())
    return f"no mean over domains, since their scales differ: {told}"


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: readers see the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)  # others may read a shared root
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def save(record: RunRecord, folder: Path) -> None:
    """Write `record.json`, which marks the run as finished."""
    write_json(folder / RECORD, dataclasses.asdict(record))


def load(folder: Path) -> RunRecord:
    """Read `record.json`; raises `UserError` when its schema is not this version's."""
    path = folder / RECORD
    tree = json.loads(path.read_text(encoding="utf-8"))
    found = tree.get("schema_version") if isinstance(tree, dict) else None
    allowed = f"not a record of this version, which reads {RECORD_VERSION}"
    require(found == RECORD_VERSION, f"{path}: schema_version", found, allowed)
    tree["scores"] = {
        domain: DomainScore(**{**score, "by_type": {k: tuple(v) for k, v in score["by_type"].items()}})
        for domain, score in tree["scores"].items()
    }
    tree["cost"] = Cost(**tree["cost"])
    tree["lineage"] = [Ancestor(**each) for each in tree.get("lineage", [])]
    return RunRecord(**tree)


def is_finished(folder: Path) -> bool:
    """Whether the run in `folder` ended well."""
    return (folder / RECORD).is_file()


def append_event(folder: Path, event: dict[str, Any]) -> None:
    """Append one line to `events.jsonl`; a single write, so that a killed process leaves whole lines."""
    line = json.dumps({"schema_version": RECORD_VERSION, **event}, allow_nan=False) + "\n"
    with (folder / EVENTS).open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        cut = size > 0 and file.read(1) != b"\n"
        file.write(("\n" + line if cut else line).encode())


def read_events(folder: Path) -> Iterator[dict[str, Any]]:
    """The events of a run in order; a last line cut off by a kill is left out."""
    path = folder / EVENTS
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("}\n"):
                yield json.loads(line)
