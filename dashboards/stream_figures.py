"""Figures of a stream as inline SVG: scores over stages, strips of orders, what is learned against what is lost.

Colours are CSS variables. What a figure shows is in its label or written beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from dashboards.units import UNITS, points, signed
from workloads.evaluation.statistics import Interval
from workloads.record import Scale

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 360, 220, 38, 36, 8
_PLOT_WIDTH, _PLOT_HEIGHT = 560, 340
# Width of a letter of a label in the plot, about.
_LETTER = 6.2


@dataclass(frozen=True, kw_only=True)
class TaskLine:
    """A task's score over stages."""

    task: str
    colour: str
    # Colours are few.
    is_dashed: bool
    # The stage that trains it, counted from 1.
    own: int
    # (stage, score); stage 0 is the untrained model.
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class Dot:
    """One order and seed in a strip."""

    value: float
    colour: str
    label: str


@dataclass(frozen=True, kw_only=True)
class Spot:
    """One arm in a plot, with both its intervals."""

    label: str
    colour: str
    x: Interval
    y: Interval


def task_curves(lines: Sequence[TaskLine], num_stages: int, top: float, scale: Scale) -> Markup:
    """A line for each task, thin until its own stage, where it has a dot, and strong from there on."""
    label = "; ".join(
        f"{line.task}, learned at stage {line.own}: "
        + ", ".join(f"{points(value, scale)} after {stage}" for stage, value in line.points)
        for line in lines
    )
    base, span = _HEIGHT - _BOTTOM, _WIDTH - _LEFT - 8

    def place(stage: float, value: float) -> tuple[float, float]:
        return _LEFT + stage / num_stages * span, _TOP + (1 - min(max(value / top, 0), 1)) * (base - _TOP)

    parts = []
    for share in (0.0, 0.5, 1.0):
        y = place(0, share * top)[1]
        parts.append(
            _line("grid", _LEFT, y, _WIDTH, y) + _words(_LEFT - 5, y + 4, points(share * top, scale), "end")
        )
    every = max(1, num_stages // 10)
    for stage in range(0, num_stages + 1, every):
        parts.append(_words(place(stage, 0)[0], base + 14, str(stage), "middle"))
    parts.append(_words(_LEFT + span / 2, base + 28, "stage; 0 is untrained", "middle"))
    for line in lines:
        dash = " dashed" if line.is_dashed else ""
        early = [place(*point) for point in line.points if point[0] <= line.own]
        late = [place(*point) for point in line.points if point[0] >= line.own]
        parts += [_polyline(f"early{dash}", line.colour, early), _polyline(f"mean{dash}", line.colour, late)]
        own = next((place(*point) for point in line.points if point[0] == line.own), None)
        if own:
            parts.append(_circle("", own[0], own[1], 3, line.colour))
    return Markup(
        '<svg class="curves" viewBox="0 0 {w} {h}" role="img" aria-label="{label}">{parts}</svg>'
    ).format(w=_WIDTH, h=_HEIGHT, label=label, parts=Markup("").join(parts))


def strip_row(dots: Sequence[Dot], mean: float, ends: tuple[float, float]) -> Markup:
    """A dot for each order and seed on an axis from `ends[0]` to `ends[1]`, and a line at the mean."""
    circles = Markup("").join(
        Markup(
            '<circle cx="{x}" cy="11" r="4" style="fill:var(--{colour})"><title>{label}</title></circle>'
        ).format(x=_percent(dot.value, ends), colour=dot.colour, label=dot.label)
        for dot in dots
    )
    x = _percent(mean, ends)
    return Markup(
        '<svg class="row strip" width="100%" height="22" aria-hidden="true">'
        '<rect class="track" width="100%" height="2" y="10"/>{circles}'
        '<line class="middle" x1="{x}" x2="{x}" y1="1" y2="21"/></svg>'
    ).format(circles=circles, x=x)


def strip_axis(ends: tuple[float, float], scale: Scale) -> Markup:
    """Labels of both ends and the middle."""
    ticks = ((ends[0], "start"), (sum(ends) / 2, "middle"), (ends[1], "end"))
    marks = Markup("").join(
        Markup('<text x="{x}" y="11" text-anchor="{anchor}">{words}</text>').format(
            x=_percent(value, ends), anchor=anchor, words=points(value, scale)
        )
        for value, anchor in ticks
    )
    return Markup('<svg class="axis" width="100%" height="14" aria-hidden="true">{}</svg>').format(marks)


def scatter(spots: Sequence[Spot], scale: Scale) -> Markup:
    """Learned (MFT, upwards) against forgotten (to the left: more), with the arms' intervals."""
    least = UNITS[scale].least
    x_low, x_high = _room([spot.x.mean for spot in spots], least)
    y_low, y_high = _room([spot.y.mean for spot in spots], least)
    base, left, right = _PLOT_HEIGHT - _BOTTOM, 48, _PLOT_WIDTH - 8

    def across(value: float) -> float:
        return right - (min(max(value, x_low), x_high) - x_low) / (x_high - x_low) * (right - left)

    def down(value: float) -> float:
        return base - (min(max(value, y_low), y_high) - y_low) / (y_high - y_low) * (base - _TOP)

    parts = [_line("grid", left, base, right, base), _line("grid", left, _TOP, left, base)]
    for value, anchor in ((x_low, "end"), ((x_low + x_high) / 2, "middle"), (x_high, "start")):
        parts.append(_words(across(value), base + 14, signed(value, scale), anchor))
    for value in (y_low, (y_low + y_high) / 2, y_high):
        parts.append(_words(left - 5, down(value) + 4, points(value, scale), "end"))
    parts.append(_words((left + right) / 2, base + 28, "forgetting: less to the right", "middle"))
    for spot in spots:
        x, y = across(spot.x.mean), down(spot.y.mean)
        parts += [
            _line("reach", across(spot.x.low), y, across(spot.x.high), y),
            _line("reach", x, down(spot.y.low), x, down(spot.y.high)),
            _circle("", x, y, 5, spot.colour),
            _words(x + 8, y - 6, spot.label, "start")
            if x + len(spot.label) * _LETTER < right
            else _words(x - 8, y - 6, spot.label, "end"),
        ]
    label = "; ".join(
        f"{spot.label}: learned {points(spot.y.mean, scale)}, forgotten {signed(spot.x.mean, scale)}"
        for spot in spots
    )
    return Markup(
        '<svg class="plot" viewBox="0 0 {w} {h}" role="img" aria-label="{label}">{parts}</svg>'
    ).format(w=_PLOT_WIDTH, h=_PLOT_HEIGHT, label=label, parts=Markup("").join(parts))


def _room(values: Sequence[float], least: float) -> tuple[float, float]:
    """Ends of an axis with some room around the values."""
    low, high = min(values), max(values)
    room = max(0.3 * (high - low), 2 * least)
    return low - room, high + room


def _percent(value: float, ends: tuple[float, float]) -> str:
    share = (min(max(value, ends[0]), ends[1]) - ends[0]) / (ends[1] - ends[0])
    return f"{share * 100:.2f}%"


def _words(x: float, y: float, words: str, anchor: str) -> Markup:
    text = Markup('<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>')
    return text.format(x=x, y=y, anchor=anchor, words=words)


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    line = Markup('<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')
    return line.format(kind=kind, x1=x1, y1=y1, x2=x2, y2=y2)


def _circle(kind: str, x: float, y: float, radius: float, colour: str) -> Markup:
    circle = Markup('<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{r}" style="fill:var(--{colour})"/>')
    return circle.format(kind=kind, x=x, y=y, r=radius, colour=colour)


def _polyline(kind: str, colour: str, places: Sequence[tuple[float, float]]) -> Markup:
    if len(places) < 2:
        return Markup("")
    points_text = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return Markup('<polyline class="{kind}" style="stroke:var(--{colour})" points="{points}"/>').format(
        kind=kind, colour=colour, points=points_text
    )
