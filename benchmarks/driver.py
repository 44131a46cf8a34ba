"""Runs the cases of a command line: chooses the other implementations, shows progress and tables,
and writes the file of results.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import rich.progress
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

import cli
import peers
import report
import tables
from results import Results
from suite import Case, Row, Session

PLAIN_EVERY = 15.0  # seconds between the lines of progress where there is no terminal


class Incomplete(cli.Refusal):
    exit_code = 1


class Options(Protocol):
    """What a bench_*.py file's options have."""

    @property
    def device(self) -> str: ...
    @property
    def rounds(self) -> int: ...
    @property
    def seconds_per_case(self) -> float: ...
    @property
    def json(self) -> Path | None: ...
    @property
    def cases(self) -> Sequence[Case]: ...


def main(options: Options) -> None:
    """What each bench_*.py file does when it runs alone."""
    cases = options.cases
    results = measure(cases, session(options), options.json)
    for table in tables.by_operation(results):
        report.show(table)
    report.say_where(results.environment)
    require_complete(results, len(cases))


def session(
    options: Options,
    others: Mapping[str, peers.Other] = peers.ALL,
    compile_until: float = math.inf,
) -> Session:
    fusedstep = cli.require_fusedstep()
    found = peers.load(others, options.device)
    return Session(
        fusedstep,
        options.device,
        options.rounds,
        found,
        options.seconds_per_case,
        compile_until,
    )


@dataclass(frozen=True)
class Progress:
    case: Case
    done: int
    total: int
    seconds_left: float | None
    """By an estimate, once a case is done."""


def measure(
    cases: Sequence[Case],
    session: Session,
    path: Path | None,
    timed_until: float = math.inf,
    until: float = math.inf,
    more: Callable[[Results], Mapping[str, object]] = lambda results: {},
) -> Results:
    """Measures the cases that begin before `timed_until` by time.monotonic(), and looks into those
    that `until` leaves time for.

    The file at `path` is written anew after every case, with what `more` adds.
    """
    results = Results(report.environment(session.device), session.implementations)

    def save() -> None:
        if path is not None:
            results.save(path, **more(results))

    save()
    with progress_bar() as bar:
        measured = _time(cases, session, results, timed_until, follower(bar), save)
    if session.device == "cuda":
        # Launches are counted last: the profiler may slow what follows it.
        _look_into(measured, session, results, until)
    save()
    return results


def _time(
    cases: Sequence[Case],
    session: Session,
    results: Results,
    until: float,
    follow: Callable[[Progress], None],
    save: Callable[[], None],
) -> list[tuple[Case, int]]:
    """Adds rows and failures to `results`; returns the cases with a row, each with its place."""
    begin = time.monotonic()
    whole = sum(case.expected_seconds for case in cases)
    expected = 0.0
    measured: list[tuple[Case, int]] = []
    for index, case in enumerate(cases):
        if time.monotonic() > until:
            results.left_out.append(_name(case))
            continue
        now = time.monotonic()
        left = (now - begin) * (whole - expected) / expected if expected else None
        if left is not None:
            left = min(left, until - now)
        follow(Progress(case, index, len(cases), left))
        outcome = session.attempt(case, partial(case.measured, session))
        if isinstance(outcome, Row):
            measured.append((case, len(results.rows)))
            results.rows.append(outcome)
        else:
            results.failures[_name(case)] = outcome
        expected += case.expected_seconds
        save()
    return measured


def _look_into(
    measured: Sequence[tuple[Case, int]], session: Session, results: Results, until: float
) -> None:
    """Adds to the rows what is launched on CUDA."""
    for case, place in measured:
        if time.monotonic() > until:
            results.left_out.append(f"launches of {_name(case)}")
            continue
        outcome = session.attempt(case, partial(case.looked_into, results.rows[place], session))
        if isinstance(outcome, Row):
            results.rows[place] = outcome
        else:
            results.failures[f"launches of {_name(case)}"] = outcome


def _name(case: Case) -> str:
    return f"{case.operation}: {case}, {case.dtype}"


def require_complete(results: Results, cases: int) -> None:
    if results.failures:
        name, why = next(iter(results.failures.items()))
        raise Incomplete(f"{len(results.failures)} of {cases} cases failed, first {name}: {why}")


def progress_bar() -> rich.progress.Progress:
    return rich.progress.Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        console=report.console,
        transient=True,
        disable=not report.console.is_terminal,
    )


def follower(bar: rich.progress.Progress) -> Callable[[Progress], None]:
    """Shows how far the run has come: on a terminal as a bar, elsewhere as a line now and then."""
    task = bar.add_task("measuring", total=None, left="")
    said = time.monotonic()

    def follow(now: Progress) -> None:
        nonlocal said
        left = "" if now.seconds_left is None else f"about {_duration(now.seconds_left)} left"
        name = f"{now.case.operation}: {now.case}"[:60]
        bar.update(task, completed=now.done, total=now.total, description=name, left=left)
        if bar.disable and time.monotonic() - said > PLAIN_EVERY:
            said = time.monotonic()
            report.say(f"{now.done} of {now.total}, {left}: {name}")

    return follow


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
