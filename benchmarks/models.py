"""The networks that the benchmarks train: small CNNs for 32 x 32 images of ten classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


def lenet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(576, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


def cifar() -> nn.Sequential:
    return nn.Sequential(*_cifar_features(), nn.Linear(1024, 64), nn.Linear(64, 10))


def cifar_one_head() -> nn.Sequential:
    return nn.Sequential(*_cifar_features(), nn.Linear(1024, 10))


def _cifar_features() -> list[nn.Module]:
    return [
        nn.Conv2d(3, 32, 5, padding=2),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 5, padding=2),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.MaxPool2d(2),
        nn.Flatten(),
    ]


@dataclass(frozen=True)
class Network:
    title: str
    channels: int
    build: Callable[[], nn.Sequential]


NETWORKS = {
    "lenet": Network("LeNet", 1, lenet),
    "cifar": Network("CIFAR CNN", 3, cifar),
    "cifar-one-head": Network("CIFAR CNN with one head", 3, cifar_one_head),
}
