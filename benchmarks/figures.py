"""The plots of a report, each as an SVG image.

Each implementation has one colour in all plots. The colours are those of Okabe and Ito, which
colour-blind readers can tell apart; the markers differ too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import StringIO

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter, NullLocator

import report
import tables
from suite import OURS, Row

matplotlib.rcParams |= {
    "svg.fonttype": "none",
    "svg.hashsalt": "fusedstep",
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Helvetica Neue", "Arial", "DejaVu Sans"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
}

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, GREY = "#56B4E9", "#CC79A7", "#595959"
STYLES: dict[str, tuple[str, str]] = {  # of an implementation: colour and marker
    OURS: (BLUE, "o"),
    "native": (ORANGE, "s"),
    "for-loop": (ORANGE, "s"),
    "foreach": (PURPLE, "D"),
    "fused": (VERMILION, "^"),
    "compile": (GREEN, "v"),
}
SPARE_STYLES = [
    (SKY, "P"),
    (PURPLE, "X"),
    (GREEN, "<"),
    (VERMILION, ">"),
    (SKY, "d"),
    (PURPLE, "h"),
]
FLOOR_STYLE = (GREY, "|")

COLUMNS = 3
ROW_HEIGHT = 0.3
FEW_TICKS = 5  # whose names fit under a panel
LINE_OF_TEXT = 0.075  # of the height of a picture()'s panel
FEW = 50  # so much between an axis's ends, and it has ticks between the powers of ten
seconds = EngFormatter(unit="s", places=0)


@dataclass(frozen=True)
class Plot:
    name: str
    """Of its file."""
    title: str
    description: str
    svg: str
    data: str = ""
    """What the image tells of itself in its metadata."""


def plot(name: str, title: str, description: str, figure: Figure, data: str = "") -> Plot:
    text = StringIO()
    about = {"Date": None, "Creator": None, "Description": data or None}
    figure.savefig(text, format="svg", metadata=about)
    return Plot(name, title, description, text.getvalue(), data)


def style(name: str, names: Sequence[str]) -> tuple[str, str]:
    if name in STYLES:
        return STYLES[name]
    spare = [other for other in names if other not in STYLES]
    return SPARE_STYLES[spare.index(name) % len(SPARE_STYLES)]


def overview(rows: Sequence[Row]) -> Plot:
    """Every row's speed-up, one lane an operation."""
    lanes = {
        operation.title.partition(",")[0]: [row for row in rows if row.operation == name]
        for name, operation in tables.OPERATIONS.items()
    }
    lanes = {title: found for title, found in lanes.items() if found}
    figure = Figure(figsize=(9, 0.9 + 0.5 * len(lanes)), layout="constrained")
    axes = figure.subplots()
    for place, found in enumerate(lanes.values()):
        speedups = [row.speedup.median for row in found]
        axes.scatter(speedups, [place] * len(found), color=BLUE, alpha=0.6, s=45, linewidths=0)
    axes.axvline(1, color=GREY, linewidth=1)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.8), max(high, 1.25))
    axes.set_xlabel("times faster than torch's default (right of 1: fusedstep is faster)")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(lanes)), list(lanes))
    axes.set_ylim(len(lanes) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    return plot("overview", "Speed-ups", "Each dot is one row of the tables below.", figure)


def dots(operation: str, rows: Sequence[Row]) -> Plot:
    """Everyone's time and the floor, one line a row."""
    names = list(dict.fromkeys(name for row in rows for name in row.implementations))
    figure = Figure(figsize=(9, 1.3 + ROW_HEIGHT * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        times = [row.time(name).median for name in [*row.implementations, *row.floors[:1]]]
        axes.plot([min(times), max(times)], [place, place], color="#dddddd", linewidth=2, zorder=1)
    floors = [(place, row) for place, row in enumerate(rows) if row.floor]
    axes.scatter(
        [row.time(row.floor).median for _, row in floors if row.floor],
        [place for place, _ in floors],
        color=FLOOR_STYLE[0],
        marker=FLOOR_STYLE[1],
        s=160,
        linewidths=2,
        label="floor",
        zorder=2,
    )
    for name in names:
        found = [(place, row) for place, row in enumerate(rows) if name in row.samples]
        colour, marker = style(name, names)
        axes.scatter(
            [row.time(name).median for _, row in found],
            [place for place, _ in found],
            color=colour,
            marker=marker,
            s=40,
            label=tables.label(name),
            zorder=4 if name == OURS else 3,
        )
    axes.set_xscale("log")
    axes.set_xlabel("time of a call (further left is faster)")
    axes.xaxis.set_major_formatter(seconds)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(rows)), [tables.name_of(row) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper left", ncols=7, handletextpad=0.2, columnspacing=1)
    title = "Time of a call"
    return plot(f"times-{operation}", title, f"{title}, median, on a logarithmic axis.", figure)


def lines(name: str, title: str, plots: Mapping[str, Sequence[Row]]) -> Plot:
    """Time over size, log-log, one panel a plot."""
    every = [row for rows in plots.values() for row in rows]
    names = list(dict.fromkeys(name for row in every for name in row.implementations))

    def draw(axes: Axes, rows: Sequence[Row]) -> None:
        draw_curves(axes, rows, names)

    return panels(name, title, plots, draw, "time of a call")


def curves_of(rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """Size and median time, of everyone and of the floor; fusedstep's last, to be on top."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(rows, key=x_of):
        if row.floor:
            curves.setdefault("floor", []).append((x_of(row), row.time(row.floor).median))
        for other in sorted(row.implementations, key=lambda name: name == OURS):
            curves.setdefault(other, []).append((x_of(row), row.time(other).median))
    return curves


def draw_curves(axes: Axes, rows: Sequence[Row], names: Sequence[str]) -> None:
    for other, points in curves_of(rows).items():
        colour, marker = curve_style(other, names)
        axes.plot(
            *zip(*points, strict=True),
            color=colour,
            marker=marker,
            markersize=4,
            linestyle="--" if other == "floor" else "-",
            linewidth=2 if other == OURS else 1.2,
            label=tables.label(other),
        )
    axes.set(xscale="log", yscale="log")
    if rows[0].point:
        axes.set_xlabel(rows[0].point.axis)
    for axis, format_tick in ((axes.xaxis, EngFormatter(sep="")), (axes.yaxis, seconds)):
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < FEW * low else (1,)))
        axis.set_major_formatter(format_tick)
        axis.set_minor_formatter(NullFormatter())


def curve_style(name: str, names: Sequence[str]) -> tuple[str, str]:
    return (GREY, "") if name == "floor" else style(name, names)


def picture(name: str, plots: Mapping[str, Sequence[Row]]) -> Plot:
    """Time over size, log-log, of torch's default, SGD(fused=True), fusedstep and the floor.

    It stands alone: curves bear their names, letters are drawn as shapes, the background is white,
    and its metadata tell every point, as data_of() has them.
    """
    plots = {panel: [pictured(row) for row in rows] for panel, rows in plots.items()}
    names = list(dict.fromkeys(name for rows in plots.values() for name in curves_of(rows)))
    figure = Figure(figsize=(4.5 * len(plots), 3.2), layout="constrained")
    grid = figure.subplots(1, len(plots), sharey=True, squeeze=False)[0]
    with matplotlib.rc_context({"svg.fonttype": "path", "font.sans-serif": ["DejaVu Sans"]}):
        for axes, (panel, rows) in zip(grid, plots.items(), strict=True):
            draw_curves(axes, rows, names)
            axes.minorticks_off()
            axes.set_title(panel, fontsize=9)
            axes.grid(alpha=0.3)
        for axes, rows in zip(grid, plots.values(), strict=True):
            name_curves(axes, curves_of(rows), names)
        grid[0].set_ylabel("time of a call")
        labels = "; ".join(map(tables.label, names))
        return plot(
            name,
            "Time over size",
            f"Time of a call over size, on logarithmic axes, of {labels}. {'. '.join(plots)}.",
            figure,
            data_of(plots),
        )


def pictured(row: Row) -> Row:
    wanted = {row.native, "fused", OURS, *row.floors}
    samples = {name: seconds for name, seconds in row.samples.items() if name in wanted}
    return replace(row, samples=samples)


def name_curves(
    axes: Axes, curves: Mapping[str, Sequence[tuple[float, float]]], names: Sequence[str]
) -> None:
    """Beside the curves' ends, from the highest down, each at least a line of text lower."""
    low, high = axes.get_ylim()
    line = (high / low) ** LINE_OF_TEXT
    most = high
    for name, points in sorted(curves.items(), key=lambda curve: -curve[1][-1][1]):
        x, y = points[-1]
        axes.annotate(
            tables.label(name),
            (x, min(y, most)),
            xytext=(7, 0),
            textcoords="offset points",
            color=curve_style(name, names)[0],
            fontsize=9,
            fontweight="bold" if name == OURS else "normal",
            va="center",
            annotation_clip=False,
        )
        most = min(y, most) / line


def data_of(plots: Mapping[str, Sequence[Row]]) -> str:
    """Every point of the curves, in words."""
    curves = (
        f"{panel}, {tables.label(name)}: "
        + ", ".join(f"{report.seconds(y)} at {x:,g}" for x, y in points)
        for panel, rows in plots.items()
        for name, points in curves_of(rows).items()
    )
    return "; ".join(curves)


def bandwidth(plots: Mapping[str, Sequence[Row]]) -> Plot:
    def draw(axes: Axes, rows: Sequence[Row]) -> None:
        colours = (ORANGE, GREEN, BLUE)
        for (name, arrays), colour in zip(tables.ARRAYS_MOVED.items(), colours, strict=True):
            rates = [arrays * (row.bytes_moved or 0) / row.time(name).median for row in rows]
            axes.plot([x_of(row) for row in rows], rates, color=colour, marker=".", label=name)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("size of one array")
        sizes = [x_of(row) for row in rows][-1 :: -2 if len(rows) > FEW_TICKS else -1]
        axes.set_xticks(sizes, [binary_size(size) for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(EngFormatter(unit="B/s", places=0))

    return panels("bandwidth", "Bandwidth", plots, draw, "bytes read and written")


def binary_size(nbytes: float) -> str:
    return f"{nbytes / 2**20:g} MiB" if nbytes >= 2**20 else f"{nbytes / 2**10:g} KiB"


def losses(rows: Sequence[Row]) -> Plot:
    def draw(axes: Axes, rows: Sequence[Row]) -> None:
        (row,) = rows
        # Native is broad and pale, so that fusedstep over it leaves both in sight.
        axes.plot(row.losses["native"], color=ORANGE, linewidth=5, alpha=0.5, label="torch")
        axes.plot(row.losses[OURS], color=BLUE, linewidth=1.2, label=OURS)
        axes.set_xlabel("step")

    shown = {row.case.replace(", batch", "\nbatch"): [row] for row in rows}
    return panels("losses", "Loss curves", shown, draw, "cross-entropy")


def batches(rows: Sequence[Row]) -> Plot:
    """The speed-up of a training step over the batch size, one line a network."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        model, _, rest = row.case.partition(", batch ")
        size, _, mode = rest.partition(", ")
        name = f"{model.partition(' (')[0]}, {mode}"
        curves.setdefault(name, []).append((int(size), row.speedup.median))
    colours = (BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, GREY, "#000000")
    for index, (name, points) in enumerate(curves.items()):
        xs, ys = zip(*sorted(points), strict=True)
        axes.plot(xs, ys, marker=".", color=colours[index % len(colours)], label=name)
    axes.axhline(1, color=GREY, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set(xlabel="batch size", ylabel="times faster than\ntorch's default")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    return plot("batches", "Speed-up of a training step", "Whole steps, by batch size.", figure)


def x_of(row: Row) -> float:
    assert row.point is not None
    return row.point.x


def panels(
    name: str,
    title: str,
    plots: Mapping[str, Sequence[Row]],
    draw: Callable[[Axes, Sequence[Row]], None],
    y_label: str,
) -> Plot:
    columns = min(COLUMNS, len(plots))
    height = -(-len(plots) // columns)
    size = (0.4 + 3.3 * columns, 0.5 + 2.8 * height)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(height, columns, squeeze=False).ravel()
    handles: dict[str, Artist] = {}
    for axes, (panel, rows) in zip(grid, plots.items(), strict=False):
        draw(axes, rows)
        axes.set_title(panel, fontsize=9)
        axes.grid(alpha=0.3)
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    for index, axes in enumerate(grid):
        if index % columns == 0:
            axes.set_ylabel(y_label)
        if index >= len(plots):
            axes.set_axis_off()
            axes.set_ylabel("")
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=7)
    return plot(name, title, f"{title}: {'; '.join(plots)}.".replace("\n", ", "), figure)
