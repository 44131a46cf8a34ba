"""What each operator returns, by shape and dtype alone: for tracing, export and meta tensors."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.compiler.config
from torch import Tensor

OPERATORS = (
    "cross_entropy",
    "cross_entropy_with_lse",
    "focal_loss",
    "cross_entropy_forward",
    "cross_entropy_backward",
    "pointwise_loss",
    "pointwise_loss_forward",
    "pointwise_loss_backward",
)

# torch.compile keeps graphs on disk and finds them again by the names of their operators. A graph
# that was compiled for operators with other arguments must not be found.
_schemas = "".join(str(torch._C._get_schema(f"fusedstep::{name}", "")) for name in OPERATORS)
_digest = hashlib.sha256(_schemas.encode()).hexdigest()[:16]
torch.compiler.config.cache_key_tag += f" fusedstep {_digest}"


def _register_fake(name: str) -> Callable[[Callable[..., Any]], None]:
    def register(fake: Callable[..., Any]) -> None:
        @functools.wraps(fake)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            _tell_inductor(name)
            return fake(*args, **kwargs)

        torch.library.register_fake(f"fusedstep::{name}")(wrapper)

    return register


def _tell_inductor(name: str) -> None:
    """Tell the default compiler that an operator is called as it is, if it has to be told.

    Every trace of the operator comes here before the compiler meets it. Nothing is imported for
    that: a compiler that is at work has been.
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    if lowering is None or lowering.config.implicit_fallbacks:
        return
    operator = getattr(torch.ops.fusedstep, name).default
    if operator not in lowering.lowerings:
        layout = lowering.get_layout_constraint_tag(operator, with_default=True)
        lowering.make_fallback(operator, lowering.tag_to_layout_constraint(layout), warn=False)


def _check_devices(input: Tensor, target: Tensor) -> None:
    torch._check(
        input.device == target.device,
        lambda: f"target is on {target.device}, but input on {input.device}",
    )


@_register_fake("cross_entropy_forward")
def _cross_entropy_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    gamma: float | None,
    loss_dtype: torch.dtype,
    with_grad: bool,
    with_stats: bool,
    with_lse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_devices(input, target)
    classes = input.shape[0 if input.dim() == 1 else 1]
    rows_shape = input.shape[1:] if input.dim() == 1 else (*input.shape[:1], *input.shape[2:])
    loss = input.new_empty(rows_shape if reduction == 0 else (), dtype=loss_dtype)
    grad = torch.empty_like(input) if with_grad else input.new_empty(0)
    compute = torch.float64 if input.dtype == torch.float64 else torch.float32
    rows = input.numel() // classes
    stats = input.new_empty(3 * rows + 1 if with_stats else 0, dtype=compute)
    lse = input.new_empty(rows_shape if with_lse else 0, dtype=compute)
    return loss, grad, stats, lse


@_register_fake("cross_entropy_backward")
def _cross_entropy_backward(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    stats: Tensor,
) -> Tensor:
    _check_devices(input, target)
    return torch.empty_like(input)


@_register_fake("pointwise_loss_forward")
def _pointwise_loss_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    kind: int,
    reduction: int,
    parameter: float,
    loss_dtype: torch.dtype,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    _check_devices(input, target)
    per_element = torch.empty_like(input, dtype=loss_dtype)
    loss = per_element if reduction == 0 else input.new_empty((), dtype=loss_dtype)
    grad = torch.empty_like(input) if with_grad else input.new_empty(0)
    return loss, grad


@_register_fake("pointwise_loss_backward")
def _pointwise_loss_backward(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    kind: int,
    reduction: int,
    parameter: float,
) -> Tensor:
    _check_devices(input, target)
    return torch.empty_like(input)
