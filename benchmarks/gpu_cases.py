"""The cases of gpu_check.py: how each is checked, timed against others, and looked into."""

import dataclasses
import importlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD

import bench_sgd
import launches
from bench_cross_entropy import DTYPES, Case, CrossEntropy, Operands, operand_sets, require_exact
from bench_sgd import BASELINES, MODES
from correctness import WrongResult, require_close_in_norm
from launches import Launches
from timing import Call, Spread, buffer_sets, measure

COPY_BYTES = 2**30
REFERENCE_ELEMENTS = 2**24  # of the logits that are computed in float64 at once
LOGITS_IN_MEMORY = 16  # tensors of a case's size that its operands and temporaries may take up
COMPILED_SETS = ("cifar", "large")  # hundreds of tensors take minutes to compile

# Of other implementations, some of which round intermediate results.
OTHERS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def compiled_loss() -> CrossEntropy:
    return torch.compile(lambda x, y: F.cross_entropy(x, y), dynamic=False, fullgraph=True)


def liger_loss() -> CrossEntropy:
    function = importlib.import_module("liger_kernel.ops.cross_entropy").LigerCrossEntropyFunction
    return lambda x, y: function.apply(x, y, None)[0]


def quack_loss() -> CrossEntropy:
    cross_entropy: CrossEntropy = importlib.import_module("quack.cross_entropy").cross_entropy
    return cross_entropy


def compiled_sgd(*arguments: Any, **settings: Any) -> SGD:
    optimizer = SGD(*arguments, **settings)
    optimizer.step = torch.compile(optimizer.step, dynamic=False)  # type: ignore[method-assign]
    return optimizer


@dataclass(frozen=True)
class OtherLoss:
    load: Callable[[], CrossEntropy]
    package: str = "torch"
    compiles: bool = False
    """It takes seconds at each new shape or dtype."""
    matrices_only: bool = False
    overwrites_logits: bool = False


LOSSES = {
    "native": OtherLoss(lambda: F.cross_entropy),
    "compile": OtherLoss(compiled_loss, compiles=True),
    "Liger": OtherLoss(
        liger_loss, "liger-kernel", compiles=True, matrices_only=True, overwrites_logits=True
    ),
    "quack": OtherLoss(quack_loss, "quack-kernels", compiles=True, matrices_only=True),
}
OPTIMIZERS: dict[str, Callable[..., SGD]] = {
    **{name: partial(SGD, **which) for name, which in BASELINES.items()},
    "compile": compiled_sgd,
}


class Unmeasured(Exception):
    """An implementation has no part in a case; the message says why."""


def why(error: Exception) -> str:
    """One line; what precedes its colon fits a table."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, Unmeasured):
        return text
    kinds = {ImportError: "absent", WrongResult: "wrong", torch.OutOfMemoryError: "no memory"}
    kind = next((kinds[known] for known in kinds if isinstance(error, known)), "failed")
    return f"{kind}: {type(error).__name__}: {text}"


@dataclass(frozen=True)
class Row:
    operation: str
    kind: str
    """vocabulary, CNN or other logits; or the set of parameters."""
    case: str
    dtype: str
    bytes_moved: int
    seconds: dict[str, Spread]
    """By implementation, fusedstep's with them."""
    ratio: dict[str, Spread]
    """An implementation's time over fusedstep's."""
    missing: dict[str, str]
    """Why an implementation was not measured."""
    copy_bandwidth: float
    """Bytes read and written in a second, in the rounds of this case."""
    share: Spread
    """Of the copy bandwidth, fusedstep's."""
    peak_bytes: dict[str, int | None]
    """What forward and backward hold at once beyond their operands; on CUDA."""
    launched: dict[str, Launches] = field(default_factory=dict)
    """By implementation and, of losses, forward and backward."""
    replayed: bool | None = None
    """Whether a captured CUDA graph gave the bits of an eager call; on CUDA."""


@dataclass(frozen=True)
class Session:
    """What the cases share: whom they are measured against, and for how long."""

    fusedstep: ModuleType
    losses: Mapping[str, CrossEntropy]
    optimizers: Mapping[str, Callable[..., SGD]]
    device: str
    rounds: int
    seconds: float
    begin: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.begin

    def require_time_to_compile(self) -> None:
        """Half of the session may be spent in compilers."""
        if self.elapsed > self.seconds / 2:
            raise Unmeasured("no time")

    def row(
        self,
        case: "LossCase | StepCase",
        bytes_moved: int,
        ours: Sequence[Call],
        others: Mapping[str, Callable[[], Sequence[Call]]],
    ) -> Row:
        """Times `ours` and what `others` make, unless it raises why there is nothing to time."""
        calls, missing = {"fusedstep": ours}, {}
        for name, make in others.items():
            try:
                calls[name] = make()
            except Exception as error:  # of any kind: these are other people's packages
                missing[name] = why(error)
        source = torch.randn(COPY_BYTES // 4, device=self.device)
        copy: list[Call] = [partial(torch.empty_like(source).copy_, source)]
        measured = measure({**calls, "copy": copy}, self.device, self.rounds)
        copied = 2 * source.nbytes
        return Row(
            case.operation,
            case.kind,
            case.name,
            case.dtype,
            bytes_moved,
            seconds={name: measured.time(name) for name in calls},
            ratio={name: measured.ratio(name, "fusedstep") for name in others if name in calls},
            missing=missing,
            copy_bandwidth=copied / measured.time("copy").median,
            share=measured.ratio("copy", "fusedstep").scaled(bytes_moved / copied),
            peak_bytes={},
        )


@dataclass(frozen=True)
class LossCase:
    """Forward and backward of the mean loss on standard-normal logits."""

    operation: ClassVar = "cross-entropy"
    shape: tuple[int, ...]
    dtype: str

    @property
    def name(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def kind(self) -> str:
        batch, classes, *positions = self.shape
        if not positions and classes >= 4096:
            return "vocabulary"
        return "CNN" if not positions and batch <= 4096 and classes <= 1000 else "other"

    def fitted(self, free_bytes: int) -> "LossCase":
        """With fewer rows where the memory does not hold them."""
        batch, *row = self.shape
        row_bytes = math.prod(row) * DTYPES[self.dtype].itemsize
        fitting = max(1, free_bytes // (LOGITS_IN_MEMORY * row_bytes))
        return dataclasses.replace(self, shape=(min(batch, fitting), *row))

    def measured(self, session: Session) -> Row:
        functions = {"fusedstep": session.fusedstep.functional.cross_entropy, **session.losses}
        sets = operand_sets(self._case, DTYPES[self.dtype], session.device)
        own_sets = {"fusedstep": sets}

        def calls(name: str) -> Sequence[Call]:
            other = LOSSES.get(name)
            if other is not None and other.matrices_only and len(self.shape) != 2:
                raise Unmeasured("not covered")
            if other is not None and other.compiles:
                session.require_time_to_compile()
            self._check(functions[name], sets[0], exact=other is None)
            own_sets[name] = sets
            if other is not None and other.overwrites_logits:
                own_sets[name] = operand_sets(self._case, DTYPES[self.dtype], session.device)
            return [operands.forward_backward(functions[name]) for operands in own_sets[name]]

        others = {name: partial(calls, name) for name in session.losses}
        row = session.row(self, 2 * sets[0].x.nbytes, calls("fusedstep"), others)
        peaks = {name: own_sets[name][0].peak_bytes(functions[name]) for name in row.seconds}
        return dataclasses.replace(row, peak_bytes=peaks)

    def looked_into(self, row: Row, session: Session) -> Row:
        ours = session.fusedstep.functional.cross_entropy
        operands = self._case.operands(DTYPES[self.dtype], session.device)
        parts = {
            **halves("fusedstep", ours, operands),
            **halves("native", F.cross_entropy, operands),
        }
        return dataclasses.replace(
            row,
            launched=launches.count(parts, session.device),
            replayed=loss_is_replayed(ours, operands) if session.device == "cuda" else None,
        )

    @property
    def _case(self) -> Case:
        return Case(self.name, self.shape)

    def _check(self, function: CrossEntropy, reference: Operands, exact: bool) -> None:
        """Compares the loss and gradient of `function`, on operands of its own that equal those of
        `reference`, with torch's in float64, a part of the batch at a time."""
        dtype, x, y = DTYPES[self.dtype], reference.x.detach(), reference.y
        operands = self._case.operands(dtype, x.device.type)
        loss, gradient = operands.loss_and_gradient(function)

        def require(what: str, actual: Tensor, expected: Tensor) -> None:
            what = f"{what} of {self.name} in {dtype}"
            if exact:
                require_exact(what, actual, expected, dtype)
            else:
                require_close_in_norm(what, actual, expected, OTHERS_TOLERANCE[dtype])

        total = torch.zeros((), dtype=torch.float64, device=x.device)
        batch = max(1, REFERENCE_ELEMENTS // math.prod(self.shape[1:]))
        parts = zip(x.split(batch), y.split(batch), gradient.split(batch), strict=True)
        for x_part, y_part, actual in parts:
            x_part = x_part.double().requires_grad_()
            share = F.cross_entropy(x_part, y_part, reduction="sum") / y.numel()
            require("the gradient", actual, *torch.autograd.grad(share, x_part))
            total += share.detach()
        require("the loss", loss, total)


def halves(name: str, function: CrossEntropy, operands: Operands) -> dict[str, Call]:
    """Forward and, to be called after it, backward from a gradient that exists already."""
    x, y = operands.x, operands.y
    one = torch.ones_like(function(x, y).detach())
    held: list[Tensor] = []

    def forward() -> None:
        x.grad = None
        held[:] = [function(x, y)]

    def backward() -> None:
        held[0].backward(one)

    return {f"{name} forward": forward, f"{name} backward": backward}


def loss_is_replayed(function: CrossEntropy, operands: Operands) -> bool:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = operands.loss_and_gradient(function)
    operands.x.detach().neg_()
    graph.replay()
    return all(map(torch.equal, replayed, operands.loss_and_gradient(function)))


@dataclass(frozen=True)
class StepCase:
    """A step of SGD on standard-normal parameters and gradients."""

    operation: ClassVar = "SGD"
    set: str
    mode: str
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.set}, {self.mode}"

    @property
    def kind(self) -> str:
        return self.set

    def measured(self, session: Session) -> Row:
        dtype, ours = DTYPES[self.dtype], session.fusedstep.SGD
        elements = sum(math.prod(shape) for shape in bench_sgd.SETS[self.set]())
        copies = buffer_sets(elements * dtype.itemsize, session.device)
        bench_sgd.check(self.set, self.mode, session.device, ours, dtype)

        def calls(name: str) -> Sequence[Call]:
            make, places = session.optimizers[name], copies
            if name == "compile":
                if self.set not in COMPILED_SETS:
                    raise Unmeasured("not tried")
                session.require_time_to_compile()
                bench_sgd.check(self.set, self.mode, session.device, make, dtype)
                places = 1  # each optimizer would be compiled anew
            return [self._optimizer(make, session.device).step for _ in range(places)]

        return session.row(
            self,
            elements * MODES[self.mode].floats_moved * dtype.itemsize,
            [self._optimizer(ours, session.device).step for _ in range(copies)],
            {name: partial(calls, name) for name in session.optimizers},
        )

    def looked_into(self, row: Row, session: Session) -> Row:
        ours, device = session.fusedstep.SGD, session.device
        makes = {
            "fusedstep": ours,
            **{name: OPTIMIZERS[name] for name in BASELINES},
        }
        steps = {name: self._optimizer(make, device).step for name, make in makes.items()}
        return dataclasses.replace(
            row,
            launched=launches.count(steps, device),
            replayed=self._is_replayed(ours, device) if device == "cuda" else None,
        )

    def _optimizer(self, make: Callable[..., SGD], device: str) -> SGD:
        shapes, settings = bench_sgd.SETS[self.set](), MODES[self.mode].settings
        return bench_sgd.optimizer(make, shapes, DTYPES[self.dtype], device, **settings)

    def _is_replayed(self, ours: Callable[..., SGD], device: str) -> bool:
        captured, eager = (self._optimizer(ours, device) for _ in range(2))
        for optimizer in (captured, eager):
            optimizer.step()  # makes the momentum buffers
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured.step()
        graph.replay()
        eager.step()
        return all(map(torch.equal, *map(bench_sgd.parameters, (captured, eager))))
