"""The SGD update: fusedstep against torch's implementations, and against memory bandwidth.

Measured is the whole `optimizer.step()`, called from Python, with the gradients in place, in turns
with the floor. All implementations update the same parameters by the same gradients; each has
momentum buffers of its own.

On CUDA the floor is the time in which a large copy moves as many bytes. On the CPU the floor moves
the same bytes of the same memory as an update, in at most two calls. The parameters lie side by
side in one array, and so do their gradients: `add_` reads both arrays and writes the first. With
momentum, `neg_` reads and writes an array of the size of the buffers, which is the floor's own as
each optimizer's buffers are its own. So the floor finds as much in cache as the optimizers do.
`add_` adds 0 times the gradients, which leaves the parameters unchanged. Both calls treat pairs of
16-bit numbers as one float32, because only the bytes matter here and torch converts 16-bit numbers
slowly.

Before anything is timed, three steps of every implementation are compared with torch's for-loop in
float64; one whose results differ is not timed. On CUDA calls rotate through operands that together
are larger than the L2 cache.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
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
SECONDS_PER_FLOAT = 1e-7  # a guess, see Case.seconds
ALIGNMENT = 64  # bytes; torch's own allocator aligns as much on the CPU


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


MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
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
    def state_bytes(self) -> int:
        """What an optimizer keeps between steps: a momentum buffer for each parameter."""
        return self.floats * self.torch_dtype.itemsize if MODES[self.mode] else 0

    @property
    def bytes_moved(self) -> int:
        """Parameters are read and written, gradients read, and what is kept read and written."""
        return 3 * self.floats * self.torch_dtype.itemsize + 2 * self.state_bytes

    @property
    def tolerance(self) -> float:
        """Of the norm of a 16-bit parameter that is rounded by every step."""
        return 1.5 * torch.finfo(self.torch_dtype).eps

    @property
    def expected_seconds(self) -> float:
        return super().expected_seconds + SECONDS_PER_FLOAT * self.floats

    def ours(self, fusedstep: ModuleType) -> Optimizer:
        optimizer: Optimizer = fusedstep.SGD
        return optimizer

    def other(self, name: str) -> Optimizer:
        return OPTIMIZERS[name].load()

    def work(self, session: Session) -> Work:
        device, dtype = session.device, self.torch_dtype
        copies = buffer_sets(self.floats * dtype.itemsize, device)
        sets = [self.parameters(dtype, device) for _ in range(copies)]
        floors = self.floors(session, sets)

        def checked(name: str, make: Optimizer, places: int = copies) -> Calls:
            self.check(name, make, device)
            return self.steps(make, sets[:places])

        def others(name: str) -> Calls:
            if not OPTIMIZERS[name].compiles:
                return checked(name, self.other(name))
            if len(self.shapes) > MOST_COMPILED:
                raise Unmeasured("not tried: hundreds of tensors take minutes to compile")
            session.require_time_to_compile()
            return checked(name, self.other(name), 1)  # each optimizer would be compiled anew

        return Work(
            DEFAULT_OPTIMIZER[device],
            {OURS: partial(checked, OURS, self.ours(session.fusedstep))}
            | {name: partial(others, name) for name in OPTIMIZERS},
            floors,
            bytes_moved=self.bytes_moved,
        )

    def steps(self, make: Optimizer, sets: Sequence[Sequence[nn.Parameter]]) -> Calls:
        return [make(parameters, lr=LR, **MODES[self.mode]).step for parameters in sets]

    def floors(self, session: Session, sets: Sequence[Sequence[nn.Parameter]]) -> dict[str, Calls]:
        """On the CPU, where there is one of `sets`, it comes to lie in the floor's arrays."""
        if session.device == "cuda":
            return {LARGE_COPY: large_copy(session.device)}
        (parameters,) = sets
        name, update = self.floor(*self.flattened(parameters))
        if not self.state_bytes:
            return {name: [update]}
        state = torch.ones(self.state_bytes // torch.float32.itemsize)

        def call() -> None:
            update()
            state.neg_()

        return {f"{name}, neg_": [call]}

    def floor(self, parameters: Tensor, gradients: Tensor) -> tuple[str, Call]:
        """Moves what an update does of `parameters` and `gradients`, and changes neither."""
        return "add_", partial(parameters.add_, gradients, alpha=0)

    def flattened(self, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, Tensor]:
        """Lays `parameters` side by side, and their gradients. Both arrays, of float32 where these
        have 16 bits; the last bytes, as many as the padding has, are left out."""
        wide = torch.float32 if self.torch_dtype.itemsize < 4 else self.torch_dtype
        count = self.floats * self.torch_dtype.itemsize // wide.itemsize
        values, flat_values = side_by_side([parameter.detach() for parameter in parameters])
        gradients, flat_gradients = side_by_side([gradient_of(each) for each in parameters])
        for parameter, value, gradient in zip(parameters, values, gradients, strict=True):
            parameter.data, parameter.grad = value, gradient
        return flat_values.view(wide)[:count], flat_gradients.view(wide)[:count]

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
        return make(parameters, lr=LR, **MODES[self.mode], **settings)

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


def side_by_side(tensors: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Copies of contiguous `tensors` of one dtype, aligned parts of one array of bytes, and that
    array. Each has a storage of its own: implementations ask which tensors share one."""
    starts = [0, *accumulate(-(-each.nbytes // ALIGNMENT) * ALIGNMENT for each in tensors)]
    array = torch.empty(starts.pop(), dtype=torch.uint8)
    parts = [
        torch.frombuffer(array.numpy(), dtype=each.dtype, count=each.numel(), offset=start)
        .view(each.shape)
        .copy_(each)
        for each, start in zip(tensors, starts, strict=True)
    ]
    return parts, array


def gradient_of(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


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
            for dtype in cli.items("--dtypes", self.dtypes, DTYPES)
            for name, shapes in cli.items("--sets", self.sets, SETS).items()
            for mode in cli.items("--modes", self.modes, MODES)
        ]


if __name__ == "__main__":
    cli.run(Options, driver.main, sys.argv[1:])
