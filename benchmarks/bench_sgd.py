"""The SGD update: fusedstep against torch's three implementations, and against memory bandwidth.

Measured is the whole `optimizer.step()`, called from Python, on float32 parameters with their
gradients in place, in one interleaved run with the floor: one tensor operation that moves as many
bytes, on the CPU `flat.add_(gradient)`, on CUDA `flat.copy_(gradient)`. An add_ moves three floats
an element, as the plain update does; an update with momentum moves five, so its floor is an add_ of
5/3 as many floats: measured, not scaled, because a cache that holds three arrays may not hold five.
Before that three steps of fusedstep are compared with torch's for-loop in float64; where they
differ nothing is timed. On CUDA the operands rotate through more memory than the L2 cache holds.
"""

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.optim import SGD
from typer import Option

import cli
import report
from correctness import require_close, require_close_in_norm
from models import NETWORKS
from timing import Call, Spread, buffer_sets, measure

Shapes = Sequence[tuple[int, ...]]

LR = 0.1


def shapes_of(model: nn.Module) -> Shapes:
    return [tuple(parameter.shape) for parameter in model.parameters()]


def conv(inputs: int, outputs: int, size: int) -> Shapes:
    """A convolution without bias and its batch normalisation."""
    return [(outputs, inputs, size, size), (outputs,), (outputs,)]


def resnet18() -> Shapes:
    """The 62 parameters, 11,689,512 floats, of a ResNet-18 for 1,000 classes."""
    net = [*conv(3, 64, 7)]
    for inputs, outputs in ((64, 64), (64, 128), (128, 256), (256, 512)):
        net += [*conv(inputs, outputs, 3), *conv(outputs, outputs, 3)]
        if inputs != outputs:
            net += conv(inputs, outputs, 1)
        net += [*conv(outputs, outputs, 3), *conv(outputs, outputs, 3)]
    return [*net, (1000, 512), (1000,)]


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
    "resnet18": resnet18,
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
class Floor:
    operation: Callable[[Tensor, Tensor], Tensor]
    floats_moved: int


FLOORS = {"cpu": Floor(Tensor.add_, 3), "cuda": Floor(Tensor.copy_, 2)}

BASELINES: dict[str, dict[str, Any]] = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


@dataclass(frozen=True, kw_only=True)
class Options(cli.BenchmarkOptions):
    """Time SGD.step(), fusedstep against torch's for-loop, foreach and fused implementations."""

    sets: Annotated[str, Option(help=f"Parameter sets, of {', '.join(SETS)}.")] = CPU_SETS
    modes: Annotated[str, Option(help="Updates, comma-separated.")] = ",".join(MODES)


@dataclass(frozen=True)
class Row:
    set: str
    tensors: int
    floats: int
    mode: str
    native: dict[str, Spread]
    ours: Spread
    speedup: dict[str, Spread]
    floor: Spread
    bandwidth: Spread
    """The floor's time over ours: the share of its bandwidth that the step reaches."""


def columns() -> dict[str, Callable[[Row], str]]:
    def native(name: str, row: Row) -> str:
        return report.seconds(row.native[name].median)

    def speedup(name: str, row: Row) -> str:
        return report.factor(row.speedup[name].median)

    return {
        "parameters": lambda row: row.set,
        "tensors": lambda row: f"{row.tensors:,}",
        "floats": lambda row: f"{row.floats:,}",
        "update": lambda row: row.mode,
        **{name: partial(native, name) for name in BASELINES},
        "fusedstep": lambda row: report.seconds(row.ours.median),
        **{f"{name}\n/ ours": partial(speedup, name) for name in BASELINES},
        "floor": lambda row: report.seconds(row.floor.median),
        "ours\n– floor": lambda row: report.seconds(row.ours.median - row.floor.median),
        "share of\nbandwidth": lambda row: f"{row.bandwidth.median:.0%}",
    }


def optimizer(
    make: Callable[..., SGD], shapes: Shapes, dtype: torch.dtype, device: str, **settings: Any
) -> SGD:
    """One over random parameters with random gradients, the same at every call on one device."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, device=device).to(dtype)
    return make(parameters, lr=LR, **settings)


def check(
    set_name: str,
    mode_name: str,
    device: str,
    ours: Callable[..., SGD],
    dtype: torch.dtype = torch.float32,
) -> None:
    shapes, settings = SETS[set_name](), MODES[mode_name].settings
    actual = optimizer(ours, shapes, dtype, device, **settings)
    expected = optimizer(SGD, shapes, torch.float64, device, foreach=False, **settings)
    for _ in range(3):
        actual.step()
        expected.step()
    for parameter, reference in zip(parameters(actual), parameters(expected), strict=True):
        what = f"a parameter of {set_name} in {dtype} after three {mode_name} steps"
        if dtype == torch.float32:
            require_close(what, parameter.detach(), reference.detach(), rtol=1e-6, atol=4e-6)
        else:  # rounded at the start and by every step
            tolerance = 1.5 * torch.finfo(dtype).eps
            require_close_in_norm(what, parameter.detach(), reference.detach(), tolerance)


def parameters(optimizer: SGD) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def bench(set_name: str, mode_name: str, options: Options, ours: type[SGD]) -> Row:
    check(set_name, mode_name, options.device, ours)
    shapes, mode = SETS[set_name](), MODES[mode_name]
    floats = sum(math.prod(shape) for shape in shapes)
    copies = range(buffer_sets(floats * torch.float32.itemsize, options.device))

    def steps(make: Callable[..., SGD], **settings: Any) -> list[Call]:
        return [
            optimizer(make, shapes, torch.float32, options.device, **settings).step for _ in copies
        ]

    def floor() -> list[Call]:
        floor = FLOORS[options.device]
        as_many = floats * mode.floats_moved // floor.floats_moved
        flat = [torch.randn(2, as_many, device=options.device) for _ in copies]
        return [partial(floor.operation, parameter, gradient) for parameter, gradient in flat]

    measured = measure(
        {
            "ours": steps(ours, **mode.settings),
            "floor": floor(),
            **{name: steps(SGD, **mode.settings, **which) for name, which in BASELINES.items()},
        },
        options.device,
        options.rounds,
    )
    return Row(
        set_name,
        len(shapes),
        floats,
        mode_name,
        native={name: measured.time(name) for name in BASELINES},
        ours=measured.time("ours"),
        speedup={name: measured.ratio(name, "ours") for name in BASELINES},
        floor=measured.time("floor"),
        bandwidth=measured.ratio("floor", "ours"),
    )


def main(options: Options) -> None:
    sets, modes = cli.items(options.sets, SETS), cli.items(options.modes, MODES)
    work = [(set_name, mode_name) for set_name in sets for mode_name in modes]
    ours = cli.require_fusedstep().SGD
    torch.set_num_threads(options.threads)
    rows = [bench(*names, options, ours) for names in report.progress(work)]
    report.show("SGD.step()", columns(), rows)
    summary = {
        f"geometric mean of {name} / fusedstep": statistics.geometric_mean(
            row.speedup[name].median for row in rows
        )
        for name in BASELINES
    }
    report.conclude(options, rows, summary)


if __name__ == "__main__":
    cli.run(Options, main, sys.argv[1:])
