"""The check that precedes every measurement: wrong results are not timed."""

from __future__ import annotations

import torch
from torch import Tensor

from cli import Refusal


class WrongResult(Refusal):
    exit_code = 1


def require_close_in_norm(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compares the norm of the error with that of the float64 reference `expected`."""
    error = ((actual.double() - expected).norm() / expected.norm()).item()
    if not error <= tolerance:  # NaN included
        raise WrongResult(
            f"not timed, {what} is wrong: its relative error is {error:.2g}, not {tolerance:.2g}"
        )


def require_close(what: str, actual: Tensor, expected: Tensor, rtol: float, atol: float) -> None:
    """Compares `actual` of any dtype with the float64 reference `expected`."""
    try:
        torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol)
    except AssertionError as error:
        raise WrongResult(f"not timed, {what} is wrong: {error}") from None
