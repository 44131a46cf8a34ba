"""The whole training step, zero_grad to update: fusedstep's loss and optimizer against torch's.

Both train the same network on one batch of random images, with torch's default settings, in one
interleaved run. Before that five steps of each are compared with torch's in float64: where a weight
has moved otherwise nothing is timed.
"""

import itertools
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from torch import Tensor
from typer import Option

import cli
import report
from correctness import require_close
from models import NETWORKS
from timing import Call, Spread, measure
from training import IMPLEMENTATIONS, Trainer

LR = 0.01
CHECKED_STEPS = 5
TOLERANCE = 1e-3  # of a tensor's largest movement; float32 convolutions cost a part of it
MOMENTA = {"plain": 0.0, "momentum": 0.9}


@dataclass(frozen=True, kw_only=True)
class Options(cli.BenchmarkOptions):
    """Time the whole training step, fusedstep against torch's defaults."""

    models: Annotated[str, Option(help=f"Of {', '.join(NETWORKS)}.")] = "cifar,lenet"
    batch_sizes: Annotated[str, Option(help="Comma-separated.")] = "1,4,64"
    modes: Annotated[str, Option(help="Updates, comma-separated.")] = ",".join(MOMENTA)


@dataclass(frozen=True)
class Row:
    model: str
    batch_size: int
    mode: str
    native: Spread
    ours: Spread
    speedup: Spread


COLUMNS: dict[str, Callable[[Row], str]] = {
    "network": lambda row: row.model,
    "batch": lambda row: str(row.batch_size),
    "update": lambda row: row.mode,
    "native": lambda row: report.spread(row.native, report.seconds),
    "fusedstep": lambda row: report.spread(row.ours, report.seconds),
    "native / fusedstep": lambda row: report.spread(row.speedup, report.factor),
}


@dataclass(frozen=True)
class Case:
    model: str
    batch_size: int
    mode: str

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch_size}, {self.mode}"

    def start(
        self, name: str, device: str, dtype: torch.dtype = torch.float32
    ) -> tuple[Trainer, Call]:
        """A trainer and its step on the batch; the same weights and batch at every call."""
        torch.manual_seed(0)
        network = NETWORKS[self.model]
        model = network.build().to(device, dtype)
        images = torch.rand(self.batch_size, network.channels, 32, 32).to(device, dtype)
        labels = torch.randint(10, (self.batch_size,)).to(device)
        trainer = Trainer(IMPLEMENTATIONS[name](), model, lr=LR, momentum=MOMENTA[self.mode])
        return trainer, partial(trainer.step, images, labels)


def check(case: Case, device: str) -> None:
    expected = movements(case, "native", device, torch.float64)
    for name in IMPLEMENTATIONS:
        actual = movements(case, name, device, torch.float32)
        for index, (moved, reference) in enumerate(zip(actual, expected, strict=True)):
            what = f"parameter {index} of {case} after {CHECKED_STEPS} {name} steps"
            atol = TOLERANCE * reference.abs().max().item()
            require_close(what, moved, reference, rtol=0, atol=atol)


def movements(case: Case, name: str, device: str, dtype: torch.dtype) -> list[Tensor]:
    """How far the first steps move each parameter."""
    trainer, step = case.start(name, device, dtype)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    for _ in range(CHECKED_STEPS):
        step()
    after = trainer.model.parameters()
    return [new.detach() - old for new, old in zip(after, before, strict=True)]


def bench(case: Case, options: Options) -> Row:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # the default: 10-bit products
        check(case, options.device)
    steps = {name: case.start(name, options.device)[1] for name in IMPLEMENTATIONS}
    measured = measure(steps, options.device, options.rounds)
    return Row(
        case.model,
        case.batch_size,
        case.mode,
        measured.time("native"),
        measured.time("fused"),
        measured.ratio("native", "fused"),
    )


def main(options: Options) -> None:
    models, modes = cli.items(options.models, NETWORKS), cli.items(options.modes, MOMENTA)
    sizes = cli.positive_integers("--batch-sizes", options.batch_sizes)
    work = [Case(*names) for names in itertools.product(models, sizes, modes)]
    cli.require_fusedstep()
    torch.set_num_threads(options.threads)
    rows = [bench(case, options) for case in report.progress(work)]
    report.show("Training step", COLUMNS, rows)
    speedups = [row.speedup.median for row in rows]
    summary = {"geometric mean of native / fusedstep": statistics.geometric_mean(speedups)}
    report.conclude(options, rows, summary)


if __name__ == "__main__":
    cli.run(Options, main, sys.argv[1:])
