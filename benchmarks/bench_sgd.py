"""The SGD update: fusedstep against torch's implementations, and against memory bandwidth.

Measured is the whole `optimizer.step()`, called from Python, with the gradients in place, in one
interleaved run with the floor: on CUDA as many bytes at the rate of a large copy, on the CPU one
`flat.add_(gradient)` that moves as many. An add_ moves three floats an element, as the plain update
does; an update with momentum moves five, so its floor is an add_ of 5/3 as many floats: measured,
not scaled, because a cache that holds three arrays may not hold five. Everyone updates the same
parameters by the same gradients, with momentum buffers of their own. The add_ has arrays of its
own: a cache that keeps the parameters from one optimizer to the next makes it the slower one.

Before that three steps of everyone's are compared with torch's for-loop in float64; who differs is
not timed. On CUDA the operands rotate through more memory than the L2 cache holds.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import SGD
from typer import Option

import cli
import driver
import launches
import suite
from bench_cross_entropy import DTYPES
from correctness import require_close, require_close_in_norm
from models import NETWORKS, resnet18
from peers import DEFAULT_OPTIMIZER, OPTIMIZERS, Unmeasured
from suite import LARGE_COPY, OURS, Calls, Row, Session, Work, large_copy
from timing import Call, buffer_sets

Shapes = Sequence[tuple[int, ...]]
Optimizer = Callable[..., SGD]

LR = 0.1
MOST_COMPILED = 20  # tensors: hundreds take minutes to compile
MOST_CHECKED = 2**24  # floats of one set that is compared with the reference


def shapes_of(model: nn.Module) -> Shapes:
    return [tuple(parameter.shape) for parameter in model.parameters()]


def conv(inputs: int, outputs: int, size: int) -> Shapes:
    """A convolution without bias and its batch normalisation."""
    return [(outputs, inputs, size, size), (outputs,), (outputs,)]


def resnet50() -> Shapes:
    """The 161 parameters, 25,557,032 floats, of a ResNet-50 for 1,000 classes."""
    net = [*conv(3, 64, 7)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        outputs = 4 * width
        for block in range(blocks):
            net += [*conv(inputs, width, 1), *conv(width, width, 3), *conv(width, outputs, 1)]
            if block == 0:
                net += conv(inputs, outputs, 1)
            inputs = outputs
    return [*net, (1000, 2048), (1000,)]


SETS: dict[str, Callable[[], Shapes]] = {
    "cifar": lambda: shapes_of(NETWORKS["cifar"].build()),
    "lenet": lambda: shapes_of(NETWORKS["lenet"].build()),
    "resnet18": lambda: shapes_of(resnet18()),
    "many": lambda: [(1000,)] * 1000,
    "flat": lambda: [(13_000_000,)],
    "resnet50": resnet50,
    "more": lambda: [(1000,)] * 2000,
    "large": lambda: [(2**27,)],
}
CPU_SETS = "cifar,lenet,resnet18,many,flat"


@dataclass(frozen=True)
class Mode:
    settings: dict[str, Any]
    floats_moved: int
    """An element: the parameter read and written, the gradient read; with momentum its buffer too,
    read and written."""


MODES = {
    "plain": Mode({}, 3),
    "momentum": Mode({"momentum": 0.9}, 5),
    "nesterov": Mode({"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}, 5),
}


@dataclass(frozen=True)
class Case(suite.Comparison):
    operation: ClassVar = "sgd"
    seconds: ClassVar = 4.0
    name: str
    shapes: Shapes
    mode: str

    def __str__(self) -> str:
        tensors = f"{len(self.shapes):,} tensor{'s'[: len(self.shapes) > 1]}"
        size = f"{tensors}, {self.floats:,} floats, {self.mode}"
        return f"{self.name}: {size}" if self.name else size

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def floats(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def bytes_moved(self) -> int:
        return self.floats * MODES[self.mode].floats_moved * self.torch_dtype.itemsize

    @property
    def tolerance(self) -> float:
        """Of the norm of a 16-bit parameter that is rounded by every step."""
        return 1.5 * torch.finfo(self.torch_dtype).eps

    def ours(self, fusedstep: ModuleType) -> Optimizer:
        optimizer: Optimizer = fusedstep.SGD
        return optimizer

    def other(self, name: str) -> Optimizer:
        return OPTIMIZERS[name].load()

    def work(self, session: Session) -> Work:
        mode, device, dtype = MODES[self.mode], session.device, self.torch_dtype
        copies = buffer_sets(self.floats * dtype.itemsize, device)
        sets = [self.parameters(dtype, device) for _ in range(copies)]

        def steps(name: str, make: Optimizer, places: int = copies) -> Calls:
            self.check(name, make, device)
            return [make(parameters, lr=LR, **mode.settings).step for parameters in sets[:places]]

        def others(name: str) -> Calls:
            if not OPTIMIZERS[name].compiles:
                return steps(name, self.other(name))
            if len(self.shapes) > MOST_COMPILED:
                raise Unmeasured("not tried: hundreds of tensors take minutes to compile")
            session.require_time_to_compile()
            return steps(name, self.other(name), 1)  # each optimizer would be compiled anew

        def add() -> Calls:
            flat = torch.randn(2, self.bytes_moved // (3 * torch.float32.itemsize))
            return [partial(Tensor.add_, *flat)]

        return Work(
            DEFAULT_OPTIMIZER[device],
            {OURS: partial(steps, OURS, self.ours(session.fusedstep))}
            | {name: partial(others, name) for name in OPTIMIZERS},
            {LARGE_COPY: large_copy(device)} if device == "cuda" else {"add_": add()},
            bytes_moved=self.bytes_moved,
        )

    def parameters(self, dtype: torch.dtype, device: str) -> list[nn.Parameter]:
        """Random ones with random gradients, in any `dtype` the same values of the case's own."""
        torch.manual_seed(0)

        def random(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, device=device).to(self.torch_dtype).to(dtype)

        parameters = [nn.Parameter(random(shape)) for shape in self.shapes]
        for parameter in parameters:
            parameter.grad = random(parameter.shape)
        return parameters

    def optimizer(self, make: Optimizer, dtype: torch.dtype, device: str, **settings: Any) -> SGD:
        parameters = self.parameters(dtype, device)
        return make(parameters, lr=LR, **MODES[self.mode].settings, **settings)

    def check(self, name: str, make: Optimizer, device: str) -> None:
        case, dtype = self.shrunk(), self.torch_dtype
        actual = case.optimizer(make, dtype, device)
        expected = case.optimizer(SGD, torch.float64, device, foreach=False)
        for _ in range(3):
            actual.step()
            expected.step()
        pairs = zip(parameters_of(actual), parameters_of(expected), strict=True)
        for parameter, reference in pairs:
            what = f"a parameter of {self} in {dtype} after three steps by {name}"
            if dtype == torch.float32:
                require_close(what, parameter.detach(), reference.detach(), rtol=1e-6, atol=4e-6)
            else:
                require_close_in_norm(what, parameter.detach(), reference.detach(), self.tolerance)

    def shrunk(self) -> "Case":
        """With fewer floats where a copy in float64 would not fit beside what is measured."""
        if self.floats <= MOST_CHECKED:
            return self
        largest = MOST_CHECKED // len(self.shapes)
        return replace(self, shapes=[(min(math.prod(s), largest),) for s in self.shapes])

    def looked_into(self, row: Row, session: Session) -> Row:
        device, dtype = session.device, self.torch_dtype
        ours = self.ours(session.fusedstep)
        makes: dict[str, Optimizer] = {OURS: ours} | {
            name: self.other(name)
            for name, other in OPTIMIZERS.items()
            if other.package == "torch" and not other.compiles
        }
        steps: dict[str, Call] = {
            name: self.optimizer(make, dtype, device).step for name, make in makes.items()
        }
        return replace(
            row,
            launched=launches.count(steps, device),
            replayed=self.is_replayed(ours, device),
        )

    def is_replayed(self, ours: Optimizer, device: str) -> bool | None:
        """Whether a captured CUDA graph, replayed, gives the bits of an eager step."""
        captured, eager = (self.optimizer(ours, self.torch_dtype, device) for _ in range(2))
        for optimizer in (captured, eager):
            optimizer.step()  # makes the momentum buffers
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured.step()
        graph.replay()
        eager.step()
        return all(map(torch.equal, *map(parameters_of, (captured, eager))))


def parameters_of(optimizer: SGD) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@dataclass(frozen=True, kw_only=True)
class Options(cli.BenchmarkOptions):
    """Time SGD.step(), fusedstep against torch's for-loop, foreach and fused implementations."""

    sets: Annotated[str, Option(help=f"Parameter sets, of {', '.join(SETS)}.")] = CPU_SETS
    modes: Annotated[str, Option(help="Updates, comma-separated.")] = ",".join(MODES)
    dtypes: Annotated[str, Option(help=f"Of {', '.join(DTYPES)}.")] = "float32"

    @property
    def cases(self) -> list[suite.Case]:
        return [
            Case(name, shapes(), mode, dtype=dtype, threads=self.threads)
            for dtype in cli.items(self.dtypes, DTYPES)
            for name, shapes in cli.items(self.sets, SETS).items()
            for mode in cli.items(self.modes, MODES)
        ]


if __name__ == "__main__":
    cli.run(Options, driver.main, sys.argv[1:])
