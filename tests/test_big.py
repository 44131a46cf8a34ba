"""Sizes that 32 bits cannot count, and other extremes of shape: `make test-big`, one at a time.

Each test says how much memory it takes, and is skipped where the machine has less. Large tensors
repeat a block whose size divides no power of two, so that an offset that wraps around reads other
numbers.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fusedstep
import fusedstep.functional as F
import reference
from numerics import BF16, F32, identical

pytestmark = [pytest.mark.big, pytest.mark.usefixtures("cpu_only")]
BEYOND = 2**31


def needs(gigabytes: float) -> None:
    available = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    if available is None or int(available[1]) * 1024 < (gigabytes + 0.5) * 1e9:
        pytest.skip(f"takes {gigabytes} GB of memory")


def repeated(block: Tensor, times: int) -> Tensor:
    return block.repeat(times, *(1 for _ in block.shape[1:]))


def assert_every_block_is(block: Tensor, whole: Tensor) -> None:
    """To the bit."""
    for part in whole.split(len(block)):
        assert torch.equal(part, block[: len(part)])


def assert_close_to_stored(actual: Tensor, exact: Tensor, scale: Tensor) -> None:
    eps = torch.finfo(actual.dtype).eps
    assert ((actual.double() - exact).abs() <= eps * scale + 1e-40).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_beyond_32_bits(reduction: str) -> None:
    """8.7 GB: 4.3 of logits, 4.3 of gradient."""
    needs(8.8)
    classes, rows = 32769, 64
    times = BEYOND // (classes * rows) + 1
    block = (3 * torch.randn(rows, classes)).to(BF16)
    target = torch.randint(classes, (rows,))
    logits = repeated(block, times).requires_grad_()
    assert logits.numel() > BEYOND
    losses = F.cross_entropy(logits, repeated(target, times), reduction=reduction)
    upstream = torch.ones(()) if reduction == "mean" else torch.tensor(2.0).expand(losses.shape)
    (grad,) = torch.autograd.grad(losses, logits, upstream.to(BF16))
    upstream = upstream.double().flatten()[0] / (times if reduction == "mean" else 1)
    expected = reference.cross_entropy(block, target, reduction=reduction, grad_output=upstream)
    assert_close_to_stored(losses.detach().reshape(-1)[:rows], expected.loss, expected.loss_scale)
    assert_close_to_stored(grad[:rows], expected.grad, expected.grad_scale)
    assert_every_block_is(grad[:rows].clone(), grad)
    if reduction == "none":
        assert_every_block_is(losses[:rows].detach().clone(), losses.detach())


@pytest.mark.parametrize("name", ["mse_loss", "binary_cross_entropy_with_logits"])
def test_elements_beyond_32_bits(name: str) -> None:
    """8.7 GB: 4.3 of input, 4.3 of gradient; the target repeats in place."""
    needs(8.8)
    size = 1_000_003
    times = BEYOND // size + 1
    block, target = torch.randn(1, size).to(BF16), torch.rand(1, size).to(BF16)
    x = repeated(block, times).requires_grad_()
    loss = getattr(F, name)(x, target.expand(times, size), reduction="sum")
    (grad,) = torch.autograd.grad(loss, x)
    expected = getattr(reference, name)(block, target, reduction="sum")
    assert loss.item() == pytest.approx(expected.loss.item() * times, rel=2**-8)
    assert_close_to_stored(grad[:1], expected.grad, expected.grad_scale)
    assert_every_block_is(grad[:1].clone(), grad)


def test_a_parameter_beyond_32_bits() -> None:
    """12.9 GB: parameter, gradient and momentum buffer of 4.3 each."""
    needs(13.0)
    size = 1_000_003
    times = BEYOND // size + 1
    block, grad = torch.randn(1, size).to(BF16), torch.randn(1, size).to(BF16)
    param = nn.Parameter(repeated(block, times))
    param.grad = repeated(grad, times)
    small = nn.Parameter(block.clone())
    small.grad = grad.clone()
    for p in (param, small):
        optimizer = fusedstep.SGD([p], lr=0.5, momentum=0.9, weight_decay=0.01)
        for _ in range(2):
            optimizer.step()
        exact, buffer = p.detach()[:1].double(), optimizer.state[p]["momentum_buffer"][:1]
        assert not torch.equal(exact, block.double()) and not torch.equal(buffer, grad)
    assert_every_block_is(small.detach(), param.detach())
    twin, twin_buffer = reference.sgd_step(
        block, grad, None, lr=0.5, momentum=0.9, weight_decay=0.01
    )
    twin, _ = reference.sgd_step(twin, grad, twin_buffer, lr=0.5, momentum=0.9, weight_decay=0.01)
    scale = block.double().abs() + 3 * (grad.double().abs() + 1)
    assert_close_to_stored(small.detach(), twin, scale)


def test_a_hundred_thousand_tensors() -> None:
    """0.2 GB."""
    params = [nn.Parameter(torch.randn(1 + i % 7)) for i in range(100_000)]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    ours = fusedstep.SGD(params, lr=0.1, momentum=0.9, nesterov=True)
    theirs = torch.optim.SGD(twins, lr=0.1, momentum=0.9, nesterov=True, foreach=False)
    for _ in range(2):
        for p, q in zip(params, twins, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(
        torch.cat([p.detach() for p in params]), torch.cat([q.detach() for q in twins])
    )
    ours.zero_grad()
    assert all(p.grad is None for p in params)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_million_classes(dtype: torch.dtype, rows: int) -> None:
    """0.3 GB."""
    classes = 1_000_003
    logits = (3 * torch.randn(rows, classes)).to(dtype).requires_grad_()
    target = torch.randint(classes, (rows,))
    target[-1] = classes - 1
    loss = F.cross_entropy(logits, target, label_smoothing=0.1)
    (grad,) = torch.autograd.grad(loss, logits)
    expected = reference.cross_entropy(logits, target, label_smoothing=0.1)
    assert_close_to_stored(loss.detach(), expected.loss, expected.loss_scale)
    assert_close_to_stored(grad, expected.grad, 4 * expected.grad_scale)


def test_one_row_of_a_hundred_million_classes() -> None:
    """1.3 GB: 0.4 of logits, 0.4 of gradient, 0.4 to look at it."""
    needs(1.4)
    classes = 10**8 + 7
    logits = torch.zeros(1, classes)
    logits[0, 5] = 3.0
    loss = F.cross_entropy(logits.requires_grad_(), torch.tensor([classes - 1]))
    (grad,) = torch.autograd.grad(loss, logits)
    total = classes - 1 + torch.tensor(3.0, dtype=torch.float64).exp()
    assert loss.item() == pytest.approx(total.log().item(), rel=1e-6)
    assert grad[0, -1].item() == pytest.approx(1 / total.item() - 1, rel=1e-6)
    assert grad[0, 5].item() == pytest.approx((torch.e**3 / total).item(), rel=1e-5)
    others = grad[0, 6:-1]
    assert (others == others[0]).all()
    assert others[0].item() == pytest.approx(1 / total.item(), rel=1e-5)


def test_one_column_of_a_hundred_million_rows() -> None:
    """2.5 GB: 0.4 of logits, 0.8 of targets, 0.4 of losses, 0.4 of gradient."""
    needs(2.6)
    rows = 10**8 + 7
    logits = torch.randn(1000, 1).repeat(rows // 1000 + 1, 1)[:rows].requires_grad_()
    target = torch.zeros(rows, dtype=torch.int64)
    target[-1] = -100
    losses = F.cross_entropy(logits, target, reduction="none")
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    assert not losses.any() and not grad.any()
    identical(F.cross_entropy(logits.detach(), target), torch.tensor(0.0))
