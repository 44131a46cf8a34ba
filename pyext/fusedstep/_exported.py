"""Losses that torch does not have, of torch's operators: what ``torch.export`` records of ours.

So an exported program holds operators of torch alone, and can be loaded without fusedstep. The
compiled core has the same formulas for whatever its kernels do not cover.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["cross_entropy_with_lse_of_torch", "focal_loss_of_torch"]

_torch_cross_entropy = F.cross_entropy  # torch's own, which patch() may replace
_NARROW = (torch.bfloat16, torch.float16)
_CLASS_INDICES = (torch.int64, torch.uint8)


def cross_entropy_with_lse_of_torch(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor]:
    """See :func:`fusedstep.functional.cross_entropy_with_lse`."""
    if not 0 <= z_loss < math.inf:
        raise ValueError(
            f"cross_entropy_with_lse: z_loss must be finite and not negative, but is {z_loss:g}"
        )
    x, weight = _widened(input, weight)
    index = target.long() if target.dtype in _CLASS_INDICES else None
    if index is not None:
        x = _without_ignored(x, index, ignore_index)
    loss = _torch_cross_entropy(
        x,
        target if index is None else index,
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    lse = x.logsumexp(0 if x.dim() == 1 else 1)
    row_weights = None
    if index is not None:
        lse = lse.masked_fill(index == ignore_index, 0)
        row_weights = _row_weights(lse, index, weight, ignore_index)
    if z_loss != 0:
        penalty = z_loss * lse.square()
        if row_weights is not None:
            penalty = penalty * row_weights
        loss = loss + _reduced(penalty, row_weights, reduction)
    return _narrowed(loss, input, target), lse


def focal_loss_of_torch(
    input: Tensor,
    target: Tensor,
    gamma: float,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
) -> Tensor:
    """See :func:`fusedstep.functional.focal_loss`."""
    if not 0 <= gamma < math.inf:
        raise ValueError(f"focal_loss: gamma must be finite and not negative, but is {gamma:g}")
    if target.dtype not in _CLASS_INDICES:
        raise RuntimeError(
            "focal_loss: target must hold class indices, Long or Byte, but its dtype is "
            f"{target.dtype}"
        )
    x, weight = _widened(input, weight)
    index = target.long()
    x = _without_ignored(x, index, ignore_index)
    if gamma == 0:
        loss = _torch_cross_entropy(
            x, index, weight, ignore_index=ignore_index, reduction=reduction
        )
        return _narrowed(loss, input, target)
    minus_log_p = _torch_cross_entropy(x, index, ignore_index=ignore_index, reduction="none")
    row_weights = _row_weights(minus_log_p, index, weight, ignore_index)
    # Where p is 1 or 0 the power's derivative is no number, or is multiplied by infinity.
    certain = minus_log_p == 0
    q = -torch.expm1(-minus_log_p)
    q = q.masked_fill(certain | minus_log_p.isinf(), 1)
    rows = (row_weights * q**gamma * minus_log_p).masked_fill(certain, 0)
    return _narrowed(_reduced(rows, row_weights, reduction), input, target)


def _widened(input: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    x = input.float() if input.dtype in _NARROW else input
    return x, None if weight is None else weight.to(x.dtype)


def _without_ignored(x: Tensor, index: Tensor, ignore_index: int) -> Tensor:
    """With zeros in rows that are ignored: whatever they hold, their gradient is 0."""
    ignored = index == ignore_index
    return x.masked_fill(ignored if x.dim() == 1 else ignored.unsqueeze(1), 0)


def _narrowed(loss: Tensor, input: Tensor, target: Tensor) -> Tensor:
    """In the dtype that torch's cross-entropy would have."""
    fits = target.dtype in (*_CLASS_INDICES, input.dtype)
    if fits and not torch.is_autocast_enabled(input.device.type):
        return loss.to(input.dtype)
    return loss


def _row_weights(rows: Tensor, index: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """What each row adds to the divisor of a mean."""
    ignored = index == ignore_index
    if weight is None:
        return torch.ones_like(rows).masked_fill(ignored, 0)
    return weight[index.masked_fill(ignored, 0)].masked_fill(ignored, 0)


def _reduced(rows: Tensor, row_weights: Tensor | None, reduction: str) -> Tensor:
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    return rows.mean() if row_weights is None else rows.sum() / row_weights.sum()
