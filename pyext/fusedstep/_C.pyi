from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

_StepByTorch = Callable[
    [torch.optim.Optimizer, list[tuple[dict[str, Any], list[Tensor]]], float], None
]

# The losses return None where torch's own function has to run: for arguments of any type.

def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    /,
) -> Tensor | None: ...
def cross_entropy_with_lse(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    /,
) -> tuple[Tensor, Tensor] | None: ...
def cross_entropy_gradient(
    grad_rows: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    /,
) -> Tensor: ...
def focal_loss(
    input: Tensor,
    target: Tensor,
    gamma: float,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    /,
) -> Tensor | None: ...
def pointwise_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    kind: int,
    reduction: str,
    parameter: float,
    /,
) -> Tensor | None: ...
def check_targets(device: torch.device, /) -> None: ...
def call_counts() -> list[tuple[str, str, int, dict[str, int]]]: ...
def reset_call_counts() -> None: ...
def count_fallback(op: str, device: torch.device, reason: str, /) -> None: ...
def cpu_capability() -> str: ...

class Extensions:
    master_weights: Final[bool]
    def __init__(
        self,
        *,
        master_weights: bool = False,
        seed: int | None = None,
        require_finite: bool = False,
    ) -> None: ...

class _Optimizer:  # a types.SimpleNamespace
    name: Final[str]
    numbers: Final[dict[str, str]]
    states: Final[tuple[str, ...]]
    @staticmethod
    def states_of(group: dict[str, Any], /) -> list[str]: ...
    @staticmethod
    def step(
        optimizer: torch.optim.Optimizer,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        extensions: Extensions,
        step_by_torch: _StepByTorch,
        /,
    ) -> None: ...
    @staticmethod
    def step_in_backward(
        optimizer: torch.optim.Optimizer,
        param: Tensor,
        extensions: Extensions,
        step_by_torch: _StepByTorch,
        /,
    ) -> None: ...

optimizers: Final[dict[str, _Optimizer]]

def refuse_capture(device: torch.device, name: str, /) -> None: ...
def zero_grad(param_groups: list[dict[str, Any]], /) -> None: ...
