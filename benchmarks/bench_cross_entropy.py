"""Cross-entropy forward and backward: fusedstep against torch, and against what the machine allows.

Measured is `x.grad = None; f(x, y).backward()` on standard-normal logits x, in one interleaved run
with two floors: the autograd round trip `x.grad = None; x.sum().backward()`, below which no small
loss can go, and one read and one write of the logits, below which no large one can: on the CPU
`torch.exp(x)`, whose exponentials no loss is without, on CUDA `copy_()`. FLOOR_ELEMENTS says where
on the CPU the one gives way to the other; on CUDA the floor is the one that took longer. Before
that fusedstep's loss and gradient are compared with torch's in float64; where they differ nothing
is timed. For z-loss and focal loss, which torch has not, native is what one writes with it.

On CUDA the operands, their gradients with them, rotate through more memory than the L2 cache holds;
the share of copy bandwidth counts one read and one write of the logits, and the peak memory is what
forward and backward hold at once beyond their operands.
"""

import math
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typer import Option

import cli
import report
from correctness import require_close
from timing import Call, Spread, buffer_sets, measure, peak_bytes

FLOOR_ELEMENTS = 256_000

SIZES = "1x10,64x10,512x10,4096x10,256x100,256x1000,1024x1000,128x32000,64x128256"
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

CrossEntropy = Callable[..., Tensor]


def native_z_loss(x: Tensor, y: Tensor, z_loss: float) -> Tensor:
    return F.cross_entropy(x, y) + z_loss * torch.logsumexp(x, 1).square().mean()


def native_focal_loss(x: Tensor, y: Tensor, gamma: float) -> Tensor:
    log_p = F.log_softmax(x, 1).gather(1, y.unsqueeze(1))
    return -((1 - log_p.exp()) ** gamma * log_p).mean()


def fused_z_loss(x: Tensor, y: Tensor, z_loss: float) -> Tensor:
    functional = cli.require_fusedstep().functional
    loss: Tensor = functional.cross_entropy_with_lse(x, y, z_loss=z_loss)[0]
    return loss


def fused_focal_loss(x: Tensor, y: Tensor, gamma: float) -> Tensor:
    loss: Tensor = cli.require_fusedstep().functional.focal_loss(x, y, gamma)
    return loss


@dataclass(frozen=True)
class Operands:
    x: Tensor
    y: Tensor
    options: Mapping[str, Any]

    def double(self) -> "Operands":
        options = {
            name: value.double() if isinstance(value, Tensor) else value
            for name, value in self.options.items()
        }
        y = self.y.double() if self.y.is_floating_point() else self.y
        return Operands(self.x.detach().double().requires_grad_(), y, options)

    def loss_and_gradient(self, cross_entropy: CrossEntropy) -> tuple[Tensor, Tensor]:
        loss = cross_entropy(self.x, self.y, **self.options)
        (gradient,) = torch.autograd.grad(loss, self.x)
        return loss.detach(), gradient

    def forward_backward(self, cross_entropy: CrossEntropy) -> Call:
        f = partial(cross_entropy, **self.options) if self.options else cross_entropy
        x, y = self.x, self.y

        def call() -> None:
            x.grad = None
            f(x, y).backward()

        return call

    def round_trip(self) -> Call:
        x = self.x

        def call() -> None:
            x.grad = None
            x.sum().backward()

        return call

    def exp(self) -> Call:
        x, logits = self.x, self.x.detach()

        def call() -> None:
            x.grad = None
            torch.exp(logits)

        return call

    def copy(self) -> Call:
        logits = self.x.detach()
        return partial(torch.empty_like(logits).copy_, logits)

    def peak_bytes(self, cross_entropy: CrossEntropy) -> int | None:
        self.x.grad = None
        return peak_bytes(self.forward_backward(cross_entropy), self.x.device.type)


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, ...]
    channels_last: bool = False
    label_smoothing: float = 0.0
    weighted: bool = False
    probabilities: bool = False
    z_loss: float = 0.0
    gamma: float = 0.0

    def implementations(self, ours: CrossEntropy) -> tuple[CrossEntropy, CrossEntropy]:
        """Native and fusedstep's, where `ours` is its cross-entropy."""
        if self.z_loss:
            return native_z_loss, fused_z_loss
        if self.gamma:
            return native_focal_loss, fused_focal_loss
        return F.cross_entropy, ours

    def operands(self, dtype: torch.dtype, device: str) -> Operands:
        torch.manual_seed(0)
        batch, classes, *positions = self.shape
        x = torch.randn(self.shape, device=device).to(dtype)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        if self.probabilities:
            y = torch.randn(self.shape, device=device).softmax(1).to(dtype)
        else:
            y = torch.randint(classes, (batch, *positions), device=device)
        options: dict[str, Any] = {}
        if self.label_smoothing:
            options["label_smoothing"] = self.label_smoothing
        if self.z_loss:
            options["z_loss"] = self.z_loss
        if self.gamma:
            options["gamma"] = self.gamma
        if self.weighted:
            options["weight"] = torch.rand(classes, device=device).add(0.5).to(dtype)
        return Operands(x.requires_grad_(), y, options)


SHAPES = [
    Case("4x21x128x128", (4, 21, 128, 128)),
    Case("4x21x128x128, channels last", (4, 21, 128, 128), channels_last=True),
    Case("256x1000, label smoothing", (256, 1000), label_smoothing=0.1),
    Case("256x1000, class weights", (256, 1000), weighted=True),
    Case("256x1000, probability targets", (256, 1000), probabilities=True),
    Case("256x1000, z-loss", (256, 1000), z_loss=1e-4),
    Case("128x32000, z-loss", (128, 32000), z_loss=1e-4),
    Case("256x1000, focal", (256, 1000), gamma=2.0),
    Case("4x21x128x128, focal", (4, 21, 128, 128), gamma=2.0),
]


@dataclass(frozen=True, kw_only=True)
class Options(cli.BenchmarkOptions):
    """Time cross-entropy forward and backward, fusedstep against torch."""

    sizes: Annotated[str, Option(help="Batch x classes, comma-separated.")] = SIZES
    shapes: Annotated[bool, Option(help="Also time images, weights, soft targets.")] = True
    dtypes: Annotated[str, Option(help=f"Of {', '.join(DTYPES)}.")] = "float32"

    @property
    def cases(self) -> list[Case]:
        return [case(size) for size in self.sizes.split(",")] + (SHAPES if self.shapes else [])


def case(size: str) -> Case:
    shape = cli.positive_integers("--sizes", size, separator="x")
    if len(shape) != 2:
        raise cli.Refusal(f"--sizes takes sizes like 64x10, not {size!r}")
    return Case("x".join(map(str, shape)), tuple(shape))


@dataclass(frozen=True)
class Row:
    case: str
    dtype: str
    native: Spread
    ours: Spread
    speedup: Spread
    floor_name: str
    floor: Spread
    over_floor: Spread
    copy_bandwidth: Spread | None
    """On CUDA: the share of it that fusedstep reaches."""
    peak_bytes: dict[str, int] | None
    """On CUDA: of the implementations."""


COLUMNS: dict[str, Callable[[Row], str]] = {
    "logits": lambda row: row.case,
    "dtype": lambda row: row.dtype,
    "native": lambda row: report.seconds(row.native.median),
    "fusedstep": lambda row: report.seconds(row.ours.median),
    "native / fusedstep": lambda row: report.spread(row.speedup, report.factor),
    "floor": lambda row: f"{report.seconds(row.floor.median)} ({row.floor_name})",
    "fusedstep / floor": lambda row: report.spread(row.over_floor, report.factor),
}
CUDA_COLUMNS: dict[str, Callable[[Row], str]] = {
    "share of copy\nbandwidth": lambda row: (
        f"{row.copy_bandwidth.median:.0%}" if row.copy_bandwidth else ""
    ),
    "peak memory: native, fusedstep": lambda row: (
        ", ".join(map(report.memory, row.peak_bytes.values())) if row.peak_bytes else ""
    ),
}


def check(case: Case, dtype: torch.dtype, device: str, ours: CrossEntropy) -> None:
    operands = case.operands(dtype, device)
    native, ours = case.implementations(ours)
    for what, actual, expected in zip(
        ("the loss", "the gradient"),
        operands.loss_and_gradient(ours),
        operands.double().loss_and_gradient(native),
        strict=True,
    ):
        require_exact(f"{what} of {case.name} in {dtype}", actual, expected, dtype)


def require_exact(what: str, actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """As exact as computing in float32, or float64, and rounding once to `dtype` leaves it."""
    computed = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    stored = torch.finfo(dtype)
    require_close(
        what,
        actual,
        expected,
        rtol=64 * computed.eps + stored.eps,
        # softmax - 1 cancels at the target; the smallest results are subnormal
        atol=4 * computed.eps * expected.abs().max().item() + stored.tiny * stored.eps,
    )


def bench(case: Case, dtype_name: str, options: Options, ours: CrossEntropy) -> Row:
    dtype, on_cuda = DTYPES[dtype_name], options.device == "cuda"
    check(case, dtype, options.device, ours)
    native, ours = case.implementations(ours)
    sets = operand_sets(case, dtype, options.device)
    pass_over = "copy" if on_cuda else "exp"
    measured = measure(
        {
            "native": [operands.forward_backward(native) for operands in sets],
            "ours": [operands.forward_backward(ours) for operands in sets],
            "round trip": [operands.round_trip() for operands in sets],
            pass_over: [getattr(operands, pass_over)() for operands in sets],
        },
        options.device,
        options.rounds,
    )
    if on_cuda:
        floor = max("round trip", pass_over, key=lambda name: measured.time(name).median)
    else:
        floor = pass_over if math.prod(case.shape) >= FLOOR_ELEMENTS else "round trip"
    peaks = {"native": sets[0].peak_bytes(native), "ours": sets[0].peak_bytes(ours)}
    return Row(
        case.name,
        dtype_name,
        measured.time("native"),
        measured.time("ours"),
        measured.ratio("native", "ours"),
        floor,
        measured.time(floor),
        measured.ratio("ours", floor),
        measured.ratio("copy", "ours") if on_cuda else None,
        {name: peak for name, peak in peaks.items() if peak is not None} or None,
    )


def operand_sets(case: Case, dtype: torch.dtype, device: str) -> list[Operands]:
    """Equal operands, in as many places as calls must rotate through."""
    first = case.operands(dtype, device)
    copies = buffer_sets(first.x.nbytes, device)
    return [first, *(case.operands(dtype, device) for _ in range(copies - 1))]


def main(options: Options) -> None:
    dtypes = list(cli.items(options.dtypes, DTYPES))
    work = [(case, dtype) for dtype in dtypes for case in options.cases]
    ours = cli.require_fusedstep().functional.cross_entropy
    torch.set_num_threads(options.threads)
    rows = [bench(case, dtype, options, ours) for case, dtype in report.progress(work)]
    columns = COLUMNS | CUDA_COLUMNS if options.device == "cuda" else COLUMNS
    report.show("Cross-entropy forward and backward", columns, rows)
    sizes = {case(size).name for size in options.sizes.split(",")}
    summary = {
        f"geometric mean of native / fusedstep over the sizes, {dtype}": statistics.geometric_mean(
            row.speedup.median for row in rows if row.dtype == dtype and row.case in sizes
        )
        for dtype in dtypes
    }
    report.conclude(options, rows, summary)


if __name__ == "__main__":
    cli.run(Options, main, sys.argv[1:])
