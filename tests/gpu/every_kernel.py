"""Runs every CUDA kernel of this build at small sizes, for compute-sanitizer to watch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fusedstep import SGD
from fusedstep import functional as F

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Parameters of a step: few and many in a launch's parameters, and so many that their table lies in
# the device's memory. A sanitizer takes long over each allocation: no more than that.
COUNTS = (4, 100, 700)


def logits(device: str, dtype: torch.dtype) -> Iterator[Tensor]:
    """One or more for each way to walk a row; odd sizes, so that rows begin at any alignment."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).to(device, dtype)

    for rows, classes in ((1, 1), (7, 3), (300, 10), (65, 127)):  # by a few lanes of a warp
        yield draw(rows, classes)
    yield draw(5, 301)  # by a warp
    yield draw(3, 5003)  # by a block
    yield draw(2, 40001)  # by a block or a cluster
    yield draw(2, 70001)  # by a cluster
    yield draw(2, 300007)  # read twice
    yield draw(5, 301)[:, 1:]  # a row's length is not its stride
    yield draw(2, 5, 7, 9)  # the next class is far, the next row is near
    yield draw(301, 3).t()  # few, long rows


def cross_entropy(x: Tensor) -> None:
    """Every kind of target, without gradient and with each way that backward takes, and the losses
    that are made of the same sums."""
    classes = x.shape[1]
    positions = (x.shape[0], *x.shape[2:])
    indices = torch.randint(classes, positions).to(x.device)
    indices.view(-1)[0] = -100
    probabilities = torch.rand(x.shape).softmax(1).to(x.device, x.dtype)
    weight = torch.rand(classes).to(x.device, x.dtype)
    for target, smoothing in ((indices, 0.0), (indices, 0.1), (probabilities, 0.0)):
        F.cross_entropy(x, target, label_smoothing=smoothing)
        for reduction in ("mean", "none"):
            leaf = x.detach().requires_grad_()
            loss = F.cross_entropy(leaf, target, weight, None, -100, None, reduction, smoothing)
            loss.backward(torch.ones_like(loss), retain_graph=True)
            loss.backward(torch.full_like(loss, 2.5))
    for loss_of in (F.focal_loss, z_loss):
        for reduction in ("mean", "none"):
            leaf = x.detach().requires_grad_()
            loss = loss_of(leaf, indices, weight=weight, reduction=reduction)
            loss.backward(torch.full_like(loss, 2.5))


def z_loss(x: Tensor, target: Tensor, **options: Any) -> Tensor:
    """With the log-sum-exps thrown away."""
    return F.cross_entropy_with_lse(x, target, z_loss=0.1, **options)[0]


def pointwise_losses(device: str, dtype: torch.dtype) -> None:
    """In vectors, with both ends of an array, and one by one."""
    one, other = (torch.rand(3, 1027).to(device, dtype) for _ in range(2))
    for x, t in ((one, other), (one[:, :35].t(), other[:, :35].t())):
        bce = F.binary_cross_entropy_with_logits
        losses: list[Callable[..., Tensor]] = [F.l1_loss, F.mse_loss, F.smooth_l1_loss]
        losses += [F.huber_loss, bce, partial(bce, weight=x[:1], pos_weight=t[:1])]
        for loss_of in losses:
            for reduction in ("mean", "none"):
                leaf = x.detach().requires_grad_()
                loss = loss_of(leaf, t, reduction=reduction)
                loss.backward(torch.ones_like(loss), retain_graph=True)
                loss.backward(torch.full_like(loss, 2.5))


def sgd(device: str, dtype: torch.dtype) -> None:
    """With and without momentum, aligned to vectors and not; of one dtype also many tensors."""
    for count in COUNTS if dtype == torch.float32 else COUNTS[:1]:
        sizes = [1, 7, 1026, 70002, *range(count)][:count]
        for make in (SGD, partial(SGD, momentum=0.9, nesterov=True, weight_decay=0.1)):
            parameters = [torch.randn(n + 1).to(device, dtype)[n % 2 :] for n in sizes]
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            optimizer = make(parameters, lr=torch.tensor(0.1, device=device))
            for _ in range(2):
                optimizer.step()


def mixed_precision_sgd(device: str) -> None:
    """With master weights and with stochastic rounding, beside parameters of other dtypes."""
    rounded: tuple[dict[str, bool], ...] = ({"master_weights": True}, {"stochastic_rounding": True})
    for count in COUNTS:
        sizes = [1, 7, 1026, 70002, *range(count)][:count]
        for options in rounded:
            parameters = [torch.randn(n + 1).to(device, torch.bfloat16)[n % 2 :] for n in sizes]
            parameters.append(torch.randn(33).to(device))
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            optimizer = SGD(parameters, lr=0.1, momentum=0.9, **options)
            for _ in range(2):
                optimizer.step()


def scaled_sgd(device: str) -> None:
    """A step whose gradients are unscaled, and one that is skipped."""
    parameter = torch.randn(1025, device=device, requires_grad=True)
    optimizer = SGD([parameter], lr=0.1, momentum=0.9, fused=True)  # is given the scale
    scaler = torch.amp.GradScaler(device)
    for factor in (1.0, float("inf")):
        optimizer.zero_grad()
        scaler.scale((parameter * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()


def run(device: str) -> None:
    """Every kernel."""
    torch.manual_seed(0)
    for dtype in DTYPES:
        for x in logits(device, dtype):
            cross_entropy(x)
        pointwise_losses(device, dtype)
        sgd(device, dtype)
    mixed_precision_sgd(device)
    scaled_sgd(device)


if __name__ == "__main__":
    run("cuda")
    torch.cuda.synchronize()
