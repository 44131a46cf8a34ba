"""The plot of a training run: both loss curves in one diagram, and the time per step."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from training import IMPLEMENTATIONS, Result

# The native curve is broad and pale, so that the fused one over it leaves both in sight.
STYLES = {
    "native": {"color": "tab:orange", "linewidth": 5, "alpha": 0.5},
    "fused": {"color": "tab:blue", "linewidth": 1.5, "marker": "."},
}


def save(result: Result, title: str, path: Path) -> None:
    figure = Figure(figsize=(11, 5), layout="constrained")
    figure.suptitle(title)
    losses, times = figure.subplots(1, 2)
    numbers = [epoch.number for epoch in result.epochs]
    for name in result.config.implementations:
        label = IMPLEMENTATIONS[name]().title
        style = STYLES[name]
        losses.plot(numbers, [epoch.losses[name] for epoch in result.epochs], label=label, **style)
        steps = [epoch.steps.time(name) for epoch in result.epochs]
        times.plot(numbers, [1e3 * step.median for step in steps], label=label, **style)
        times.fill_between(
            numbers,
            [1e3 * step.low for step in steps],
            [1e3 * step.high for step in steps],
            color=style["color"],
            alpha=0.2,
        )
    losses.set(title="Running loss", xlabel="epoch", ylabel="cross-entropy, summed over batches")
    times.set(title="Time per step: median and quartiles", xlabel="epoch", ylabel="milliseconds")
    times.set_ylim(bottom=0)
    for axes in (losses, times):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)
