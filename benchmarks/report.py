"""How benchmarks show their results: on the terminal, in tables, with units."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TypeVar

import rich.table
import torch
from matplotlib.ticker import EngFormatter
from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.progress import Progress

from cli import require_fusedstep
from timing import Spread

Row = TypeVar("Row")

PLAIN_WIDTH = 200  # of a file or a pipe, which has no width of its own


@dataclass(frozen=True)
class Table:
    """The first column is text, the others are figures."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    slower: frozenset[int] = frozenset()
    """Rows that a page marks: fusedstep is not the fastest there."""
    prose: bool = False
    """Every column is text."""
    folded: bool = False
    """A page shows it when asked."""

    @classmethod
    def of(
        cls,
        title: str,
        columns: Mapping[str, Callable[[Row], str]],
        rows: Sequence[Row],
        note: str = "",
    ) -> Table:
        cells = [[cell(row) for cell in columns.values()] for row in rows]
        return cls(title, list(columns), cells, note)


console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)


def environment(device: str) -> dict[str, str | int | float | None]:
    """Where and how it runs; the load is that of the minute before."""
    return {
        "torch": torch.__version__,
        "fusedstep": require_fusedstep().__version__,
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "gpu": _gpu_model() if device == "cuda" else None,
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": round(os.getloadavg()[0], 2),
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _gpu_model() -> str:
    major, minor = torch.cuda.get_device_capability()
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        drivers = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        drivers = "unknown"
    driver = drivers.splitlines()[0]  # one line a card
    return f"{torch.cuda.get_device_name()} (compute capability {major}.{minor}, driver {driver})"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def show(table: Table) -> None:
    shown = rich.table.Table(
        title=escape(table.title), title_justify="left", caption=table.note, caption_justify="left"
    )
    for index, header in enumerate(table.header):
        justify: JustifyMethod = "right" if index else "left"
        shown.add_column(escape(header), justify=justify, overflow="fold")
    for row in table.rows:
        shown.add_row(*map(escape, row))
    console.print(shown)


def stream(columns: Mapping[str, Callable[[Row], str]]) -> Callable[[Row], None]:
    """A function that prints one row, for a table whose rows come far apart in time."""
    header_due = True

    def print_row(row: Row) -> None:
        nonlocal header_due
        table = rich.table.Table(
            box=None, pad_edge=False, padding=(0, 1, 0, 0), show_header=header_due
        )
        for header in columns:
            width = max(map(len, header.split("\n")))
            table.add_column(header, justify="right", overflow="fold", width=width)
        table.add_row(*(cell(row) for cell in columns.values()))
        console.print(table)
        header_due = False

    return print_row


def say(line: str) -> None:
    """Prints `line` as it is: unwrapped, and without rich's markup."""
    console.print(line, soft_wrap=True, markup=False)


def say_where(where: Mapping[str, object]) -> None:
    say(", ".join(f"{key} {value}" for key, value in where.items() if value is not None))


def progress_bar() -> Progress:
    """Seen on a terminal only, and while it runs."""
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def three_digits(unit: str, value: float) -> str:
    """1.23 ms, 12.3 ms, 123 ms: what a measurement is good for."""
    digits, _, exponent = f"{value:.2e}".partition("e")
    places = 2 - int(exponent) % 3
    formatted: str = EngFormatter(unit=unit, places=places)(float(f"{digits}e{exponent}"))
    return formatted


seconds = partial(three_digits, "s")
memory = partial(three_digits, "B")


def factor(value: float) -> str:
    return f"{value:.2f}"


def spread(value: Spread, unit: Callable[[float], str]) -> str:
    """The median and, in brackets, the quartiles."""
    return f"{unit(value.median)} ({unit(value.low)} – {unit(value.high)})"
