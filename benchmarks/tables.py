"""The tables of a run: speed, floors, memory, and where fusedstep is slower."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import report
from report import Table
from results import Results
from suite import OURS, Row

NONE = "–"

ARRAYS_MOVED = {"copy": 2, "exp": 2, "add_": 3}  # by the operations of bench_bandwidth.py

LABELS = {
    "native": "torch",
    "compile": "torch.compile",
    "for-loop": "torch, for-loop",
    "foreach": "torch, foreach",
    "fused": "torch, fused",
    "apex": "apex",
    "step()": "fusedstep, step()",
    "network alone": "network alone",
}


def label(name: str) -> str:
    return LABELS.get(name, name)


@dataclass(frozen=True)
class Operation:
    """How an operation is presented."""

    title: str
    measured: str
    floor: str


OPERATIONS = {
    "cross_entropy": Operation(
        "Cross-entropy, forward and backward",
        "One call is loss = f(logits, target); loss.backward(). Sizes are batch × classes, or "
        "batch × classes × height × width. Torch has no focal loss and no z-loss: its times there "
        "are those of log_softmax, gather and pow, and of cross_entropy and logsumexp.",
        "The floor of small logits is the autograd round trip x.sum().backward(), that of large "
        "ones torch.exp over the logits: one read, one write and the exponentials.",
    ),
    "pointwise_loss": Operation(
        "Pointwise losses, forward and backward",
        "One call is f(input, target).backward(), with the mean as the reduction.",
        "The floor of few elements is the autograd round trip x.sum().backward(), that of many "
        "torch.add(input, target, out=gradient), which moves as many bytes.",
    ),
    "linear_cross_entropy": Operation(
        "Linear layer and cross-entropy, forward and backward",
        "A vocabulary's head: the loss of features @ weight.T, with gradients to both. "
        "F.linear_cross_entropy, Liger's fused head and Apple's cross-entropy take part only here: "
        "they take features and weight, not logits. fusedstep is F.linear and its loss.",
        "The floor is the three matrix products that no one can leave out.",
    ),
    "sgd": Operation(
        "A step of SGD",
        "One call is optimizer.step(), Python included, gradients in place. torch's default is its "
        "for-loop on the CPU and foreach on CUDA; fused is its fastest documented setting.",
        "The floor moves the same bytes of the same memory: add_ on all parameters and gradients "
        "as two flat arrays and, with momentum, neg_ on a third. On CUDA it is the rate of a copy.",
    ),
    "train_step": Operation(
        "Whole training steps",
        "zero_grad, forward, loss, backward and update on one batch. torch stands for torch's "
        "defaults; torch, fused for its loss with SGD(fused=True). torch.compile of the network is "
        "left out: it would speed up everyone's network alike.",
        "The floor is the network alone: no loss, no update.",
    ),
    "data_parallel": Operation(
        "Training steps of two processes",
        "The same under DistributedDataParallel: two processes on this machine, one thread each, "
        "average their gradients over gloo. A batch is that of each process. A step takes as long "
        "as it takes the slower of the two.",
        "The floor is the network alone, the averaging of its gradients included.",
    ),
    "sgd_options": Operation(
        "A step of SGD on bfloat16 parameters",
        "One call is optimizer.step(). With master_weights the others do by hand what the option "
        "does: gradients are cast to float32, float32 copies of the parameters are updated and "
        "cast back. With stochastic_rounding they round bfloat16 parameters to nearest.",
        "The floors move the same bytes of the same memory, by copy_ or add_ on flat arrays of "
        "parameters and gradients and neg_ on one of what is kept; of stochastic rounding also "
        "fusedstep's own step that rounds to nearest. On CUDA it is the rate of a copy.",
    ),
    "in_backward": Operation(
        "Training steps that update in backward",
        "zero_grad, forward, loss, backward and step on one batch. fusedstep's backward updates "
        "each parameter as soon as its gradient is complete, so that all gradients are never held "
        "at once: see the peak of memory. step() is fusedstep without this option.",
        "The floor is the network alone: no loss, no update.",
    ),
}


def by_operation(results: Results) -> list[Table]:
    """For the terminal, where every row counts, a plot's too."""
    tables = [losses_table(results.rows)]
    for name, operation in OPERATIONS.items():
        rows = [row for row in results.rows if row.operation == name]
        if rows:
            tables += [speed_table(operation.title, rows), memory_table("Memory", rows)]
    tables += bandwidth_tables(results.rows)
    tables += training_tables(results.rows)
    return tables


def name_of(row: Row) -> str:
    parts = [row.case]
    if row.dtype != "float32":
        parts.append(row.dtype)
    if row.threads > 1:
        parts.append(f"{row.threads} threads")
    return ", ".join(parts)


def overview_table(rows: Sequence[Row]) -> Table:
    """Of each operation, who is how much faster."""
    groups = [
        (operation.title, [row for row in rows if row.operation == name])
        for name, operation in OPERATIONS.items()
    ]
    columns: Mapping[str, Callable[[tuple[str, list[Row]]], str]] = {
        "operation": lambda group: group[0],
        "rows": lambda group: str(len(group[1])),
        "× faster than torch's default: geometric mean": lambda group: report.factor(
            statistics.geometric_mean(row.speedup.median for row in group[1])
        ),
        "least": lambda group: report.factor(min(row.speedup.median for row in group[1])),
        "most": lambda group: report.factor(max(row.speedup.median for row in group[1])),
        "× faster than the best other: geometric mean": lambda group: report.factor(
            statistics.geometric_mean(best(row) for row in group[1])
        ),
        "share of the floor: median": lambda group: _percent(
            statistics.median(row.share.median for row in group[1] if row.share)
        ),
        "rows where slower": lambda group: str(sum(bool(row.lost_to) for row in group[1])),
    }
    return Table.of("In short", columns, [group for group in groups if group[1]])


def best(row: Row) -> float:
    """How many times faster we are than the fastest of the others."""
    return row.over_ours(row.best_other).median if row.best_other else math.nan


def speed_table(title: str, rows: Sequence[Row], note: str = "") -> Table:
    others = [name for name in _order(rows) if name != OURS]

    def time(name: str, row: Row) -> str:
        if name in row.samples:
            return report.seconds(row.time(name).median)
        return row.missing.get(name, NONE).partition(":")[0]

    def floor(row: Row) -> str:
        return f"{time(row.floor, row)}, {row.floor}" if row.floor else NONE

    def against_best(row: Row) -> str:
        if row.best_other is None:
            return NONE
        return f"{report.factor(best(row))} ({label(row.best_other)})"

    columns: dict[str, Callable[[Row], str]] = {"case": name_of}
    for name in others:
        columns[label(name)] = partial(time, name)
    columns |= {
        OURS: lambda row: time(OURS, row),
        "torch's default / fusedstep (quartiles)": lambda row: report.spread(
            row.speedup, report.factor
        ),
    }
    if len(others) > 1:
        columns["best other / fusedstep"] = against_best
    columns |= {
        "floor": floor,
        "share of the floor": lambda row: _percent(row.share.median) if row.share else NONE,
    }
    if any(row.shares for row in rows):
        columns["loss and update: of torch's step"] = lambda row: _percent(row.shares.get("native"))
        columns["of fusedstep's"] = lambda row: _percent(row.shares.get(OURS))
    table = Table.of(title, columns, rows, note)
    slower = frozenset(index for index, row in enumerate(rows) if row.lost_to)
    return replace(table, slower=slower)


def memory_table(title: str, rows: Sequence[Row], note: str = "") -> Table:
    columns: dict[str, Callable[[Row], str]] = {"case": name_of}
    for name in _order(rows):
        columns[f"peak: {label(name)}"] = partial(peak, name)
    for name in _order(rows):
        columns[f"allocations: {label(name)}"] = partial(allocations, name)
    if any(row.page_faults for row in rows):
        for name in {row.native: None for row in rows} | {OURS: None}:
            columns[f"page faults: {label(name)}"] = partial(page_faults, name)
    if any(row.bytes_moved for row in rows):
        columns["bytes moved, by count"] = lambda row: (
            report.memory(row.bytes_moved) if row.bytes_moved else NONE
        )
        columns["a second by fusedstep"] = lambda row: (
            f"{report.memory(row.bytes_per_second)}/s" if row.bytes_per_second else NONE
        )
    if any(row.launched for row in rows):
        columns["launches"] = launches
    return Table.of(title, columns, rows, note)


def peak(name: str, row: Row) -> str:
    return report.memory(row.peak_bytes[name]) if name in row.peak_bytes else NONE


def allocations(name: str, row: Row) -> str:
    return str(row.allocations.get(name, NONE))


def page_faults(name: str, row: Row) -> str:
    return f"{row.page_faults[name]:,}" if name in row.page_faults else NONE


def launches(row: Row) -> str:
    parts = (
        f"{part} {count.kernels + count.copies}"
        for part, count in row.launched.items()
        if part.startswith((OURS, row.native))
    )
    return ", ".join(parts) or NONE


def losses_table(rows: Iterable[Row]) -> Table:
    """Every row in which another implementation is faster than ours, the worst first."""
    lost = [(row, name) for row in rows for name in row.lost_to]
    lost.sort(key=lambda pair: pair[0].over_ours(pair[1]).median)
    columns: dict[str, Callable[[tuple[Row, str]], str]] = {
        "case": lambda pair: f"{title_of(pair[0])}: {name_of(pair[0])}",
        "faster": lambda pair: label(pair[1]),
        "its time": lambda pair: report.seconds(pair[0].time(pair[1]).median),
        OURS: lambda pair: report.seconds(pair[0].time(OURS).median),
        "its time / fusedstep's (quartiles)": lambda pair: report.spread(
            pair[0].over_ours(pair[1]), report.factor
        ),
        "beyond the noise": lambda pair: "yes" if pair[0].over_ours(pair[1]).high < 1 else "no",
    }
    return Table.of(
        "Where fusedstep is slower",
        columns,
        lost,
        "A ratio is the median of the ratios within each round. It may differ from the ratio of "
        "the two times, which are medians of their own. Beyond the noise: even its upper quartile "
        "is below 1."
        if lost
        else "Nowhere.",
    )


def missing_table(rows: Iterable[Row]) -> Table:
    """Who took no part in which rows, and why."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        for name, why in row.missing.items():
            found.setdefault((title_of(row), label(name), why), []).append(name_of(row))
    cells = [
        [title, name, why, "; ".join(dict.fromkeys(cases))]
        for (title, name, why), cases in found.items()
    ]
    return Table("Not measured", ["operation", "who", "why", "cases"], cells)


def bandwidth_tables(rows: Iterable[Row]) -> list[Table]:
    found = [row for row in rows if row.operation == "bandwidth"]
    if not found:
        return []

    def rate(name: str, row: Row) -> str:
        moved = ARRAYS_MOVED[name] * (row.bytes_moved or 0)
        return f"{report.memory(moved / row.time(name).median)}/s"

    columns: dict[str, Callable[[Row], str]] = {"an array": name_of}
    for name, arrays in ARRAYS_MOVED.items():
        columns[f"{name} ({arrays} arrays moved)"] = partial(rate, name)
    return [Table.of("Bandwidth", columns, found)]


def training_tables(rows: Iterable[Row]) -> list[Table]:
    found = [row for row in rows if row.losses]
    if not found:
        return []
    columns: dict[str, Callable[[Row], str]] = {
        "run": name_of,
        "torch, a step": lambda row: report.seconds(row.time("native").median),
        "fusedstep, a step": lambda row: report.seconds(row.time(OURS).median),
        "torch / fusedstep (quartiles)": lambda row: report.spread(row.speedup, report.factor),
        "first loss": lambda row: f"{row.losses['native'][0]:.4f}",
        "last loss, torch": lambda row: f"{row.losses['native'][-1]:.4f}",
        "last loss, fusedstep": lambda row: f"{row.losses[OURS][-1]:.4f}",
        "largest relative difference": lambda row: f"{loss_difference(row):.1e}",
    }
    return [Table.of("Training runs", columns, found)]


def loss_difference(row: Row) -> float:
    pairs = zip(row.losses["native"], row.losses[OURS], strict=True)
    return max(abs(ours - native) / abs(native) for native, ours in pairs)


def environment_table(results: Results) -> Table:
    units = {"memory": report.memory}
    cells = [
        [name, units[name](value) if name in units else str(value)]
        for name, value in results.environment.items()
        if value is not None
    ]
    return Table("Where it was measured", ["", ""], cells)


def implementations_table(results: Results) -> Table:
    cells = [[label(name), what] for name, what in results.implementations.items()]
    return Table("Who is compared", ["implementation", "version, or why it is absent"], cells)


def title_of(row: Row) -> str:
    if row.operation == "training":
        return "Training runs"
    return OPERATIONS[row.operation].title


def _order(rows: Sequence[Row]) -> list[str]:
    """The implementations of some rows, torch's default first and ours last."""
    names = dict.fromkeys(name for row in rows for name in row.implementations)
    native = {row.native for row in rows}
    return sorted(names, key=lambda name: (name == OURS, name not in native))


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{value:.0%}"
