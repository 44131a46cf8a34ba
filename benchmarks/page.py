"""The report of a run: one self-contained HTML page, and the same in Markdown."""

from __future__ import annotations

import base64
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import figures
import goals
import report
import tables
from figures import Plot
from report import Table
from results import Results
from suite import Row

METHOD = [
    "Everyone's results are compared with a float64 reference first; who differs is not timed. All "
    "candidates of a row, floors included, are timed in one interleaved run: each round gives "
    "everyone a block of calls in a new order, so that a drift of the machine's speed meets all "
    "alike. Times are medians over the rounds. Ratios are taken within a round and are given as "
    "their median and, in brackets, their quartiles.",
    "Everyone runs with the settings that a user gets unasked. Where another setting of torch is "
    "documented as faster it is a candidate of its own: SGD with foreach=True and fused=True, "
    "torch.compile (compiled for the exact shape, compilation not counted), F.linear_cross_entropy "
    "with its chunking. A row counts as lost if anyone of them is faster.",
    "A floor is a simpler operation that moves as many bytes or takes the same way through "
    "autograd; the share of the floor is its time over fusedstep's. A share above 100 % says that "
    "the simpler operation took longer. Bytes are counted, not measured: for cross-entropy one "
    "read and one write of the logits, for pointwise losses two reads and one write, for SGD three "
    "floats an element and five with momentum. Peak memory is what a call holds at once beyond its "
    "operands, the memory that fusedstep keeps from one gradient for the next included.",
]


@dataclass(frozen=True)
class Section:
    title: str
    text: Sequence[str] = ()
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Page:
    title: str
    lede: str
    headlines: Sequence[tuple[str, str]]
    sections: Sequence[Section] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """report.html, and report.md with its plots as files."""
        plots = folder / "plots"
        plots.mkdir(parents=True, exist_ok=True)
        for section in self.sections:
            for plot in section.plots:
                (plots / f"{plot.name}.svg").write_text(plot.svg)
        for name in ("html", "md"):
            template = environment().get_template(f"page.{name}.jinja")
            fields = {item: getattr(self, item) for item in self.__dataclass_fields__}
            (folder / f"report.{name}").write_text(template.render(**fields))


def environment() -> Environment:
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: bool(name) and "html" in str(name),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    found.filters["base64"] = lambda text: base64.b64encode(text.encode()).decode()
    found.filters["markdown"] = markdown
    return found


def markdown(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        escaped = (cell.replace("|", "\\|").replace("\n", " ") for cell in cells)
        return f"| {' | '.join(escaped)} |\n"

    ruler = ["---", *(["---"] if table.prose else ["---:"]) * (len(table.header) - 1)]
    return line(table.header) + f"|{'|'.join(ruler)}|\n" + "".join(map(line, table.rows))


def page(results: Results) -> Page:
    compared = results.compared
    main = [row for row in compared if row.operation in tables.OPERATIONS and not row.point]
    sections = [
        slower(compared),
        Section(
            "In short",
            plots=[figures.overview(main)] if main else [],
            tables=[tables.overview_table(main)],
        ),
        *goals_of(results),
        Section("How to read this", METHOD),
    ]
    for name, operation in tables.OPERATIONS.items():
        rows = results.of(name)
        if rows:
            sections.append(details(name, operation, rows))
    sections += scaling([row for row in compared if row.point is not None])
    sections += bandwidth([row for row in results.rows if row.operation == "bandwidth"])
    sections += training(results)
    sections.append(provenance(results))
    return Page("fusedstep, measured", lede(results), headlines(compared), sections)


def lede(results: Results) -> str:
    where = results.environment
    device = where["gpu"] or f"{where['cpu']} with {where['capability']}, {where['cores']} cores"
    left_out = len(results.left_out)
    missing = f" No time was left for {left_out} cases, which the end names." if left_out else ""
    return (
        "fusedstep replaces PyTorch's losses and SGD by fused kernels with the same classes and "
        f"numbers. Here fusedstep {where['fusedstep']} is compared with torch {where['torch']} and "
        f"others on {device}: who is faster, by how much, and how far from a floor. "
        f"CPU rows are of one thread unless they name more.{missing}"
    )


def headlines(rows: Sequence[Row]) -> list[tuple[str, str]]:
    found = []
    for name, operation in tables.OPERATIONS.items():
        of_it = [row for row in rows if row.operation == name and not row.point]
        if of_it:
            mean = statistics.geometric_mean(row.speedup.median for row in of_it)
            shares = [row.share.median for row in of_it if row.share]
            text = f"as fast as torch's default: {operation.title}"
            if shares:
                text += f"; {statistics.median(shares):.0%} of the floor"
            found.append((f"{mean:.2f}×", text))
    lost = sum(bool(row.lost_to) for row in rows)
    return [*found, (f"{lost} of {len(rows)}", "rows in which anyone is faster than fusedstep")]


def slower(rows: Sequence[Row]) -> Section:
    table = tables.losses_table(rows)
    if not table.rows:
        return Section(table.title, ["In no row of this run is anyone faster than fusedstep."])
    text = (
        f"In {sum(bool(row.lost_to) for row in rows)} of {len(rows)} rows, points of the plots "
        "included, another implementation has the lower time. They are all here, the worst first."
    )
    return Section(table.title, [text], tables=[table])


GOALS = (
    "What was aimed at on one CPU thread, and what this run has. A goal for several rows is judged "
    "by the worst of them. “At the floor” is the figure of an implementation that takes exactly as "
    "long as each row's floor in this run: a bound beyond it asks for more than the floor allows."
)


def goals_of(results: Results) -> list[Section]:
    verdicts = [goal.verdict(results.rows) for goal in goals.ON_CPU]
    if results.environment["gpu"] or all(verdict.met is None for verdict in verdicts):
        return []
    return [Section("Goals", [GOALS], tables=[goals.table("Goals", verdicts)])]


def details(name: str, operation: tables.Operation, rows: Sequence[Row]) -> Section:
    speed = tables.speed_table(operation.title, rows)
    memory = tables.memory_table(
        "Memory of a call: peak, allocations, page faults, bytes moved", rows
    )
    plots = [figures.dots(name, rows)]
    if name == "train_step":
        plots.append(figures.batches(rows))
    return Section(
        operation.title,
        [operation.measured, operation.floor],
        plots,
        [speed, replace(memory, folded=True)],
    )


def by_plot(rows: Sequence[Row]) -> dict[str, list[Row]]:
    plots: dict[str, list[Row]] = {}
    for row in rows:
        if row.point:
            plots.setdefault(row.point.plot, []).append(row)
    return plots


def scaling(rows: Sequence[Row]) -> list[Section]:
    plots = by_plot(rows)
    by_threads = {
        name: found
        for name, found in plots.items()
        if any(row.point and row.point.axis == "threads" for row in found)
    }
    by_size = {name: found for name, found in plots.items() if name not in by_threads}
    sections = []
    for title, name, chosen in (
        ("Scaling with size", "scaling", by_size),
        ("Scaling with threads", "threads", by_threads),
    ):
        if not chosen:
            continue
        every = [row for found in chosen.values() for row in found]
        table = tables.speed_table("Every point", every)
        sections.append(
            Section(
                title,
                [crossovers(chosen)],
                [figures.lines(name, title, chosen)],
                [replace(table, folded=True)],
            )
        )
    return sections


def crossovers(plots: dict[str, list[Row]]) -> str:
    """Where on a plot fusedstep is slower than torch's default."""
    found = []
    for name, rows in plots.items():
        for row in rows:
            if row.point and row.speedup.median < 1:
                where = f"{row.point.axis} = {row.point.x:,g}"
                found.append(f"{name}, {where} ({report.factor(row.speedup.median)})")
    if not found:
        return "fusedstep is faster than torch's default at every point: there is no crossover."
    return f"fusedstep is slower than torch's default here: {'; '.join(found)}."


def bandwidth(rows: Sequence[Row]) -> list[Section]:
    if not rows:
        return []
    text = (
        "What copy_, exp and add_ reach over arrays of growing size, bytes read and written. The "
        "floors of the tables come from the same operations, timed beside every row."
    )
    plot = figures.bandwidth(by_plot(rows))
    return [Section("The machine's bandwidth", [text], [plot], tables.bandwidth_tables(rows))]


def training(results: Results) -> list[Section]:
    rows = [row for row in results.rows if row.losses]
    if not rows:
        return []
    text = (
        "Both start from the same weights and see the same batches in the same order: real digits, "
        "or sequences drawn from a random bigram table. What the curves differ by is rounding, "
        "which training amplifies."
    )
    tables_ = tables.training_tables(rows)
    return [Section("Training runs", [text], [figures.losses(rows)], tables_)]


def provenance(results: Results) -> Section:
    notes = [f"Failed: {name}: {why}" for name, why in results.failures.items()]
    if results.left_out:
        notes.append(f"No time was left for {'; '.join(results.left_out)}.")
    shown = [
        tables.environment_table(results),
        tables.implementations_table(results),
        tables.missing_table(results.rows),
    ]
    prose = [replace(table, prose=True) for table in shown if table.rows]
    return Section("What was measured where", notes, tables=prose)
