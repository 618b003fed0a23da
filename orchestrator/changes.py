"""Settings of a study as dotted keys, and what a user changes in them on the command line with `--set`."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from workloads.config import apply_overrides
from workloads.errors import require

Sets = dict[str, Any]


def flat(tree: Any, where: str) -> Sets:
    """Nested or dotted settings as dotted ones; a mixture stays one value."""
    require(isinstance(tree, Mapping), where, tree, "a mapping of dotted keys, such as optim.lr: 0.001")
    out: Sets = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping) and prefix != "data.mixture":
            for key, item in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), item)
        else:
            out[prefix] = value

    walk("", tree)
    return out


def changed(tree: Mapping[str, Any], changes: Iterable[str]) -> dict[str, Any]:
    """The study with `key=value` words in its `set` and in no profile's; what tells arms apart cannot be changed."""
    new = flat(apply_overrides({}, changes), "--set")
    if not new:
        return dict(tree)
    arms, profiles, grid = tree.get("arms"), tree.get("profiles") or {}, tree.get("grid")
    for key, value in new.items():
        holders = [
            name for name, part in _parts(arms) if key in flat(part.get("set") or {}, f"arms.{name}.set")
        ]
        allowed = f"the arm {holders[0]} sets it; edit the study" if holders else ""
        require(not holders, f"--set {key}", value, allowed)
        varies = isinstance(grid, Mapping) and key in grid
        require(not varies, f"--set {key}", value, "the grid varies it; edit the study")
    kept = {name: _without(part, new) for name, part in _parts(profiles)}
    own = {"set": {**flat(tree.get("set") or {}, "set"), **new}}
    return {**tree, **own, **({"profiles": {**profiles, **kept}} if kept else {})}


def _parts(tree: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """The named parts of a section that are mappings."""
    pairs = tree.items() if isinstance(tree, Mapping) else ()
    return [(str(name), part) for name, part in pairs if isinstance(part, Mapping)]


def _without(part: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """A profile that leaves `keys` alone."""
    if not part.get("set"):
        return dict(part)
    rest = {key: value for key, value in flat(part["set"], "profiles").items() if key not in keys}
    return {**part, "set": rest}
