"""How time grows with rows, classes, tensors, parameters and threads; each is a line of a plot.

The cases are those of cross-entropy and of SGD, checked and measured in the same way, beside their
floors and against torch's default; SGD also against torch's for-loop, foreach and fused forms.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from typer import Option

import bench_cross_entropy
import bench_pointwise_loss
import bench_sgd
import cli
import driver
import suite
from suite import Point

ROWS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
CLASSES = (10, 32, 100, 316, 1000, 3162, 10_000, 32_000, 100_000, 262_144)
TENSORS = (1, 3, 10, 30, 100, 300, 1000, 2000)
FLOATS = (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000, 500_000_000)
QUICK_FLOATS = FLOATS[:6]
QUICK_EVERY = 2  # of the other points

SIZE_AXES = ("rows", "classes", "tensors", "parameters")
AXES = (*SIZE_AXES, "threads")


def rows(quick: bool) -> Iterator[suite.Case]:
    for classes in (10, 1000):
        for count in thinned(ROWS, quick):
            point = Point(f"cross-entropy of N × {classes} logits", "rows N", count)
            yield replace(bench_cross_entropy.sized(f"{count}x{classes}"), point=point)


def classes(quick: bool) -> Iterator[suite.Case]:
    for count in thinned(CLASSES, quick):
        point = Point("cross-entropy of 64 × C logits", "classes C", count)
        yield replace(bench_cross_entropy.sized(f"64x{count}"), point=point)


def tensors(quick: bool) -> Iterator[suite.Case]:
    for count in thinned(TENSORS, quick):
        point = Point("SGD with momentum, tensors of 1,000 floats", "tensors", count)
        shapes = [(1000,)] * count
        yield bench_sgd.Case("", shapes, "momentum", point=point)


def parameters(quick: bool) -> Iterator[suite.Case]:
    for count in QUICK_FLOATS if quick else FLOATS:
        point = Point("SGD without momentum, one tensor", "parameters", count)
        yield bench_sgd.Case("", [(count,)], "plain", point=point)


def threads(quick: bool) -> Iterator[suite.Case]:
    resnet = bench_sgd.SETS["resnet18"]()
    cases: dict[str, suite.Case] = {
        "cross-entropy of 4096 × 10 logits": bench_cross_entropy.sized("4096x10"),
        "cross-entropy of 1024 × 1000 logits": bench_cross_entropy.sized("1024x1000"),
        "cross-entropy of 64 × 128256 logits": bench_cross_entropy.sized("64x128256"),
        "mse_loss of 4,194,304 elements": bench_pointwise_loss.Case("mse_loss", (2**22,)),
        "SGD with momentum, ResNet-18": bench_sgd.Case("resnet18", resnet, "momentum"),
    }
    for name, case in cases.items():
        for count in thread_counts():
            yield replace(case, threads=count, point=Point(name, "threads", count))


def thread_counts() -> list[int]:
    """1, 2, 4 and so on, and the number of this machine's cores."""
    cores = os.cpu_count() or 1
    return sorted({1 << power for power in range(cores.bit_length())} | {cores})


def thinned(values: Sequence[int], quick: bool) -> Sequence[int]:
    return sorted({*values[::QUICK_EVERY], values[-1]}) if quick else values


MAKERS = dict(zip(AXES, (rows, classes, tensors, parameters, threads), strict=True))


@dataclass(frozen=True, kw_only=True)
class Options(cli.BenchmarkOptions):
    """Time cross-entropy and SGD over sizes and threads, fusedstep against torch."""

    axes: Annotated[str, Option(help=f"Of {', '.join(AXES)}.")] = ",".join(AXES)

    @property
    def cases(self) -> list[suite.Case]:
        made = [
            (axis, case)
            for axis, make in cli.items("--axes", self.axes, MAKERS).items()
            for case in make(self.quick)
        ]
        return [
            case if axis == "threads" else replace(case, threads=self.threads)
            for axis, case in made
        ]


if __name__ == "__main__":
    cli.run(Options, driver.main, sys.argv[1:])
