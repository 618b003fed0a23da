"""The terminal's tables of a stream: what each arm learns, keeps and forgets, in the unit of its tasks' scores."""

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from dashboards.results import StudyResults
from dashboards.stream_differences import PAIRED, Difference, differences
from dashboards.stream_rows import COLUMNS, ROLES, StreamRow, StreamSummary, scale_of, summarise_stream
from dashboards.streams import Stream, missing_lines, stream_of
from dashboards.units import NO_MEAN, UNITS, bracket, signed, spread, with_spread
from workloads.evaluation.statistics import Interval
from workloads.record import Scale, no_mean

# The columns that one line of a terminal holds; the others have a table of their own.
_FIRST = ("final", "mft", "maa", "bwt_T", "bwt_Tminus1", "forgetting", "fwt", "zero_shot_never")
_SECOND = ("zero_shot_later", "intransigence", "mif")


def stream_parts(results: StudyResults) -> list[RenderableType]:
    """Tables of the study's stream, and what is missing; nothing for a study without one."""
    stream = stream_of(results)
    if stream is None:
        return []
    found = summarise_stream(stream)
    parts: list[RenderableType] = [_main_table(found), _order_table(found)]
    if rows := differences(stream):
        parts.append(_difference_table(stream, rows))
    parts += [Text(line) for line in scale_lines(stream)]
    return parts + [Text(f"missing: {line}", style="red") for line in missing_lines(stream)]


def scale_lines(stream: Stream) -> list[str]:
    """Why there are no means, where there are none."""
    groups = ((stream.tasks, stream.scale), (stream.never, stream.never_scale))
    lines = []
    for names, scale in groups:
        if names and scale is None:
            known: dict[str, Scale] = {name: own for name in names if (own := stream.scales[name])}
            mixed = [name for name in names if stream.scales[name] is None]
            told = [no_mean(known)] if len(set(known.values())) > 1 else []
            lines += told + [f"no score of {name}: its domains' scales differ" for name in mixed]
    return lines


def shown(name: str, interval: Interval | None, stream: Stream) -> str:
    """A metric with its interval; a dash, or that scales differ, where there is none."""
    scale = scale_of(name, stream)
    if interval is None or scale is None:
        names = stream.never if name == "zero_shot_never" else stream.tasks
        return NO_MEAN if scale is None and names else "–"
    if COLUMNS[name].is_difference:
        return f"{signed(interval.mean, scale)} {spread(interval, scale)}"
    return with_spread(interval, scale)


def _main_table(found: StreamSummary) -> Table:
    unit = UNITS[found.stream.scale].name if found.stream.scale else "each task's own unit"
    table = _table(
        f"Stream of {len(found.stream.tasks)} tasks in {unit}, ± 95 % interval over orders and seeds (items fixed)"
    )
    table.add_column("arm", no_wrap=True)
    for name in ("orders × seeds", "done"):
        table.add_column(name, justify="right")
    for name in _FIRST:
        table.add_column(COLUMNS[name].heading, justify="right")
    for row in found.arms:
        done = f"{row.num_whole}/{row.num_chains}"
        cells = (shown(name, row.values[name], found.stream) for name in _FIRST)
        table.add_row(*(Text(cell) for cell in (row.arm, _size(row), done, *cells)))
    for bound in found.bounds:
        label = f"{bound.arm} ({ROLES[bound.role]})"
        cells = (
            shown(name, bound.values[name], found.stream) if name in bound.values else "" for name in _FIRST
        )
        table.add_row(*(Text(cell) for cell in (label, f"– × {bound.num_seeds}", "", *cells)))
    return table


def _order_table(found: StreamSummary) -> Table:
    table = _table("How much the order matters (final, ± 95 % t-interval over seeds), and three more metrics")
    table.add_column("arm")
    for name in ("mean", "spread over orders", "worst order", "its final"):
        table.add_column(name, justify="right")
    for name in _SECOND:
        table.add_column(COLUMNS[name].heading, justify="right")
    for row in found.arms:
        cells = [shown(name, row.values[name], found.stream) for name in _SECOND]
        table.add_row(*(Text(cell) for cell in (row.arm, *_sensitivity(found, row.arm), *cells)))
    for bound in found.bounds:
        if bound.values["mif"]:
            cells = [shown(n, bound.values[n], found.stream) if n in bound.values else "" for n in _SECOND]
            label = f"{bound.arm} ({ROLES[bound.role]})"
            table.add_row(*(Text(cell) for cell in (label, "", "", "", "", *cells)))
    return table


def _difference_table(stream: Stream, rows: Sequence[Difference]) -> Table:
    table = _table("Differences between arms, paired over orders and seeds, with 95 % intervals")
    table.add_column("arm − arm")
    table.add_column("orders × seeds", justify="right")
    for name in PAIRED:
        table.add_column(COLUMNS[name].heading, justify="right")
    for row in rows:
        cells = [_paired(row.values[name], stream.scale) for name in PAIRED]
        table.add_row(*(Text(cell) for cell in (f"{row.arm} − {row.against}", _size(row), *cells)))
    return table


def _paired(interval: Interval | None, scale: Scale | None) -> str:
    return f"{signed(interval.mean, scale)} {bracket(interval, scale)}" if interval and scale else "–"


def _sensitivity(found: StreamSummary, arm: str) -> Sequence[str]:
    part, scale = found.sensitivity.get(arm), found.stream.scale
    if part is None or scale is None:
        return ("–", "–", "–", "–")
    over_orders = with_spread(part.spread, scale) if part.spread else "–"
    return (with_spread(part.mean, scale), over_orders, part.worst_order, with_spread(part.worst, scale))


def _size(row: StreamRow | Difference) -> str:
    """Orders and seeds that the row's numbers are over."""
    return f"{row.num_orders} × {row.num_seeds}" if row.num_orders else "–"


def _table(title: str) -> Table:
    return Table(title=Text(title), title_justify="left", header_style="bold", pad_edge=False, box=None)
