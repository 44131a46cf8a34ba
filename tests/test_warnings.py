"""Warnings name a line of the program: Python shows one for each line."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as native
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusedstep
import fusedstep.functional as F

LOSSES = {
    "l1_loss": "L1Loss",
    "mse_loss": "MSELoss",
    "smooth_l1_loss": "SmoothL1Loss",
    "huber_loss": "HuberLoss",
}
X, T = torch.randn(5, 1), torch.randn(5)


def program(call: Callable[[Tensor, Tensor], Any], x: Tensor, t: Tensor) -> None:
    for _ in range(2):
        call(x, t)
        call(x, t)


LINES = [program.__code__.co_firstlineno + line for line in (2, 3)]


def warned(call: Callable[[Tensor, Tensor], Any], x: Tensor = X, t: Tensor = T) -> list[Any]:
    """Each warning's file, line and first words, as Python shows them by default."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        program(call, x, t)
    return [(w.filename, w.lineno, str(w.message).partition("(")[0]) for w in caught]


EXPECTED = [(__file__, line, "Using a target size ") for line in LINES]


@pytest.mark.parametrize("patched", [False, True], ids=["imported", "patched"])
@pytest.mark.parametrize("loss", LOSSES)
def test_shapes_that_broadcast(loss: str, patched: bool) -> None:
    """Also of a module, where torch names a line of its own."""
    functions, modules = (native, nn) if patched else (F, fusedstep)

    class Mine(getattr(modules, LOSSES[loss])):  # type: ignore[misc]
        pass

    with fusedstep.patched() if patched else contextlib.nullcontext():
        function = getattr(functions, loss)
        calls: list[Callable[[Tensor, Tensor], Any]] = [
            function,
            partial(function, reduction="none"),
            getattr(modules, LOSSES[loss])(),
            Mine(reduction="sum"),
            partial(checkpoint, function, use_reentrant=False),
        ]
        if loss != "smooth_l1_loss":
            calls.append(partial(function, weight=torch.ones(5, 1)))
        for call in calls:
            assert warned(call) == EXPECTED, call
            assert warned(call, X.clone().requires_grad_()) == EXPECTED, call
            assert warned(call, X.bfloat16()) == EXPECTED, call
            assert warned(call, X, X) == []
        if not patched:
            with torch.device("cpu"):  # a function mode
                assert warned(function) == EXPECTED


@pytest.mark.parametrize("loss", LOSSES)
def test_shapes_that_do_not_broadcast(loss: str) -> None:
    """Torch warns before it raises."""
    with (
        warnings.catch_warnings(record=True) as caught,
        pytest.raises(RuntimeError, match="must match"),
    ):
        warnings.simplefilter("always")
        getattr(F, loss)(torch.zeros(3), torch.zeros(2))
    assert [w.filename for w in caught] == [__file__]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_warning_that_is_an_error(loss: str) -> None:
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="target size"):
        warnings.simplefilter("error")
        getattr(F, loss)(X, T)


def test_a_script_that_is_run_patched(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import torch, torch.nn.functional as F\n"
        "x, t = torch.zeros(8, 1), torch.zeros(8)\n"
        "F.mse_loss(x, t)\n"
        "torch.nn.MSELoss()(x, t)\n"
    )
    command = [sys.executable, "-m", "fusedstep", "run", str(script)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    assert [f"{script}:{line}: UserWarning" in said for line in (2, 3, 4)] == [False, True, True]
