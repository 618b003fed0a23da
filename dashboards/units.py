"""How scores are written: each on its own scale, shares and percentages in points from 0 to 100, CIDEr from 0 to 10."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workloads.record import Scale, no_mean

if TYPE_CHECKING:
    from workloads.evaluation.statistics import Interval

# Stands where a mean would.
NO_MEAN = "scales differ"


@dataclass(frozen=True, kw_only=True)
class Unit:
    """The unit that the scores of one scale are written in."""

    name: str
    # Written number of a score of 1, and its decimals.
    factor: float
    decimals: int
    # The least score at the end of an axis of differences, and the score at which a bar ends; 0: the panel's best.
    least: float
    bar: float


UNITS: Mapping[Scale, Unit] = {
    "fraction": Unit(name="points", factor=100, decimals=1, least=0.02, bar=1.0),
    "percent": Unit(name="percent", factor=1, decimals=1, least=2.0, bar=100.0),
    "cider": Unit(name="CIDEr, 0 to 10", factor=1, decimals=3, least=0.02, bar=0.0),
}


def points(value: float, scale: Scale = "fraction") -> str:
    """0.713 -> 71.3; a CIDEr of 0.713 -> 0.713."""
    unit = UNITS[scale]
    return f"{value * unit.factor:.{unit.decimals}f}"


def signed(value: float, scale: Scale = "fraction") -> str:
    """0.021 -> +2.1, with a real minus sign and no sign on a zero."""
    unit = UNITS[scale]
    text = f"{value * unit.factor:+.{unit.decimals}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def spread(interval: "Interval", scale: Scale = "fraction") -> str:
    """± half the interval's width, in the scale's unit."""
    return f"± {points(interval.half_width, scale)}" if math.isfinite(interval.half_width) else "± ?"


def bracket(interval: "Interval", scale: Scale = "fraction") -> str:
    """[low, high], signed."""
    if not math.isfinite(interval.half_width):
        return "[no interval]"
    return f"[{signed(interval.low, scale)}, {signed(interval.high, scale)}]"


def with_spread(interval: "Interval", scale: Scale = "fraction") -> str:
    """71.3 ± 2.1."""
    return f"{points(interval.mean, scale)} {spread(interval, scale)}"


def heading(domain: str, scale: Scale) -> str:
    """A domain's name, with the unit where that is not points."""
    return domain if scale == "fraction" else f"{domain} ({UNITS[scale].name})"


def common(scales: Mapping[str, Scale]) -> Scale | None:
    """The scale that all domains share, if there is one."""
    found: set[Scale] = set(scales.values())
    return found.pop() if len(found) == 1 else None


def told(scales: Mapping[str, Scale]) -> str:
    """Why there is no mean over domains; empty when there is one."""
    return "" if common(scales) or not scales else no_mean(scales)


def limit_words(limits: Mapping[Scale, float]) -> str:
    """The ends of axes, each in its unit: `5 points`."""
    units = [(UNITS[scale], limit) for scale, limit in limits.items()]
    return ", ".join(f"{round(limit * unit.factor, 6):g} {unit.name}" for unit, limit in units)
