"""What a study will take: samples, tokens, weights, memory, disk and hours, from measured costs.

Costs are cached per method in calibration.json. `calibrate` measures them with a short real run; without it
the finished runs of the study itself serve, and what is not known is shown as such.
"""

import dataclasses
import json
import math
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from orchestrator.cluster import local_slots
from orchestrator.progress import duration
from orchestrator.store import Store
from orchestrator.streams import expanded
from orchestrator.study import Study
from orchestrator.trials import Trial, distinct, search_points
from workloads.config import RunConfig
from workloads.data import mixture, sources
from workloads.identity import fingerprint
from workloads.record import RunRecord, is_finished, load, write_json

UNKNOWN = "not measured"
# The driver, Ray's own processes and MLflow, in bytes.
_BASE_BYTES = 1_200_000_000


@dataclass(frozen=True, kw_only=True)
class Rate:
    """What one method costs on this machine."""

    # Per training sample and per evaluation item, and what a run takes besides, in seconds.
    train_seconds: float
    eval_seconds: float
    other_seconds: float
    tokens_per_sample: float
    peak_bytes: int
    disk_bytes: int
    trainable: int


def samples(config: RunConfig) -> int:
    """Training samples of a run; of a budget in tokens, as many as there are when each is as long as allowed."""
    data, source = config.data, sources.of(config.data)
    sizes = {domain: source.size(domain, "train") for domain in mixture.domains(data)}
    parts = mixture.multiples(data, sizes)
    longest = data.max_length if data.tokens else 1
    return sum(round(part * mixture.unit(data) / longest) for part in parts.values())


def replayed(config: RunConfig, before: Mapping[str, RunConfig]) -> int:
    """Samples of earlier stages that a stage sees again; `before` holds the study's runs by fingerprint."""
    if config.continual.replay == "none":
        return 0
    earlier, key = 0, config.init_from
    while key in before:
        earlier, key = earlier + samples(before[key]), before[key].init_from
    return round(config.continual.replay_share * earlier)


def eval_items(config: RunConfig) -> int:
    """Items that a run answers."""
    return config.eval.samples * len(sources.evaluated(config))


def rate_of(record: RunRecord, folder: Path) -> Rate:
    """Costs per sample and item from a finished run."""
    cost = record.cost
    items = sum(score.num_items for score in record.scores.values())
    return Rate(
        train_seconds=cost.train_seconds / max(1, record.num_samples),
        eval_seconds=cost.eval_seconds / max(1, items),
        other_seconds=max(0.0, cost.seconds - cost.train_seconds - cost.eval_seconds),
        tokens_per_sample=cost.tokens_per_second / cost.samples_per_second
        if cost.samples_per_second
        else 0.0,
        peak_bytes=cost.peak_bytes,
        disk_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        trainable=cost.trainable,
    )


def key_of(config: RunConfig) -> str:
    """What a rate belongs to: base model with VCE or without, method with its settings, dtype, look at the past."""
    model, fields = config.model, dataclasses.asdict(config.adapter)
    # The order of the tasks costs nothing.
    settings = json.dumps(
        {**fields, **{k: sorted(fields[k]) for k in ("tasks",) if k in fields}}, sort_keys=True
    )
    past = f" {config.continual.regulariser} {config.continual.replay}" if _looks_back(config) else ""
    vce = f" vce {model.vce_levels} {model.vce_heads} {model.vce_points}" if model.vce else ""
    base = f"{model.language_model} {model.vision_tower}" if model.language_model else model.name_or_path
    return f"{base}{vce} {config.optim.dtype} {settings}{past}"


def _looks_back(config: RunConfig) -> bool:
    """Whether a stage does something with those before it."""
    own = config.continual
    return config.init_from != "" and (own.regulariser, own.replay) != ("none", "none")


def rates(store: Store, trials: Iterable[Trial]) -> dict[str, Rate]:
    """Known costs: the cached calibration, and over it the finished runs of these trials."""
    known: dict[str, Rate] = {}
    if store.calibration.is_file():
        tree = json.loads(store.calibration.read_text(encoding="utf-8"))
        known = {key: Rate(**value) for key, value in tree["rates"].items()}
    for trial in trials:
        folder = store.run_folder(trial.fingerprint)
        if is_finished(folder):
            known[key_of(trial.config)] = rate_of(load(folder), folder)
    return known


def planned(study: Study) -> list[Trial]:
    """The runs to plan for; a search counts with its arms' own settings at every point."""
    return search_points(study) if study.search else list(distinct(expanded(study)).values())


def representatives(study: Study) -> list[Trial]:
    """One trial for every cost that has to be known."""
    return list({key_of(trial.config): trial for trial in planned(study)}.values())


def calibrate(trials: Iterable[Trial], store: Store, console: Console) -> None:
    """Measure every trial's cost with a run of a few steps in this process, and cache it."""
    from workloads.run import run

    measured = {}
    for trial in trials:
        config = _short(trial.config)
        with tempfile.TemporaryDirectory() as folder:
            own = Path(folder) / fingerprint(config)
            record = run(config, lambda metrics, path: None, own)
            if _looks_back(trial.config):  # at a short first stage
                config = dataclasses.replace(config, init_from=own.name)
                own = Path(folder) / fingerprint(config)
                record = run(config, lambda metrics, path: None, own)
            measured[key_of(trial.config)] = dataclasses.asdict(rate_of(record, own))
        console.print(f"measured {trial.arm}: {record.cost.seconds:.1f} s", highlight=False, markup=False)
    old = (
        json.loads(store.calibration.read_text(encoding="utf-8"))["rates"]
        if store.calibration.is_file()
        else {}
    )
    write_json(store.calibration, {"schema_version": 1, "rates": {**old, **measured}})


def _short(config: RunConfig) -> RunConfig:
    """The same run with a few steps and a few answers; the shares of its domains stay."""
    parts = sum(config.data.mixture.values())
    replace = dataclasses.replace
    return replace(
        config,
        init_from="",
        data=replace(
            config.data, samples=max(2, math.ceil(20 * config.optim.global_batch / parts)), tokens=0
        ),
        eval=replace(config.eval, samples=min(config.eval.samples, 100)),
        execution=replace(config.execution, workers=1, checkpoint_every=0),
    )


def table(study: Study, store: Store) -> Table:
    """The plan as a table: one line per arm, then the sums; what several trials share is counted once."""
    asked = search_points(study) if study.search else expanded(study)
    trials = asked if study.search else list(distinct(asked).values())
    known = rates(store, trials)
    slots = local_slots(study.resources, trials[0].config.execution.threads)
    done = {trial.fingerprint for trial in trials if store.finished(trial.fingerprint)}
    counts = _counts(trials)
    out = Table("arm", "runs", "done", "samples", "tokens", "weights", "seconds a run")
    out.title, out.show_footer = study.name, True
    for arm in dict.fromkeys(trial.arm for trial in asked):
        mine = [trial for trial in trials if trial.arm == arm]
        finished = sum(trial.fingerprint in done for trial in mine)
        cells = [escape(arm), str(len(mine)), str(finished)]
        if mine:
            cells += _means(mine, known, counts)
        out.add_row(*cells)
    _footer(out, trials, known, done, counts, slots)
    out.caption = f"{out.caption}{_sharing(asked, counts)}"
    return out


def _counts(trials: list[Trial]) -> dict[str, int]:
    """Fingerprint -> samples of its run, those that are seen again included."""
    before = {trial.fingerprint: trial.config for trial in trials}
    return {key: samples(config) + replayed(config, before) for key, config in before.items()}


def _means(mine: list[Trial], known: dict[str, Rate], counts: dict[str, int]) -> list[str]:
    """Samples, tokens, weights and seconds of one of an arm's runs; stages differ, so their mean."""
    pairs = [(trial, known.get(key_of(trial.config))) for trial in mine]
    mean = round(sum(counts[trial.fingerprint] for trial in mine) / len(mine))
    measured = [(trial, rate) for trial, rate in pairs if rate]
    if len(measured) < len(pairs):
        return [f"{mean:,}"]
    seconds = [_seconds(trial.config, rate, counts[trial.fingerprint]) for trial, rate in measured]
    tokens = [counts[trial.fingerprint] * rate.tokens_per_sample for trial, rate in measured]
    weights = measured[0][1].trainable
    return [f"{mean:,}", f"{sum(tokens) / len(mine):,.0f}", f"{weights:,}", f"{sum(seconds) / len(mine):.0f}"]


def _sharing(asked: list[Trial], counts: dict[str, int]) -> str:
    """What stages that several trials share save, in words; empty without stages."""
    staged = [trial for trial in asked if trial.spot.stage]
    if not staged:
        return ""
    runs = {trial.fingerprint for trial in staged}
    everything = sum(counts[trial.fingerprint] for trial in staged)
    saved = everything - sum(counts[key] for key in runs)
    share = f"{100 * saved / everything:.0f} %" if everything else "0 %"
    asked_for = f"{len(staged)} stages of all trials are {len(runs)} runs"
    return f"; sharing: {asked_for}; saves {len(staged) - len(runs)} runs and {saved:,} samples ({share})"


def _footer(
    out: Table,
    trials: list[Trial],
    known: dict[str, Rate],
    done: set[str],
    counts: dict[str, int],
    slots: int,
) -> None:
    """Sums into the footers, and what is not a sum into the caption."""
    left = [trial for trial in trials if trial.fingerprint not in done]
    found = [(trial, known.get(key_of(trial.config))) for trial in left]
    pairs = [(trial, rate) for trial, rate in found if rate]
    total = sum(counts[trial.fingerprint] for trial in trials)
    footers = ("all", str(len(trials)), str(len(done)), f"{total:,}")
    for column, text in zip(out.columns, footers, strict=False):
        column.footer = text
    parts = [f"{len(left)} runs to do, {slots} at once"]
    if len(pairs) < len(left):
        parts.append(
            f"time, memory and disk of {len(left) - len(pairs)}: {UNKNOWN} (plan --calibrate measures)"
        )
    if pairs:
        each = [_seconds(trial.config, rate, counts[trial.fingerprint]) for trial, rate in pairs]
        seconds = max(sum(each) / slots, _longest(pairs, each))
        memory = _BASE_BYTES + slots * max(rate.peak_bytes for _, rate in pairs)
        disk = sum(rate.disk_bytes for _, rate in pairs)
        parts.append(
            f"about {duration(seconds)}, {memory / 1e9:.1f} GB of memory, {disk / 1e6:.0f} MB of disk"
        )
    out.caption = "; ".join(parts)


def _longest(pairs: list[tuple[Trial, Rate]], each: list[float]) -> float:
    """Seconds of the longest chain of stages, which no number of slots makes shorter."""
    ends: dict[str, float] = {}
    for (trial, _), seconds in zip(pairs, each, strict=True):
        ends[trial.fingerprint] = seconds + ends.get(trial.config.init_from, 0.0)
    return max(ends.values())


def _seconds(config: RunConfig, rate: Rate, count: int) -> float:
    return count * rate.train_seconds + eval_items(config) * rate.eval_seconds + rate.other_seconds
