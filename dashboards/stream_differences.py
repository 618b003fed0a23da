"""Differences between arms of a stream, paired order by order and seed by seed.

Arms of one study share orders, seeds and test items, so what an order or a seed does to both cancels. The interval is
that of the crossed design in `stream_rows`; no correction is made for the number of differences.

Shape letters: S seeds, O orders.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dashboards.stream_rows import crossed, rectangle, scale_of, values_of
from dashboards.streams import Chain, Stream
from workloads.evaluation.statistics import Interval

# The metrics whose differences are shown.
PAIRED = ("final", "maa", "forgetting")

Key = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One arm minus another, over the orders and seeds in which both are whole."""

    arm: str
    against: str
    num_orders: int
    num_seeds: int
    # One for each of PAIRED; None where something that it takes is missing.
    values: dict[str, Interval | None]


def differences(stream: Stream) -> tuple[Difference, ...]:
    """Every arm minus the study's first, then every arm minus the one before it.

    The second arm, for which both are the same, is in it once.
    """
    arms = stream.arms
    pairs = [(arm, arms[0]) for arm in arms[1:]]
    pairs += [(arm, before) for before, arm in pairwise(arms[1:])]
    return tuple(difference(stream, arm, against) for arm, against in pairs)


def difference(stream: Stream, arm: str, against: str) -> Difference:
    """`arm` minus `against`; without an order and seed in which both are whole there are no values."""
    mine, other = _whole(stream, arm), _whole(stream, against)
    grid = rectangle([chain for key, chain in mine.items() if key in other])
    return Difference(
        arm=arm,
        against=against,
        num_orders=len(grid),
        num_seeds=len(next(iter(grid.values()), ())),
        values=_values(stream, grid, other),
    )


def _values(
    stream: Stream, grid: Mapping[str, Sequence[Chain]], other: Mapping[Key, Chain]
) -> dict[str, Interval | None]:
    pairs = [
        [(values_of(stream, chain), values_of(stream, other[chain.order, chain.seed])) for chain in chains]
        for chains in grid.values()
    ]
    out: dict[str, Interval | None] = {}
    for name in PAIRED:
        rows_OS = [[_minus(mine[name], its[name]) for mine, its in row] for row in pairs]
        is_whole = bool(rows_OS) and all(value is not None for row in rows_OS for value in row)
        known = is_whole and scale_of(name, stream) is not None
        out[name] = crossed(np.array(rows_OS, dtype=np.float64).T) if known else None
    return out


def _minus(mine: float | None, its: float | None) -> float | None:
    return None if mine is None or its is None else mine - its


def _whole(stream: Stream, arm: str) -> dict[Key, Chain]:
    """(order, seed) -> the arm's whole chain."""
    return {(chain.order, chain.seed): chain for chain in stream.of(arm) if chain.matrix is not None}
