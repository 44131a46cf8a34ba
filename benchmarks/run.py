"""Runs every benchmark and writes a report: `make bench`.

The output folder gets results.json, with every sample; report.html, one self-contained page; and
report.md with its plots. --results writes the report of results that exist already, --compare adds
the changes since other results, --readme writes the measured parts of the pages from committed
results.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from typer import Option

import bench_bandwidth
import bench_cross_entropy
import bench_data_parallel
import bench_linear_cross_entropy
import bench_pointwise_loss
import bench_scaling
import bench_sgd
import bench_sgd_options
import bench_train_step
import cli
import compare
import driver
import page
import peers
import readme
import report
import tables
from results import Results
from suite import Case

OPERATIONS = (
    "bandwidth",
    "cross_entropy",
    "pointwise_loss",
    "linear_cross_entropy",
    "sgd",
    "sgd_options",
    "train_step",
    "data_parallel",
    "scaling",
    "threads",
)
QUICK_MINUTES = 15.0
COMPILING, BEGINNING = 0.5, 0.85  # of these; the rest is for a long last case, and the report


@dataclass(frozen=True, kw_only=True)
class Options(cli.BenchmarkOptions):
    """Run the benchmarks, check and time everyone, and write a report."""

    ops: Annotated[str, Option(help="What to run, comma-separated.")] = ",".join(OPERATIONS)
    sizes: Annotated[
        str | None, Option(help="Of logits: batch x classes.", show_default="a choice")
    ] = None
    dtypes: Annotated[str, Option(help="Of losses and SGD, comma-separated.")] = "float32"
    sets: Annotated[
        str | None, Option(help="SGD's parameters.", show_default=bench_sgd.CPU_SETS)
    ] = None
    models: Annotated[str | None, Option(help="Trained networks.", show_default="a choice")] = None
    batch_sizes: Annotated[
        str | None, Option(help="Of training steps of one process.", show_default="by network")
    ] = None
    against: Annotated[
        str | None, Option(help="Compared implementations.", show_default="all there are")
    ] = None
    minutes: Annotated[
        float | None,
        Option(
            help="End within so many: compile in the first half, leave out what is not begun.",
            show_default=f"{QUICK_MINUTES:g} with --quick, else no limit",
        ),
    ] = None
    json: Annotated[
        Path | None, Option(help="The file of results.", show_default="OUT/results.json")
    ] = None
    out: Annotated[Path, Option(help="The folder of the report.")] = Path("build/bench")
    results: Annotated[Path | None, Option(help="Measure nothing: report on this file.")] = None
    compare: Annotated[
        Path | None, Option(help="Also report the changes since this file of results.")
    ] = None
    readme: Annotated[
        bool, Option("--readme", help="Only rewrite the measured parts of the pages.")
    ] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        cli.require_range(0, minutes=self.minutes)
        cli.items("--ops", self.ops, dict.fromkeys(OPERATIONS))
        if self.against is not None:
            cli.items("--against", self.against, peers.ALL)

    @property
    def path(self) -> Path:
        return self.json or self.out / "results.json"

    @property
    def seconds(self) -> float:
        """Within which it ends."""
        if self.minutes is None:
            return 60 * QUICK_MINUTES if self.quick else math.inf
        return 60 * self.minutes

    @property
    def cases(self) -> list[Case]:
        chosen = cli.items("--ops", self.ops, dict.fromkeys(OPERATIONS))
        return [case for operation in chosen for case in self._cases(operation)]

    def _cases(self, operation: str) -> Sequence[Case]:
        def of(options: Callable[..., driver.Options], **settings: object) -> Sequence[Case]:
            own = {"threads": self.threads, "device": self.device, "quick": self.quick}
            return options(**{**own, **settings}).cases

        if operation == "bandwidth":
            counts = sorted({self.threads, bench_scaling.thread_counts()[-1]})
            return [case for count in counts for case in of(bench_bandwidth.Options, threads=count)]
        if operation == "cross_entropy":
            sizes = {} if self.sizes is None else {"sizes": self.sizes, "shapes": False}
            return of(bench_cross_entropy.Options, dtypes=self.dtypes, **sizes)
        if operation == "pointwise_loss":
            return of(bench_pointwise_loss.Options, dtypes=self.dtypes)
        if operation == "linear_cross_entropy":
            return of(bench_linear_cross_entropy.Options, dtypes=self.dtypes)
        if operation == "sgd":
            sets = {} if self.sets is None else {"sets": self.sets}
            return of(bench_sgd.Options, dtypes=self.dtypes, **sets)
        if operation == "sgd_options":
            given = {"sets": self.sets, "models": self.models}
            chosen = {name: value for name, value in given.items() if value is not None}
            return of(bench_sgd_options.Options, **chosen)
        if operation == "train_step":
            return of(bench_train_step.Options, models=self.models, batch_sizes=self.batch_sizes)
        if operation == "data_parallel":
            models = {} if self.models is None else {"models": self.models}
            return of(bench_data_parallel.Options, **models) if self.device == "cpu" else []
        axes = ["threads"] if operation == "threads" else bench_scaling.SIZE_AXES
        return of(bench_scaling.Options, axes=",".join(axes))


def main(options: Options) -> None:
    if options.readme:
        readme.rewrite()
        return
    given = None if options.results is None else Results.load(options.results)
    old = None if options.compare is None else Results.load(options.compare)
    cases = options.cases
    cli.require_folder(options.out)
    results = given or measured(cases, options)
    shown = [tables.overview_table(results.compared), tables.losses_table(results.compared)]
    made = page.page(results)
    if old is not None:
        changes = compare.section(results, old)
        made = replace(made, sections=[changes, *made.sections])
        shown += changes.tables
    made.write(options.out)
    for table in shown:
        report.show(table)
    if results.left_out:
        report.say(f"left out for lack of time: {len(results.left_out)} cases")
    report.say(f"report: {options.out / 'report.html'}")
    driver.require_complete(results, len(results.rows) + len(results.failures))


def measured(cases: Sequence[Case], options: Options) -> Results:
    cli.require_writable(options.path)
    against = (
        peers.ALL if options.against is None else cli.items("--against", options.against, peers.ALL)
    )
    begin = time.monotonic()
    session = driver.session(options, against, begin + COMPILING * options.seconds)
    end = begin + BEGINNING * options.seconds
    return driver.measure(cases, session, options.path, timed_until=end, until=end)


if __name__ == "__main__":
    cli.run(Options, main, sys.argv[1:])
