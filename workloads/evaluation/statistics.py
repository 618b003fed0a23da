"""Intervals for mean scores and mean differences that respect both the test items and the training seeds.

Source:  Two-way crossed random effects (items crossed with seeds, as words with subjects in Clark 1973, "The
         language-as-fixed-effect fallacy"); degrees of freedom after Satterthwaite 1946.
Differs: a variance component that is estimated below 0 counts as 0, so that an interval is never narrower
         than the one over seeds alone or the one over items alone. Degrees of freedom are no fewer than those of
         seeds or items alone, whichever are fewer: Satterthwaite's fall below them where the rest is subtracted
         (to 1 for 3 seeds x 3 orders of a stream), and intervals then hold the truth far more often than 95 %.

The model of a score is y[s, i] = mean + seed[s] + item[i] + rest[s, i]. A t-interval over the seeds' means
takes the items for the whole population; an interval over items takes the trained networks for it. Neither is
what a reader means by "would it happen again". No percentile bootstrap: over few seeds it is too narrow.
Limit:   seeds that jump between two levels look calm when all happen to jump alike (at 3 seeds, 1 time in 4).

Shape letters: S seeds, I items, D independent item sets (domains) that share the seeds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

LEVEL = 0.95
# Seeds below which no verdict is given.
MIN_SEEDS = 5

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its 95 % interval, in the unit of the values it was made from.

    `low` and `high` are infinite when nothing was repeated, so that no spread can be estimated.
    """

    mean: float
    low: float
    high: float
    # Degrees of freedom of the t quantile; 0 when the interval is infinite.
    df: float
    # 1 says that the interval is over items only and knows nothing of other seeds.
    num_seeds: int
    # Items of all sets together; 0 says that the interval is over seeds only.
    num_items: int

    @property
    def half_width(self) -> float:
        """Distance from the mean to either end."""
        return self.high - self.mean


def interval(values_SI: FloatArray) -> Interval:
    """Interval of the mean of `values_SI` (scores or paired differences), the same items for every seed."""
    return mean_interval([values_SI])


def mean_interval(sets_SI: Sequence[FloatArray]) -> Interval:
    """Interval of the unweighted mean over D item sets (S, I_d) that share the seeds and may differ in size.

    Seeds enter by the spread of their mean over the sets, so sets that rise and fall together with the seed
    are not taken for independent. With one seed the interval is over items only. Raises `ValueError` for an
    empty or non-finite set, and for sets whose numbers of seeds differ.
    """
    _check(sets_SI)
    num_seeds = len(sets_SI[0])
    num_items = sum(values_SI.shape[1] for values_SI in sets_SI)
    mean_S = np.mean([values_SI.mean(axis=1) for values_SI in sets_SI], axis=0)
    variance, df = _items_only(sets_SI) if num_seeds == 1 else _crossed(sets_SI, mean_S)
    return _student(float(mean_S.mean()), variance, df, num_seeds=num_seeds, num_items=num_items)


def over_seeds(values_S: FloatArray) -> Interval:
    """Plain t-interval over one value per seed: the items, if any, are taken as fixed."""
    _check([values_S[:, None]])
    num_seeds = len(values_S)
    variance = float(values_S.var(ddof=1)) / num_seeds if num_seeds > 1 else math.inf
    return _student(float(values_S.mean()), variance, num_seeds - 1, num_seeds=num_seeds, num_items=0)


def verdict(difference: Interval, min_seeds: int = MIN_SEEDS) -> str:
    """`reproduced` above 0, `not reproduced` below 0, else `inconclusive`; empty below `min_seeds` seeds."""
    if difference.num_seeds < min_seeds:
        return ""
    if difference.low > 0:
        return "reproduced"
    return "not reproduced" if difference.high < 0 else "inconclusive"


def _crossed(sets_SI: Sequence[FloatArray], mean_S: FloatArray) -> tuple[float, float]:
    """Variance of the grand mean and its degrees of freedom, from the mean squares of the two-way layout.

    In units of that variance: `seeds` estimates seed + rest, `items` item + rest, `rest` rest alone; so the
    answer is seeds + items - rest, with seeds >= rest and items >= rest where the components are at least 0.
    """
    num_seeds = len(mean_S)
    seeds = float(mean_S.var(ddof=1)) / num_seeds
    items = rest = items_over_df = rest_over_df = 0.0
    for values_SI in sets_SI:
        item_set, rest_set = _mean_squares(values_SI, len(sets_SI))
        items, rest = items + item_set, rest + rest_set
        num_free = values_SI.shape[1] - 1
        items_over_df += item_set**2 / num_free if num_free else math.inf
        rest_over_df += rest_set**2 / (num_free * (num_seeds - 1)) if num_free else math.inf
    if math.isinf(items_over_df):
        return math.inf, 0
    seeds = max(seeds, rest)
    variance = seeds + max(items - rest, 0.0)
    spread = seeds**2 / (num_seeds - 1) + items_over_df + rest_over_df
    least = min(num_seeds, *(values_SI.shape[1] for values_SI in sets_SI)) - 1
    # No variation at all: any degrees of freedom give the same interval of width 0.
    return variance, max(variance**2 / spread, least) if spread > 0 else num_seeds - 1


def _mean_squares(values_SI: FloatArray, num_sets: int) -> tuple[float, float]:
    """Mean squares of items and of the rest, scaled to be variances of the mean over the sets."""
    num_seeds, num_items = values_SI.shape
    if num_items == 1:
        return 0.0, 0.0
    item_I = values_SI.mean(axis=0)
    rest_SI = values_SI - values_SI.mean(axis=1, keepdims=True) - item_I + values_SI.mean()
    items = num_seeds * float(item_I.var(ddof=1))
    rest = float((rest_SI**2).sum()) / ((num_seeds - 1) * (num_items - 1))
    scale = num_seeds * num_items * num_sets**2
    return items / scale, rest / scale


def _items_only(sets_1I: Sequence[FloatArray]) -> tuple[float, float]:
    """Variance of the mean over sets and its degrees of freedom, from the spread of the items of one seed."""
    if min(values_1I.shape[1] for values_1I in sets_1I) == 1:
        return math.inf, 0
    parts = [float(v.var(ddof=1)) / (v.shape[1] * len(sets_1I) ** 2) for v in sets_1I]
    spread = sum(part**2 / (v.shape[1] - 1) for part, v in zip(parts, sets_1I, strict=True))
    return sum(parts), sum(parts) ** 2 / spread if spread > 0 else min(v.shape[1] for v in sets_1I) - 1


def _student(mean: float, variance: float, df: float, *, num_seeds: int, num_items: int) -> Interval:
    finite = math.isfinite(variance)
    half = float(stdtrit(df, (1 + LEVEL) / 2)) * math.sqrt(variance) if finite else math.inf
    return Interval(
        mean=mean,
        low=mean - half,
        high=mean + half,
        df=float(df) if finite else 0.0,
        num_seeds=num_seeds,
        num_items=num_items,
    )


def _check(sets_SI: Sequence[FloatArray]) -> None:
    if not sets_SI or any(values.ndim != 2 or values.size == 0 for values in sets_SI):
        raise ValueError(f"scores: need arrays of seeds x items, got shapes {[np.shape(v) for v in sets_SI]}")
    if len({len(values) for values in sets_SI}) > 1:
        raise ValueError(f"scores: item sets with different numbers of seeds: {[len(v) for v in sets_SI]}")
    if not all(np.isfinite(values).all() for values in sets_SI):
        raise ValueError("scores: not all values are finite")
