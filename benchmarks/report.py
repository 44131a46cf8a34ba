"""How benchmarks report: a table on the terminal and, with --json, a file of these keys:

environment  torch, fusedstep, python, cpu, capability, cores, threads, gpu, command, date
rows         one object per row of the table; times in seconds, a spread as its median and the
             quartiles low and high
summary      figures over all rows

gpu_check.py adds a few, which it names.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar

import torch
from matplotlib.ticker import EngFormatter
from rich.console import Console, JustifyMethod
from rich.progress import Progress
from rich.table import Table

from cli import BenchmarkOptions, require_fusedstep
from timing import Spread

T = TypeVar("T")
Row = TypeVar("Row")

PLAIN_WIDTH = 200  # of a file or a pipe, which has no width of its own

console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)


def environment(device: str) -> dict[str, str | int | None]:
    return {
        "torch": torch.__version__,
        "fusedstep": require_fusedstep().__version__,
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": _gpu_model() if device == "cuda" else None,
        "command": shlex.join(sys.argv),
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


def show(title: str, columns: Mapping[str, Callable[[Row], str]], rows: Sequence[Row]) -> None:
    table = Table(title=title, title_justify="left")
    for header in columns:
        justify: JustifyMethod = "left" if header == next(iter(columns)) else "right"
        table.add_column(header, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()))
    console.print(table)


def stream(columns: Mapping[str, Callable[[Row], str]]) -> Callable[[Row], None]:
    """A function that prints one row, for a table whose rows come far apart in time."""
    header_due = True

    def print_row(row: Row) -> None:
        nonlocal header_due
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), show_header=header_due)
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


def conclude(
    options: BenchmarkOptions, rows: Sequence[object], summary: Mapping[str, float]
) -> None:
    """Prints the summary and where it was measured, and writes the --json file."""
    for label, value in summary.items():
        say(f"{label}: {value:.2f}")
    where = environment(options.device)
    say_where(where)
    if options.json is not None:
        write(options.json, where, rows, summary)


def say_where(where: Mapping[str, object]) -> None:
    say(", ".join(f"{key} {value}" for key, value in where.items() if value is not None))


def write(
    path: Path,
    where: Mapping[str, object],
    rows: Sequence[object],
    summary: Mapping[str, object],
    **more: object,
) -> None:
    document = {
        "environment": where,
        "rows": [dataclasses.asdict(row) for row in rows],  # type: ignore[call-overload]
        "summary": summary,
        **more,
    }
    path.write_text(json.dumps(document, indent=2) + "\n")


def progress_bar() -> Progress:
    """Seen on a terminal only, and while it runs."""
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def progress(work: Sequence[T]) -> Iterator[T]:
    with progress_bar() as bar:
        yield from bar.track(work, description="measuring")


seconds = EngFormatter(unit="s", places=2)
memory = EngFormatter(unit="B", places=2)


def factor(value: float) -> str:
    return f"{value:.2f}"


def spread(value: Spread, unit: Callable[[float], str]) -> str:
    """The median and, in brackets, the quartiles."""
    return f"{unit(value.median)} ({unit(value.low)} – {unit(value.high)})"
