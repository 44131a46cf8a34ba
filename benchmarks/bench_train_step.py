"""The whole training step, zero_grad to update: fusedstep's loss and optimizer against torch's.

Every candidate takes steps of the same network on one batch, in turns: torch's defaults, torch with
SGD(fused=True), fusedstep, and as the floor the network alone, that is forward, and backward from a
gradient of the logits that exists already. Before anything is timed, the first steps of each are
compared with torch's in float64: if a weight moved differently by more than rounding to float32
explains, nothing is timed. The share of loss and update in a step is measured in separate steps
that time these parts.

Training trains torch's and fusedstep's candidate from the same weights on the same batches and
keeps the losses.
"""

import copy
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader
from typer import Option

import cli
import data
import driver
import suite
from correctness import WrongResult
from models import NETWORKS, SEQUENCE, VOCABULARY, Transformer, resnet18
from suite import OURS, Calls, Row, Session, Work
from timing import timed
from training import Implementation, Trainer, fused, native

LR = 0.01
CHECKED_STEPS = 3
TOLERANCE = 1e-3  # of a tensor's movement; float32 convolutions cost a part of it
WHOLE_TOLERANCE = 1e-6  # of all movements: some gradients are zero but for rounding
MOMENTA = {"plain": 0.0, "momentum": 0.9}
SPLIT_STEPS = 15
SPLIT_SECONDS = 2.0
STEPS = 75  # a guess: so many take as long as a case of a quick run, its check included
NETWORK_ALONE = "network alone"

Batch = tuple[Tensor, Tensor]


def native_fused_sgd() -> Implementation:
    return replace(native(), optimizer=partial(SGD, fused=True))


IMPLEMENTATIONS: Mapping[str, Callable[[], Implementation]] = {
    OURS: fused,
    "native": native,
    "fused": native_fused_sgd,
}


def images(channels: int, side: int, classes: int, size: int) -> Batch:
    return torch.rand(size, channels, side, side), torch.randint(classes, (size,))


def sequences(size: int) -> Batch:
    tokens = torch.randint(VOCABULARY, (size, SEQUENCE + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].flatten()


def digits(channels: int, side: int, size: int) -> Iterator[Batch]:
    """Batches of handwritten digits, without end."""
    training, _ = data.digits(channels)
    order = torch.Generator().manual_seed(0)
    while True:
        for pictures, labels in DataLoader(
            training, size, shuffle=True, drop_last=True, generator=order
        ):
            yield F.interpolate(pictures, size=side) if side != 32 else pictures, labels


def text(size: int) -> Iterator[Batch]:
    """Batches of sequences, without end, in which each token has one of a few successors."""
    order = torch.Generator().manual_seed(0)
    successors = torch.randint(VOCABULARY, (VOCABULARY, 2), generator=order)
    while True:
        tokens = [torch.randint(64, (size,), generator=order)]
        for _ in range(SEQUENCE):
            pick = torch.randint(2, (size,), generator=order)
            tokens.append(successors[tokens[-1], pick])
        sequence = torch.stack(tokens, 1)
        yield sequence[:, :-1].contiguous(), sequence[:, 1:].flatten()


@dataclass(frozen=True)
class Model:
    title: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    """So many random examples."""
    stream: Callable[[int], Iterator[Batch]]
    """What it is trained on: batches of so many."""
    guess: tuple[float, float]
    """At the seconds of a step on one core: those of every step, and those of each example."""
    batch_sizes: tuple[int, ...] = (1, 4, 16, 64, 256)
    quick_batch_sizes: tuple[int, ...] = (1, 4, 16, 64, 256)
    modes: tuple[str, ...] = tuple(MOMENTA)
    training_batch_size: int = 4
    training_lr: float = 0.005
    quick_training_steps: int = 100

    def step_seconds(self, batch_size: int) -> float:
        every, each = self.guess
        return every + each * batch_size


MODELS = {
    **{
        name: Model(
            network.title,
            network.build,
            partial(images, network.channels, 32, 10),
            partial(digits, network.channels, 32),
            guess=(7e-4, 1e-4) if name == "lenet" else (2e-3, 8e-4),
        )
        for name, network in NETWORKS.items()
    },
    "resnet18": Model(
        "ResNet-18 (64 × 64 pixels, 1,000 classes)",
        resnet18,
        partial(images, 3, 64, 1000),
        partial(digits, 3, 64),
        guess=(0.04, 0.01),
        quick_batch_sizes=(1, 16),
        modes=("momentum",),
        training_batch_size=8,
        training_lr=0.001,
        quick_training_steps=40,
    ),
    "transformer": Model(
        f"transformer ({SEQUENCE} tokens of {VOCABULARY:,})",
        Transformer,
        sequences,
        text,
        guess=(0.04, 0.08),
        quick_batch_sizes=(1, 4, 16),
        modes=("momentum",),
        training_lr=0.3,
        quick_training_steps=30,
    ),
}


@dataclass(frozen=True)
class Case(suite.Comparison):
    operation: ClassVar = "train_step"
    seconds: ClassVar = 1.5
    implementations: ClassVar = IMPLEMENTATIONS
    model: str
    batch_size: int
    mode: str

    def __str__(self) -> str:
        return f"{MODELS[self.model].title}, batch {self.batch_size}, {self.mode}"

    @property
    def expected_seconds(self) -> float:
        return self.seconds + STEPS * MODELS[self.model].step_seconds(self.batch_size)

    def start(self, device: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
        """The same weights and batch at every call."""
        torch.manual_seed(0)
        model = MODELS[self.model].build().to(device, dtype)
        inputs, labels = MODELS[self.model].batch(self.batch_size)
        inputs = inputs.to(device, dtype) if inputs.is_floating_point() else inputs.to(device)
        return model, inputs, labels.to(device)

    def wrapped(self, model: nn.Module) -> nn.Module:
        """What is trained of a network."""
        return model

    def trainer(self, name: str, model: nn.Module, lr: float = LR) -> Trainer:
        return Trainer(
            self.implementations[name](), self.wrapped(model), lr=lr, momentum=MOMENTA[self.mode]
        )

    def work(self, session: Session) -> Work:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # the default: 10 bits
            self.check(session.device)
        model, inputs, labels = self.start(session.device, torch.float32)

        # A rate of 0 changes no weight. Thousands of steps on one batch would bring the loss to 0
        # and momentum to subnormal numbers, which take a processor a hundred cycles each.
        trainers = {
            name: self.trainer(name, copy.deepcopy(model), lr=0.0) for name in self.implementations
        }

        def step(name: str) -> Calls:
            return [partial(trainers[name].step, inputs, labels)]

        def release() -> None:
            for trainer in trainers.values():
                trainer.optimizer.zero_grad()

        return Work(
            "native",
            {name: partial(step, name) for name in self.implementations},
            {NETWORK_ALONE: [network_alone(self.wrapped(copy.deepcopy(model)), inputs)]},
            release=release,
        )

    def measured(self, session: Session) -> Row:
        row = super().measured(session)
        model, inputs, labels = self.start(session.device, torch.float32)
        trainers = {name: self.trainer(name, copy.deepcopy(model)) for name in row.implementations}
        return replace(row, shares=loss_and_update(trainers, inputs, labels, session.device))

    def check(self, device: str) -> None:
        """The error of a movement may be TOLERANCE, or twice what it is with torch in float32."""
        expected = self.movements("native", device, torch.float64)
        whole = torch.stack([moved.norm() for moved in expected]).norm().item()
        natives = self.movements("native", device, torch.float32)
        for name in self.implementations:
            moved = natives if name == "native" else self.movements(name, device, torch.float32)
            for index, parts in enumerate(zip(moved, natives, expected, strict=True)):
                actual, by_native, reference = parts
                own, error = ((tensor - reference).norm().item() for tensor in (by_native, actual))
                tolerance = TOLERANCE * reference.norm().item() + WHOLE_TOLERANCE * whole
                if not error <= tolerance + 2 * own:
                    raise WrongResult(
                        f"not timed, parameter {index} of {self} is wrong after {CHECKED_STEPS} "
                        f"steps by {name}: its error is {error:.2g}, that of float32 {own:.2g}"
                    )

    def movements(self, name: str, device: str, dtype: torch.dtype) -> list[Tensor]:
        """How far the first steps move each parameter."""
        model, inputs, labels = self.start(device, dtype)
        trainer = self.trainer(name, model)
        before = [parameter.detach().double().clone() for parameter in model.parameters()]
        for _ in range(CHECKED_STEPS):
            trainer.step(inputs, labels)
        after = model.parameters()
        return [new.detach().double() - old for new, old in zip(after, before, strict=True)]


def network_alone(model: nn.Module, inputs: Tensor) -> Callable[[], None]:
    gradient = torch.randn_like(model(inputs))

    def call() -> None:
        model.zero_grad()
        model(inputs).backward(gradient)

    return call


def loss_and_update(
    trainers: Mapping[str, Trainer], inputs: Tensor, labels: Tensor, device: str
) -> dict[str, float]:
    """The share of a step that the loss, forward and backward, and the update take."""
    shares: dict[str, list[float]] = {name: [] for name in trainers}
    begin = time.monotonic()
    for done in range(SPLIT_STEPS):
        if done >= 3 and time.monotonic() - begin > SPLIT_SECONDS:
            break
        for name, trainer in trainers.items():
            parts, whole = timed(partial(split_step, trainer, inputs, labels, device), device)
            shares[name].append(parts / whole)
    return {name: statistics.median(values[1:]) for name, values in shares.items()}


def split_step(trainer: Trainer, inputs: Tensor, labels: Tensor, device: str) -> float:
    """A step; the seconds of its loss and of its update."""
    trainer.optimizer.zero_grad()
    outputs = trainer.model(inputs)
    logits = outputs.detach().requires_grad_()

    def loss() -> Tensor:
        gradient: Tensor
        (gradient,) = torch.autograd.grad(trainer.criterion(logits, labels), logits)
        return gradient

    gradient, loss_seconds = timed(loss, device)
    outputs.backward(gradient)
    _, update_seconds = timed(trainer.optimizer.step, device)
    return loss_seconds + update_seconds


@dataclass(frozen=True)
class Training(suite.Case):
    """A short training run, native and fusedstep from the same start on the same batches."""

    operation: ClassVar = "training"
    seconds: ClassVar = 1.0
    model: str
    steps: int

    def __str__(self) -> str:
        model = MODELS[self.model]
        return f"{model.title}, batch {model.training_batch_size}, {self.steps} steps"

    @property
    def expected_seconds(self) -> float:
        model = MODELS[self.model]
        return self.seconds + 2 * self.steps * model.step_seconds(model.training_batch_size)

    def measured(self, session: Session) -> Row:
        torch.manual_seed(0)
        settings = MODELS[self.model]
        model = settings.build().to(session.device)
        trainers = {
            name: Trainer(
                IMPLEMENTATIONS[name](), copy.deepcopy(model), lr=settings.training_lr, momentum=0.9
            )
            for name in (OURS, "native")
        }
        losses: dict[str, list[float]] = {name: [] for name in trainers}
        samples: dict[str, list[float]] = {name: [] for name in trainers}
        turns = list(trainers)
        stream = settings.stream(settings.training_batch_size)
        for inputs, labels in itertools.islice(stream, self.steps):
            inputs, labels = inputs.to(session.device), labels.to(session.device)
            for name in turns:
                step = partial(trainers[name].step, inputs, labels)
                loss, seconds = timed(step, session.device)
                losses[name].append(loss.item())
                samples[name].append(seconds)
            turns.reverse()
        return Row(
            self.operation,
            str(self),
            self.dtype,
            self.threads,
            "native",
            floors=[],
            samples=samples,
            losses=losses,
        )


@dataclass(frozen=True, kw_only=True)
class Options(cli.BenchmarkOptions):
    """Time the whole training step, fusedstep against torch's defaults."""

    models: Annotated[str | None, Option(help=f"Of {', '.join(MODELS)}.", show_default="all")] = (
        None
    )
    batch_sizes: Annotated[
        str | None, Option(help="Comma-separated.", show_default="by network")
    ] = None
    modes: Annotated[str, Option(help="Updates, comma-separated.")] = ",".join(MOMENTA)
    curves: Annotated[bool, Option(help="Also train, and keep the losses.")] = True

    @property
    def cases(self) -> list[suite.Case]:
        models = cli.items("--models", self.models or ",".join(MODELS), MODELS)
        modes = cli.items("--modes", self.modes, MOMENTA)
        cases: list[suite.Case] = []
        for name, model in models.items():
            for size in self._sizes(model):
                kept = [mode for mode in modes if mode in model.modes]
                cases += [Case(name, size, mode, threads=self.threads) for mode in kept]
        if self.curves:
            cases += [
                Training(name, steps, threads=self.threads)
                for name, model in models.items()
                for steps in [model.quick_training_steps * (1 if self.quick else 3)]
            ]
        return cases

    def _sizes(self, model: Model) -> Iterable[int]:
        if self.batch_sizes is not None:
            return cli.positive_integers("--batch-sizes", self.batch_sizes)
        return model.quick_batch_sizes if self.quick else model.batch_sizes


if __name__ == "__main__":
    cli.run(Options, driver.main, sys.argv[1:])
