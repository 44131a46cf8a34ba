"""What fusedstep's SGD has beyond torch's: master_weights, stochastic_rounding, in_backward.

The first two are steps on bfloat16 parameters, measured and checked as in bench_sgd.py. Against
master weights the other implementations do the same by hand: they cast the gradients to float32,
step on float32 copies and cast these to the parameters. Against stochastic rounding they round to
nearest, and so does the floor: fusedstep's own step without the option.

in_backward is a whole training step, measured and checked as in bench_train_step.py, beside
fusedstep's with step() and torch's. A step at batch 1 needs little memory besides its gradients;
the option lowers their peak.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import SGD
from typer import Option

import bench_sgd
import bench_train_step
import cli
import driver
import suite
from bench_sgd import SETS, Optimizer
from bench_train_step import MODELS
from suite import OURS, Calls, Row, Session
from timing import Call
from training import Implementation, fused, native

OPTIONS = ("master_weights", "stochastic_rounding", "in_backward")
NEAREST = "to nearest"


def on_float32_copies(make: Optimizer, parameters: list[Tensor], **settings: Any) -> SGD:
    """An SGD of 16-bit `parameters` whose step is that of `make` on float32 copies of them."""
    masters = [nn.Parameter(parameter.detach().float()) for parameter in parameters]
    copies: list[Tensor] = [*masters]
    on_copies, optimizer = make(masters, **settings), SGD(parameters, **settings)

    def step() -> None:
        for copy, parameter in zip(copies, parameters, strict=True):
            assert parameter.grad is not None
            copy.grad = parameter.grad.float()
        on_copies.step()
        with torch.no_grad():
            torch._foreach_copy_(parameters, copies)

    optimizer.step = step  # type: ignore[method-assign, assignment]
    return optimizer


@dataclass(frozen=True)
class Rounding(bench_sgd.Case):
    operation: ClassVar = "sgd_options"
    option: str

    def __str__(self) -> str:
        return f"{super().__str__()}, {self.option}"

    @property
    def state_bytes(self) -> int:
        """Master weights and their momentum have 32 bits."""
        return 8 * self.floats if self.option == "master_weights" else super().state_bytes

    @property
    def bytes_moved(self) -> int:
        """With master weights gradients are read, parameters only written."""
        if self.option != "master_weights":
            return super().bytes_moved
        return 2 * self.floats * self.torch_dtype.itemsize + 2 * self.state_bytes

    @property
    def tolerance(self) -> float:
        """A parameter is its float32 weight, rounded once to nearest; or rounded by every step."""
        once = 0.51 * torch.finfo(self.torch_dtype).eps
        return once if self.option == "master_weights" else super().tolerance

    def ours(self, fusedstep: ModuleType) -> Optimizer:
        return partial(super().ours(fusedstep), **{self.option: True})

    def other(self, name: str) -> Optimizer:
        make = super().other(name)
        return partial(on_float32_copies, make) if self.option == "master_weights" else make

    def floors(self, session: Session, sets: Sequence[Sequence[nn.Parameter]]) -> dict[str, Calls]:
        floors = super().floors(session, sets)
        if self.option == "stochastic_rounding":
            floors[NEAREST] = self.steps(session.fusedstep.SGD, sets)
        return floors

    def floor(self, parameters: Tensor, gradients: Tensor) -> tuple[str, Call]:
        """With master weights every step overwrites the parameters, and so does this."""
        if self.option == "master_weights":
            return "copy_", partial(parameters.copy_, gradients)
        return super().floor(parameters, gradients)

    def is_replayed(self, ours: Optimizer, device: str) -> bool | None:
        """None of stochastic rounding, which is refused in a CUDA graph."""
        return super().is_replayed(ours, device) if self.option == "master_weights" else None


def in_backward() -> Implementation:
    return replace(fused(), optimizer=partial(fused().optimizer, in_backward=True))


@dataclass(frozen=True)
class InBackward(bench_train_step.Case):
    operation: ClassVar = "in_backward"
    implementations: ClassVar[Mapping[str, Callable[[], Implementation]]] = {
        OURS: in_backward,
        "native": native,
        "step()": fused,
    }

    def measured(self, session: Session) -> Row:
        """Without the share of an update, which is no part of its own here."""
        return suite.Comparison.measured(self, session)


@dataclass(frozen=True, kw_only=True)
class Options(cli.BenchmarkOptions):
    """Time master weights, stochastic rounding and the update in backward."""

    options: Annotated[str, Option(help="Of SGD, comma-separated.")] = ",".join(OPTIONS)
    sets: Annotated[str, Option(help=f"Parameter sets, of {', '.join(SETS)}.")] = "cifar,resnet18"
    models: Annotated[str, Option(help=f"Updated in backward, of {', '.join(MODELS)}.")] = (
        "lenet,resnet18"
    )

    @property
    def cases(self) -> list[suite.Case]:
        cases: list[suite.Case] = []
        for option in cli.items("--options", self.options, dict.fromkeys(OPTIONS)):
            if option == "in_backward":
                models = cli.items("--models", self.models, MODELS)
                cases += [InBackward(name, 1, "momentum", threads=self.threads) for name in models]
                continue
            cases += [
                Rounding(name, shapes(), "momentum", option, dtype="bfloat16", threads=self.threads)
                for name, shapes in cli.items("--sets", self.sets, SETS).items()
            ]
        return cases


if __name__ == "__main__":
    cli.run(Options, driver.main, sys.argv[1:])
