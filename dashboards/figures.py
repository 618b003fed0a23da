"""Small inline SVG figures, drawn with CSS variables so that one drawing serves light, dark and print.

Horizontal positions are percentages wherever a figure is one row, so that it fills whatever box it is in.
Nothing is drawn that is not also written in text beside it, so rows are hidden from screen readers.

Shape letters: L layers, E experts.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from dashboards.units import UNITS
from workloads.evaluation.statistics import MIN_SEEDS, Interval
from workloads.record import Scale

# Size of one cell of an expert map, and of a panel of learning curves, in CSS pixels.
_CELL_WIDTH, _CELL_HEIGHT, _LABEL_WIDTH = 34, 22, 24
_PANEL_WIDTH, _PANEL_HEIGHT, _LEFT, _BOTTOM = 360, 210, 34, 34
_LOSS_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One learning curve; `is_mean` draws it strong."""

    colour: str
    points: Sequence[tuple[float, float]]
    is_mean: bool


def tone(interval: Interval) -> str:
    """`gain` above 0, `loss` below 0, `flat` when the interval holds 0 or is over too few seeds to tell."""
    if interval.num_seeds < MIN_SEEDS:
        return "flat"
    return "gain" if interval.low > 0 else "loss" if interval.high < 0 else "flat"


def nice_limit(values: Iterable[float], least: float = 0.02) -> float:
    """A round number that holds all |values|, at least `least`."""
    largest = max([least, *(abs(value) for value in values if math.isfinite(value))])
    power = 10.0 ** math.floor(math.log10(largest))
    steps = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
    return next(step * power for step in steps if step * power >= largest * (1 - 1e-9))


def interval_row(interval: Interval, limit: float, strong: bool = False) -> Markup:
    """A dot with its whisker on an axis from -limit to +limit, and a line at 0."""
    height, radius = (22, 5) if strong else (18, 3.5)
    middle, low, high = (_percent(x, -limit, limit) for x in (interval.mean, interval.low, interval.high))
    kind = tone(interval) + (" strong" if strong else "")
    return Markup(
        '<svg class="row {kind}" width="100%" height="{height}" aria-hidden="true">'
        '<line class="zero" x1="50%" x2="50%" y1="0" y2="{height}"/>'
        '<line class="whisker" x1="{low}" x2="{high}" y1="{y}" y2="{y}"/>'
        '<circle class="dot" cx="{middle}" cy="{y}" r="{radius}"/></svg>'
    ).format(kind=kind, height=height, low=low, high=high, middle=middle, y=height // 2, radius=radius)


def difference_axis(limit: float, scale: Scale = "fraction") -> Markup:
    """Tick labels in the scale's unit for `interval_row`."""
    end = f"{limit * UNITS[scale].factor:g}"
    ticks = (("0%", "start", f"−{end}"), ("50%", "middle", "0"), ("100%", "end", f"+{end}"))
    marks = Markup("").join(_text(x, 11, words, anchor) for x, anchor, words in ticks)
    return Markup('<svg class="axis" width="100%" height="14" aria-hidden="true">{}</svg>').format(marks)


def bar_row(interval: Interval, colour: str, marks: Mapping[str, float], top: float = 1.0) -> Markup:
    """A bar on an axis from 0 to `top` with its interval; `marks` (CSS class -> score) are baselines."""
    low, high = _percent(interval.low, 0, top), _percent(interval.high, 0, top)
    lines = Markup("").join(
        Markup('<line class="mark {name}" x1="{x}" x2="{x}" y1="0" y2="22"/>').format(
            name=name, x=_percent(score, 0, top)
        )
        for name, score in marks.items()
    )
    return Markup(
        '<svg class="row" width="100%" height="22" aria-hidden="true">'
        '<rect class="track" width="100%" height="12" y="5" rx="2"/>'
        '<rect width="{mean}" height="12" y="5" rx="2" style="fill:var(--{colour})"/>{lines}'
        '<line class="halo" x1="{low}" x2="{high}" y1="11" y2="11"/>'
        '<line class="whisker" x1="{low}" x2="{high}" y1="11" y2="11"/></svg>'
    ).format(mean=_percent(interval.mean, 0, top), colour=colour, lines=lines, low=low, high=high)


def expert_map(shares_LE: Sequence[Sequence[float]]) -> Markup:
    """Share of tokens on each expert, a row per layer; the stronger the more, with the percentage in it."""
    num_experts = max((len(row) for row in shares_LE), default=0)
    width, height = _LABEL_WIDTH + num_experts * _CELL_WIDTH, (len(shares_LE) + 1) * _CELL_HEIGHT
    centres = [_LABEL_WIDTH + (e + 0.5) * _CELL_WIDTH for e in range(num_experts)]
    cells = [_text(centre, 15, f"E{e + 1}", "middle") for e, centre in enumerate(centres)]
    for layer, row in enumerate(shares_LE):
        top = (layer + 1) * _CELL_HEIGHT
        cells.append(_text(_LABEL_WIDTH - 6, top + 15, str(layer), "end"))
        cells += [_cell(_LABEL_WIDTH + e * _CELL_WIDTH, top, share) for e, share in enumerate(row)]
    return Markup(
        '<svg class="experts" width="{w}" height="{h}" viewBox="0 0 {w} {h}" role="img" aria-label="{label}">'
        "{cells}</svg>"
    ).format(w=width, h=height, cells=Markup("").join(cells), label=_map_label(shares_LE))


def curve_panel(curves: Sequence[Curve]) -> Markup:
    """Loss (log scale) over the samples of one domain seen so far."""
    points = [point for curve in curves for point in curve.points]
    right = max((x for x, _ in points), default=1.0)
    floor, ceiling = _loss_range([y for _, y in points])
    lines = Markup("").join(_curve(curve, right, floor, ceiling) for curve in curves)
    ticks = [tick for tick in _LOSS_TICKS if floor <= tick <= ceiling]
    grid = Markup("").join(_loss_tick(tick, floor, ceiling) for tick in ticks)
    base = _PANEL_HEIGHT - _BOTTOM
    axis = [
        _text(_LEFT, base + 14, "0", "start"),
        _text(_PANEL_WIDTH - 2, base + 14, f"{right:,.0f}", "end"),
        _text((_LEFT + _PANEL_WIDTH) / 2, base + 28, "samples of this domain seen", "middle"),
    ]
    return Markup(
        '<svg class="curves" viewBox="0 0 {w} {h}" role="img" '
        'aria-label="training loss over samples seen, log scale">{grid}{lines}{axis}</svg>'
    ).format(w=_PANEL_WIDTH, h=_PANEL_HEIGHT, grid=grid, lines=lines, axis=Markup("").join(axis))


def thin(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most `most` points: the mean of both coordinates over equal stretches."""
    if len(points) <= most:
        return list(points)
    edges = [round(i * len(points) / most) for i in range(most + 1)]
    stretches = [points[a:b] for a, b in itertools.pairwise(edges)]
    return [(sum(x for x, _ in s) / len(s), sum(y for _, y in s) / len(s)) for s in stretches]


def _percent(value: float, low: float, high: float) -> str:
    share = (min(max(value, low), high) - low) / (high - low)
    return f"{share * 100:.2f}%"


def _text(x: float | str, y: float, words: str, anchor: str) -> Markup:
    return Markup('<text x="{x}" y="{y:g}" text-anchor="{anchor}">{words}</text>').format(
        x=x, y=y, anchor=anchor, words=words
    )


def _cell(left: float, top: float, share: float) -> Markup:
    kind = "on" if share > 0.55 else ""
    return Markup(
        '<rect class="load" x="{x}" y="{y}" width="{w}" height="{h}" style="fill-opacity:{opacity:.3f}"/>'
        '<text class="{kind}" x="{middle:g}" y="{base}" text-anchor="middle">{percent}</text>'
    ).format(
        x=left + 1,
        y=top + 1,
        w=_CELL_WIDTH - 2,
        h=_CELL_HEIGHT - 2,
        opacity=0.06 + 0.94 * min(max(share, 0.0), 1.0),
        kind=kind,
        middle=left + _CELL_WIDTH / 2,
        base=top + 15,
        percent=f"{share * 100:.0f}",
    )


def _map_label(shares_LE: Sequence[Sequence[float]]) -> str:
    rows = (", ".join(f"{share * 100:.0f} %" for share in row) for row in shares_LE)
    return "share of tokens on each expert: " + "; ".join(f"layer {i}: {row}" for i, row in enumerate(rows))


def _loss_range(values: Sequence[float]) -> tuple[float, float]:
    """Decent limits on a log axis: the ticks just outside the values."""
    least, most = min(values, default=0.1), max(values, default=1.0)
    floor = max((tick for tick in _LOSS_TICKS if tick <= least), default=_LOSS_TICKS[0])
    above = [tick for tick in _LOSS_TICKS if tick >= most and tick > floor]
    return floor, min(above, default=_LOSS_TICKS[-1] * 2)


def _loss_y(value: float, floor: float, ceiling: float) -> float:
    share = math.log(min(max(value, floor), ceiling) / floor) / math.log(ceiling / floor)
    return 8 + (1 - share) * (_PANEL_HEIGHT - _BOTTOM - 8)


def _loss_tick(tick: float, floor: float, ceiling: float) -> Markup:
    y = _loss_y(tick, floor, ceiling)
    line = Markup('<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
    label = _text(_LEFT - 6, round(y + 4, 1), f"{tick:g}", "end")
    return line.format(left=_LEFT, right=_PANEL_WIDTH, y=y) + label


def _curve(curve: Curve, right: float, floor: float, ceiling: float) -> Markup:
    span = _PANEL_WIDTH - _LEFT - 2
    places = [(_LEFT + x / right * span, _loss_y(y, floor, ceiling)) for x, y in curve.points]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return Markup('<polyline class="{kind}" style="stroke:var(--{colour})" points="{points}"/>').format(
        kind="mean" if curve.is_mean else "one", colour=curve.colour, points=points
    )
