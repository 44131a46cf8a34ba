"""How far torch's NLLLoss is from its floor: whether a fused one could gain anything.

Given log-probabilities, the loss reads one number a row, and its gradient is zero but for one
number a row. The floor is therefore the autograd round trip of ten numbers and, in the same call,
zeros in the shape of the gradient. Both are timed in one interleaved run, as the other benchmarks
are.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from typer import Option

import bench_cross_entropy
import cli
import report
from report import Table
from timing import Measurement, measure

NATIVE, FLOOR = "F.nll_loss", "floor"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time torch's NLLLoss on the CPU, forward and backward, beside its floor."""

    threads: Annotated[int, Option(help="CPU threads that torch may use.")] = 1
    rounds: Annotated[int, Option(help="Of each size.")] = 31
    sizes: Annotated[str, Option(help="Batch x classes, comma-separated.")] = (
        bench_cross_entropy.SIZES
    )

    def __post_init__(self) -> None:
        cli.require_threads(self.threads)
        cli.require_range(1, cli.MAX_COUNT, rounds=self.rounds)

    @property
    def shapes(self) -> dict[str, list[int]]:
        return {
            size: cli.positive_integers("--sizes", size, separator="x")
            for size in self.sizes.split(",")
        }


def measured(shape: list[int], rounds: int) -> Measurement:
    torch.manual_seed(0)
    batch, classes, *_ = shape
    log_p = torch.randn(shape).log_softmax(1).requires_grad_(True)
    y = torch.randint(classes, (batch,))
    ten = torch.randn(10, requires_grad=True)

    def native() -> None:
        F.nll_loss(log_p, y).backward()
        log_p.grad = None

    def floor() -> None:
        ten.sum().backward()
        ten.grad = None
        torch.zeros_like(log_p)

    return measure({NATIVE: native, FLOOR: floor}, "cpu", rounds)


def main(options: Options) -> None:
    where = report.environment("cpu")
    torch.set_num_threads(options.threads)
    found = {size: measured(shape, options.rounds) for size, shape in options.shapes.items()}
    columns: dict[str, Callable[[str], str]] = {
        "logits": str,
        NATIVE: lambda size: report.seconds(found[size].time(NATIVE).median),
        FLOOR: lambda size: report.seconds(found[size].time(FLOOR).median),
        f"{NATIVE} / {FLOOR} (quartiles)": lambda size: report.spread(
            found[size].ratio(NATIVE, FLOOR), report.factor
        ),
    }
    report.show(Table.of("NLLLoss, forward and backward", columns, list(found)))
    ratios = [measurement.ratio(NATIVE, FLOOR).median for measurement in found.values()]
    report.say(f"geometric mean: {report.factor(statistics.geometric_mean(ratios))}")
    report.say_where(where)


if __name__ == "__main__":
    cli.run(Options, main, sys.argv[1:])
