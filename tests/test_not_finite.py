"""Hyperparameters that are not finite: an error of our own classes, numbers under torch's names."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedstep
from numerics import BF16, F32, F64, identical, pairwise

VALUES = (math.nan, math.inf, -math.inf)
OTHERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "maximize": {"maximize": True},
}
ROWS = pairwise(
    {
        "key": ["lr", "momentum", "dampening", "weight_decay"],
        "value": VALUES,
        "others": list(OTHERS),
        "how": ["default", "foreach", "fused"],
        "dtype": [F32, F64, BF16],
        "when": ["at first", "after a step"],
    },
    seed=0,
)


def steps(row: dict[str, Any], patched: bool) -> list[Any]:
    """Parameters and momenta after every step."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(n).to(row["dtype"])) for n in (130, 1)]
    params[1].data.zero_()
    states = []
    with fusedstep.patched() if patched else nullcontext():
        how = {"foreach": False} if not patched else {row["how"]: True}
        how.pop("default", None)
        optimizer = torch.optim.SGD(params, lr=0.1, **OTHERS[row["others"]], **how)
        for i in range(4):
            if i == (row["when"] == "after a step"):
                optimizer.param_groups[0][row["key"]] = row["value"]
            for p in params:
                p.grad = torch.randn(p.shape).to(p.dtype)
                p.grad[0] = 0
            optimizer.step()
            states.append([p.detach().clone() for p in params])
            states.append(
                [
                    buffer.clone()
                    for p in params
                    if (buffer := optimizer.state[p].get("momentum_buffer")) is not None
                ]
            )
    return states


def fits(row: dict[str, Any]) -> bool:
    """Torch's nesterov is without dampening."""
    return not (row["key"] == "dampening" and row["others"] == "nesterov")


@pytest.mark.parametrize(
    "row", [*filter(fits, ROWS)], ids=lambda row: "-".join(map(str, row.values()))
)
def test_under_torchs_name_they_compute_as_torchs_do(row: dict[str, Any]) -> None:
    fusedstep.reset_stats()
    ours = steps(row, patched=True)
    assert fusedstep.stats()["SGD"].fused == 8
    theirs = steps(row, patched=False)
    if row["dtype"] is BF16:  # rounded once, where torch rounds after each operation
        ours, theirs = ([[t.isfinite() for t in state] for state in s] for s in (ours, theirs))
    identical(ours, theirs)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("key", ["lr", "momentum", "dampening", "weight_decay"])
def test_of_ours_they_are_errors(key: str, value: float) -> None:
    p = nn.Parameter(torch.ones(3))
    before = p.detach().clone()
    optimizer = fusedstep.SGD([p], lr=0.1, momentum=0.9)
    optimizer.param_groups[0][key] = value
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"Invalid .*: -?(nan|inf)"):
        optimizer.step()
    identical(p.detach(), before)


@pytest.mark.parametrize("value", VALUES)
def test_a_learning_rate_in_a_tensor(value: float) -> None:
    """Which torch takes on the CPU, and reads in every step."""
    results: list[Tensor] = []
    for patch in (fusedstep.patched, nullcontext):
        p = nn.Parameter(torch.arange(3.0))
        with patch():
            optimizer = torch.optim.SGD([p], lr=torch.tensor(0.1))
            optimizer.param_groups[0]["lr"].fill_(value)
            p.grad = torch.arange(3.0)
            optimizer.step()
        results.append(p.detach())
    identical(*results)
