"""Trains a CNN with torch's own loss and optimizer and with fusedstep's, side by side.

Both networks start from the same weights and see the same batches. They step in turn, batch by
batch, and take turns to be first, so that a warm cache or a drift of the machine's speed favours
neither. A step is zero_grad, forward, loss, backward and update; loading its batch is timed
separately.
"""

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, Sampler, Subset
from typer import Option

import checkpoint
import cli
import data
from data import Images
from models import NETWORKS
from timing import Measurement, timed

TEST_BATCH_SIZE = 256
WARM_UP_STEPS = 5


@dataclass(frozen=True)
class Implementation:
    title: str
    criterion: type[nn.CrossEntropyLoss]
    optimizer: Callable[..., torch.optim.SGD]


def native() -> Implementation:
    return Implementation("native torch", nn.CrossEntropyLoss, torch.optim.SGD)


def fused() -> Implementation:
    fusedstep = cli.require_fusedstep()
    return Implementation("fusedstep", fusedstep.CrossEntropyLoss, fusedstep.SGD)


IMPLEMENTATIONS: dict[str, Callable[[], Implementation]] = {"native": native, "fused": fused}


class Trainer:
    """A network with its loss and its optimizer."""

    def __init__(
        self,
        implementation: Implementation,
        model: nn.Module,
        *,
        lr: float,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        self.model = model
        self.criterion = implementation.criterion()
        self.optimizer = implementation.optimizer(
            model.parameters(),
            lr=lr,
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
        )

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss: Tensor = self.criterion(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        return loss

    @torch.no_grad()
    def accuracy(self, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
        """The share of the images whose class the network finds."""
        right = total = 0
        for images, labels in batches:
            right += int((self.model(images).argmax(1) == labels).sum())
            total += len(labels)
        return right / total


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is trained, on what, for how long and where."""

    model: Annotated[Literal["lenet", "cifar", "cifar-one-head"], Option(help="The network.")] = (
        "cifar"
    )
    data: Annotated[
        Literal["digits", "cifar10"],
        Option(help="scikit-learn's handwritten digits, or CIFAR-10 through torchvision."),
    ] = "digits"
    data_root: Annotated[Path, Option(help="The folder that holds CIFAR-10.")] = Path("data")
    samples: Annotated[
        int | None, Option(help="Train on the first so many images only.", show_default="all")
    ] = None
    batch_size: Annotated[int, Option(help="Images per step.")] = 4
    epochs: Annotated[int, Option(help="Passes over the training images.")] = 10
    lr: Annotated[float, Option(help="Learning rate.")] = 0.001
    momentum: Annotated[float, Option(help="SGD's momentum.")] = 0.5
    nesterov: Annotated[bool, Option("--nesterov", help="Use Nesterov's momentum.")] = False
    weight_decay: Annotated[float, Option(help="SGD's weight decay.")] = 0.0
    dtype: Annotated[Literal["float32", "float64"], Option(help="Of the weights and images.")] = (
        "float32"
    )
    device: Annotated[Literal["cpu", "cuda"], Option(help="Where to train.")] = "cpu"
    threads: Annotated[int, Option(help="CPU threads that torch may use.")] = 1
    seed: Annotated[int, Option(help="Of the weights and of the order of the images.")] = 0

    def __post_init__(self) -> None:
        cli.require_range(
            1, cli.MAX_COUNT, samples=self.samples, batch_size=self.batch_size, epochs=self.epochs
        )
        cli.require_range(0, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        cli.require_range(0, cli.MAX_COUNT, seed=self.seed)
        cli.require_threads(self.threads)
        cli.require_device(self.device)
        if "fused" in self.implementations:
            cli.require_kernels(self.device)
        if self.nesterov and self.momentum == 0:
            raise cli.Refusal("--nesterov needs a --momentum above 0")

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == "float64" else torch.float32

    @property
    def implementations(self) -> list[str]:
        return list(IMPLEMENTATIONS)


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Train a small CNN with native torch and with fusedstep, step by step side by side."""

    implementation: Annotated[
        Literal["native", "fused", "both"], Option(help="Whose loss and optimizer.")
    ] = "both"
    tensorboard: Annotated[
        Path | None, Option(help="Write TensorBoard event files to this folder.")
    ] = None
    plot: Annotated[Path, Option(help="Save the plot as this PNG file.")] = Path("train_cnn.png")
    checkpoint: Annotated[
        Path | None, Option(help="Keep the run's state in this file: after each epoch and Ctrl-C.")
    ] = None
    resume: Annotated[
        bool, Option("--resume", help="Go on from the --checkpoint, where there is one.")
    ] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.plot.suffix != ".png":
            raise cli.Refusal(f"--plot must name a .png file, not {self.plot}")
        if self.checkpoint is not None:
            cli.require_writable(self.checkpoint)
        elif self.resume:
            raise cli.Refusal("--resume needs a --checkpoint")

    @property
    def implementations(self) -> list[str]:
        return list(IMPLEMENTATIONS) if self.implementation == "both" else [self.implementation]


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training images gave, by implementation."""

    number: int
    losses: Mapping[str, float]
    """Summed over the batches."""
    accuracies: Mapping[str, float]
    """Shares of the test images."""
    steps: Measurement
    loading: Sequence[float]
    """Seconds that each batch took to load."""

    @property
    def loss_difference(self) -> float:
        """Between the implementations, relative to the native loss."""
        native, fused = self.losses["native"], self.losses["fused"]
        return abs(fused - native) / max(abs(native), sys.float_info.min)


@dataclass(frozen=True)
class Result:
    config: Options
    epochs: Sequence[Epoch]
    models: Mapping[str, nn.Module]

    @property
    def steps(self) -> Measurement:
        return Measurement(
            {
                name: [second for epoch in self.epochs for second in epoch.steps.seconds[name]]
                for name in self.config.implementations
            }
        )

    @property
    def loading(self) -> Sequence[float]:
        return [second for epoch in self.epochs for second in epoch.loading]


Batches = DataLoader[tuple[Tensor, ...]]


@dataclass
class State:
    """Where a run stands between two steps; with the networks and the optimizers all of it."""

    turns: list[str]
    """The implementations in the order of the next step."""
    epochs: list[Epoch] = field(default_factory=list)
    """Those that are finished. What follows is of the one that is not."""
    batches: int = 0
    order: Tensor = field(default_factory=lambda: torch.empty(0))
    """The state, when the epoch began, of the generator that the order of its images comes from."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    loading: list[float] = field(default_factory=list)

    def begin_epoch(self, config: Options, order: torch.Generator) -> None:
        self.batches, self.order, self.loading = 0, order.get_state(), []
        self.losses = {
            name: torch.zeros((), device=config.device, dtype=config.torch_dtype)
            for name in config.implementations
        }
        self.seconds = {name: [] for name in config.implementations}


def train(
    config: Options,
    on_step: Callable[[int, int], object] = lambda done, total: None,
    on_epoch: Callable[[Epoch], object] = lambda epoch: None,
    *,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    sampler: Callable[[Images], Sampler[Any]] | None = None,
    keep_in: Path | None = None,
    resume: bool = False,
) -> Result:
    """Trains as `config` says.

    The callbacks run outside the timed steps: on_step(steps done, steps in all), on_epoch(epoch).
    What trains is `wrap(network)`, on the training images in the order of `sampler(images)`; by
    default all of them, shuffled. With `keep_in` the state is kept in that file after each epoch
    and, at an interrupt, between two steps; a run that resumes from it ends with the same weights
    to the bit.

    Raises:
        checkpoint.Interrupted: There was an interrupt, and the state is in `keep_in`.
        Refusal: `keep_in` cannot be read or written, or is of a run with other options.
    """
    torch.set_num_threads(config.threads)
    trainers = _trainers(config, wrap)
    training, test = _batches(config, sampler)
    state = State(list(trainers))
    state.begin_epoch(config, training.generator)
    if resume and keep_in is not None and keep_in.exists():
        _restore(keep_in, config, trainers, state)
    with _interrupts(keep_in) as interrupted:
        for number in range(len(state.epochs) + 1, config.epochs + 1):
            _run_epoch(config, trainers, training, state, keep_in, interrupted, on_step)
            warm_up = min(WARM_UP_STEPS, len(training) - 1) if number == 1 else 0
            epoch = Epoch(
                number,
                losses={name: loss.item() for name, loss in state.losses.items()},
                accuracies={
                    name: trainer.accuracy(_on_device(test, config))
                    for name, trainer in trainers.items()
                },
                steps=Measurement({name: took[warm_up:] for name, took in state.seconds.items()}),
                loading=state.loading,
            )
            state.epochs.append(epoch)
            state.begin_epoch(config, training.generator)
            on_epoch(epoch)
            if keep_in is not None:
                _save(keep_in, config, trainers, state)
    models = {name: trainer.model for name, trainer in trainers.items()}
    return Result(config, state.epochs, models)


def _run_epoch(
    config: Options,
    trainers: Mapping[str, Trainer],
    training: Batches,
    state: State,
    keep_in: Path | None,
    interrupted: Callable[[], bool],
    on_step: Callable[[int, int], object],
) -> None:
    """Takes the steps that the epoch lacks."""
    training.generator.set_state(state.order)
    random_state = torch.get_rng_state()
    loaded = _on_device(training, config)
    for _ in range(state.batches):  # seen before an interrupt
        next(loaded)
    torch.set_rng_state(random_state)
    while state.batches < len(training):
        (images, labels), took = timed(partial(next, loaded), config.device)
        state.loading.append(took)
        for name in state.turns:
            step = partial(trainers[name].step, images, labels)
            loss, took = timed(step, config.device)
            state.losses[name] += loss.detach()
            state.seconds[name].append(took)
        state.turns.reverse()
        state.batches += 1
        on_step(len(state.epochs) * len(training) + state.batches, config.epochs * len(training))
        if interrupted() and keep_in is not None:
            _save(keep_in, config, trainers, state)
            raise checkpoint.Interrupted(
                f"interrupted in epoch {len(state.epochs) + 1}; --resume goes on from {keep_in}"
            )


MAY_DIFFER_ON_RESUME = {
    "data_root",
    "epochs",
    "threads",
    "tensorboard",
    "plot",
    "checkpoint",
    "resume",
}


def _fixed_options(config: Options) -> dict[str, str]:
    """The options that must be the same when a run is resumed, by name."""
    names = (option.name for option in fields(config) if option.name not in MAY_DIFFER_ON_RESUME)
    return {name: str(getattr(config, name)) for name in names}


def _save(path: Path, config: Options, trainers: Mapping[str, Trainer], state: State) -> None:
    checkpoint.save(
        path,
        {
            "options": _fixed_options(config),
            "models": {name: trainer.model.state_dict() for name, trainer in trainers.items()},
            "optimizers": {name: t.optimizer.state_dict() for name, t in trainers.items()},
            "random": torch.get_rng_state(),
            "state": vars(state)
            | {"epochs": [vars(e) | {"steps": e.steps.seconds} for e in state.epochs]},
        },
    )


def _restore(path: Path, config: Options, trainers: Mapping[str, Trainer], state: State) -> None:
    kept = checkpoint.load(path, config.device)
    options = _fixed_options(config)
    if not isinstance(kept, dict) or kept.get("options", {}).keys() != options.keys():
        raise cli.Refusal(f"{path} is no checkpoint of train_cnn.py")
    for name, value in kept["options"].items():
        if value != options[name]:
            option = name.replace("_", "-")
            raise cli.Refusal(f"{path} is of a run with --{option} {value}, not {options[name]}")
    for name, trainer in trainers.items():
        trainer.model.load_state_dict(kept["models"][name])
        trainer.optimizer.load_state_dict(kept["optimizers"][name])
    torch.set_rng_state(kept["random"].cpu())
    vars(state).update(kept["state"])
    state.order = state.order.cpu()
    state.epochs = [
        Epoch(**{**epoch, "steps": Measurement(epoch["steps"])})
        for epoch in kept["state"]["epochs"]
    ]


@contextmanager
def _interrupts(keep_in: Path | None) -> Iterator[Callable[[], bool]]:
    """Whether there was an interrupt that is to leave a checkpoint; others interrupt at once."""
    if keep_in is None:
        yield lambda: False
        return
    with checkpoint.noted_interrupt() as interrupted:
        yield interrupted


def _trainers(config: Options, wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Trainer]:
    torch.manual_seed(config.seed)
    model = NETWORKS[config.model].build().to(config.device, config.torch_dtype)
    return {
        name: Trainer(
            IMPLEMENTATIONS[name](),
            wrap(copy.deepcopy(model)),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        )
        for name in config.implementations
    }


def _batches(
    config: Options, sampler: Callable[[Images], Sampler[Any]] | None
) -> tuple[Batches, Batches]:
    channels = NETWORKS[config.model].channels
    if config.data == "digits":
        training, test = data.digits(channels)
    else:
        training, test = data.cifar10(channels, config.data_root)
    training = Subset(training, range(len(training))[: config.samples])
    order = torch.Generator().manual_seed(config.seed)
    chosen = sampler(training) if sampler else RandomSampler(training, generator=order)
    return (
        DataLoader(training, config.batch_size, sampler=chosen, generator=order),
        DataLoader(test, TEST_BATCH_SIZE),
    )


def _on_device(batches: Batches, config: Options) -> Iterator[tuple[Tensor, Tensor]]:
    for images, labels in batches:
        yield images.to(config.device, config.torch_dtype), labels.to(config.device)
