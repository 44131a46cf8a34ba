"""Trains a CNN with torch's own loss and optimizer and with fusedstep's, and compares the two.

training.py says how the comparison is made. Each epoch prints a row: the running losses and their
relative difference, the accuracies on the test images, the median times per step, and torch's time
over fusedstep's (the median over pairs of steps on the same batch).
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import cli
import plot
import report
from models import NETWORKS
from timing import Measurement, Spread
from training import IMPLEMENTATIONS, Config, Epoch, Options, Result, train

Cell = Callable[[Epoch], str]


def columns(config: Options) -> dict[str, Cell]:
    def each(header: str, cell: Callable[[str, Epoch], str]) -> dict[str, Cell]:
        return {f"{header}{name}": partial(cell, name) for name in config.implementations}

    both = len(config.implementations) == 2
    table: dict[str, Cell] = {"epoch": lambda epoch: str(epoch.number)}
    table |= each("running\nloss ", lambda name, epoch: f"{epoch.losses[name]:.6g}")
    if both:
        table["relative\ndiff."] = lambda epoch: f"{epoch.loss_difference:.1e}"
    table |= each("accuracy\n", lambda name, epoch: f"{epoch.accuracies[name]:.1%}")
    table |= each("ms/step\n", lambda name, epoch: f"{1e3 * epoch.steps.time(name).median:.2f}")
    if both:
        table["native\n/ fused"] = lambda epoch: report.factor(speedup(epoch.steps).median)
    return table


def speedup(steps: Measurement) -> Spread:
    return steps.ratio("native", "fused")


def summary(result: Result) -> list[str]:
    steps = result.steps
    lines = [
        f"{name} step: {report.spread(steps.time(name), report.seconds)}"
        for name in result.config.implementations
    ]
    if len(result.config.implementations) == 2:
        lines.append(f"speed-up: {report.spread(speedup(steps), report.factor)}")
    loading = report.seconds(Spread.of(result.loading).median)
    return [*lines, f"loading a batch, outside the steps: {loading}"]


def title(config: Options) -> str:
    contenders = [IMPLEMENTATIONS[name]().title for name in config.implementations]
    settings = [
        f"{NETWORKS[config.model].title} on {config.data}",
        f"batch {config.batch_size}",
        f"lr {config.lr:g}",
        f"momentum {config.momentum:g}{' (Nesterov)' if config.nesterov else ''}",
        f"weight decay {config.weight_decay:g}",
        config.dtype,
        "CUDA" if config.device == "cuda" else f"CPU threads: {config.threads}",
    ]
    return f"{' and '.join(contenders)}\n{', '.join(settings)}"


@contextmanager
def event_log(folder: Path | None) -> Iterator[Callable[[Epoch], None]]:
    """A follower of the epochs that writes TensorBoard event files, if `folder` asks for them."""
    if folder is None:
        yield lambda epoch: None
        return
    tensorboard = cli.require_module(
        "torch.utils.tensorboard", "--tensorboard needs the package tensorboard"
    )
    cli.require_folder(folder)
    with tensorboard.SummaryWriter(folder) as writer:

        def log(epoch: Epoch) -> None:
            for name, loss in epoch.losses.items():
                step = epoch.steps.time(name).median
                writer.add_scalar(f"loss/{name}", loss, epoch.number)
                writer.add_scalar(f"accuracy/{name}", epoch.accuracies[name], epoch.number)
                writer.add_scalar(f"milliseconds per step/{name}", 1e3 * step, epoch.number)

        yield log


def main(config: Config) -> None:
    cli.require_writable(config.plot)
    heading = title(config)
    print_row = report.stream(columns(config))
    progress = report.progress_bar()
    with event_log(config.tensorboard) as log, progress:
        report.say(heading)
        steps = progress.add_task("training", total=None)

        def on_step(done: int, total: int) -> None:
            progress.update(steps, completed=done, total=total)

        def on_epoch(epoch: Epoch) -> None:
            print_row(epoch)
            log(epoch)

        result = train(config, on_step, on_epoch, keep_in=config.checkpoint, resume=config.resume)
    for line in summary(result):
        report.say(line)
    plot.save(result, heading, config.plot)
    report.say(f"plot saved in {config.plot.resolve()}")


if __name__ == "__main__":
    cli.run(Config, main, sys.argv[1:])
