"""Replay: which samples of earlier stages are kept, and where they stand in a stage's stream; a function of the seed.

Every earlier sample has a random number that depends on the seed, its stage's place and its own place alone; those
with the smallest numbers are kept. So a larger share keeps all that a smaller one does, and what a stage keeps of the
past is decided by the past alone.

Source:  reservoir sampling by random keys (Efraimidis, Spirakis 2006): every set of the kept size is equally likely.
Differs: Prism's buffer takes each of the first batches' samples with a fixed chance, which is not uniform.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from workloads.data.mixture import Slot

# Keys that keep the random streams of one seed apart from each other and from those of mixtures.
_KEEP, _MIX = 11, 12


def kept(
    earlier: Sequence[Sequence[Slot]], kind: Literal["reservoir", "balanced"], share: float, seed: int
) -> list[Slot]:
    """round(share * all earlier samples) of `earlier`, the streams of the stages in order.

    reservoir  uniform over all earlier samples
    balanced   equally many of every stage, as far as a stage has as many; uniform within it
    """
    sizes = [len(slots) for slots in earlier]
    size = round(share * sum(sizes))
    keys = [np.random.default_rng([seed, _KEEP, place]).random(n) for place, n in enumerate(sizes)]
    if kind == "balanced":
        chosen = [own.argsort(kind="stable")[:n] for own, n in zip(keys, _equal(sizes, size), strict=True)]
        return [slots[i] for slots, places in zip(earlier, chosen, strict=True) for i in sorted(places)]
    everything = [slot for slots in earlier for slot in slots]
    return [everything[i] for i in sorted(np.concatenate(keys).argsort(kind="stable")[:size])]


def mixed(own: Sequence[Slot], old: Sequence[Slot], seed: int) -> list[Slot]:
    """`own` in its order with the shuffled `old` spread over it evenly, each at random within its stretch."""
    rng = np.random.default_rng([seed, _MIX, len(old)])
    shuffled = [old[i] for i in rng.permutation(len(old))]
    own_places = (np.arange(len(own)) + 0.5) / max(1, len(own))
    old_places = (np.arange(len(old)) + rng.random(len(old))) / max(1, len(old))
    order = np.concatenate([own_places, old_places]).argsort(kind="stable")
    both = [*own, *shuffled]
    return [both[i] for i in order]


def _equal(sizes: Sequence[int], size: int) -> list[int]:
    """`size` shared out among stages as equally as their sizes allow; what is left over goes to the earliest."""
    shares = [0] * len(sizes)
    while sum(shares) < size:
        open_ = [place for place, n in enumerate(sizes) if shares[place] < n]
        each = max(1, (size - sum(shares)) // len(open_))
        for place in open_:
            shares[place] += min(each, sizes[place] - shares[place], size - sum(shares))
    return shares
