"""What a CUDA card reaches: fusedstep against its copy bandwidth, torch, torch.compile and peers.

Each case's results are compared with torch's in float64. Then fusedstep, the others and a large
device-to-device copy are timed in one interleaved run, while operands and gradients rotate through
more memory than the L2 cache holds. Bytes moved are, for cross-entropy forward and backward, one
read and one write of the logits; for a step of SGD, every parameter read and written, every
gradient read, every momentum buffer read and written. Their share of copy bandwidth is the copy's
time per byte over fusedstep's.

After the last timing torch's profiler counts launches; of backward those that follow from a
gradient which exists already (`loss.backward()` itself launches one that makes it). A call captured
in a CUDA graph is replayed on new values and compared, bit for bit, with an eager one.

Peers are Liger and quack where they can be imported; called as liger-kernel 0.8.5 and quack-kernels
0.6.5 define them. Liger writes the gradient over the logits: it gets logits of its own, and from
their second use on computes with what it left there.

The --json file is written anew after every case. Besides what report.py names it holds
implementations (a package's version, or why it is absent), failures (why a case has no row) and
left_out (what no time was left for).
"""

import gc
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Literal

import torch
from typer import Option

import bench_sgd
import cli
import report
from bench_cross_entropy import CrossEntropy
from gpu_cases import LOSSES, OPTIMIZERS, LossCase, OtherLoss, Row, Session, StepCase, why

# Large ones first, so that they find time for compiling.
SIZES = (
    "8192x4096,8192x32000,4096x50257,4096x128256,2048x262144,"
    "64x10,512x10,4096x10,256x1000,1024x1000,16x21x512x512"
)
SETS = "cifar,resnet50,more,large"
MODES = ("plain", "momentum")
DTYPES = ("bfloat16", "float32")

TIMING = 0.8  # of the time; the rest is for counting launches


class Incomplete(cli.Refusal):
    exit_code = 1


@dataclass(frozen=True, kw_only=True)
class Options(cli.BenchmarkOptions):
    """Compare fusedstep on a CUDA card with copy bandwidth, torch, torch.compile and peers."""

    device: Annotated[
        Literal["cpu", "cuda"], Option(help="Where to measure; cpu tries the script out.")
    ] = "cuda"
    minutes: Annotated[float, Option(help="Begin nothing new after so long.")] = 3.0
    sizes: Annotated[str, Option(help="Logits, batch x classes x positions; or none.")] = SIZES
    sets: Annotated[str, Option(help=f"Of {', '.join(bench_sgd.SETS)}; or none.")] = SETS
    losses: Annotated[str, Option(help="Compared losses, comma-separated.")] = ",".join(LOSSES)
    optimizers: Annotated[str, Option(help="Compared steps of SGD.")] = ",".join(OPTIMIZERS)

    def __post_init__(self) -> None:
        super().__post_init__()
        cli.require_range(0, minutes=self.minutes)

    @property
    def rounds(self) -> int:
        return 5 if self.quick else 15

    @property
    def cases(self) -> list[LossCase | StepCase]:
        sizes = [] if self.sizes == "none" else self.sizes.split(",")
        sets = {} if self.sets == "none" else cli.items(self.sets, bench_sgd.SETS)
        losses = [LossCase(shape(size), dtype) for size in sizes for dtype in DTYPES]
        if self.device == "cuda":
            free, _ = torch.cuda.mem_get_info()
            losses = [case.fitted(free) for case in losses]
        steps = [StepCase(name, mode, dtype) for name in sets for mode in MODES for dtype in DTYPES]
        return [*losses, *steps]


def shape(size: str) -> tuple[int, ...]:
    numbers = cli.positive_integers("--sizes", size, separator="x")
    if len(numbers) < 2:
        raise cli.Refusal(f"--sizes takes sizes like 64x10 or 4x21x128x128, not {size!r}")
    return tuple(numbers)


# The design goals, set for cards of compute capability 9.0


@dataclass(frozen=True)
class Goal:
    text: str
    figure: Callable[[Row], float | None]
    """Of a row, or None where it does not concern the goal or was not measured."""
    bound: float
    at_most: bool = False

    def verdict(self, rows: Sequence[Row]) -> "Verdict":
        figures = [(self.figure(row), f"{row.case}, {row.dtype}") for row in rows]
        known = [(value, case) for value, case in figures if value is not None]
        if not known:
            return Verdict(self.text, self.bound, None, "not measured", None)
        worst, case = (max if self.at_most else min)(known)
        met = worst <= self.bound if self.at_most else worst >= self.bound
        return Verdict(self.text, self.bound, worst, case, met)


@dataclass(frozen=True)
class Verdict:
    goal: str
    bound: float
    worst: float | None
    case: str
    met: bool | None


def share(kinds: Sequence[str], row: Row) -> float | None:
    return row.share.median if row.kind in kinds else None


def ratio(kind: str, name: str, row: Row) -> float | None:
    return row.ratio[name].median if row.kind == kind and name in row.ratio else None


def launched(kind: str, part: str, row: Row) -> float | None:
    """Kernels and copies alike."""
    if kind not in (row.kind, row.operation) or part not in row.launched:
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
    Goal("SGD: launches a step", partial(launched, "SGD", "fusedstep"), 1, True),
    Goal(
        "SGD, from 25M floats: share of copy bandwidth", partial(share, ["resnet50", "large"]), 0.9
    ),
    Goal("SGD, CIFAR CNN: fused=True / fusedstep", partial(ratio, "cifar", "fused"), 3.0),
    Goal("replayed in a CUDA graph", replayed, 1),
]


# The tables


Columns = Mapping[str, Callable[[Row], str]]


def columns(others: Sequence[str], parts: Sequence[str]) -> dict[str, Callable[[Row], str]]:
    def compared(name: str, row: Row) -> str:
        if name in row.ratio:
            return report.factor(row.ratio[name].median)
        return row.missing.get(name, "–").partition(":")[0]

    def launches(row: Row) -> str:
        found = [row.launched[part] for part in parts if part in row.launched]
        return " + ".join(str(part.kernels + part.copies) for part in found) or "–"

    return {
        "case": lambda row: row.case,
        "dtype": lambda row: row.dtype,
        "fusedstep": lambda row: report.seconds(row.seconds["fusedstep"].median),
        "of copy\nbandwidth": lambda row: f"{row.share.median:.0%}",
        **{f"{name}\n/ ours": partial(compared, name) for name in others},
        "launches": launches,
        "graph": lambda row: {None: "–", True: "same bits", False: "differs"}[row.replayed],
    }


def peak(name: str, row: Row) -> str:
    used = row.peak_bytes.get(name)
    return "–" if used is None else f"{used / (row.bytes_moved / 2):.2f}"


LOSS_COLUMNS: Columns = {
    **columns(list(LOSSES), ["fusedstep forward", "fusedstep backward"]),
    "peak / logits\nours": partial(peak, "fusedstep"),
    "\nnative": partial(peak, "native"),
}
STEP_COLUMNS: Columns = columns(list(OPTIMIZERS), ["fusedstep"])
VERDICT_COLUMNS: Mapping[str, Callable[[Verdict], str]] = {
    "goal": lambda verdict: verdict.goal,
    "bound": lambda verdict: f"{verdict.bound:g}",
    "worst": lambda verdict: "–" if verdict.worst is None else report.factor(verdict.worst),
    "at": lambda verdict: verdict.case,
    "verdict": lambda verdict: {None: "–", True: "met", False: "missed"}[verdict.met],
}


def show(rows: Sequence[Row], verdicts: Sequence[Verdict]) -> None:
    """Fits 12,000 characters."""
    if rows:
        bandwidth = statistics.median(row.copy_bandwidth for row in rows)
        report.say(f"copy bandwidth, bytes read and written: {report.memory(bandwidth)}/s")
    for title, table, operation in (
        ("Cross-entropy forward and backward", LOSS_COLUMNS, LossCase.operation),
        ("SGD.step()", STEP_COLUMNS, StepCase.operation),
    ):
        shown = [row for row in rows if row.operation == operation]
        if shown:
            report.show(title, table, shown)
    report.show("Goals, set for compute capability 9.0", VERDICT_COLUMNS, verdicts)


# The run


def load(others: Mapping[str, OtherLoss]) -> tuple[dict[str, CrossEntropy], dict[str, str]]:
    """The losses that can be imported, and for each its package's version or why it is absent."""
    losses, found = {}, {}
    for name, other in others.items():
        try:
            losses[name] = other.load()
        except Exception as error:  # of any kind: these are other people's packages
            found[name] = why(error)
        else:
            found[name] = version_of(other.package)
    return losses, found


def version_of(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:  # imported from a plain folder
        return package


def release_memory(device: str) -> None:
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # each case is compiled for its own shape
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def main(options: Options) -> None:
    cases = options.cases
    others = cli.items(options.losses, LOSSES)
    optimizers = cli.items(options.optimizers, OPTIMIZERS)
    fusedstep = cli.require_fusedstep()
    losses, implementations = load(others)
    torch.set_num_threads(options.threads)
    where = report.environment(options.device)
    report.say_where(where)
    session = Session(
        fusedstep, losses, optimizers, options.device, options.rounds, 60 * options.minutes
    )
    rows: dict[LossCase | StepCase, Row] = {}
    failures: dict[str, str] = {}
    left_out: list[str] = []

    def attempt(case: LossCase | StepCase, measure: Callable[[], Row]) -> None:
        try:
            release_memory(options.device)
            rows[case] = measure()
        except Exception as error:
            failures[str(case)] = why(error)
        save()

    def verdicts() -> list[Verdict]:
        return [goal.verdict(list(rows.values())) for goal in GOALS]

    def save() -> None:
        if options.json is not None:
            report.write(
                options.json,
                where,
                list(rows.values()),
                {verdict.goal: asdict(verdict) for verdict in verdicts()},
                implementations=implementations,
                failures=failures,
                left_out=left_out,
            )

    for case in report.progress(cases):
        if session.elapsed > TIMING * session.seconds:
            left_out.append(str(case))
        else:
            attempt(case, partial(case.measured, session))
    for case, row in list(rows.items()):  # the profiler may slow what follows it
        if session.elapsed > session.seconds:
            left_out.append(f"launches of {case}")
        else:
            attempt(case, partial(case.looked_into, row, session))
    save()

    for name, what in implementations.items():
        report.say(f"{name}: {what}")
    for case_name, reason in failures.items():
        report.say(f"failed: {case_name}: {reason}")
    if left_out:
        report.say(f"no time was left for {'; '.join(left_out)}")
    show(list(rows.values()), verdicts())
    if failures:
        raise Incomplete(f"{len(failures)} of {len(cases)} cases failed")


if __name__ == "__main__":
    cli.run(Options, main, sys.argv[1:])
