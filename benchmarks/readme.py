"""The measured parts of the pages, written from committed results.

A part stands between <!-- measured: PART from FILE --> and <!-- end -->. FILE is a file of results,
the budget of instructions, or what the long checks found. A part may show a plot, which is an SVG
file beside its results.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import cli
import figures
import goals
import nll_loss
import page
import report
import tables
from figures import Plot
from report import Table
from results import Results
from suite import OURS, Row

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    ROOT / "README.md",
    ROOT / "benchmarks" / "NOTES.md",
    ROOT / "docs" / "reliability.md",
)
PART = re.compile(r"(<!-- measured: (\w+) from (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

# The rows that a reader needs; the report has all.
SHOWN: Mapping[str, Callable[[Row], bool]] = {
    "cross_entropy": lambda row: True,
    "pointwise_loss": lambda row: row.case.endswith((", 64x10", ", 64x3x224x224")),
    "linear_cross_entropy": lambda row: True,
    "sgd": lambda row: not row.case.startswith("lenet") and "nesterov" not in row.case,
    "train_step": lambda row: "plain" not in row.case,
    "data_parallel": lambda row: True,
}

PLOTS: Mapping[str, Sequence[str]] = {
    "cross_entropy_plot": (
        "cross-entropy of N × 10 logits",
        "cross-entropy of N × 1000 logits",
    ),
    "sgd_plot": ("SGD with momentum, tensors of 1,000 floats", "SGD without momentum, one tensor"),
}
"""By their part: the plots of scaling that a picture shows."""


def rewrite() -> None:
    for path in PAGES:
        text = path.read_text()
        path.write_text(rendered(text))
        for file, plot in pictures(text).items():
            file.write_text(plot.svg)


def pictures(text: str) -> dict[Path, Plot]:
    """The files of the plots that `text` shows, and what belongs there."""
    found = {}
    for _, name, path, _ in PART.findall(text):
        if name in PLOTS and (plot := picture(name, Results.load(ROOT / path))):
            found[ROOT / file_of(name, path)] = plot
    return found


def file_of(name: str, path: str) -> Path:
    return Path(path).with_name(f"{name}.svg")


def picture(name: str, results: Results) -> Plot | None:
    plots = page.by_plot(results.compared)
    chosen = {plot: plots[plot] for plot in PLOTS[name] if plot in plots}
    return figures.picture(name, chosen) if chosen else None


def picture_part(name: str) -> Callable[[Results, str], str]:
    def write(results: Results, path: str) -> str:
        plot = picture(name, results)
        return nothing(path) if plot is None else f"![{plot.description}]({file_of(name, path)})\n"

    return write


def rendered(text: str) -> str:
    """`text` with each part as its results have it."""

    def replaced(part: re.Match[str]) -> str:
        begin, name, path, end = part.groups()
        if name not in PARTS:
            raise cli.Refusal(f"there is no part {name!r}, only {', '.join(PARTS)}")
        return f"{begin}\n{PARTS[name](path)}\n{end}"

    return PART.sub(replaced, text)


def source(results: Results, path: str) -> str:
    where = results.environment
    device = where["gpu"] or f"{where['cpu']}, {where['capability']}"
    return (
        f"Measured on {where['date'][:10]} on one machine ({device}) with torch {where['torch']}, "
        f"on one CPU thread. All samples and more rows are in [{path}]({path}), made by\n\n"
        f"```console\n{where['command']}\n```\n"
    )


def overview(results: Results, path: str) -> str:
    rows = [row for row in results.compared if row.point is None]
    return page.markdown(tables.overview_table(rows))


def slower(results: Results, path: str) -> str:
    found = tables.losses_table(results.compared)
    if not found.rows:
        return f"In none of the {len(results.compared)} rows of {path} is anyone faster.\n"
    rows = (
        f"{len(found.rows)} of the comparisons in {path} are lost, within the noise or beyond it:"
    )
    return f"{rows}\n\n{page.markdown(found)}\n{found.note}\n"


def nothing(path: str) -> str:
    return f"Not measured in {path}.\n"


def part(operation: str) -> Callable[[Results, str], str]:
    def write(results: Results, path: str) -> str:
        rows = [row for row in results.of(operation) if SHOWN[operation](row)]
        if not rows:
            return nothing(path)
        return page.markdown(table(rows)) + f"\n<sub>`{operation}` in [{path}]({path})</sub>\n"

    return write


def table(rows: Sequence[Row]) -> Table:
    columns: dict[str, Callable[[Row], str]] = {
        "": tables.name_of,
        "torch's default": lambda row: report.seconds(row.time(row.native).median),
        "best other": best_other,
        OURS: lambda row: report.seconds(row.time(OURS).median),
        "torch / fusedstep": lambda row: report.factor(row.speedup.median),
        "floor": lambda row: (
            f"{report.seconds(row.time(row.floor).median)}, {row.floor}" if row.floor else "–"
        ),
        "share of the floor": lambda row: f"{row.share.median:.0%}" if row.share else "–",
    }
    mean = statistics.geometric_mean(row.speedup.median for row in rows)
    found = Table.of("", columns, rows)
    last = ["geometric mean", "", "", "", report.factor(mean), "", ""]
    return Table("", found.header, [*found.rows, last])


def best_other(row: Row) -> str:
    name = row.best_other
    if name is None or name == row.native:
        return "–"
    return f"{report.seconds(row.time(name).median)}, {tables.label(name)}"


def goals_of(results: Results, path: str) -> str:
    verdicts = [goal.verdict(results.rows) for goal in goals.ON_CPU]
    return page.markdown(goals.table("Goals", verdicts))


def floors(results: Results, path: str) -> str:
    """Of plain logits, with what they are made of."""
    rows = [row for row in results.of("cross_entropy") if row.case in goals.SIZES]

    def time(name: str) -> Callable[[Row], str]:
        return lambda row: report.seconds(row.time(name).median)

    columns: dict[str, Callable[[Row], str]] = {"logits": tables.name_of}
    columns |= {tables.label(name): time(name) for name in ("native", OURS)}
    columns |= {name: time(name) for name in ("round trip", "exp", "copy")}
    return page.markdown(Table.of("", columns, rows))


def page_faults(results: Results, path: str) -> str:
    rows = [row for row in results.of("cross_entropy") if any(row.page_faults.values())]
    if not rows:
        return nothing(path)
    columns: dict[str, Callable[[Row], str]] = {"": tables.name_of}
    for name in ("native", OURS):
        columns[tables.label(name)] = partial(tables.page_faults, name)
    return page.markdown(Table.of("", columns, rows))


def nll(results: Results, path: str) -> str:
    command = f"```console\n{results.environment['command']}\n```\n"
    return f"{page.markdown(nll_loss.table(results.rows))}\n{command}"


# What the budget counts once for so many calls, or elements of one call, and NOTES.md tells of.
COUNTED = (
    *("calls: cross_entropy and backward", "calls: SGD.step of 1", "calls: SGD.step of 20"),
    "kernels: avx2: cross_entropy float32 64x10 loss and gradient",
    "kernels: avx2: cross_entropy float32 64x1000 loss",
    "kernels: avx2: cross_entropy float32 64x1000 loss and gradient",
    "kernels: avx2: cross_entropy float32 64x1000 backward",
)


def instructions(path: str) -> str:
    budget = json.loads((ROOT / path).read_text())
    cells = []
    for what in COUNTED:
        kind, _, name = what.partition(": ")
        total, number = budget[kind]["counts"][name]
        calls = number if kind == "calls" else 1
        cells.append([f"{kind.removesuffix('s')}: {name}", f"{total / calls:,.0f}"])
    return page.markdown(Table("", ["", "instructions of a call"], cells))


def long_checks(path: str) -> str:
    cells = []
    for check, entry in json.loads((ROOT / path).read_text()).items():
        for what, counts in entry["found"].items():
            found = ", ".join(f"{count:,} {name}" for name, count in counts.items())
            cells.append([check, what, found, f"`{entry['command']}`", entry["date"]])
    header = ["check", "of", "found", "command", "run on"]
    return page.markdown(Table("", header, cells, prose=True))


def of_results(write: Callable[[Results, str], str]) -> Callable[[str], str]:
    return lambda path: write(Results.load(ROOT / path), path)


PARTS: Mapping[str, Callable[[str], str]] = {
    "instructions": instructions,
    "checks": long_checks,
    **{
        name: of_results(write)
        for name, write in {
            "source": source,
            "overview": overview,
            "slower": slower,
            **{operation: part(operation) for operation in SHOWN},
            **{name: picture_part(name) for name in PLOTS},
            "goals": goals_of,
            "floors": floors,
            "page_faults": page_faults,
            "nll_loss": nll,
        }.items()
    },
}
