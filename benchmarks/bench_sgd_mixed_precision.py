"""What fusedstep's SGD has beyond torch's: master weights, stochastic rounding, in_backward.

bfloat16 parameters are measured as bench_sgd.py measures float32 ones, with their gradients in
place. "By hand" is what one writes without master weights in the optimizer: torch's SGD over
float32 copies, gradients cast to them before its step and parameters cast from them after it.

A training step (zero_grad, forward, backward, update) with `in_backward` is compared with the same
step of the same optimizer without it, on a chain of linear layers. The gradients alive
at once are counted where each is complete; on CUDA the allocator's peak takes the place of theirs.
Before that the weights that both reach are compared: they are the same bits.
"""

import math
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.optim import SGD
from typer import Option

import cli
import report
from bench_sgd import LR, SETS, Shapes, optimizer, parameters
from correctness import require_close_in_norm
from timing import Call, Spread, buffer_sets, measure, peak_bytes

SETTINGS: dict[str, Any] = {"momentum": 0.9, "weight_decay": 5e-4}
WIDTH, LAYERS, BATCH = 512, 12, 16


@dataclass(frozen=True, kw_only=True)
class Options(cli.BenchmarkOptions):
    """Time master weights and stochastic rounding, and the update in backward."""

    sets: Annotated[str, Option(help=f"Parameter sets, of {', '.join(SETS)}.")] = "cifar,resnet18"


@dataclass(frozen=True)
class Row:
    what: str
    baseline: Spread
    ours: Spread
    speedup: Spread
    baseline_bytes: int | None
    """The peak of gradients, where that is compared."""
    ours_bytes: int | None


COLUMNS: dict[str, Callable[[Row], str]] = {
    "what": lambda row: row.what,
    "baseline": lambda row: report.seconds(row.baseline.median),
    "fusedstep": lambda row: report.seconds(row.ours.median),
    "baseline\n/ ours": lambda row: report.factor(row.speedup.median),
    "gradients,\nbaseline": lambda row: megabytes(row.baseline_bytes),
    "gradients,\nours": lambda row: megabytes(row.ours_bytes),
}


def megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.2f} MB"


def by_hand(halves: list[Tensor]) -> Call:
    """A step of torch's SGD on float32 copies."""
    masters = [nn.Parameter(half.detach().float()) for half in halves]
    copies: list[Tensor] = [*masters]
    native = SGD(masters, lr=LR, **SETTINGS)

    def step() -> None:
        for master, half in zip(masters, halves, strict=True):
            assert half.grad is not None
            master.grad = half.grad.float()
        native.step()
        with torch.no_grad():
            torch._foreach_copy_(halves, copies)

    return step


def check_rounding(shapes: Shapes, device: str, ours: type[SGD]) -> None:
    for option in ("master_weights", "stochastic_rounding"):
        rounded = optimizer(ours, shapes, torch.bfloat16, device, **SETTINGS, **{option: True})
        exact = optimizer(SGD, shapes, torch.float64, device, foreach=False, **SETTINGS)
        for _ in range(3):
            rounded.step()
            exact.step()
        for p, reference in zip(parameters(rounded), parameters(exact), strict=True):
            what = f"a bfloat16 parameter after three steps with {option}"
            tolerance = 1.5 * torch.finfo(torch.bfloat16).eps
            require_close_in_norm(what, p.detach(), reference.detach(), tolerance)


def bench_rounding(set_name: str, options: Options, ours: type[SGD]) -> list[Row]:
    shapes = SETS[set_name]()
    check_rounding(shapes, options.device, ours)
    floats = sum(math.prod(shape) for shape in shapes)
    copies = range(buffer_sets(2 * floats, options.device))
    make = partial(optimizer, shapes=shapes, dtype=torch.bfloat16, device=options.device)

    def steps(**settings: Any) -> list[Call]:
        return [make(ours, **SETTINGS, **settings).step for _ in copies]

    measured = measure(
        {
            "by hand": [by_hand(parameters(make(SGD, **SETTINGS))) for _ in copies],
            "master_weights": steps(master_weights=True),
            "nearest": steps(),
            "stochastic_rounding": steps(stochastic_rounding=True),
        },
        options.device,
        options.rounds,
    )
    pairs = (("by hand", "master_weights"), ("nearest", "stochastic_rounding"))
    return [
        Row(
            f"{set_name}, {floats:,} bfloat16: {name} (baseline: {baseline})",
            measured.time(baseline),
            measured.time(name),
            measured.ratio(baseline, name),
            None,
            None,
        )
        for baseline, name in pairs
    ]


class Training:
    """A chain of layers whose gradients weigh as much as its weights.

    `watch` is called with each parameter whose gradient is complete, before it is updated.
    """

    def __init__(
        self,
        ours: Callable[..., SGD],
        device: str,
        in_backward: bool,
        watch: Callable[[Tensor], None] | None = None,
    ) -> None:
        torch.manual_seed(0)
        layers = (layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU()))
        self.model = nn.Sequential(*layers).to(device)
        self.batch = torch.randn(BATCH, WIDTH, device=device)
        if watch is not None:
            for param in self.model.parameters():
                param.register_post_accumulate_grad_hook(watch)
        self.optimizer = ours(self.model.parameters(), lr=LR, **SETTINGS, in_backward=in_backward)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(self.batch).square().mean().backward()
        self.optimizer.step()


def peak_gradients(ours: Callable[..., SGD], device: str, in_backward: bool) -> int:
    """The bytes of gradients that are alive at once, at most, in a step."""
    alive: list[weakref.ref[Tensor]] = []
    peak = 0

    def count(param: Tensor) -> None:
        nonlocal peak
        assert param.grad is not None
        alive.append(weakref.ref(param.grad))
        peak = max(peak, sum(grad.nbytes for ref in alive if (grad := ref()) is not None))

    Training(ours, device, in_backward, count).step()
    return peak


def bench_in_backward(options: Options, ours: Callable[..., SGD]) -> Row:
    apart, fused = (Training(ours, options.device, in_backward) for in_backward in (False, True))
    for training in (apart, fused):
        for _ in range(3):
            training.step()
    for p, q in zip(apart.model.parameters(), fused.model.parameters(), strict=True):
        if not torch.equal(p, q):
            raise SystemExit("in_backward and step() reach different weights")
    peaks = [peak_gradients(ours, options.device, where) for where in (False, True)]
    if options.device == "cuda":
        peaks = [peak_bytes(training.step, "cuda") or 0 for training in (apart, fused)]
    measured = measure(
        {"step": apart.step, "in_backward": fused.step}, options.device, options.rounds
    )
    return Row(
        f"training step, {LAYERS} layers of {WIDTH}: in_backward (baseline: step)",
        measured.time("step"),
        measured.time("in_backward"),
        measured.ratio("step", "in_backward"),
        *peaks,
    )


def main(options: Options) -> None:
    ours = cli.require_fusedstep().SGD
    sets = cli.items(options.sets, SETS)
    torch.set_num_threads(options.threads)
    rows = [
        row for name in report.progress(list(sets)) for row in bench_rounding(name, options, ours)
    ]
    rows.append(bench_in_backward(options, ours))
    report.show("SGD beyond torch's", COLUMNS, rows)
    report.conclude(options, rows, {})


if __name__ == "__main__":
    cli.run(Options, main, sys.argv[1:])
