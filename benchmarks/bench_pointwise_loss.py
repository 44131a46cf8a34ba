"""Pointwise losses forward and backward: fusedstep against torch, and against memory bandwidth.

Measured is `f(x, t).backward(); x.grad = None` with the mean as the reduction, on standard-normal
inputs x and targets t uniform in [0, 1), in turns with two floors:

- the autograd round trip `x.sum().backward(); x.grad = None`: no loss of few elements is faster;
- `torch.add(x, t, out=g)`: no loss of many elements can be faster. It moves three arrays, as a loss
  must, which reads input and target once and writes the gradient once. g lies where fusedstep puts
  a gradient, which is on huge pages where the system grants them. This floor does not include the
  exponential and the logarithm of binary cross-entropy.

On the CPU FLOOR_ELEMENTS says where the floor changes from the first to the second; on CUDA the
floor is the slower of the two. Before anything is timed, the loss and the gradient of every
implementation are compared with torch's in float64; one whose results differ is not timed.

On CUDA calls rotate through operands that together are larger than the L2 cache.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typer import Option

import cli
import driver
import suite
from bench_cross_entropy import DTYPES, FLOOR_ELEMENTS, require, round_trip
from peers import compiled
from suite import OURS, Calls, Session, Work
from timing import Call, buffer_sets

SIZES = "64x10,1024x1000,64x3x224x224,16777216"
QUICK_SIZES = "64x10,1024x1000,64x3x224x224"

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

    def add(self, loss: Loss) -> Call:
        """Into the memory that the gradient of `loss` has."""
        _, gradient = self.loss_and_gradient(loss)
        return partial(torch.add, self.x.detach(), self.t, out=gradient)


@dataclass(frozen=True)
class Case(suite.Comparison):
    operation: ClassVar = "pointwise_loss"
    seconds: ClassVar = 4.0
    loss: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.loss}, {'x'.join(map(str, self.shape))}"

    def operands(self, device: str) -> Operands:
        torch.manual_seed(0)
        dtype = DTYPES[self.dtype]
        x = torch.randn(self.shape, device=device).to(dtype)
        t = torch.rand(self.shape, device=device).to(dtype)
        return Operands(x.requires_grad_(), t)

    def work(self, session: Session) -> Work:
        native = LOSSES[self.loss]
        reference = self.operands(session.device)
        copies = buffer_sets(reference.x.nbytes + reference.t.nbytes, session.device)
        sets = [reference, *(self.operands(session.device) for _ in range(copies - 1))]

        def calls(name: str, load: Callable[[], Loss]) -> Calls:
            function = load()
            self.check(name, function, reference)
            return [operands.forward_backward(function) for operands in sets]

        def compile_native() -> Loss:
            session.require_time_to_compile()
            return compiled(native)

        ours: Loss = getattr(session.fusedstep.functional, self.loss)
        loaders: dict[str, Callable[[], Loss]] = {
            OURS: lambda: ours,
            "native": lambda: native,
            "compile": compile_native,
        }
        return Work(
            "native",
            {name: partial(calls, name, load) for name, load in loaders.items()},
            {
                "round trip": [round_trip(operands.x) for operands in sets],
                "add": [operands.add(ours) for operands in sets],
            },
            None if session.device == "cuda" else self.cpu_floor,
            3 * reference.x.nbytes,
        )

    @property
    def cpu_floor(self) -> str:
        return "add" if math.prod(self.shape) >= FLOOR_ELEMENTS else "round trip"

    def check(self, name: str, function: Loss, operands: Operands) -> None:
        for what, actual, expected in zip(
            ("the loss", "the gradient"),
            operands.loss_and_gradient(function),
            operands.double().loss_and_gradient(LOSSES[self.loss]),
            strict=True,
        ):
            dtype = DTYPES[self.dtype]
            require(f"{what} of {self} by {name}", actual, expected, dtype, name == OURS)


@dataclass(frozen=True, kw_only=True)
class Options(cli.BenchmarkOptions):
    """Time pointwise losses forward and backward, fusedstep against torch."""

    sizes: Annotated[
        str | None, Option(help="Shapes of the input, comma-separated.", show_default=SIZES)
    ] = None
    losses: Annotated[str, Option(help="Comma-separated.")] = ",".join(LOSSES)
    dtypes: Annotated[str, Option(help=f"Of {', '.join(DTYPES)}.")] = "float32"

    @property
    def cases(self) -> list[suite.Case]:
        shapes = [
            tuple(cli.positive_integers("--sizes", size, separator="x"))
            for size in (self.sizes or (QUICK_SIZES if self.quick else SIZES)).split(",")
        ]
        return [
            Case(loss, shape, dtype=dtype, threads=self.threads)
            for dtype in cli.items("--dtypes", self.dtypes, DTYPES)
            for loss in cli.items("--losses", self.losses, LOSSES)
            for shape in shapes
        ]


if __name__ == "__main__":
    cli.run(Options, driver.main, sys.argv[1:])
