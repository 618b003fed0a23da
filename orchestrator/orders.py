"""A study's `stream:` as checked values: its stages, and the orders in which they are trained.

Orders follow from the stages, their own words and seeds alone, never from the other orders of the study, so that
one more order changes none of those that are there.
"""

import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from search_spaces.mixtures import MIXTURES
from workloads.errors import UserError, nearest, require, require_known

Names = tuple[str, ...]

_WORDS = ("given", "reversed")
_FORMS = "given, reversed, {sampled: N, seed: S}, {all: N}, or a list of the stages"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What one stage trains on: a task alone, or a mixture under a name of its own."""

    name: str
    mixture: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Stages, and label -> order of their names; no two orders are the same."""

    stages: tuple[Stage, ...]
    orders: dict[str, Names]

    @property
    def names(self) -> Names:
        """The stages' names as the study lists them."""
        return tuple(stage.name for stage in self.stages)

    def stage(self, name: str) -> Stage:
        """The stage of that name."""
        return next(stage for stage in self.stages if stage.name == name)


def read(tree: Any) -> Stream:
    """The stream that a study's `stream:` describes; raises `UserError` in one line on any mistake."""
    require(isinstance(tree, Mapping), "stream", tree, "a mapping with stages and orders")
    require_known("stream.", tree, ("stages", "orders"))
    given = tree.get("stages")
    require(isinstance(given, list) and bool(given), "stream.stages", given, "a list of at least one stage")
    stages = tuple(_stage(part) for part in given)
    names = tuple(stage.name for stage in stages)
    for name in names:
        require(names.count(name) == 1, "stream.stages", name, "each stage once")
    return Stream(stages=stages, orders=_orders(tree.get("orders", ["given"]), names))


def _stage(part: Any) -> Stage:
    """A task by its name, or `{name: ..., mixture: ...}`."""
    if isinstance(part, str):
        return Stage(name=part, mixture={part: 1.0})
    allowed = "a task, or {name: NAME, mixture: {TASK: WEIGHT}}"
    require(isinstance(part, Mapping), "stream.stages", part, allowed)
    require_known("stream.stages.", part, ("name", "mixture"))
    name, mixture = part.get("name"), part.get("mixture")
    fits = isinstance(name, str) and re.fullmatch("[A-Za-z0-9][A-Za-z0-9_-]*", name) is not None
    require(fits, "stream.stages.name", name, "letters, digits, '_' and '-', a letter or digit first")
    key = f"stream.stages.{name}.mixture"
    if isinstance(mixture, str):
        require(mixture in MIXTURES, key, mixture, f"a mapping or one of {', '.join(MIXTURES)}", MIXTURES)
        mixture = MIXTURES[mixture]
    numbers = isinstance(mixture, Mapping) and all(
        type(weight) in (int, float) for weight in mixture.values()
    )
    require(numbers and bool(mixture), key, mixture, "a mapping of tasks to weights")
    return Stage(name=str(name), mixture={str(task): float(weight) for task, weight in mixture.items()})


def _orders(given: Any, names: Names) -> dict[str, Names]:
    """Label -> order; an order that is there already is left out of `all`, and a mistake anywhere else."""
    require(isinstance(given, list) and bool(given), "stream.orders", given, f"a list of {_FORMS}")
    out: dict[str, Names] = {}
    counters: dict[str, Iterator[int]] = {}
    for entry in given:
        kind, found = _entry(entry, names)
        number = counters.setdefault(kind, itertools.count())
        for order in found:
            label = kind if kind in _WORDS else f"{kind}-{next(number)}"
            same = next((other for other in out if out[other] == order), "")
            if same and kind == "all":
                continue
            require(not same, "stream.orders", entry, f"{' > '.join(order)} is there already, as {same}")
            out[label] = order
    return out


def _entry(entry: Any, names: Names) -> tuple[str, Sequence[Names]]:
    """The kind of one entry of `orders`, and what it stands for."""
    if isinstance(entry, str):
        require(entry in _WORDS, "stream.orders", entry, _FORMS, _WORDS)
        return entry, [names if entry == "given" else names[::-1]]
    if isinstance(entry, list):
        _check_permutation(entry, names)
        return "explicit", [tuple(entry)]
    require(isinstance(entry, Mapping), "stream.orders", entry, _FORMS)
    kind = next((word for word in ("sampled", "all") if word in entry), "")
    require(bool(kind), "stream.orders", entry, _FORMS)
    require_known("stream.orders.", entry, (kind, "seed"))
    number, seed = entry.get(kind), entry.get("seed", 0)
    require(
        type(number) is int and number >= 1, f"stream.orders.{kind}", number, "a whole number of 1 or more"
    )
    require(type(seed) is int, "stream.orders.seed", seed, "a whole number")
    assert isinstance(number, int)
    possible = math.factorial(len(names))
    if kind == "sampled":
        allowed = f"{len(names)} stages have {possible} orders"
        require(number <= possible, "stream.orders.sampled", number, allowed)
        return kind, sampled(names, number, seed)
    return kind, list(itertools.permutations(names)) if possible <= number else sampled(names, number, seed)


def _check_permutation(order: list[Any], names: Names) -> None:
    allowed = f"each of {', '.join(names)} once"
    for name in order:
        if name not in names:
            raise UserError(
                f"stream.orders: {name!r} in {order} is no stage; {allowed}{nearest(str(name), names)}"
            )
    require(sorted(order) == sorted(names), "stream.orders", order, allowed)


def sampled(names: Names, number: int, seed: int) -> list[Names]:
    """`number` different orders that follow from the seed; a larger number begins with the same ones.

    The order given and its reverse come last, when nothing else is left: a study names those itself.
    """
    named = list(dict.fromkeys([names, names[::-1]]))
    free = math.factorial(len(names)) - len(named)
    drawn: dict[Names, None] = {}
    for draw in itertools.count():
        if len(drawn) >= min(number, free):
            break
        order = tuple(sorted(names, key=lambda name: _key(f"{seed}/{draw}/{name}")))
        if order not in named:
            drawn[order] = None
    return [*drawn, *named][:number]


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
