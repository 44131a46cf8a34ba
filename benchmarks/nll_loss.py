"""How far torch's NLLLoss is from its floor: could a fused one be faster at all?

Given log-probabilities, the loss reads one number for each row, and its gradient is zero except for
one number in each row. So the floor is the autograd round trip of ten numbers and, in the same
call, a tensor of zeros in the shape of the gradient. Both are timed in turns, as in the other
benchmarks.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from typer import Option

import bench_cross_entropy
import cli
import report
from report import Table
from results import Results
from suite import Row
from timing import Measurement, Spread, measure

NATIVE, FLOOR = "F.nll_loss", "floor"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time torch's NLLLoss on the CPU, forward and backward, beside its floor."""

    threads: Annotated[int, Option(help="CPU threads that torch may use.")] = 1
    rounds: Annotated[int, Option(help="Of each size.")] = 31
    sizes: Annotated[str, Option(help="Batch x classes, comma-separated.")] = (
        bench_cross_entropy.SIZES
    )
    json: Annotated[Path | None, Option(help="Write the measurements to this file.")] = None

    def __post_init__(self) -> None:
        cli.require_threads(self.threads)
        cli.require_range(1, cli.MAX_COUNT, rounds=self.rounds)
        if self.json is not None:
            cli.require_writable(self.json)

    @property
    def cases(self) -> list[bench_cross_entropy.Case]:
        return [bench_cross_entropy.sized(size) for size in self.sizes.split(",")]


def measured(case: bench_cross_entropy.Case, options: Options) -> Row:
    torch.manual_seed(0)
    batch, classes, *positions = case.shape
    log_p = torch.randn(case.shape).log_softmax(1).requires_grad_(True)
    y = torch.randint(classes, (batch, *positions))
    ten = torch.randn(10, requires_grad=True)

    def native() -> None:
        F.nll_loss(log_p, y).backward()
        log_p.grad = None

    trip = bench_cross_entropy.round_trip(ten)

    def floor() -> None:
        trip()
        torch.zeros_like(log_p)

    samples = measure({NATIVE: native, FLOOR: floor}, "cpu", options.rounds).seconds
    return Row(
        "nll_loss",
        str(case),
        "float32",
        options.threads,
        NATIVE,
        [FLOOR],
        {name: list(seconds) for name, seconds in samples.items()},
    )


def over_floor(row: Row) -> Spread:
    return Measurement(row.samples).ratio(NATIVE, FLOOR)


def table(rows: Sequence[Row]) -> Table:
    columns: dict[str, Callable[[Row], str]] = {
        "log-probabilities": lambda row: row.case,
        NATIVE: lambda row: report.seconds(row.time(NATIVE).median),
        FLOOR: lambda row: report.seconds(row.time(FLOOR).median),
        f"{NATIVE} / {FLOOR} (quartiles)": lambda row: report.spread(
            over_floor(row), report.factor
        ),
    }
    found = Table.of("NLLLoss, forward and backward", columns, rows)
    mean = statistics.geometric_mean(over_floor(row).median for row in rows)
    return replace(found, rows=[*found.rows, ["geometric mean", "", "", report.factor(mean)]])


def main(options: Options) -> None:
    cases = options.cases
    results = Results(report.environment("cpu"), {})
    torch.set_num_threads(options.threads)
    results.rows.extend(measured(case, options) for case in cases)
    if options.json is not None:
        results.save(options.json)
    report.show(table(results.rows))
    report.say_where(results.environment)


if __name__ == "__main__":
    cli.run(Options, main, sys.argv[1:])
