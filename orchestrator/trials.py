"""A Study expanded into trials: every arm, grid point and seed as a checked RunConfig with fingerprint."""

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from orchestrator.study import Arm, Study
from search_spaces.adapters import ARMS, SPACES, Space
from search_spaces.mixtures import MIXTURES
from workloads.config import RunConfig, check, from_tree, to_tree
from workloads.data import sources
from workloads.errors import UserError, require
from workloads.identity import fingerprint

Tree = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Spot:
    """Where a run stands in a study's stream; all empty: nowhere."""

    # Label of the order; a run that belongs to no order has none.
    order: str = ""
    # Counted from 1.
    stage: int = 0
    task: str = ""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run as a study sees it."""

    # The arm's label: its name, and the grid or search point after an @.
    arm: str
    seed: int
    point: dict[str, Any] = field(default_factory=dict)
    config: RunConfig
    fingerprint: str
    spot: Spot = field(default_factory=Spot)


def fixed(study: Study) -> list[Trial]:
    """All trials of a study without search and stream, in the order seed, arm, grid point.

    Seeds come first, so that a study stopped half-way has whole replications of the comparison.
    """
    firsts = [
        build(arm_tree(study, arm), arm.name, study.seeds[0], point)
        for arm in study.arms
        for point in points(study)
    ]
    return [seeded(first, seed) for seed in study.seeds for first in firsts]


def points(study: Study) -> list[dict[str, Any]]:
    """Every point of the study's grid; without a grid the one that sets nothing."""
    return [dict(zip(study.grid, values, strict=True)) for values in itertools.product(*study.grid.values())]


def search_points(study: Study) -> list[Trial]:
    """Every trial of a search, standing at its arm's first point; raises `UserError` on wrong keys."""
    search = study.search
    assert search is not None
    out = []
    for arm in study.arms:
        point = {key: _first(part) for key, part in space_of(study, arm).items()}
        first = build(arm_tree(study, arm), arm.name, search.seeds[0], point)
        out += [first] * (search.trials_per_arm * len(search.seeds))
    return out


def foreseen(study: Study, todo: Sequence[Trial]) -> list[RunConfig]:
    """The runs to come; of a search, which draws its points as it goes, every arm's first one with every seed."""
    if not study.search:
        return [trial.config for trial in todo]
    firsts = {trial.arm: trial for trial in search_points(study)}
    return [seeded(first, seed).config for first in firsts.values() for seed in study.search.seeds]


def space_of(study: Study, arm: Arm) -> Space:
    """What is searched for one arm."""
    assert study.search is not None
    own = SPACES[arm_tree(study, arm)["adapter"]["name"]] if study.search.method_space else {}
    return {**study.search.space, **own}


def distinct(trials: list[Trial]) -> dict[str, Trial]:
    """Fingerprint -> the first trial that has it: equal configurations are one run."""
    out: dict[str, Trial] = {}
    for trial in trials:
        out.setdefault(trial.fingerprint, trial)
    return out


def arm_tree(study: Study, arm: Arm) -> Tree:
    """The configuration tree of an arm: recipe, then `set`, then the arm's own `set`, then resources.

    The arm comes after the study and its profile, since it holds what tells the arms apart.
    """
    tree = copy.deepcopy(study.recipe)
    own = tree.get("adapter", {})
    if arm.method:
        kept = own if own.get("name") == arm.method else {}
        tree["adapter"] = {"name": arm.method, **kept, **ARMS[arm.method]}
    for key, value in {**study.set, **arm.set}.items():
        put(tree, key, value)
    put(tree, "execution.workers", study.resources.workers)
    put(tree, "execution.gpus_per_worker", study.resources.gpus_per_worker)
    return tree


def build(base: Mapping[str, Any], arm: str, seed: int, point: Mapping[str, Any]) -> Trial:
    """One trial from an arm's tree; a mistake names the arm it stands in."""
    tree = copy.deepcopy(dict(base))
    rounded = {key: round_point(value) for key, value in point.items()}
    for key, value in rounded.items():
        put(tree, key, value)
    name = label(arm, rounded)
    with naming(name):
        config = from_tree({**tree, "seed": seed, "name": f"{name}/{seed}"})
        sources.check(config)
    return Trial(arm=name, seed=seed, point=rounded, config=config, fingerprint=fingerprint(config))


def seeded(trial: Trial, seed: int) -> Trial:
    """The same run with another seed."""
    if seed == trial.seed:
        return trial
    with naming(trial.arm):
        config = replace(trial.config, seed=seed, name=f"{trial.arm}/{seed}")
        check(config)
    return replace(trial, seed=seed, config=config, fingerprint=fingerprint(config))


@contextmanager
def naming(arm: str) -> Iterator[None]:
    """Put an arm's name before a mistake in its settings."""
    try:
        yield
    except UserError as error:
        raise UserError(f"arm {arm}: {error}") from None


def put(tree: Tree, key: str, value: Any) -> None:
    """Set a dotted key in place; a mixture may be given by its name, and replaces the one that was there."""
    if key == "data.mixture" and isinstance(value, str):
        require(value in MIXTURES, key, value, f"a mapping or one of {', '.join(MIXTURES)}", MIXTURES)
        value = dict(MIXTURES[value])
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        require(isinstance(node, dict), key, value, f"`{parent}` is a single value, not a section")
    node[leaf] = value


def label(arm: str, point: Mapping[str, Any]) -> str:
    """`lora@lr=0.002,mixture=all_equal`: an arm's name with the last words of the keys that vary."""
    words = [f"{key.rsplit('.', 1)[-1]}={_short(value)}" for key, value in point.items()]
    return f"{arm}@{','.join(words)}" if words else arm


def round_point(value: Any) -> Any:
    """Sampled floats with four significant digits, so that a point can be written down and run again."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return "+".join(f"{key}:{item:g}" for key, item in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def _first(part: Mapping[str, list[Any]]) -> Any:
    """A value out of the space, for a check before anything runs."""
    return next(iter(part.values()))[0]


def row(trial: Trial) -> dict[str, Any]:
    """The trial's line in study.json before it ran."""
    return {
        "arm": trial.arm,
        "seed": trial.seed,
        "point": trial.point,
        **asdict(trial.spot),
        "fingerprint": trial.fingerprint,
        "config": to_tree(trial.config),
        "status": "pending",
        "error": "",
        # host:pid of the trial's process.
        "where": "",
        "started": 0.0,
        "ended": 0.0,
    }


def flat_params(tree: Mapping[str, Any]) -> dict[str, str]:
    """A configuration tree as dotted text values, for MLflow."""
    out: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping) and value:
            for key, item in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), item)
        else:
            out[prefix] = str(value)

    walk("", tree)
    return out
