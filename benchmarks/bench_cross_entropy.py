"""Cross-entropy forward and backward: fusedstep against torch, and against what the machine allows.

Measured is `f(x, y).backward(); x.grad = None` on standard-normal logits x, in turns with the
floors:

- the autograd round trip `x.sum().backward(); x.grad = None`: no loss of few logits can be faster;
- one read and one write of the logits: no loss of many logits can be faster. On the CPU these are
  `copy_()` and `torch.exp(x)`, because every such loss computes these exponentials; on CUDA it is
  the time in which a large copy moves as many bytes.

On the CPU FLOOR_ELEMENTS says where the floor changes from the round trip to exp; on CUDA the floor
is the slower of the two. Before anything is timed, the loss and the gradient of every
implementation are compared with torch's in float64; one whose results differ is not timed.

On CUDA calls rotate through operands, with their gradients, that together are larger than the L2
cache.

Torch has no focal loss and no z-loss: its part is played by the loss as one writes it with torch's
operators, which in float64 is also the reference.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typer import Option

import cli
import driver
import launches
import suite
from correctness import require_close, require_close_in_norm
from peers import LOSSES, TOLERANCE, Unmeasured, compiled
from suite import LARGE_COPY, OURS, Calls, Row, Session, Work, large_copy
from timing import Call, buffer_sets

FLOOR_ELEMENTS = 256_000
REFERENCE_ELEMENTS = 2**24  # of the logits that are computed in float64 at once

SIZES = "1x10,64x10,512x10,4096x10,256x100,256x1000,1024x1000,128x32000,64x128256"
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

CrossEntropy = Callable[..., Tensor]

GAMMA = 2.0
Z_LOSS = 1e-4


def focal_loss(x: Tensor, y: Tensor, *, reduction: str = "mean") -> Tensor:
    log_p = x.log_softmax(1).gather(1, y.unsqueeze(1)).squeeze(1)
    losses = -((1 - log_p.exp()) ** GAMMA) * log_p
    return losses.mean() if reduction == "mean" else losses.sum()


def z_loss(x: Tensor, y: Tensor, *, reduction: str = "mean") -> Tensor:
    squares = Z_LOSS * x.logsumexp(1).square()
    added = squares.mean() if reduction == "mean" else squares.sum()
    return F.cross_entropy(x, y, reduction=reduction) + added


NATIVE: dict[str, CrossEntropy] = {
    "cross_entropy": F.cross_entropy,
    "focal_loss": focal_loss,
    "z_loss": z_loss,
}


@dataclass(frozen=True)
class Operands:
    x: Tensor
    y: Tensor
    options: Mapping[str, Any]

    def double_options(self) -> dict[str, Any]:
        return {
            name: value.double() if isinstance(value, Tensor) else value
            for name, value in self.options.items()
        }

    def loss_and_gradient(self, cross_entropy: CrossEntropy) -> tuple[Tensor, Tensor]:
        loss = cross_entropy(self.x, self.y, **self.options)
        (gradient,) = torch.autograd.grad(loss, self.x)
        return loss.detach(), gradient

    def forward_backward(self, cross_entropy: CrossEntropy) -> Call:
        f = partial(cross_entropy, **self.options) if self.options else cross_entropy
        x, y = self.x, self.y

        def call() -> None:
            f(x, y).backward()
            x.grad = None

        return call

    def exp(self) -> Call:
        return partial(torch.exp, self.x.detach())

    def copy(self) -> Call:
        logits = self.x.detach()
        return partial(torch.empty_like(logits).copy_, logits)


def round_trip(x: Tensor) -> Call:
    """The way of `x` through autograd and back, with next to nothing to compute."""

    def call() -> None:
        x.sum().backward()
        x.grad = None

    return call


@dataclass(frozen=True)
class Case(suite.Comparison):
    operation: ClassVar = "cross_entropy"
    seconds: ClassVar = 4.0
    name: str
    shape: tuple[int, ...]
    channels_last: bool = False
    label_smoothing: float = 0.0
    weighted: bool = False
    probabilities: bool = False
    loss: str = "cross_entropy"

    def __str__(self) -> str:
        return self.name

    def operands(self, device: str) -> Operands:
        torch.manual_seed(0)
        dtype = DTYPES[self.dtype]
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
        if self.weighted:
            options["weight"] = torch.rand(classes, device=device).add(0.5).to(dtype)
        return Operands(x.requires_grad_(), y, options)

    def operand_sets(self, device: str) -> list[Operands]:
        """Equal operands, in as many places as calls must rotate through."""
        first = self.operands(device)
        copies = buffer_sets(first.x.nbytes, device)
        return [first, *(self.operands(device) for _ in range(copies - 1))]

    def ours(self, functional: ModuleType) -> CrossEntropy:
        if self.loss == "z_loss":
            with_lse = partial(functional.cross_entropy_with_lse, z_loss=Z_LOSS)
            return lambda x, y: with_lse(x, y)[0]
        function: CrossEntropy = getattr(functional, self.loss)
        return function

    def work(self, session: Session) -> Work:
        sets = self.operand_sets(session.device)

        def ours() -> Calls:
            function = self.ours(session.fusedstep.functional)
            self.check(OURS, function, sets[0])
            return [operands.forward_backward(function) for operands in sets]

        def others(name: str) -> Calls:
            other = LOSSES[name]
            if other.plain_matrices_only and not self.is_plain_matrix:
                raise Unmeasured("not covered")
            if other.compiles:
                session.require_time_to_compile()
            if self.loss == "cross_entropy":
                function = other.load()
            else:
                native = NATIVE[self.loss]
                function = compiled(native) if other.compiles else native
            self.check(name, function, sets[0])
            own = self.operand_sets(session.device) if other.overwrites_logits else sets
            return [operands.forward_backward(function) for operands in own]

        return Work(
            "native",
            {OURS: ours} | {name: partial(others, name) for name in LOSSES},
            floors(sets, session.device),
            None if session.device == "cuda" else self.cpu_floor,
            2 * sets[0].x.nbytes,
        )

    @property
    def is_plain_matrix(self) -> bool:
        return len(self.shape) == 2 and self == replace(
            self, label_smoothing=0.0, weighted=False, probabilities=False, loss="cross_entropy"
        )

    @property
    def cpu_floor(self) -> str:
        return "exp" if math.prod(self.shape) >= FLOOR_ELEMENTS else "round trip"

    def check(self, name: str, function: CrossEntropy, reference: Operands) -> None:
        """Compares the loss and gradient of `function`, on operands of its own that equal those of
        `reference`, with torch's in float64, a part of the batch at a time."""
        dtype, x, y = DTYPES[self.dtype], reference.x.detach(), reference.y
        loss, gradient = self.operands(x.device.type).loss_and_gradient(function)
        options = reference.double_options()
        weight = options.get("weight")
        rows = y.numel() if not self.probabilities else y.numel() // y.shape[1]
        divisor = rows if weight is None else weight[y].sum()
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        batch = max(1, REFERENCE_ELEMENTS // math.prod(self.shape[1:]))
        parts = zip(x.split(batch), y.split(batch), gradient.split(batch), strict=True)
        for x_part, y_part, actual in parts:
            x_part = x_part.double().requires_grad_()
            y_part = y_part.double() if self.probabilities else y_part
            share = NATIVE[self.loss](x_part, y_part, reduction="sum", **options) / divisor
            (expected,) = torch.autograd.grad(share, x_part)
            require(f"the gradient of {self} by {name}", actual, expected, dtype, name == OURS)
            total += share.detach()
        require(f"the loss of {self} by {name}", loss, total, dtype, name == OURS)

    def looked_into(self, row: Row, session: Session) -> Row:
        ours = self.ours(session.fusedstep.functional)
        operands = self.operands(session.device)
        parts = halves(OURS, ours, operands) | halves("native", NATIVE[self.loss], operands)
        return replace(
            row,
            launched=launches.count(parts, session.device),
            replayed=is_replayed(ours, operands),
        )


def floors(sets: Sequence[Operands], device: str) -> dict[str, Calls]:
    trips: dict[str, Calls] = {"round trip": [round_trip(operands.x) for operands in sets]}
    if device == "cuda":
        return trips | {LARGE_COPY: large_copy(device)}
    (operands,) = sets
    return trips | {"exp": [operands.exp()], "copy": [operands.copy()]}


def halves(name: str, function: CrossEntropy, operands: Operands) -> dict[str, Call]:
    """Forward and, to be called after it, backward from a gradient that exists already."""
    x, y = operands.x, operands.y
    one = torch.ones_like(function(x, y, **operands.options).detach())
    held: list[Tensor] = []

    def forward() -> None:
        x.grad = None
        held[:] = [function(x, y, **operands.options)]

    def backward() -> None:
        held[0].backward(one)

    return {f"{name} forward": forward, f"{name} backward": backward}


def is_replayed(function: CrossEntropy, operands: Operands) -> bool:
    """Whether a captured CUDA graph, replayed on new values, gives the bits of an eager call."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = operands.loss_and_gradient(function)
    operands.x.detach().neg_()
    graph.replay()
    return all(map(torch.equal, replayed, operands.loss_and_gradient(function)))


def require(what: str, actual: Tensor, expected: Tensor, dtype: torch.dtype, exactly: bool) -> None:
    if exactly:
        require_exact(f"{what} in {dtype}", actual, expected, dtype)
    else:
        require_close_in_norm(f"{what} in {dtype}", actual, expected, TOLERANCE[dtype])


SHAPES = [
    Case("4x21x128x128", (4, 21, 128, 128)),
    Case("4x21x128x128, channels last", (4, 21, 128, 128), channels_last=True),
    Case("256x1000, label smoothing", (256, 1000), label_smoothing=0.1),
    Case("256x1000, class weights", (256, 1000), weighted=True),
    Case("256x1000, probability targets", (256, 1000), probabilities=True),
    Case("256x1000, focal loss", (256, 1000), loss="focal_loss"),
    Case("4x21x128x128, focal loss", (4, 21, 128, 128), loss="focal_loss"),
    Case("256x1000, z-loss", (256, 1000), loss="z_loss"),
    Case("128x32000, z-loss", (128, 32000), loss="z_loss"),
]


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


@dataclass(frozen=True, kw_only=True)
class Options(cli.BenchmarkOptions):
    """Time cross-entropy forward and backward, fusedstep against torch."""

    sizes: Annotated[str, Option(help="Batch x classes, comma-separated.")] = SIZES
    shapes: Annotated[bool, Option(help="Also time images, weights, other losses.")] = True
    dtypes: Annotated[str, Option(help=f"Of {', '.join(DTYPES)}.")] = "float32"

    @property
    def cases(self) -> list[suite.Case]:
        cases = [sized(size) for size in self.sizes.split(",")] + (SHAPES if self.shapes else [])
        return [
            replace(case, dtype=dtype, threads=self.threads)
            for dtype in cli.items("--dtypes", self.dtypes, DTYPES)
            for case in cases
        ]


def sized(size: str) -> Case:
    """Of logits such as 64x10 or, for images, 4x21x128x128."""
    shape = cli.positive_integers("--sizes", size, separator="x")
    if len(shape) < 2:
        raise cli.Refusal(f"--sizes takes sizes like 64x10 or 4x21x128x128, not {size!r}")
    return Case("x".join(map(str, shape)), tuple(shape))


if __name__ == "__main__":
    cli.run(Options, driver.main, sys.argv[1:])
