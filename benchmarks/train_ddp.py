"""Trains a CNN on several processes, with torch's own loss and optimizer and with fusedstep's.

    torchrun --standalone --nproc-per-node 2 benchmarks/train_ddp.py

Both networks are wrapped in DistributedDataParallel, start from the same weights and see the same
share of every batch; training.py and train_cnn.py say how they take turns and what the columns
mean. Losses are summed over the processes, times are those of the first process. At the end weights
are compared: between processes, where they must be the same bits, and fusedstep's with torch's.
In float64, the default, these two are equal up to rounding; in float32 the last bits of two losses
grow apart with every step, as they do between any two implementations.
"""

import dataclasses
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler
from typer import Option

import cli
import report
import train_cnn
from data import Images
from process_group import process_group, run_rank
from training import Epoch, Options, train

FLOAT64_TOLERANCE = 1e-10


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Train a small CNN under torchrun with native torch and with fusedstep, side by side."""

    dtype: Annotated[Literal["float32", "float64"], Option(help="Of the weights and images.")] = (
        "float64"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        cli.require_fusedstep()
        if not dist.is_torchelastic_launched():
            raise cli.Refusal(
                "train_ddp.py runs under torchrun: torchrun --standalone --nproc-per-node 2 "
                "benchmarks/train_ddp.py"
            )
        local, cards = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if self.device == "cuda" and local > cards:
            raise cli.Refusal(f"--device cuda: {local} processes, but {cards} GPUs")


def over_all_processes(epoch: Epoch, device: str) -> Epoch:
    """The epoch with losses that are summed over the processes."""
    losses = torch.tensor(list(epoch.losses.values()), dtype=torch.float64, device=device)
    dist.all_reduce(losses)
    return dataclasses.replace(epoch, losses=dict(zip(epoch.losses, losses.tolist(), strict=True)))


def largest_difference(model: nn.Module, other: nn.Module) -> float:
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max((ours - theirs).abs().max().item() for ours, theirs in pairs)


def check_weights(models: Mapping[str, nn.Module], dtype: str) -> list[str]:
    """What the final weights have in common, in words; refuses where that is too little."""
    for name, model in models.items():
        for param in model.parameters():
            first = param.detach().clone()
            dist.broadcast(first, 0)
            if not torch.equal(first, param):
                raise cli.Refusal(f"the {name} weights differ between processes")
    difference = largest_difference(models["fused"], models["native"])
    line = f"final weights, fusedstep and native: largest difference {difference:.1e}"
    if dtype == "float64":
        if not difference <= FLOAT64_TOLERANCE:
            raise cli.Refusal(f"{line}, more than {FLOAT64_TOLERANCE:.0e}")
        line += f", equal within {FLOAT64_TOLERANCE:.0e}"
    return ["final weights, between processes: the same bits", line]


def main(config: Config) -> None:
    if config.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with process_group("nccl" if config.device == "cuda" else "gloo"):
        run(config)


def run(config: Config) -> None:
    """What one process does in the group; the first prints."""
    first = dist.get_rank() == 0
    samplers: list[DistributedSampler[Any]] = []

    def sampler(images: Images) -> DistributedSampler[Any]:
        samplers.append(DistributedSampler(images, seed=config.seed))
        return samplers[-1]

    def on_epoch(epoch: Epoch) -> None:
        samplers[-1].set_epoch(epoch.number)
        summed = over_all_processes(epoch, config.device)
        if first:
            print_row(summed)

    if first:
        report.say(f"{train_cnn.title(config)}, processes: {dist.get_world_size()}")
        print_row = report.stream(train_cnn.columns(config))
    result = train(config, on_epoch=on_epoch, wrap=DistributedDataParallel, sampler=sampler)
    lines = check_weights(result.models, config.dtype)
    if first:
        for line in [*train_cnn.summary(result), *lines]:
            report.say(line)


if __name__ == "__main__":
    run_rank(partial(cli.run, Config, main, sys.argv[1:]))
