"""Trains a CNN with torch's own loss and optimizer and with fusedstep's, and compares the two.

training.py says how the comparison is made. For each epoch a row: the running losses and their
relative difference, the accuracies on the test images, the median times per step, and how many
times as fast fusedstep is (the median over pairs of steps on the same batch).
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

import cli
import plot
import report
from models import NETWORKS
from timing import Spread
from training import Config, Epoch, Result, train

Cell = Callable[[Epoch], str]


def columns(config: Config) -> dict[str, Cell]:
    def each(header: str, cell: Callable[[str, Epoch], str]) -> dict[str, Cell]:
        return {f"{header}\n{name}": partial(cell, name) for name in config.implementations}

    both = config.implementation == "both"
    table: dict[str, Cell] = {"epoch": lambda epoch: str(epoch.number)}
    table |= each("loss", lambda name, epoch: f"{epoch.losses[name]:.6g}")
    if both:
        table["relative\ndifference"] = lambda epoch: f"{epoch.loss_difference:.1e}"
    table |= each("accuracy", lambda name, epoch: f"{epoch.accuracies[name]:.1%}")
    table |= each("step", lambda name, epoch: report.seconds(epoch.steps.time(name).median))
    if both:
        table["speed-up"] = lambda epoch: f"{epoch.steps.ratio('native', 'fused').median:.2f}"
    return table


def summary(result: Result) -> list[str]:
    steps = result.steps
    lines = [
        f"{name} step: {report.spread(steps.time(name), report.seconds)}"
        for name in result.config.implementations
    ]
    if result.config.implementation == "both":
        lines.append(f"speed-up: {report.spread(steps.ratio('native', 'fused'), report.factor)}")
    loading = report.seconds(Spread.of(result.loading).median)
    return [*lines, f"loading a batch, outside the steps: {loading}"]


def title(config: Config) -> str:
    threads = config.threads or torch.get_num_threads()
    settings = [
        f"{NETWORKS[config.model].title} on {config.data}",
        f"batch {config.batch_size}",
        f"lr {config.lr:g}",
        f"momentum {config.momentum:g}{' (Nesterov)' if config.nesterov else ''}",
        config.dtype,
        "CUDA" if config.device == "cuda" else f"CPU threads {threads}",
    ]
    if config.weight_decay:
        settings.insert(-2, f"weight decay {config.weight_decay:g}")
    return ", ".join(settings)


@contextmanager
def event_log(folder: Path | None) -> Iterator[Callable[[Epoch], None]]:
    """A follower of the epochs that writes TensorBoard event files, if `folder` asks for them."""
    if folder is None:
        yield lambda epoch: None
        return
    tensorboard = cli.require_module(
        "torch.utils.tensorboard", "--tensorboard needs the package tensorboard"
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cli.Refusal(f"cannot write to {folder}: {error.strerror}") from None
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

        result = train(config, on_step, on_epoch)
    for line in summary(result):
        report.say(line)
    plot.save(result, heading)
    report.say(f"plot saved in {config.plot.resolve()}")


if __name__ == "__main__":
    cli.run(Config, main, sys.argv[1:])
