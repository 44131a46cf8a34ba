"""Goals for the figures of a run, and whether the run meets them.

ON_CPU are set for one thread; the goals for a GPU are in gpu_check.py.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import bench_cross_entropy
import report
import tables
from bench_cross_entropy import FLOOR_ELEMENTS
from report import Table
from suite import OURS, Row
from timing import Measurement

Figure = Callable[[Row], float | None]
"""Of a row, or None where it does not concern the goal or was not measured."""

SIZES = bench_cross_entropy.SIZES.split(",")
TINY_ELEMENTS = 1000
MEAN = "geometric mean"


@dataclass(frozen=True)
class Goal:
    """A bound for the figure of the worst row or, of `mean_of` rows, for their geometric mean."""

    text: str
    figure: Figure
    bound: float
    at_most: bool = False
    mean_of: int | None = None
    at_floor: Figure = lambda row: None
    """The figure if fusedstep took as long as the floor, unless that follows from the goal."""
    unit: str = ""

    def verdict(self, rows: Sequence[Row]) -> Verdict:
        known = [(value, row) for row in rows if (value := self.figure(row)) is not None]
        if not known or (self.mean_of and len(known) != self.mean_of):
            return Verdict(self.text, self.wanted, None, "not measured", None)
        if self.mean_of:
            value, case = statistics.geometric_mean(value for value, _ in known), MEAN
        else:
            value, worst = (max if self.at_most else min)(known, key=lambda pair: pair[0])
            known, case = [(value, worst)], tables.name_of(worst)
        limits = [limit for _, row in known if (limit := self.at_floor(row)) is not None]
        limit = statistics.geometric_mean(limits) if len(limits) == len(known) else None
        met = value <= self.bound if self.at_most else value >= self.bound
        return Verdict(self.text, self.wanted, value, case, met, limit, self.unit)

    @property
    def wanted(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.bound:g}{self.unit}"


@dataclass(frozen=True)
class Verdict:
    goal: str
    wanted: str
    figure: float | None
    case: str
    """The worst row, where the figure is not a mean."""
    met: bool | None
    at_floor: float | None = None
    unit: str = ""


def table(title: str, verdicts: Sequence[Verdict]) -> Table:
    def written(value: float | None, verdict: Verdict) -> str:
        return tables.NONE if value is None else f"{report.factor(value)}{verdict.unit}"

    columns: dict[str, Callable[[Verdict], str]] = {
        "goal": lambda verdict: verdict.goal,
        "bound": lambda verdict: verdict.wanted,
        "this run": lambda verdict: written(verdict.figure, verdict),
        "verdict": lambda verdict: {None: tables.NONE, True: "met", False: "missed"}[verdict.met],
    }
    if any(verdict.at_floor for verdict in verdicts):
        columns["at the floor"] = lambda verdict: written(verdict.at_floor, verdict)
    columns["worst row"] = lambda verdict: verdict.case
    missed = frozenset(place for place, verdict in enumerate(verdicts) if verdict.met is False)
    return replace(Table.of(title, columns, verdicts), slower=missed)


# On the CPU


def over(above: str | None, below: str | None, row: Row) -> float | None:
    """The time of one over that of another; of torch's default, where a name is None."""
    names = [name or row.native for name in (above, below)]
    if not all(name in row.samples for name in names):
        return None
    return Measurement(row.samples).ratio(*names).median


def over_floor(name: str | None, row: Row) -> float | None:
    return over(name, row.floor, row) if row.floor else None


def microseconds_over_floor(row: Row) -> float | None:
    if row.floor is None:
        return None
    pairs = zip(row.samples[OURS], row.samples[row.floor], strict=True)
    return 1e6 * statistics.median(ours - floor for ours, floor in pairs)


def of_logits(least: float, most: float, figure: Figure, row: Row) -> float | None:
    """`figure` of the sizes of so many logits."""
    if not _plain(row, "cross_entropy") or row.case not in SIZES:
        return None
    return figure(row) if least <= math.prod(map(int, row.case.split("x"))) <= most else None


def of_step(name: str, mode: str, figure: Figure, row: Row) -> float | None:
    """`figure` of a set of parameters; of every update where `mode` is empty."""
    wanted = row.case.startswith(f"{name}:") and row.case.endswith(mode)
    return figure(row) if wanted and _plain(row, "sgd") else None


def of_training(batch: int, mode: str, figure: Figure, row: Row) -> float | None:
    wanted = row.case == f"CIFAR CNN, batch {batch}, {mode}"
    return figure(row) if wanted and _plain(row, "train_step") else None


def _plain(row: Row, operation: str) -> bool:
    found = (row.operation, row.point, row.dtype, row.threads)
    return found == (operation, None, "float32", 1)


SPEEDUP = partial(over, None, OURS)
SPEEDUP_AT_FLOOR = partial(over_floor, None)
OVER_FUSED, OVER_FUSED_AT_FLOOR = partial(over, "fused", OURS), partial(over_floor, "fused")


def _goal(
    text: str, of: Callable[[Figure, Row], float | None], figures: Sequence[Figure], bound: float
) -> Goal:
    """Of a figure and what it would be at the floor."""
    figure, at_floor = figures
    return Goal(text, partial(of, figure), bound, at_floor=partial(of, at_floor))


def _speedup_of_training(batch: int, mode: str, bound: float) -> Goal:
    return _goal(
        f"training step, CIFAR CNN, batch {batch}, {mode}: torch / fusedstep",
        partial(of_training, batch, mode),
        (SPEEDUP, SPEEDUP_AT_FLOOR),
        bound,
    )


ON_CPU = [
    replace(
        _goal(
            f"cross-entropy, {len(SIZES)} sizes: torch / fusedstep, geometric mean",
            partial(of_logits, 0, math.inf),
            (SPEEDUP, SPEEDUP_AT_FLOOR),
            8,
        ),
        mean_of=len(SIZES),
    ),
    _goal(
        "each of these sizes: torch / fusedstep",
        partial(of_logits, 0, math.inf),
        (SPEEDUP, SPEEDUP_AT_FLOOR),
        1.3,
    ),
    Goal(
        f"cross-entropy of up to {TINY_ELEMENTS:,} logits: fusedstep / round trip",
        partial(of_logits, 0, TINY_ELEMENTS, partial(over, OURS, "round trip")),
        1.1,
        at_most=True,
    ),
    Goal(
        f"cross-entropy of {FLOOR_ELEMENTS:,} logits and more: fusedstep / exp",
        partial(of_logits, FLOOR_ELEMENTS, math.inf, partial(over, OURS, "exp")),
        1.6,
        at_most=True,
    ),
    *(
        _goal(
            f"SGD of the CIFAR CNN, {mode}: fused=True / fusedstep",
            partial(of_step, "cifar", mode),
            (OVER_FUSED, OVER_FUSED_AT_FLOOR),
            bound,
        )
        for mode, bound in (("plain", 2.5), ("momentum", 2.8))
    ),
    Goal(
        "SGD of the CIFAR CNN, every update: fusedstep - floor",
        partial(of_step, "cifar", "", microseconds_over_floor),
        10,
        at_most=True,
        unit=" µs",
    ),
    Goal(
        "SGD of 13M floats, every update: share of the floor",
        partial(of_step, "flat", "", lambda row: row.share.median if row.share else None),
        0.9,
    ),
    _goal(
        "SGD of 13M floats, every update: fused=True / fusedstep",
        partial(of_step, "flat", ""),
        (OVER_FUSED, OVER_FUSED_AT_FLOOR),
        1,
    ),
    _speedup_of_training(1, "plain", 1.10),
    _speedup_of_training(1, "momentum", 1.15),
    _speedup_of_training(4, "plain", 1.07),
    _speedup_of_training(4, "momentum", 1.07),
    _speedup_of_training(64, "plain", 1.03),
    _speedup_of_training(64, "momentum", 1.03),
]
