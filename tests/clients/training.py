"""What the tests of every client share: a task, and the run that a client has to end like."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fusedstep

ROWS, FEATURES, CLASSES = 48, 11, 7


@dataclass(frozen=True)
class Kit:
    """A loss and an optimizer, of one maker."""

    criterion: type[nn.Module]
    sgd: Callable[..., torch.optim.Optimizer]


def torch_sgd(params: Any, **options: Any) -> torch.optim.SGD:
    """What our updates have the bits of."""
    return torch.optim.SGD(params, foreach=False, **options)


OURS = Kit(fusedstep.CrossEntropyLoss, fusedstep.SGD)
OUR_LOSS = Kit(fusedstep.CrossEntropyLoss, torch_sgd)
NATIVE = Kit(nn.CrossEntropyLoss, torch_sgd)
SGD_OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "nesterov": True}


def network() -> nn.Module:
    """Of 100 features, so that updates cross the width of any vector."""
    return nn.Sequential(nn.Linear(FEATURES, 100), nn.Tanh(), nn.Linear(100, CLASSES))


def task() -> tuple[nn.Module, Tensor, Tensor]:
    """A network to be copied, inputs and labels."""
    return network(), torch.randn(ROWS, FEATURES), torch.randint(CLASSES, (ROWS,))


def weights(net: nn.Module) -> list[Tensor]:
    return [p.detach().cpu().clone() for p in net.parameters()]


def trained_by_hand(
    kit: Kit, net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], clip: float | None = None
) -> list[Tensor]:
    """The weights that a plain loop over the batches ends with."""
    net = copy.deepcopy(net)
    criterion = kit.criterion(label_smoothing=0.1)
    optimizer = kit.sgd(net.parameters(), **SGD_OPTIONS)
    for x, t in batches:
        optimizer.zero_grad()
        criterion(net(x), t).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
    return weights(net)
