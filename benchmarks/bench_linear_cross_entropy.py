"""The output layer of a language model: a linear layer and cross-entropy, forward and backward.

Some implementations fuse the linear layer into the loss and so never have logits in memory:
F.linear_cross_entropy, by default and chunked by LinearCrossEntropyOptions(), and on CUDA Liger's
and Apple's. fusedstep is F.linear followed by its loss. The floor is the three matrix products that
no implementation can do without; bytes are not counted. Before anything is timed, the loss and both
gradients of every implementation are compared with torch's in float64; one whose results differ is
not timed.
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
from bench_cross_entropy import DTYPES
from correctness import require_close_in_norm
from peers import LINEAR_LOSSES, linear_loss
from suite import OURS, Calls, Session, Work
from timing import Call

SIZES = "64x256x10000,512x256x32000,256x1024x32000"
QUICK_SIZES = "64x256x10000,128x256x32000"

# Of the norm of a result; products in float32 and the rounding of 16-bit logits cost most of it.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 4e-3,
}

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Operands:
    hidden: Tensor
    weight: Tensor
    y: Tensor

    def results(self, loss: Loss) -> tuple[Tensor, ...]:
        value = loss(self.hidden, self.weight, self.y)
        return value.detach(), *torch.autograd.grad(value, (self.hidden, self.weight))

    def forward_backward(self, loss: Loss) -> Call:
        def call() -> None:
            loss(self.hidden, self.weight, self.y).backward()
            self.hidden.grad = self.weight.grad = None

        return call

    def products(self) -> Call:
        hidden, weight = self.hidden.detach(), self.weight.detach()
        gradient = torch.randn(len(hidden), len(weight), device=hidden.device).to(hidden.dtype)

        def call() -> None:
            F.linear(hidden, weight)
            gradient @ weight
            gradient.T @ hidden

        return call


@dataclass(frozen=True)
class Case(suite.Comparison):
    operation: ClassVar = "linear_cross_entropy"
    seconds: ClassVar = 10.0
    rows: int
    width: int
    classes: int

    def __str__(self) -> str:
        return f"{self.rows} rows, {self.width} features, {self.classes:,} classes"

    def operands(self, device: str, dtype: torch.dtype) -> Operands:
        torch.manual_seed(0)
        hidden = torch.randn(self.rows, self.width, device=device)
        weight = torch.randn(self.classes, self.width, device=device) / math.sqrt(self.width)
        y = torch.randint(self.classes, (self.rows,), device=device)
        stored = DTYPES[self.dtype]  # the reference starts from the rounded operands
        hidden, weight = (tensor.to(stored).to(dtype) for tensor in (hidden, weight))
        return Operands(hidden.requires_grad_(), weight.requires_grad_(), y)

    def work(self, session: Session) -> Work:
        dtype = DTYPES[self.dtype]
        operands = self.operands(session.device, dtype)
        references = self.operands(session.device, torch.float64).results(linear_loss)

        def calls(name: str, load: Callable[[], Loss]) -> Calls:
            loss = load()
            names = ("the loss", "the gradient of the features", "the gradient of the weight")
            found = operands.results(loss)
            for what, actual, expected in zip(names, found, references, strict=True):
                what = f"{what} of {self} by {name}"
                require_close_in_norm(what, actual, expected, TOLERANCE[dtype])
            return [operands.forward_backward(loss)]

        def ours() -> Loss:
            cross_entropy = session.fusedstep.functional.cross_entropy
            return lambda hidden, weight, y: cross_entropy(F.linear(hidden, weight), y)

        def other(name: str) -> Loss:
            if LINEAR_LOSSES[name].compiles:
                session.require_time_to_compile()
            loss: Loss = LINEAR_LOSSES[name].load()
            return loss

        loaders: dict[str, Callable[[], Loss]] = {
            OURS: ours,
            **{name: partial(other, name) for name in LINEAR_LOSSES},
        }
        return Work(
            "native",
            {name: partial(calls, name, load) for name, load in loaders.items()},
            {"three products": [operands.products()]},
        )


@dataclass(frozen=True, kw_only=True)
class Options(cli.BenchmarkOptions):
    """Time a linear layer with cross-entropy, fusedstep against torch and fused heads."""

    sizes: Annotated[
        str | None,
        Option(help="Rows x features x classes, comma-separated.", show_default=SIZES),
    ] = None
    dtypes: Annotated[str, Option(help=f"Of {', '.join(DTYPES)}.")] = "float32"

    @property
    def cases(self) -> list[suite.Case]:
        sizes = self.sizes or (QUICK_SIZES if self.quick else SIZES)
        return [
            sized(size, dtype, self.threads)
            for dtype in cli.items("--dtypes", self.dtypes, DTYPES)
            for size in sizes.split(",")
        ]


def sized(size: str, dtype: str, threads: int) -> Case:
    shape = cli.positive_integers("--sizes", size, separator="x")
    if len(shape) != 3:
        raise cli.Refusal(f"--sizes takes rows x features x classes: 64x256x10000, not {size!r}")
    return Case(*shape, dtype=dtype, threads=threads)


if __name__ == "__main__":
    cli.run(Options, driver.main, sys.argv[1:])
