"""A study YAML as checked values: which arms, grids, searches and seeds one question asks for.

Nothing here imports torch or ray; `orchestrator.trials` turns a Study into runs.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.changes import Sets, changed, flat
from orchestrator.orders import Stream
from orchestrator.orders import read as read_stream
from orchestrator.spaces import Space, read_space
from search_spaces.adapters import ARMS
from workloads.config import SCHEMA_VERSION, methods, read_yaml
from workloads.errors import UserError, nearest, require

STUDIES = Path(__file__).parent.parent / "search_spaces" / "studies"
RECIPES = Path(__file__).parent.parent / "workloads" / "recipes"
FULL = "full"


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one trial holds, and how many run at once."""

    # Workers of one run; above 1 they form a Ray Train group.
    workers: int = 1
    # Trials at once; 0 means as many as the CPUs allow.
    slots: int = 0
    gpus_per_worker: float = 0.0
    # Every worker of a run on a node of its own.
    spread: bool = False


@dataclass(frozen=True, kw_only=True)
class Search:
    """A random search: every arm gets `trials_per_arm` points, each run with every tuning seed."""

    space: Space
    # Search each arm's own method settings too, as search_spaces.adapters.SPACES names them.
    method_space: bool = False
    trials_per_arm: int = 8
    scheduler: str = "none"
    metric: str = "score"
    mode: str = "max"
    seeds: tuple[int, ...] = (1000,)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One line of the comparison: a method and what sets it apart."""

    name: str
    # Empty: the recipe's own method.
    method: str
    set: Sets = field(default_factory=dict)
    # In a study with a stream: empty runs every order, `joint` one run on all stages' data, `alone` a run a task.
    stream: str = ""


@dataclass(frozen=True, kw_only=True)
class Study:
    """One question, ready to be expanded into trials."""

    # The file's name, and after it the profile unless that is `full`.
    name: str
    tree_name: str
    profile: str
    hypothesis: str
    recipe: dict[str, Any]
    set: Sets
    arms: tuple[Arm, ...]
    grid: dict[str, list[Any]]
    search: Search | None
    stream: Stream | None
    seeds: tuple[int, ...]
    resources: Resources
    comparison: dict[str, Any]
    # The file as it was written.
    tree: dict[str, Any]


_KEYS = (
    "schema_version", "hypothesis", "recipe", "set", "arms", "grid", "search", "stream", "seeds",
    "profiles", "resources", "comparison",
)  # fmt: skip
_PROFILE_KEYS = ("set", "seeds", "grid", "resources", "search", "stream")
# Metrics that a run reports once, after its training.
_AT_THE_END = ("score", "eval_loss", "scale")
_ROLES = ("solo", "mix", "double", "iso", "mole", "headline", "before", "joint", "alone")
_BOUNDS = ("joint", "alone")
# What the stages of a stream decide.
_STAGED = ("data.mixture", "init_from", "continual.task")


def find(spec: str) -> Path:
    """The file of a study given as a path or by the name of a packaged one (dashes count as underscores)."""
    if Path(spec).suffix in (".yaml", ".yml"):
        return Path(spec)
    path = STUDIES / f"{spec.replace('-', '_')}.yaml"
    names = sorted(p.stem for p in STUDIES.glob("*.yaml"))
    require(path.is_file(), "study", spec, f"a .yaml file or one of {', '.join(names)}", names)
    return path


def load(spec: str, profile: str = FULL, changes: Iterable[str] = ()) -> Study:
    """Read and check a study, `changes` (`key=value`) over its `set`; raises `UserError` in one line on any mistake."""
    path = find(spec)
    tree = changed(read_yaml(path), changes)
    return from_tree(tree, path.stem.replace("-", "_"), profile, path.parent)


def from_tree(tree: Mapping[str, Any], name: str, profile: str = FULL, folder: Path = Path()) -> Study:
    """Build a Study from plain values; relative recipe paths are looked up beside the study."""
    known(tree, _KEYS, "")
    version = tree.get("schema_version", SCHEMA_VERSION)
    require(version == SCHEMA_VERSION, "schema_version", version, f"this version reads {SCHEMA_VERSION}")
    require(name.isidentifier(), "study name", name, "letters, digits and underscores (the file's name)")
    merged = _with_profile(tree, profile)
    stream = read_stream(merged["stream"]) if "stream" in merged else None
    arms = _arms(merged.get("arms"), staged=stream is not None)
    resources = _fields(Resources, merged.get("resources") or {}, "resources")
    require(resources.workers >= 1, "resources.workers", resources.workers, "a whole number of 1 or more")
    require(resources.slots >= 0, "resources.slots", resources.slots, "0 (all CPUs) or more")
    study = Study(
        name=name if profile == FULL else f"{name}_{profile}",
        tree_name=name,
        profile=profile,
        hypothesis=str(merged.get("hypothesis", "")),
        recipe=read_yaml(_recipe(str(merged.get("recipe", "pocket")), folder)),
        set=flat(merged.get("set") or {}, "set"),
        arms=arms,
        grid=_grid(merged.get("grid") or {}),
        search=_search(merged["search"]) if merged.get("search") else None,
        stream=stream,
        seeds=_seeds(merged.get("seeds", [0]), "seeds"),
        resources=resources,
        comparison=_comparison(merged.get("comparison") or {}, [arm.name for arm in arms]),
        tree=dict(tree),
    )
    _check_stream(study)
    return study


def _check_stream(study: Study) -> None:
    """What does not go together with a stream."""
    if study.stream is None:
        return
    require(
        study.search is None, "search", "with `stream`", "one of the two: tune on a study without a stream"
    )
    places = {"set": study.set, "grid": study.grid, **{f"arms.{arm.name}.set": arm.set for arm in study.arms}}
    for place, settings in places.items():
        for key in settings:
            require(key not in _STAGED, f"{place}.{key}", settings[key], "the stages of `stream` decide it")


def known(tree: Any, keys: Iterable[str], where: str) -> None:
    """Raise unless `tree` is a mapping that has only `keys`."""
    names = list(keys)
    require(isinstance(tree, Mapping), where or "study", tree, f"a mapping with {', '.join(names)}")
    for key in tree:
        if key not in names:
            label = f"{where}.{key}" if where else str(key)
            raise UserError(f"{label}: unknown key; known keys: {', '.join(names)}{nearest(str(key), names)}")


def _with_profile(tree: Mapping[str, Any], profile: str) -> dict[str, Any]:
    """The study with one profile's changes; `full` needs no entry of its own."""
    profiles = tree.get("profiles") or {}
    require(isinstance(profiles, Mapping), "profiles", profiles, "a mapping of profile names")
    for name, part in profiles.items():
        known(part or {}, _PROFILE_KEYS, f"profiles.{name}")
    names = sorted({*profiles, FULL})
    require(profile in names, "profile", profile, f"this study has {', '.join(names)}", names)
    merged = {key: value for key, value in tree.items() if key != "profiles"}
    for key, value in (profiles.get(profile) or {}).items():
        if key in ("set", "resources", "search", "stream") and isinstance(value, Mapping):
            base = flat(merged.get(key) or {}, key) if key == "set" else dict(merged.get(key) or {})
            merged[key] = {**base, **(flat(value, f"profiles.{profile}.set") if key == "set" else value)}
        else:
            merged[key] = value
    return merged


def _arms(tree: Any, staged: bool) -> tuple[Arm, ...]:
    require(
        bool(tree) and isinstance(tree, (list, Mapping)),
        "arms",
        tree,
        "a list of methods or a mapping of arms",
    )
    if isinstance(tree, list):
        tree = {str(name): {"method": name} for name in tree}
    arms = []
    for name, part in tree.items():
        known(part or {}, ("method", "set", "stream"), f"arms.{name}")
        require(str(name).isidentifier(), "arms", name, "a name of letters, digits and underscores")
        method = (part or {}).get("method", name if name in ARMS else "")
        choices = sorted(set(ARMS) & set(methods()))
        require(
            method == "" or method in choices,
            f"arms.{name}.method",
            method,
            f"methods: {', '.join(choices)}",
            choices,
        )
        bound = (part or {}).get("stream", "")
        allowed = f"{' or '.join(_BOUNDS)}; without it the arm runs in every order"
        require(bound in ("", *_BOUNDS), f"arms.{name}.stream", bound, allowed, _BOUNDS)
        require(staged or not bound, f"arms.{name}.stream", bound, "the study has no `stream`")
        settings = flat((part or {}).get("set") or {}, f"arms.{name}.set")
        arms.append(Arm(name=str(name), method=method, set=settings, stream=bound))
    return tuple(arms)


def _grid(tree: Any) -> dict[str, list[Any]]:
    require(isinstance(tree, Mapping), "grid", tree, "a mapping of dotted keys to lists")
    for key, values in tree.items():
        require(
            isinstance(values, list) and bool(values), f"grid.{key}", values, "a list of at least one value"
        )
    return {str(key): list(values) for key, values in tree.items()}


def _search(tree: Any) -> Search:
    names = [f.name for f in dataclasses.fields(Search)]
    known(tree, names, "search")
    space = read_space(tree.get("space", "learning_rate"), "search.space")
    rest = {key: value for key, value in tree.items() if key not in ("space", "seeds")}
    seeds = _seeds(tree.get("seeds", [1000]), "search.seeds")
    search = _fields(Search, {**rest, "space": space, "seeds": seeds}, "search")
    require(
        search.trials_per_arm >= 1,
        "search.trials_per_arm",
        search.trials_per_arm,
        "a whole number of 1 or more",
    )
    for key, choices in (("scheduler", ("none", "asha")), ("mode", ("min", "max"))):
        value = getattr(search, key)
        require(value in choices, f"search.{key}", value, f"one of {', '.join(choices)}", choices)
    watched = search.scheduler == "none" or not search.metric.startswith(_AT_THE_END)
    allowed = "asha watches what training reports, such as loss with mode: min; scores come at the end"
    require(watched, "search.metric", search.metric, allowed)
    return search


def _comparison(tree: Any, arms: list[str]) -> dict[str, Any]:
    known(tree, _ROLES, "comparison")
    for role, value in tree.items():
        inner = (
            value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else [value]
        )
        for arm in inner:
            require(arm in arms, f"comparison.{role}", arm, f"arms of this study: {', '.join(arms)}", arms)
    return dict(tree)


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    good = isinstance(value, list) and bool(value) and all(type(item) is int and item >= 0 for item in value)
    require(
        good and len(set(value)) == len(value), where, value, "a list of different whole numbers of 0 or more"
    )
    return tuple(value)


def _recipe(name: str, folder: Path) -> Path:
    if Path(name).suffix in (".yaml", ".yml"):
        return folder / name
    names = sorted(p.stem for p in RECIPES.glob("*.yaml"))
    require(name in names, "recipe", name, f"a .yaml file or one of {', '.join(names)}", names)
    return RECIPES / f"{name}.yaml"


def _fields(kind: type[Any], tree: Mapping[str, Any], where: str) -> Any:
    """A flat dataclass from a mapping, with types as its defaults have them."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    known(tree, fields, where)
    for key, value in tree.items():
        default = fields[key].default
        if default is dataclasses.MISSING or isinstance(default, tuple):
            continue
        wanted = (int, float) if isinstance(default, float) else (type(default),)
        typed = isinstance(value, wanted) and isinstance(value, bool) == isinstance(default, bool)
        require(typed, f"{where}.{key}", value, f"a {type(default).__name__}")
    return kind(**tree)
