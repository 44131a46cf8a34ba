"""Float64 references, written from the definitions in torch's documentation.

They favour one formula over speed and know nothing of layouts, blocks or reduced precision, so a
disagreement is settled by reading this page.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class CrossEntropy:
    """A loss, its gradients, and the scale on which each value's rounding error is measured.

    The loss and the gradient are sums of terms that may cancel, and a probability is known only as
    well as the exponent it comes from. `loss_scale` and `grad_scale` are the same sums over the
    absolute values of terms and exponents: an error divided by its scale and by eps is a number of
    roundings, comparable across elements, shapes and reductions.
    """

    loss: Tensor
    loss_scale: Tensor
    grad: Tensor
    grad_scale: Tensor
    target_grad: Tensor | None


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    grad_output: Tensor | float = 1.0,
) -> CrossEntropy:
    """Each row's loss is `-sum_c w_c q_c log p_c + z r lse^2`: p is the softmax, q the smoothed
    target, lse the logarithm of the sum of exponentials, z the factor of the z-loss.

    An ignored row has no loss and no gradient. The mean divides by the sum of the rows' r: the
    weight of the target of a row that counts (class indices), or 1 (class probabilities).
    """
    class_dim = 0 if logits.dim() == 1 else 1
    is_probability = target.shape == logits.shape
    rows_shape = [size for dim, size in enumerate(logits.shape) if dim != class_dim]
    classes = logits.shape[class_dim]

    def as_rows(tensor: Tensor) -> Tensor:
        return tensor.detach().double().movedim(class_dim, -1).reshape(-1, classes)

    def as_given(rows: Tensor) -> Tensor:
        return rows.reshape([*rows_shape, classes]).movedim(-1, class_dim)

    x = as_rows(logits)
    w = torch.ones_like(x[:1]) if weight is None else weight.detach().double().reshape(1, -1)
    if is_probability:
        counts = torch.ones_like(x[:, 0], dtype=torch.bool)
        hard = as_rows(target)
        r = torch.ones_like(x[:, 0])
    else:
        index = target.detach().reshape(-1).long()
        counts = index != ignore_index
        index = torch.where(counts, index, 0)
        hard = torch.zeros_like(x).scatter_(1, index[:, None], 1.0)
        r = w.expand_as(x).gather(1, index[:, None])[:, 0] * counts
    denominator = r.sum()
    wq = w * (hard * (1 - label_smoothing) + label_smoothing / classes) * counts[:, None]

    shifted = x - x.amax(1, keepdim=True)
    log_sum = shifted.exp().sum(1, keepdim=True).log()
    log_p = shifted - log_sum
    p = log_p.exp()

    row_loss = torch.where(wq == 0, 0.0, wq * -log_p).sum(1)
    row_scale = torch.where(wq == 0, 0.0, wq.abs() * (shifted.abs() + log_sum + 1)).sum(1)
    if z_loss:
        lse = x.logsumexp(1)
        row_loss = row_loss + torch.where(counts, z_loss * r * lse.square(), 0.0)
        terms = x.abs().amax(1) + log_sum[:, 0] + 1
        row_scale = row_scale + torch.where(counts, z_loss * r * terms.square(), 0.0)
    else:
        lse = terms = torch.zeros_like(r)
    from_lse = (2 * z_loss * r * lse)[:, None]

    reduced = {"none": lambda rows: rows.reshape(rows_shape), "sum": torch.sum}
    reduced["mean"] = lambda rows: rows.sum() / denominator
    g = torch.as_tensor(grad_output, dtype=torch.float64, device=x.device)
    g = g.reshape(-1, 1) if reduction == "none" and g.dim() else g.reshape(1, 1)
    if reduction == "mean":
        g = g / denominator

    ignored = ~counts[:, None]
    grad = (g * (p * (wq.sum(1, keepdim=True) + from_lse) - wq)).masked_fill(ignored, 0.0)
    coefficient = wq.abs().sum(1, keepdim=True) + (2 * z_loss * r * terms)[:, None]
    p_scale = p * (1 + shifted.abs().clamp(max=1e3)) * coefficient
    grad_scale = (g * (p_scale + wq.abs())).abs().masked_fill(ignored, 0.0)
    target_grad = as_given(-g * w * (1 - label_smoothing) * log_p) if is_probability else None
    return CrossEntropy(
        reduced[reduction](row_loss),
        reduced[reduction](row_scale),
        as_given(grad),
        as_given(grad_scale),
        target_grad,
    )


def focal_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    gamma: float = 2.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    grad_output: Tensor | float = 1.0,
) -> CrossEntropy:
    """Each row's loss is `w q^gamma n`, with `n = -log p` the cross-entropy of its class and
    `q = 1 - p`: a function of n alone, whose gradient follows from that of n by the chain rule.

    The scales add to those of n, carried through the function, that a power is known only as well
    as `q`, gamma times, and as its exponent `gamma log q`; and `q` no better than n.
    """
    row = cross_entropy(logits, target, ignore_index=ignore_index, reduction="none")
    counts = target != ignore_index
    n, n_scale = row.loss, row.loss_scale
    w = torch.ones_like(n)
    if weight is not None:
        w = weight.detach().double()[torch.where(counts, target, 0).long()]
    w = w * counts
    p, q = (-n).exp(), -(-n).expm1()
    pn = torch.where(p == 0, 0.0, p * n)  # zero where n is infinite
    ratio = torch.where(q == 0, 1.0, pn / q)
    value, slope = w * q**gamma * n, w * q**gamma * (1 + gamma * ratio)
    known = torch.maximum(q, torch.finfo(torch.float64).eps * n_scale)
    steepest = w * known**gamma * (1 + gamma * ratio)
    if gamma:
        curvature = w * gamma * known ** (gamma - 1) * (p * (2 + abs(gamma - 1) * ratio) + pn)
        power = 1 + gamma * torch.where(q > 0, 1 + q.log().abs(), 1.0)
    else:
        curvature, power = torch.zeros_like(n), 1.0
    curvature = curvature.nan_to_num(0.0, posinf=1e30)

    divisor = w.sum() if reduction == "mean" else 1.0
    g = torch.as_tensor(grad_output, dtype=torch.float64, device=n.device).expand_as(n) / divisor
    class_dim = 0 if logits.dim() == 1 else 1
    g, along = g.unsqueeze(class_dim), slope.unsqueeze(class_dim)
    bend, power_scale = curvature * n_scale, slope * power
    grad_scale = steepest.unsqueeze(class_dim) * row.grad_scale
    grad_scale = grad_scale + (bend + power_scale).unsqueeze(class_dim) * row.grad.abs()

    def reduced(rows: Tensor) -> Tensor:
        return rows if reduction == "none" else rows.sum() / divisor

    return CrossEntropy(
        reduced(value),
        reduced(steepest * n_scale + value * power),
        g * along * row.grad,
        g.abs() * grad_scale,
        None,
    )


@dataclass
class Pointwise:
    """As :class:`CrossEntropy`, for a loss of each element on its own.

    The gradient with respect to the target is given for losses of `input - target` alone, where it
    is minus the gradient with respect to the input.
    """

    loss: Tensor
    loss_scale: Tensor
    grad: Tensor
    grad_scale: Tensor
    target_grad: Tensor | None


def _pointwise(
    value: Tensor,
    value_scale: Tensor,
    derivative: Tensor,
    derivative_scale: Tensor,
    reduction: str,
    grad_output: Tensor | float,
    is_of_difference: bool = True,
) -> Pointwise:
    """Reduces elements and applies the chain rule; the mean divides by their number."""
    g = torch.as_tensor(grad_output, dtype=torch.float64, device=value.device)
    if reduction == "mean":
        g = g / value.numel() if value.numel() else g * torch.nan
    grad = g * derivative
    reduce = {"none": lambda t: t, "sum": torch.sum, "mean": torch.mean}[reduction]
    return Pointwise(
        reduce(value),
        reduce(value_scale),
        grad,
        g.abs() * derivative_scale,
        -grad if is_of_difference else None,
    )


def l1_loss(
    input: Tensor,
    target: Tensor,
    *,
    reduction: str = "mean",
    grad_output: Tensor | float = 1.0,
) -> Pointwise:
    """`|d|` for `d = input - target`; its derivative where d is 0 is 0."""
    d = input.detach().double() - target.detach().double()
    sign = torch.where(d > 0, 1.0, torch.where(d < 0, -1.0, 0.0)).double()
    return _pointwise(d.abs(), d.abs(), sign, sign.abs(), reduction, grad_output)


def mse_loss(
    input: Tensor,
    target: Tensor,
    *,
    reduction: str = "mean",
    grad_output: Tensor | float = 1.0,
) -> Pointwise:
    """`d^2` for `d = input - target`."""
    d = input.detach().double() - target.detach().double()
    return _pointwise(d * d, d * d, 2 * d, 2 * d.abs(), reduction, grad_output)


def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    *,
    reduction: str = "mean",
    beta: float = 1.0,
    grad_output: Tensor | float = 1.0,
) -> Pointwise:
    """`d^2 / (2 beta)` where `|d| < beta`, else `|d| - beta / 2`; the L1 loss for a beta of 0."""
    if beta == 0:
        return l1_loss(input, target, reduction=reduction, grad_output=grad_output)
    d = input.detach().double() - target.detach().double()
    is_near = d.abs() < beta
    value = torch.where(is_near, d * (d / beta) / 2, d.abs() - beta / 2)
    derivative = torch.where(is_near, d / beta, d.sign())
    value_scale = torch.where(is_near, value, d.abs())
    return _pointwise(value, value_scale, derivative, derivative.abs(), reduction, grad_output)


def huber_loss(
    input: Tensor,
    target: Tensor,
    *,
    reduction: str = "mean",
    delta: float = 1.0,
    grad_output: Tensor | float = 1.0,
) -> Pointwise:
    """`d^2 / 2` where `|d| <= delta`, else `delta (|d| - delta / 2)`."""
    d = input.detach().double() - target.detach().double()
    is_near = d.abs() <= delta
    value = torch.where(is_near, d * d / 2, delta * (d.abs() - delta / 2))
    derivative = torch.where(is_near, d, delta * d.sign())
    value_scale = torch.where(is_near, value, delta * d.abs())
    return _pointwise(value, value_scale, derivative, derivative.abs(), reduction, grad_output)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    grad_output: Tensor | float = 1.0,
) -> Pointwise:
    """`-w (q t log p + (1 - t) log(1 - p))`, p the sigmoid of the input, q the pos_weight.

    `-log p` is `log(1 + exp(-|x|)) + max(-x, 0)` and `-log(1 - p)` is that plus `x`; p is
    `exp(-|x|) / (1 + exp(-|x|))` for a negative x, else 1 minus that. What cancels is left out.
    """
    x, t = input.detach().double(), target.detach().double()
    one = torch.ones_like(x)
    w = one if weight is None else weight.detach().double().expand_as(x)
    q = one if pos_weight is None else pos_weight.detach().double().expand_as(x)
    log_sum = (-x.abs()).exp().log1p()
    linear = torch.where(x < 0, -q * t, 1 - t) * x
    more = (q - 1) * t if pos_weight is not None else torch.zeros_like(x)
    linear_scale = (
        linear.abs() if pos_weight is None else ((1 - t).abs() + 1 + more.abs()) * x.abs()
    )
    e = (-x.abs()).exp()
    s = torch.where(x < 0, 1.0, -1.0) * e / (1 + e)
    p = torch.where(x < 0, e, 1.0) / (1 + e)
    return _pointwise(
        w * (linear + (1 + more) * log_sum),
        w.abs() * (linear_scale + (1 + 2 * more.abs()) * log_sum),
        w * (torch.where(x < 0, -q * t, 1 - t) + (1 - t + q * t) * s),
        w.abs() * (((1 - t).abs() + (q * t).abs()) * p + (q * t).abs()),
        reduction,
        grad_output,
        is_of_difference=False,
    )


def sgd_step(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """The new parameter and momentum buffer, in float64; the first buffer is the gradient."""
    param, grad = param.detach().double(), grad.detach().double()
    step = (-grad if maximize else grad) + weight_decay * param
    if momentum != 0:
        if momentum_buffer is None:
            momentum_buffer = step
        else:
            momentum_buffer = momentum * momentum_buffer.double() + (1 - dampening) * step
        step = step + momentum * momentum_buffer if nesterov else momentum_buffer
    return param - lr * step, momentum_buffer


def random_bits(seed: int, place: int, step: int, offsets: range) -> np.ndarray[Any, Any]:
    """The 32 random bits of elements: a parameter's number and its step's, from 0, decide.

    SplitMix64 of Steele, Lea and Flood (2014) makes one key of the seed and the two numbers; twice
    the finalizer of MurmurHash3 (Appleby, 2011) mixes an element's offset into it.
    """

    def split_mix(start: int, number: int) -> int:
        z = (start + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    def murmur(h: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
        h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
        return h ^ (h >> 16)

    key = split_mix(split_mix(seed, place), step)
    offset = np.array(offsets, dtype=np.uint64)
    high = (key // 2**32 + offset // 2**32 * 0x9E3779B9) % 2**32
    return murmur(murmur((offset + key % 2**32) % 2**32) ^ high)


def stochastically_rounded(value: Tensor, random: np.ndarray[Any, Any]) -> Tensor:
    """Finite float32 values as bfloat16: away from zero where the 16 bits that bfloat16 lacks and
    the upper half of the random ones make a carry, else towards zero."""
    bits = value.cpu().numpy().view(np.uint32).astype(np.uint64)
    kept = (bits + (random >> 16)) >> 16
    return torch.from_numpy(kept.astype(np.uint16)).view(torch.bfloat16).view_as(value)
