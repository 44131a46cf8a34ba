"""What a GPU reaches: fusedstep against its copy bandwidth, torch, torch.compile and peers.

The cases are those of bench_cross_entropy.py and bench_sgd.py, checked and measured as described
there, at sizes for a GPU and within a time limit. Bytes are counted: for cross-entropy forward and
backward, one read and one write of the logits; for a step of SGD, every parameter read and written,
every gradient read, every momentum buffer read and written. The share of copy bandwidth is the time
in which a large copy moves as many bytes, divided by fusedstep's time.

After all timings torch's profiler counts launches. Those of backward are counted from a gradient
that exists already, because `loss.backward()` launches a kernel to make one. A call captured in a
CUDA graph is replayed on new values and compared, bit for bit, with an eager call.

The --json file has the form of results.py, with the verdict on each goal.
"""

import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from typer import Option

import bench_cross_entropy
import bench_sgd
import cli
import driver
import goals
import peers
import report
from bench_cross_entropy import DTYPES
from goals import Goal, Verdict
from report import Table
from results import Results
from suite import LARGE_COPY, OURS, Case, Row

# Large ones first, so that they find time for compiling.
SIZES = (
    "8192x4096,8192x32000,4096x50257,4096x128256,2048x262144,"
    "64x10,512x10,4096x10,256x1000,1024x1000,16x21x512x512"
)
SETS = "cifar,resnet50,large,more"
MODES = ("plain", "momentum")
MEASURED_DTYPES = ("bfloat16", "float32")
LOGITS_IN_MEMORY = 16  # tensors of a case's size that its operands and temporaries may take up
COMPILING = 0.35  # of the time; the last of it is for counting launches
TIMING = 0.8


@dataclass(frozen=True, kw_only=True)
class Options(cli.BenchmarkOptions):
    """Compare fusedstep on a CUDA card with copy bandwidth, torch, torch.compile and peers."""

    device: Annotated[
        Literal["cpu", "cuda"], Option(help="Where to measure; cpu tries the script out.")
    ] = "cuda"
    minutes: Annotated[float, Option(help="Begin nothing new after so long.")] = 3.0
    sizes: Annotated[str, Option(help="Logits, batch x classes x positions; or none.")] = SIZES
    sets: Annotated[str, Option(help=f"Of {', '.join(bench_sgd.SETS)}; or none.")] = SETS
    against: Annotated[str, Option(help="Implementations, comma-separated.")] = ",".join(
        peers.LOSSES | peers.OPTIMIZERS
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        cli.require_range(0, minutes=self.minutes)

    @property
    def rounds(self) -> int:
        return 5 if self.quick else 15

    @property
    def cases(self) -> list[Case]:
        sizes = [] if self.sizes == "none" else self.sizes.split(",")
        sets = {} if self.sets == "none" else cli.items("--sets", self.sets, bench_sgd.SETS)
        losses = [
            dataclasses.replace(bench_cross_entropy.sized(size), dtype=dtype, threads=self.threads)
            for size in sizes
            for dtype in MEASURED_DTYPES
        ]
        if self.device == "cuda":
            free, _ = torch.cuda.mem_get_info()
            losses = [fitted(case, free) for case in losses]
        steps = [
            bench_sgd.Case(name, shapes(), mode, dtype=dtype, threads=self.threads)
            for name, shapes in sets.items()
            for mode in MODES
            for dtype in MEASURED_DTYPES
        ]
        return [*losses, *steps]


def fitted(case: bench_cross_entropy.Case, free_bytes: int) -> bench_cross_entropy.Case:
    """With fewer rows where the memory does not hold them."""
    batch, *row = case.shape
    row_bytes = math.prod(row) * DTYPES[case.dtype].itemsize
    rows = min(batch, max(1, free_bytes // (LOGITS_IN_MEMORY * row_bytes)))
    small = bench_cross_entropy.sized("x".join(map(str, (rows, *row))))
    return dataclasses.replace(small, dtype=case.dtype, threads=case.threads)


def kind(row: Row) -> str:
    """vocabulary, CNN or other logits; or the set of parameters."""
    if row.operation == "sgd":
        return row.case.partition(":")[0]
    batch, classes, *positions = map(int, row.case.split("x"))
    if not positions and classes >= 4096:
        return "vocabulary"
    return "CNN" if not positions and batch <= 4096 and classes <= 1000 else "other"


# The goals, set for cards of compute capability 9.0


def share(kinds: Sequence[str], row: Row) -> float | None:
    return copy_share(row) if kind(row) in kinds else None


def copy_share(row: Row) -> float | None:
    return row.over_ours(LARGE_COPY).median if LARGE_COPY in row.samples else None


def ratio(wanted: str, name: str, row: Row) -> float | None:
    return row.over_ours(name).median if kind(row) == wanted and name in row.others else None


def launched(wanted: str, part: str, row: Row) -> float | None:
    """Kernels and copies alike."""
    if wanted not in (kind(row), row.operation) or part not in row.launched:
        return None
    return row.launched[part].kernels + row.launched[part].copies


def native_share(row: Row) -> float | None:
    """Of native eager's time, fusedstep's."""
    faster = ratio("CNN", "native", row)
    return None if faster is None else 1 / faster


def replayed(row: Row) -> float | None:
    return None if row.replayed is None else float(row.replayed)


GOALS = [
    Goal("vocabulary: share of copy bandwidth", partial(share, ["vocabulary"]), 0.9),
    Goal("vocabulary: quack / fusedstep", partial(ratio, "vocabulary", "quack"), 1.0),
    Goal("vocabulary: torch.compile / fusedstep", partial(ratio, "vocabulary", "compile"), 1.5),
    Goal("CNN: launches forward", partial(launched, "CNN", "fusedstep forward"), 1, True),
    Goal("CNN: launches backward", partial(launched, "CNN", "fusedstep backward"), 1, True),
    Goal("CNN: fusedstep / native", native_share, 0.35, True),
    Goal("SGD: launches a step", partial(launched, "sgd", "fusedstep"), 1, True),
    Goal(
        "SGD, from 25M floats: share of copy bandwidth", partial(share, ["resnet50", "large"]), 0.9
    ),
    Goal("SGD, CIFAR CNN: fused=True / fusedstep", partial(ratio, "cifar", "fused"), 3.0),
    Goal("replayed in a CUDA graph", replayed, 1),
]


# The tables


Columns = dict[str, Callable[[Row], str]]


def columns(others: Sequence[str], parts: Sequence[str]) -> Columns:
    def compared(name: str, row: Row) -> str:
        if name in row.others:
            return report.factor(row.over_ours(name).median)
        return row.missing.get(name, "–").partition(":")[0]

    def launches(row: Row) -> str:
        found = [row.launched[part] for part in parts if part in row.launched]
        return " + ".join(str(part.kernels + part.copies) for part in found) or "–"

    def copied(row: Row) -> str:
        share = copy_share(row)
        return "–" if share is None else f"{share:.0%}"

    return {
        "case": lambda row: row.case,
        "dtype": lambda row: row.dtype,
        "fusedstep": lambda row: report.seconds(row.time(OURS).median),
        "of copy\nbandwidth": copied,
        **{f"{name}\n/ ours": partial(compared, name) for name in others},
        "launches": launches,
        "graph": lambda row: {None: "–", True: "same bits", False: "differs"}[row.replayed],
    }


def peak(name: str, row: Row) -> str:
    if name not in row.peak_bytes or row.bytes_moved is None:
        return "–"
    return f"{row.peak_bytes[name] / (row.bytes_moved / 2):.2f}"


LOSS_COLUMNS: Columns = {
    **columns(list(peers.LOSSES), ["fusedstep forward", "fusedstep backward"]),
    "peak / logits\nours": partial(peak, OURS),
    "\nnative": partial(peak, "native"),
}
STEP_COLUMNS: Columns = columns(list(peers.OPTIMIZERS), ["fusedstep"])


def show(rows: Sequence[Row], verdicts: Sequence[Verdict]) -> None:
    """Fits 12,000 characters."""
    copies = [
        row.bytes_moved / row.time(LARGE_COPY).median
        for row in rows
        if row.bytes_moved and LARGE_COPY in row.samples
    ]
    if copies:
        bandwidth = report.memory(statistics.median(copies))
        report.say(f"copy bandwidth, bytes read and written: {bandwidth}/s")
    for title, table, operation in (
        ("Cross-entropy forward and backward", LOSS_COLUMNS, "cross_entropy"),
        ("SGD.step()", STEP_COLUMNS, "sgd"),
    ):
        shown = [row for row in rows if row.operation == operation]
        if shown:
            report.show(Table.of(title, table, shown))
    report.show(goals.table("Goals, set for compute capability 9.0", verdicts))


def verdicts(results: Results) -> list[Verdict]:
    return [goal.verdict(results.rows) for goal in GOALS]


def main(options: Options) -> None:
    cases = options.cases
    against = cli.items("--against", options.against, peers.LOSSES | peers.OPTIMIZERS)
    seconds = 60 * options.minutes
    begin = time.monotonic()
    session = driver.session(options, against, begin + COMPILING * seconds)
    results = driver.measure(
        cases,
        session,
        options.json,
        timed_until=begin + TIMING * seconds,
        until=begin + seconds,
        more=lambda results: {
            "summary": {verdict.goal: asdict(verdict) for verdict in verdicts(results)}
        },
    )
    report.say_where(results.environment)
    for name, what in results.implementations.items():
        report.say(f"{name}: {what}")
    for case_name, reason in results.failures.items():
        report.say(f"failed: {case_name}: {reason}")
    if results.left_out:
        report.say(f"no time was left for {'; '.join(results.left_out)}")
    show(results.rows, verdicts(results))
    driver.require_complete(results, len(cases))


if __name__ == "__main__":
    cli.run(Options, main, sys.argv[1:])
