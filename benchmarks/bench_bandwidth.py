"""What the machine's memory and caches can do: copy_, exp and add_ over arrays of growing size.

The floors of the other benchmarks cannot be faster than these bytes per second.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

import cli
import driver
import suite
from suite import Point, Row, Session
from timing import measure

OPERATIONS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "copy": lambda x, y: torch.Tensor.copy_(y, x),
    "exp": lambda x, y: torch.exp(x, out=y),
    "add_": lambda x, y: torch.Tensor.add_(y, x),
}
KIBIBYTES = (32, 128, 512, 2048, 8192, 32_768, 131_072, 524_288)


@dataclass(frozen=True)
class Case(suite.Case):
    operation: ClassVar = "bandwidth"
    seconds: ClassVar = 1.0
    nbytes: int

    def __str__(self) -> str:
        return f"{self.nbytes / 2**20:g} MiB"

    def measured(self, session: Session) -> Row:
        x, y = torch.randn(2, self.nbytes // 4, device=session.device)
        calls = {name: partial(call, x, y) for name, call in OPERATIONS.items()}
        measured = measure(calls, session.device, session.rounds, session.seconds_per_case)
        return Row(
            self.operation,
            str(self),
            self.dtype,
            self.threads,
            native="",
            floors=list(calls),
            samples={name: list(seconds) for name, seconds in measured.seconds.items()},
            bytes_moved=self.nbytes,
            point=self.point,
        )


@dataclass(frozen=True, kw_only=True)
class Options(cli.BenchmarkOptions):
    """Measure the bandwidth of copy_, exp and add_ from cache to memory."""

    @property
    def cases(self) -> list[suite.Case]:
        sizes = KIBIBYTES[1::2] if self.quick else KIBIBYTES
        plural = "thread" if self.threads == 1 else "threads"
        return [
            Case(
                size * 1024,
                threads=self.threads,
                point=Point(f"{self.threads} {plural}", "bytes an array", size * 1024),
            )
            for size in sizes
        ]


if __name__ == "__main__":
    cli.run(Options, driver.main, sys.argv[1:])
