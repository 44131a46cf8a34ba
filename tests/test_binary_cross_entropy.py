"""What is special about the binary cross-entropy: its two tails, and its weights beside 16 bits.

The oracle is its definition in 80 digits, where nothing has to be left out that cancels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
import torch.nn.functional as native
from torch import Tensor, nn

import fusedstep
import fusedstep.functional as F
import reference
from numerics import BF16, DTYPES, F16, F32, F64, REDUCTIONS, assert_accurate, identical

LOGITS = (0.0, 1e-4, 0.5, 2.0, 8.0, 17.0, 30.0, 37.43, 40.0, 80.0)
SURE, UNSURE = (0.0, 1.0), (1e-4, 0.25, 0.3, 0.5, 0.9, 1 - 2**-7, -0.5, 1.5, 3.0, 1e6)
WEIGHTS = {
    "plain": (None, None),
    "weight": (0.75, None),
    "pos_weight": (None, 3.0),
    "small pos_weight": (None, 2.0**-30),
    "both": (1.3, 0.6),
}


def grid(targets: tuple[float, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    logits = [*LOGITS, *(-x for x in LOGITS), *((300.0, -300.0, 700.0, -700.0) * (dtype is F64))]
    pairs = torch.tensor(list(itertools.product(logits, targets)), dtype=F64)
    x, t = pairs.to(device, dtype).unbind(1)
    return x.contiguous(), t.contiguous()


def loss_and_grad(
    function: Callable[..., Tensor], x: Tensor, t: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    loss = function(leaf, t, **options)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), grad


def exactly(x: Tensor, t: Tensor, w: float, q: float) -> list[tuple[float, float]]:
    """Loss and derivative of each pair."""
    found = []
    with mpmath.workdps(700):
        for x_, t_ in zip(x.tolist(), t.tolist(), strict=True):
            p = 1 / (1 + mpmath.exp(-mpmath.mpf(x_)))
            loss = -w * (q * t_ * mpmath.log(p) + (1 - mpmath.mpf(t_)) * mpmath.log(1 - p))
            slope = w * ((1 - mpmath.mpf(t_)) * p - q * mpmath.mpf(t_) * (1 - p))
            found.append((float(loss), float(slope)))
    return found


@pytest.mark.level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_both_tails_are_as_exact_as_other_numbers(
    weights: str, dtype: torch.dtype, device: str
) -> None:
    """Of a target of 0 or 1 to a few roundings of the result, however small that is."""
    w, q = (None if v is None else torch.tensor(v, dtype=dtype) for v in WEIGHTS[weights])
    x, t = grid(SURE, dtype, device)
    fusedstep.reset_stats()
    options = {"weight": w, "pos_weight": q, "reduction": "none"}
    for name, value in options.items():
        options[name] = value.to(device) if isinstance(value, Tensor) else value
    results = loss_and_grad(F.binary_cross_entropy_with_logits, x, t, **options)
    assert fusedstep.stats()["binary_cross_entropy_with_logits"].fell_back == 0
    exact = exactly(x, t, *(1.0 if v is None else v.item() for v in (w, q)))
    limits = torch.finfo(dtype)
    for result, expected in zip(results, zip(*exact, strict=True), strict=True):
        truth = torch.tensor(expected, dtype=F64, device=device)
        # What would be subnormal may be 0.
        tiny = limits.smallest_normal if dtype.itemsize > 2 else limits.smallest_normal * limits.eps
        torch.testing.assert_close(result.double(), truth, rtol=4 * limits.eps, atol=tiny)


@pytest.mark.level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_between_and_outside_of_the_tails_no_less_exact_than_torch(
    weights: str, dtype: torch.dtype, device: str
) -> None:
    x, t = grid(UNSURE, dtype, device)
    w, q = (None if v is None else torch.tensor(v, dtype=dtype) for v in WEIGHTS[weights])
    options: dict[str, Any] = {"reduction": "none"}
    for name, value in (("weight", w), ("pos_weight", q)):
        options[name] = None if value is None else value.to(device)
    ours = loss_and_grad(F.binary_cross_entropy_with_logits, x, t, **options)
    theirs = loss_and_grad(native.binary_cross_entropy_with_logits, x, t, **options)
    expected = reference.binary_cross_entropy_with_logits(x, t, **options)
    scales = (expected.loss_scale, expected.grad_scale)
    exact = zip(*exactly(x, t, *(1.0 if v is None else v.item() for v in (w, q))), strict=True)
    for actual, peer, truth, scale in zip(ours, theirs, exact, scales, strict=True):
        truth_ = torch.tensor(truth, dtype=F64, device=device)
        assert_accurate(f"{weights}, {dtype}", actual, [peer], truth_, scale, dtype)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_tails_are_mirror_images(dtype: torch.dtype, reduction: str, device: str) -> None:
    """A logit and a target of 1 are the opposite logit and a target of 0: the same bits."""
    x, t = grid((0.0, 1.0, 0.25, 0.75), dtype, device)
    for q in (None, torch.ones(1, dtype=dtype, device=device)):
        options = {"pos_weight": q, "reduction": reduction}
        loss, grad = loss_and_grad(F.binary_cross_entropy_with_logits, x, t, **options)
        mirrored = loss_and_grad(F.binary_cross_entropy_with_logits, -x, 1 - t, **options)
        if reduction == "none":
            identical((loss, grad), (mirrored[0], -mirrored[1]))
        else:
            identical(grad, -mirrored[1])
            torch.testing.assert_close(loss, mirrored[0])


@pytest.mark.level
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_the_factor_of_extreme_targets_and_weights(dtype: torch.dtype, device: str) -> None:
    """Where x is 0 the loss is (1 - t + q t) log 2, whose terms cancel in many a pair."""
    targets = (1.0, 0.999, 1e-6, 1.5, 3.0, 4.0, 5.0, 1e9, 1e20, -1e-6, -0.5, -2.0, -1e20)
    factors = (1.0, 1e-10, 0.333333, 2 / 3, 0.8, 0.999999, 1.000001, 1.4, 3.0, 1e10)
    pairs = torch.tensor(list(itertools.product(targets, factors)), dtype=F64).to(device, dtype)
    t, q = (column.contiguous() for column in pairs.unbind(1))
    x = torch.zeros_like(t)
    ours, theirs = (
        f(x, t, pos_weight=q, reduction="none").double()
        for f in (F.binary_cross_entropy_with_logits, native.binary_cross_entropy_with_logits)
    )
    with mpmath.workdps(60):
        exact = [
            float((1 - mpmath.mpf(t_) + mpmath.mpf(q_) * mpmath.mpf(t_)) * mpmath.log(2))
            for t_, q_ in pairs.tolist()
        ]
    truth = torch.tensor(exact, dtype=F64, device=device)
    error, theirs_error = (ours - truth).abs(), (theirs - truth).abs()
    rounding = 2 * torch.finfo(dtype).eps * truth.abs()
    if device == "cpu" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        # There is no fused multiply-add: the product q t is rounded before terms cancel.
        rounding = rounding + torch.finfo(dtype).eps * (q * t).double().abs() / 2
    wrong = error > theirs_error + rounding
    assert not wrong.any(), (pairs[wrong], ours[wrong], theirs[wrong], truth[wrong])


# ------------------------------------------------------------------ weights beside 16 bits


def reads_strided(values: Tensor) -> Tensor:
    return values.repeat_interleave(2, -1)[..., ::2]


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_float32_weights_beside_16_bits_run_in_the_kernels(
    dtype: torch.dtype, layout: str, device: str
) -> None:
    """With autocast, as after a layer of it, and without; each weight alone, and both."""
    lay = {"contiguous": Tensor.clone, "transposed": lambda v: v.T.clone().T}
    x = lay.get(layout, reads_strided)((3 * torch.randn(9, 33, device=device)).to(dtype))
    t = torch.rand(9, 33, device=device).to(dtype)
    w, q = torch.rand(33, device=device) + 0.3, torch.rand(9, 1, device=device) + 0.3
    both = {"weight": w, "pos_weight": q}
    of_two_types = {"weight": w.to(dtype), "pos_weight": q}
    options = [{"weight": w}, {"pos_weight": q}, both, of_two_types]
    calls = 0
    fusedstep.reset_stats()
    for weights, reduction, autocast in itertools.product(options, REDUCTIONS, (True, False)):
        with torch.autocast(device, dtype=dtype, enabled=autocast):
            results, peers = (
                loss_and_grad(f, x, t, reduction=reduction, **weights)
                for f in (
                    F.binary_cross_entropy_with_logits,
                    native.binary_cross_entropy_with_logits,
                )
            )
        calls += 1
        expected = reference.binary_cross_entropy_with_logits(x, t, reduction=reduction, **weights)
        truths = (expected.loss, expected.loss_scale), (expected.grad, expected.grad_scale)
        for actual, peer, (truth, scale) in zip(results, peers, truths, strict=True):
            assert (actual.dtype, actual.shape) == (peer.dtype, peer.shape)
            assert_accurate(f"{weights.keys()}", actual, [peer], truth, scale, actual.dtype)
    counts = fusedstep.stats()["binary_cross_entropy_with_logits"]
    assert (counts.fused, counts.fell_back) == (calls, 0)


@pytest.mark.parametrize("how", ["imported", "patched", "compiled"])
def test_a_module_with_float32_weights_under_autocast(how: str, device: str) -> None:
    """As programs have it: the module's weights are buffers, the logits autocast's."""
    net = nn.Linear(20, 6).to(device)
    x, t = torch.randn(64, 20, device=device), torch.rand(64, 6, device=device)
    for weights in ({"pos_weight": torch.full((6,), 3.1)}, {"weight": torch.full((6,), 0.7)}):
        ours = fusedstep.BCEWithLogitsLoss(**weights).to(device)
        theirs = nn.BCEWithLogitsLoss(**weights).to(device)

        def step(module: nn.Module) -> Tensor:
            with torch.autocast(device, dtype=BF16):
                return module(net(x), t)

        def gradients(loss: Tensor) -> list[Tensor]:
            return [loss.detach(), *torch.autograd.grad(loss, list(net.parameters()))]

        expected = gradients(step(theirs))
        fusedstep.reset_stats()
        if how == "patched":
            with fusedstep.patched():
                results = gradients(step(theirs))
        elif how == "compiled":
            results = gradients(torch.compile(step, backend="aot_eager", fullgraph=True)(ours))
        else:
            results = gradients(step(ours))
        torch.testing.assert_close(results, expected, rtol=2e-2, atol=1e-3)
        torch.testing.assert_close(results[0], expected[0], rtol=1e-5, atol=0)
        counts = fusedstep.stats()["binary_cross_entropy_with_logits"]
        assert counts.fused >= 1 and counts.fell_back == 0


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_float32_weights_beside_16_bits_in_second_derivatives(
    dtype: torch.dtype, device: str
) -> None:
    x = (3 * torch.randn(9, 33, device=device)).to(dtype)
    t = torch.rand(9, 33, device=device).to(dtype)
    weights = {"weight": torch.rand(33, device=device), "pos_weight": torch.rand(33, device=device)}
    results = []
    for function, cast in ((F, dtype), (native, F64)):
        leaf = x.to(cast, copy=True).requires_grad_()
        with torch.autocast(device, dtype=dtype, enabled=cast is dtype):
            loss = function.binary_cross_entropy_with_logits(
                leaf, t.to(cast), reduction="sum", **{k: v.to(F32) for k, v in weights.items()}
            )
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (second,) = torch.autograd.grad(grad.double().square().sum(), leaf)
        results.append((grad.detach().double(), second.double()))
    rtol = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(*results, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_tails_of_a_compiled_loss(weights: str, device: str) -> None:
    x, t = grid(SURE, F64, device)
    options: dict[str, Any] = {"reduction": "none"}
    for name, value in zip(("weight", "pos_weight"), WEIGHTS[weights], strict=True):
        options[name] = None if value is None else torch.tensor(value, dtype=F64, device=device)

    def loss(x: Tensor, t: Tensor, **options: Any) -> Tensor:
        return F.binary_cross_entropy_with_logits(x, t, **options)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    identical(loss_and_grad(compiled, x, t, **options), loss_and_grad(loss, x, t, **options))
