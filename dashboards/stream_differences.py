"""Differences between arms of a stream, paired order by order and seed by seed.

Arms of one study share orders, seeds and test items, so what an order or a seed does to both cancels. The interval is
that of the crossed design in `stream_rows`; no correction is made for the number of differences.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from dashboards.stream_rows import Values, intervals, rectangle, values_of
from dashboards.streams import Stream

# The metrics whose differences are shown.
PAIRED = ("final", "maa", "forgetting")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One arm minus another, over the orders and seeds in which both are whole."""

    arm: str
    against: str
    num_orders: int
    num_seeds: int
    # One for each of PAIRED; None where something that it takes is missing.
    values: Values


def differences(stream: Stream) -> tuple[Difference, ...]:
    """Every arm minus the study's first, then every arm minus the one before it; none where the tasks' scales differ.

    The second arm, for which both are the same, is in it once.
    """
    if stream.scale is None:
        return ()
    arms = stream.arms
    pairs = [(arm, arms[0]) for arm in arms[1:]]
    pairs += [(arm, before) for before, arm in pairwise(arms[1:])]
    return tuple(difference(stream, arm, against) for arm, against in pairs)


def difference(stream: Stream, arm: str, against: str) -> Difference:
    """`arm` minus `against`; without an order and seed in which both are whole there are no values."""
    other = {(chain.order, chain.seed): chain for chain in stream.of(against) if chain.matrix is not None}
    grid = rectangle([chain for chain in stream.of(arm) if (chain.order, chain.seed) in other])
    found = [
        [
            _minus(values_of(stream, chain), values_of(stream, other[chain.order, chain.seed]))
            for chain in part
        ]
        for part in grid.values()
    ]
    return Difference(
        arm=arm,
        against=against,
        num_orders=len(grid),
        num_seeds=len(next(iter(grid.values()), ())),
        values=intervals(stream, found, PAIRED),
    )


def _minus(mine: Mapping[str, float | None], its: Mapping[str, float | None]) -> dict[str, float | None]:
    pairs = {name: (mine[name], its[name]) for name in PAIRED}
    return {name: None if a is None or b is None else a - b for name, (a, b) in pairs.items()}
