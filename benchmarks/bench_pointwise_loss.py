"""Pointwise losses forward and backward: fusedstep against torch, and against memory bandwidth.

Measured is `f(x, t).backward(); x.grad = None` on standard-normal inputs x and targets t uniform in
[0, 1), with the mean as the reduction, in one interleaved run with two floors. One is the autograd
round trip `x.sum().backward(); x.grad = None`, below which no small loss can go. The other is
`torch.add(x, t, out=g)`, below which no large one can: it moves three arrays, as a loss must that
reads input and target once and writes the gradient once; of the exponential and the logarithm that
binary cross-entropy computes as well it knows nothing. FLOOR_ELEMENTS says where on the CPU the one
gives way to the other; on CUDA the floor is the one that took longer. Before that fusedstep's loss
and gradient are compared with torch's in float64; where they differ nothing is timed.

On CUDA the operands rotate through more memory than the L2 cache holds, and the peak memory is what
forward and backward hold at once beyond them.
"""

import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor
from typer import Option

import cli
import report
from bench_cross_entropy import DTYPES, FLOOR_ELEMENTS, require_exact
from timing import Call, Spread, buffer_sets, measure, peak_bytes

SIZES = "64x10,1024x1000,64x3x224x224,16777216"

Loss = Callable[[Tensor, Tensor], Tensor]

LOSSES: dict[str, Loss] = {
    loss.__name__: loss
    for loss in (
        F.l1_loss,
        F.mse_loss,
        F.smooth_l1_loss,
        F.huber_loss,
        F.binary_cross_entropy_with_logits,
    )
}


@dataclass(frozen=True)
class Operands:
    x: Tensor
    t: Tensor

    def double(self) -> "Operands":
        return Operands(self.x.detach().double().requires_grad_(), self.t.double())

    def loss_and_gradient(self, f: Loss) -> tuple[Tensor, Tensor]:
        loss = f(self.x, self.t)
        (gradient,) = torch.autograd.grad(loss, self.x)
        return loss.detach(), gradient

    def forward_backward(self, f: Loss) -> Call:
        x, t = self.x, self.t

        def call() -> None:
            f(x, t).backward()
            x.grad = None

        return call

    def round_trip(self) -> Call:
        x = self.x

        def call() -> None:
            x.sum().backward()
            x.grad = None

        return call

    def add(self) -> Call:
        x = self.x.detach()
        return partial(torch.add, x, self.t, out=torch.empty_like(x))

    def peak_bytes(self, f: Loss) -> int | None:
        return peak_bytes(self.forward_backward(f), self.x.device.type)


@dataclass(frozen=True)
class Case:
    loss: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> str:
        return "x".join(map(str, self.shape))

    def operands(self, device: str) -> Operands:
        torch.manual_seed(0)
        dtype = DTYPES[self.dtype]
        x = torch.randn(self.shape, device=device).to(dtype)
        t = torch.rand(self.shape, device=device).to(dtype)
        return Operands(x.requires_grad_(), t)

    def operand_sets(self, device: str) -> list[Operands]:
        """Equal operands, in as many places as calls must rotate through."""
        first = self.operands(device)
        copies = buffer_sets(first.x.nbytes + first.t.nbytes, device)
        return [first, *(self.operands(device) for _ in range(copies - 1))]


@dataclass(frozen=True, kw_only=True)
class Options(cli.BenchmarkOptions):
    """Time pointwise losses forward and backward, fusedstep against torch."""

    sizes: Annotated[str, Option(help="Shapes of the input, comma-separated.")] = SIZES
    losses: Annotated[str, Option(help="Comma-separated.")] = ",".join(LOSSES)
    dtypes: Annotated[str, Option(help=f"Of {', '.join(DTYPES)}.")] = "float32"

    @property
    def cases(self) -> list[Case]:
        shapes = [
            tuple(cli.positive_integers("--sizes", size, separator="x"))
            for size in self.sizes.split(",")
        ]
        return [
            Case(loss, shape, dtype)
            for dtype in cli.items(self.dtypes, DTYPES)
            for loss in cli.items(self.losses, LOSSES)
            for shape in shapes
        ]


@dataclass(frozen=True)
class Row:
    loss: str
    size: str
    dtype: str
    native: Spread
    ours: Spread
    speedup: Spread
    floor_name: str
    floor: Spread
    over_floor: Spread
    peak_bytes: dict[str, int] | None
    """On CUDA: of the implementations."""


COLUMNS: dict[str, Callable[[Row], str]] = {
    "loss": lambda row: row.loss,
    "input": lambda row: row.size,
    "dtype": lambda row: row.dtype,
    "native": lambda row: report.seconds(row.native.median),
    "fusedstep": lambda row: report.seconds(row.ours.median),
    "native / fusedstep": lambda row: report.spread(row.speedup, report.factor),
    "floor": lambda row: f"{report.seconds(row.floor.median)} ({row.floor_name})",
    "fusedstep / floor": lambda row: report.spread(row.over_floor, report.factor),
}
CUDA_COLUMNS: dict[str, Callable[[Row], str]] = {
    "peak memory: native, fusedstep": lambda row: (
        ", ".join(map(report.memory, row.peak_bytes.values())) if row.peak_bytes else ""
    ),
}


def check(case: Case, operands: Operands, ours: Loss) -> None:
    for what, actual, expected in zip(
        ("the loss", "the gradient"),
        operands.loss_and_gradient(ours),
        operands.double().loss_and_gradient(LOSSES[case.loss]),
        strict=True,
    ):
        name = f"{what} of {case.loss} for {case.size} in {case.dtype}"
        require_exact(name, actual, expected, DTYPES[case.dtype])


def bench(case: Case, options: Options, ours: Loss) -> Row:
    on_cuda, native = options.device == "cuda", LOSSES[case.loss]
    sets = case.operand_sets(options.device)
    check(case, sets[0], ours)
    measured = measure(
        {
            "native": [operands.forward_backward(native) for operands in sets],
            "ours": [operands.forward_backward(ours) for operands in sets],
            "round trip": [operands.round_trip() for operands in sets],
            "add": [operands.add() for operands in sets],
        },
        options.device,
        options.rounds,
    )
    if on_cuda:
        floor = max("round trip", "add", key=lambda name: measured.time(name).median)
    else:
        floor = "add" if math.prod(case.shape) >= FLOOR_ELEMENTS else "round trip"
    peaks = {"native": sets[0].peak_bytes(native), "ours": sets[0].peak_bytes(ours)}
    return Row(
        case.loss,
        case.size,
        case.dtype,
        measured.time("native"),
        measured.time("ours"),
        measured.ratio("native", "ours"),
        floor,
        measured.time(floor),
        measured.ratio("ours", floor),
        {name: peak for name, peak in peaks.items() if peak is not None} or None,
    )


def main(options: Options) -> None:
    cases = options.cases
    functional = cli.require_fusedstep().functional
    torch.set_num_threads(options.threads)
    rows = [bench(case, options, getattr(functional, case.loss)) for case in report.progress(cases)]
    columns = COLUMNS | CUDA_COLUMNS if options.device == "cuda" else COLUMNS
    report.show("Pointwise losses forward and backward", columns, rows)
    summary = {
        f"geometric mean of native / fusedstep, {dtype}": statistics.geometric_mean(
            row.speedup.median for row in rows if row.dtype == dtype
        )
        for dtype in cli.items(options.dtypes, DTYPES)
    }
    report.conclude(options, rows, summary)


if __name__ == "__main__":
    cli.run(Options, main, sys.argv[1:])
