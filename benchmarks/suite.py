"""What every benchmark shares: how a case is checked, timed against others and made into a row.

A bench_*.py file defines one kind of Case and lists the cases that are worth a row. run.py runs
all of them, gpu_check.py some of them; each file also runs alone.
"""

from __future__ import annotations

import gc
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import ClassVar

import torch

import peers
from launches import Launches
from memory import footprint
from peers import Unmeasured, why
from timing import Call, Measurement, Spread, measure

OURS = "fusedstep"
COMPILE = "compile"

LARGE_COPY = "copy bandwidth"  # a floor: the time to copy as many bytes as the case moves
COPY_BYTES = 2**30  # of the copy that the rate is measured with; no cache holds them
POINT_SECONDS = 1.5  # for a point of a plot, where nothing is compiled; a guess like Case.seconds

Calls = Sequence[Call]


@dataclass(frozen=True)
class Point:
    """Where on which plot a row lies."""

    plot: str
    axis: str
    x: float


@dataclass(frozen=True)
class Row:
    """What was measured of a case."""

    operation: str
    case: str
    dtype: str
    threads: int
    native: str
    """Which of the implementations is torch's default on the device."""
    floors: list[str]
    """Simpler operations, as lower bounds for the time; the first is the highest here."""
    samples: dict[str, list[float]]
    """Seconds per call of each implementation and floor, one a round."""
    missing: dict[str, str] = field(default_factory=dict)
    """Why an implementation was not measured."""
    bytes_moved: int | None = None
    """By count: what an implementation must read and write."""
    peak_bytes: dict[str, int] = field(default_factory=dict)
    """What a call holds at once beyond its operands, by implementation."""
    allocations: dict[str, int] = field(default_factory=dict)
    """How often a call asks for memory, by implementation."""
    page_faults: dict[str, int] = field(default_factory=dict)
    """Of a call on the CPU, by implementation."""
    shares: dict[str, float] = field(default_factory=dict)
    """Of a training step, what loss and update take, by implementation."""
    losses: dict[str, list[float]] = field(default_factory=dict)
    """Of a training run, each step's, by implementation."""
    point: Point | None = None
    launched: dict[str, Launches] = field(default_factory=dict)
    """On CUDA; by implementation and, of losses, forward and backward."""
    replayed: bool | None = None
    """On CUDA: whether a captured graph gave the bits of an eager call."""

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        return (
            self.operation,
            self.point.plot if self.point else "",
            self.case,
            self.dtype,
            self.threads,
        )

    @property
    def implementations(self) -> list[str]:
        return [name for name in self.samples if name not in self.floors]

    @property
    def others(self) -> list[str]:
        return [name for name in self.implementations if name != OURS]

    @property
    def floor(self) -> str | None:
        return self.floors[0] if self.floors else None

    @property
    def best_other(self) -> str | None:
        return min(self.others, key=lambda name: self.time(name).median, default=None)

    def time(self, name: str) -> Spread:
        return Spread.of(self.samples[name])

    def over_ours(self, name: str) -> Spread:
        """The time of `name` over ours: a speed-up, or the share of a floor."""
        return Measurement(self.samples).ratio(name, OURS)

    @property
    def speedup(self) -> Spread:
        return self.over_ours(self.native)

    @property
    def share(self) -> Spread | None:
        return self.over_ours(self.floor) if self.floor else None

    @property
    def bytes_per_second(self) -> float | None:
        return self.bytes_moved / self.time(OURS).median if self.bytes_moved else None

    @property
    def lost_to(self) -> list[str]:
        return [name for name in self.others if self.over_ours(name).median < 1]


@dataclass(frozen=True)
class Work:
    """What is to be measured of a case. Several calls of one candidate take turns."""

    native: str
    implementations: Mapping[str, Callable[[], Calls]]
    """Each is checked by what makes its calls, which may fail; that of OURS may not."""
    floors: Mapping[str, Calls]
    highest_floor: str | None = None
    """By name; without one it is the slowest that was measured."""
    bytes_moved: int | None = None

    release: Callable[[], object] = lambda: None
    """Frees what a call keeps until the next, before its memory is counted."""

    @property
    def floor_shares(self) -> dict[str, float]:
        """What share of a floor's time counts: of a copy of COPY_BYTES, by bytes."""
        copied = (self.bytes_moved or 0) / (2 * COPY_BYTES)
        return {name: copied if name == LARGE_COPY else 1.0 for name in self.floors}


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    operation: ClassVar[str]
    seconds: ClassVar[float]
    """A guess at what such a case takes in a quick run on one core."""
    dtype: str = "float32"
    threads: int = 1
    point: Point | None = None

    @abstractmethod
    def __str__(self) -> str: ...

    @property
    def expected_seconds(self) -> float:
        """A guess at what this one takes, for the estimate of the time left."""
        return self.seconds

    @abstractmethod
    def measured(self, session: Session) -> Row: ...

    def looked_into(self, row: Row, session: Session) -> Row:
        """On CUDA, with what it launches and whether a graph replays it."""
        return row


@dataclass(frozen=True, kw_only=True)
class Comparison(Case):
    """A case that times implementations against each other and against floors."""

    @property
    def expected_seconds(self) -> float:
        return POINT_SECONDS if self.point else self.seconds

    @abstractmethod
    def work(self, session: Session) -> Work: ...

    def measured(self, session: Session) -> Row:
        return session.row(self, self.work(session))


@dataclass(frozen=True)
class Session:
    """What the cases share: whom they are measured against, and for how long."""

    fusedstep: ModuleType
    device: str
    rounds: int
    implementations: Mapping[str, str]
    """Of everyone else who is wanted, the package's version or why it is absent."""
    seconds_per_case: float = 2.0
    compile_until: float = float("inf")
    """Of time.monotonic(): then no compiler is started any more."""
    agreed: Callable[[float], float] = lambda seconds: seconds
    """See timing.measure()."""

    @property
    def present(self) -> frozenset[str]:
        return frozenset(peers.present(self.implementations))

    def require_time_to_compile(self) -> None:
        if time.monotonic() > self.compile_until:
            raise Unmeasured("no time")

    def row(self, case: Case, work: Work) -> Row:
        implementations: dict[str, Calls] = {}
        missing = {}
        for name, make in work.implementations.items():
            if name != OURS and name not in self.present:
                continue
            if name == COMPILE and case.point:
                continue  # a plot has many points, and each would be compiled
            try:
                implementations[name] = make()
            except Exception as error:  # of any kind: these are other people's packages
                if name == OURS:
                    raise
                missing[name] = why(error)
        measured = measure(
            {**implementations, **work.floors},
            self.device,
            self.rounds,
            self.seconds_per_case,
            self.agreed,
        )
        work.release()
        memory = {name: footprint(calls[0], self.device) for name, calls in implementations.items()}
        shares = work.floor_shares
        samples = {
            name: [shares.get(name, 1.0) * value for value in seconds]
            for name, seconds in measured.seconds.items()
        }
        highest = work.highest_floor or max(
            work.floors, key=lambda name: Spread.of(samples[name]).median, default=None
        )
        return Row(
            case.operation,
            str(case),
            case.dtype,
            case.threads,
            work.native,
            floors=sorted(work.floors, key=lambda name: name != highest),
            samples=samples,
            missing=missing,
            bytes_moved=work.bytes_moved,
            peak_bytes={name: used.peak_bytes for name, used in memory.items()},
            allocations={name: used.allocations for name, used in memory.items()},
            page_faults={
                name: used.page_faults
                for name, used in memory.items()
                if used.page_faults is not None
            },
            point=case.point,
        )

    def attempt(self, case: Case, measure: Callable[[], Row]) -> Row | str:
        """The row, or one line that says why there is none."""
        threads = torch.get_num_threads()
        torch.set_num_threads(case.threads)
        try:
            release_memory(self.device)
            return measure()
        except Exception as error:
            return why(error)
        finally:
            torch.set_num_threads(threads)


def large_copy(device: str) -> Calls:
    source = torch.randn(COPY_BYTES // 4, device=device)
    return [partial(torch.empty_like(source).copy_, source)]


def release_memory(device: str) -> None:
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # each case is compiled for its own shape
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
