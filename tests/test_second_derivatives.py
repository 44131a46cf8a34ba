"""Derivatives of the losses beyond the first, which programs take with ``create_graph=True``.

Oracles are torch's own losses in float64, and for rows that are ignored the same rows left out.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as native
from torch import Tensor
from torch.autograd import forward_ad, gradcheck
from torch.utils.checkpoint import checkpoint

import fusedstep
import fusedstep.functional as F
from numerics import BF16, F16, F32, F64, REDUCTIONS, identical, place

IGNORED = -7
REASON = "a backward pass that is differentiated itself (create_graph=True)"
SHAPES = ((4,), (5, 3), (2, 3, 2, 2))
Loss = Callable[..., Tensor]


def class_dim(logits: Tensor) -> int:
    return 0 if logits.dim() == 1 else 1


def along_rows(lse: Tensor) -> Tensor:
    """The sum of the rows, each with a factor of its own."""
    return (lse * torch.linspace(0.5, 1.5, lse.numel()).to(lse).view_as(lse)).sum()


def with_lse(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any
) -> Tensor:
    """Both results, in one tensor of the loss's shape."""
    loss, lse = F.cross_entropy_with_lse(logits, target, weight, **options)
    return loss + along_rows(lse)


def native_with_lse(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    z_loss: float,
    **options: Any,
) -> Tensor:
    lse = logits.logsumexp(class_dim(logits))
    factor = torch.ones_like(lse)
    if target.dtype == torch.int64:
        counts = target != IGNORED
        lse = torch.where(counts, lse, 0)
        factor = counts.to(lse.dtype)
        if weight is not None:
            factor = factor * weight[torch.where(counts, target, 0)]
    rows = z_loss * factor * lse.square()
    reduction = options.get("reduction", "mean")
    if reduction != "none":
        rows = rows.sum() / (factor.sum() if reduction == "mean" else 1)
    loss = native.cross_entropy(logits, target, weight, **options)
    return loss + rows + along_rows(lse)


def native_focal(
    logits: Tensor, target: Tensor, gamma: float, weight: Tensor | None = None, **options: Any
) -> Tensor:
    reduction = options.pop("reduction", "mean")
    n = native.cross_entropy(logits, target, reduction="none", **options)
    counts = target != IGNORED
    factor = counts.to(n.dtype)
    if weight is not None:
        factor = factor * weight[torch.where(counts, target, 0)]
    q = torch.where(counts, -torch.expm1(-n), 1)
    rows = factor * q**gamma * n
    if reduction == "none":
        return rows
    return rows.sum() / factor.sum() if reduction == "mean" else rows.sum()


@dataclass(frozen=True)
class Row:
    """A loss of rows of logits, and torch's."""

    ours: Loss
    native: Loss
    weighted: bool = False
    smoothing: float = 0.0
    probabilities: bool = False
    ignores: bool = False

    def options(self, reduction: str) -> dict[str, Any]:
        options: dict[str, Any] = {"reduction": reduction}
        if self.smoothing:
            options["label_smoothing"] = self.smoothing
        if not self.probabilities:
            options["ignore_index"] = IGNORED
        return options

    def target(self, shape: tuple[int, ...]) -> Tensor:
        classes = shape[0 if len(shape) == 1 else 1]
        if self.probabilities:
            return torch.rand(shape).softmax(0 if len(shape) == 1 else 1)
        rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
        target = torch.randint(classes, rows)
        if self.ignores and target.dim():
            target.view(-1)[::2] = IGNORED
        return target

    def weight(self, shape: tuple[int, ...]) -> Tensor | None:
        return torch.rand(shape[0 if len(shape) == 1 else 1]) + 0.5 if self.weighted else None


CROSS_ENTROPY = {
    "plain": Row(F.cross_entropy, native.cross_entropy),
    "ignored": Row(F.cross_entropy, native.cross_entropy, ignores=True),
    "weighted": Row(F.cross_entropy, native.cross_entropy, weighted=True, ignores=True),
    "smoothed": Row(F.cross_entropy, native.cross_entropy, smoothing=0.2, ignores=True),
    "weighted and smoothed": Row(
        F.cross_entropy, native.cross_entropy, weighted=True, smoothing=0.2, ignores=True
    ),
    "probabilities": Row(F.cross_entropy, native.cross_entropy, probabilities=True),
    "weighted probabilities": Row(
        F.cross_entropy, native.cross_entropy, weighted=True, smoothing=0.2, probabilities=True
    ),
}
ROWS = CROSS_ENTROPY | {
    "lse": Row(
        partial(with_lse, z_loss=0.3),
        partial(native_with_lse, z_loss=0.3),
        weighted=True,
        smoothing=0.2,
        ignores=True,
    ),
    "lse of probabilities": Row(
        partial(with_lse, z_loss=0.3), partial(native_with_lse, z_loss=0.3), probabilities=True
    ),
    "focal": Row(
        partial(F.focal_loss, gamma=1.5),
        partial(native_focal, gamma=1.5),
        weighted=True,
        ignores=True,
    ),
}
ELEMENTS: dict[str, tuple[str, dict[str, float]]] = {
    "l1": ("l1_loss", {}),
    "mse": ("mse_loss", {}),
    "smooth l1": ("smooth_l1_loss", {"beta": 0.75}),
    "huber": ("huber_loss", {"delta": 0.75}),
    "bce": ("binary_cross_entropy_with_logits", {}),
    "weighted bce": ("binary_cross_entropy_with_logits", {"weight": 2.0, "pos_weight": 3.0}),
}
INDEXED = {name: row for name, row in ROWS.items() if row.ignores}


@dataclass
class Drawn:
    """A loss of its first operands, to be differentiated, with all else given."""

    ours: Loss
    native: Loss
    operands: list[Tensor]

    def derivatives(
        self, which: str, dtype: torch.dtype, order: int, by_grad_output: bool = False
    ) -> list[Tensor]:
        """Of functions of the derivatives below, by the operands and perhaps by what the loss is
        multiplied with."""
        generator = torch.Generator().manual_seed(0)
        leaves = [t.detach().to(dtype).requires_grad_() for t in self.operands]
        value = getattr(self, which)(*leaves)
        g = torch.rand(value.shape, generator=generator, dtype=F64) + 0.5
        g = g.to(value.device, value.dtype).requires_grad_(by_grad_output)
        value = (value * g).sum()
        if by_grad_output:
            leaves.append(g)
        found = []
        for _ in range(order):
            if not value.requires_grad:  # nothing is left of an L1 loss
                break
            grads = torch.autograd.grad(value, leaves, create_graph=True)
            found += [grad.detach() for grad in grads]
            value = sum(
                (
                    grad.sin() * torch.randn(grad.shape, generator=generator, dtype=F64).to(grad)
                ).sum()
                for grad in grads
            )
        return found


def draw_rows(row: Row, shape: tuple[int, ...], reduction: str, device: str) -> Drawn:
    target, weight = row.target(shape).to(device), row.weight(shape)

    def call(function: Loss, logits: Tensor) -> Tensor:
        fitting = target.to(logits) if row.probabilities else target
        w = None if weight is None else weight.to(logits)
        return function(logits, fitting, weight=w, **row.options(reduction))

    logits = torch.randn(shape, device=device)
    return Drawn(partial(call, row.ours), partial(call, row.native), [logits])


def draw_elements(
    name: str, shape: tuple[int, ...], reduction: str, device: str, both: bool = True
) -> Drawn:
    """Of input and target where torch differentiates both and `both` wants it, else of input.

    Steps of 1/4, so that differences are 0, or at the corner of a loss, now and then.
    """
    function, numbers = ELEMENTS[name]
    x = torch.randint(-8, 8, shape, device=device) / 4
    t = torch.randint(0, 5, shape, device=device) / 4
    both = both and "bce" not in name

    def call(function: Loss, x: Tensor, t: Tensor = t) -> Tensor:
        options: dict[str, Any] = {"reduction": reduction}
        for key, value in numbers.items():
            weight = torch.linspace(1, value, x.shape[-1] if x.dim() else 1)
            options[key] = weight.to(x).view(x.shape[-1:]) if "weight" in key else value
        return function(x, t.to(x), **options)

    ours, theirs = getattr(F, function), getattr(native, function)
    return Drawn(partial(call, ours), partial(call, theirs), [x, t] if both else [x])


def draw(name: str, shape: tuple[int, ...], reduction: str, device: str) -> Drawn:
    """Of any loss here."""
    if name in ELEMENTS:
        return draw_elements(name, shape, reduction, device)
    return draw_rows(ROWS[name], shape, reduction, device)


# ------------------------------------------------------------------ values


@pytest.mark.parametrize("by_grad_output", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", [*ROWS, *ELEMENTS])
def test_three_derivatives_like_torch(
    name: str, reduction: str, by_grad_output: bool, device: str
) -> None:
    for shape in SHAPES:
        drawn = draw(name, shape, reduction, device)
        ours, theirs = (drawn.derivatives(w, F64, 3, by_grad_output) for w in ("ours", "native"))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("name", [*ROWS, *ELEMENTS])
def test_two_derivatives_of_each_dtype(name: str, dtype: torch.dtype, device: str) -> None:
    """Each in the dtype of its operand, and no further from float64 than that rounds."""
    for reduction in REDUCTIONS:
        drawn = draw(name, (5, 3), reduction, device)
        drawn.operands = [t.to(dtype).double() for t in drawn.operands]
        ours, exact = drawn.derivatives("ours", dtype, 2), drawn.derivatives("native", F64, 2)
        assert {grad.dtype for grad in ours} == {dtype}
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close([g.double() for g in ours], exact, rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize("name", CROSS_ENTROPY)
def test_derivatives_of_any_layout(name: str, device: str) -> None:
    """Classes last, gaps, a broadcast: as of the same values laid out plainly."""
    row, shape = ROWS[name], (2, 3, 2, 2)
    for layout in (
        lambda t: place(t, order=(0, 2, 3, 1)),
        lambda t: place(t, steps={3: 2}),
        lambda t: t[:1].expand(shape),
    ):
        drawn = draw_rows(row, shape, "mean", device)
        logits = layout(drawn.operands[0])
        found = []
        for x in (logits, logits.contiguous()):
            x = x.requires_grad_() if x.is_leaf else x.detach().requires_grad_()
            loss = drawn.ours(x)
            (grad,) = torch.autograd.grad(loss, x, create_graph=True)
            found.append((grad.detach(), *torch.autograd.grad(grad.square().sum(), x)))
        torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    "name", ["weighted and smoothed", "weighted probabilities", "focal", "lse"]
)
def test_numerical_derivatives_of_the_second(name: str, device: str) -> None:
    """Backward and forward through the second derivative, against differences."""
    drawn = draw_rows(ROWS[name], (3, 4), "mean", device)
    v = torch.randn(3, 4, dtype=F64, device=device)

    def second(logits: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(drawn.ours(logits), logits, create_graph=True)
        return torch.autograd.grad((grad * v).sum(), logits, create_graph=True)[0]

    x = drawn.operands[0].double().requires_grad_()
    assert gradcheck(second, [x])


@pytest.mark.parametrize("name", ROWS)
def test_forward_mode_over_what_arrives(name: str, device: str) -> None:
    """The gradient is linear in grad_output, so its tangent is the gradient for the tangent."""
    drawn = draw_rows(ROWS[name], (5, 3), "none", device)
    x = drawn.operands[0].double().requires_grad_()
    loss = drawn.ours(x)
    g, tangent = torch.rand_like(loss), torch.rand_like(loss)
    (expected,) = torch.autograd.grad(loss, x, tangent, retain_graph=True)
    with forward_ad.dual_level():
        (grad,) = torch.autograd.grad(loss, x, forward_ad.make_dual(g, tangent))
        found = forward_ad.unpack_dual(grad).tangent
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", [*CROSS_ENTROPY, *ELEMENTS])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_first_gradient_is_the_kernels(name: str, dtype: torch.dtype, device: str) -> None:
    for reduction in REDUCTIONS:
        drawn = draw(name, (9, 19), reduction, device)
        leaves = [t.to(dtype).requires_grad_() for t in drawn.operands]
        loss = drawn.ours(*leaves)
        g = torch.rand_like(loss)
        kept = torch.autograd.grad(loss, leaves, g, create_graph=True)
        plain = torch.autograd.grad(loss, leaves, g)
        assert all(grad.requires_grad for grad in kept)
        identical([grad.detach() for grad in kept], list(plain))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ELEMENTS)
def test_each_operand_alone(name: str, reduction: str, device: str) -> None:
    """The gradient of one operand depends on both; one may be a function of the other."""
    drawn = draw_elements(name, (4, 3), reduction, device, both=True)
    if len(drawn.operands) == 1:
        pytest.skip("torch's own computes the gradient of this target")
    for wanted, tied in itertools.product(([0], [1], [0, 1]), (False, True)):
        results = []
        for function in (drawn.ours, drawn.native):
            leaves = [t.double().requires_grad_() for t in drawn.operands]
            loss = function(leaves[0], leaves[0] * leaves[1] if tied else leaves[1]).sum()
            grads = torch.autograd.grad(loss, [leaves[i] for i in wanted], create_graph=True)
            value = sum((k + 1) * grad.sin().sum() for k, grad in enumerate(grads))
            results.append([g.detach() for g in grads] + [*torch.autograd.grad(value, leaves)])
        torch.testing.assert_close(*results)


def test_second_derivatives_of_both_tails(device: str) -> None:
    """A binary cross-entropy's s (1 - s) is about exp(-|x|), wherever that is no subnormal."""
    x = torch.tensor([-80.0, -30.0, -1.0, 0.0, 1.0, 30.0, 80.0], device=device, requires_grad=True)
    for t, q in itertools.product((0.0, 0.5, 1.0), (None, 3.0)):
        loss = F.binary_cross_entropy_with_logits(
            x,
            torch.full_like(x, t),
            reduction="sum",
            pos_weight=None if q is None else torch.tensor(q, device=device),
        )
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        (second,) = torch.autograd.grad(grad.sum(), x)
        s = x.detach().double().abs().neg().sigmoid()
        exact = s * (1 - s) * (1 - t + (1 if q is None else q) * t)
        torch.testing.assert_close(second.double(), exact, rtol=1e-6, atol=0)


# ------------------------------------------------------------------ rows that are ignored


@pytest.mark.parametrize("by_grad_output", [False, True])
@pytest.mark.parametrize("name", INDEXED)
def test_ignored_rows_have_no_derivative_whatever_they_hold(
    name: str, by_grad_output: bool, device: str
) -> None:
    """Exactly 0 in them, also where what arrives there is no number; elsewhere as without them."""
    for reduction, dtype in itertools.product(REDUCTIONS, (F64, F32, BF16)):
        drawn = draw_rows(INDEXED[name], (6, 3), reduction, device)
        (values,) = drawn.operands
        kept = values.clone()
        values[0], values[2] = math.nan, -math.inf
        values[4, 0], values[4, 1] = math.inf, -math.inf
        found = []
        for logits in (values, kept):
            x = logits.to(dtype).requires_grad_()
            loss = drawn.ours(x)
            g = torch.ones_like(loss).requires_grad_(by_grad_output)
            (first,) = torch.autograd.grad(loss, x, g, create_graph=True)
            v = torch.ones_like(first) / 3
            v[::2] = math.nan
            (second,) = torch.autograd.grad(first, x, v, create_graph=True)
            (third,) = torch.autograd.grad(second, x, v)
            found.append([first.detach(), second.detach(), third])
        for of_bad, of_good in zip(*found, strict=True):
            assert not of_bad[::2].any()
            identical(of_bad, of_good)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", INDEXED)
def test_all_rows_ignored(name: str, reduction: str, device: str) -> None:
    """A mean is no number, as torch's; every derivative is 0."""
    row = INDEXED[name]
    for by_grad_output, bad in itertools.product((False, True), (0.0, math.nan)):
        x = torch.full((4, 3), bad, device=device, requires_grad=True)
        target = torch.full((4,), IGNORED, device=device)
        weight = torch.ones(3, device=device) if row.weighted else None
        loss = row.ours(x, target, weight=weight, **row.options(reduction))
        assert loss.isnan().all() if reduction == "mean" else not loss.any()
        g = torch.ones_like(loss).requires_grad_(by_grad_output)
        (first,) = torch.autograd.grad(loss, x, g, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        assert not first.any() and not second.any()


@pytest.mark.parametrize("name", ["focal", "lse"])
@pytest.mark.parametrize("path", ["torch.func", "another weight", "traced", "compiled autograd"])
def test_ignored_rows_of_composed_losses(name: str, path: str, device: str) -> None:
    """What the kernels do not cover, and what is traced."""
    row = INDEXED[name]
    values = torch.randn(6, 3, device=device)
    values[::2] = math.nan
    target = torch.randint(3, (6,), device=device)
    target[::2] = IGNORED
    weight = torch.ones(3, dtype=F64 if path == "another weight" else F32, device=device)

    def loss(x: Tensor) -> Tensor:
        return row.ours(x, target, weight=weight, **row.options("mean"))

    x = values.clone().requires_grad_()
    if path == "torch.func":
        grad = torch.func.grad(loss)(values)
    elif path == "traced":
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        (grad,) = torch.autograd.grad(compiled(x), x)
    else:
        on = torch._dynamo.compiled_autograd._enable if path != "another weight" else None
        with on(partial(torch.compile, backend="eager")) if on else nullcontext():
            loss(x).backward()
        grad = x.grad
    assert grad is not None and not grad[::2].any() and grad[1::2].isfinite().all()


# ------------------------------------------------------------------ autograd's other features


def twice(loss: Tensor, x: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), x)[0]


@pytest.mark.parametrize("name", [*CROSS_ENTROPY, *ELEMENTS])
def test_hooks_and_retained_gradients(name: str, device: str) -> None:
    """Of an input that is no leaf: called once in each pass, with what torch gives them."""
    drawn = draw(name, (5, 3), "mean", device)
    results = []
    for function in (drawn.ours, drawn.native):
        leaf = drawn.operands[0].double().requires_grad_()
        logits, seen = leaf * 1, []
        logits.retain_grad()
        logits.register_hook(lambda grad, seen=seen: seen.append(grad.detach().clone()))
        loss = function(logits)
        loss.backward(create_graph=True)
        first, kept = leaf.grad, logits.grad
        assert first is not None and kept is not None
        leaf.grad = logits.grad = None
        first.square().sum().backward()
        results.append([*seen, first.detach(), kept.detach(), leaf.grad, logits.grad])
        assert len(seen) == 2
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "name", ["weighted and smoothed", "probabilities", "focal", "huber", "bce"]
)
def test_checkpoints(name: str, reduction: str, device: str) -> None:
    """What a checkpoint saved may be unpacked once in each pass."""
    drawn = draw(name, (5, 3), reduction, device)
    target = drawn.operands[1:]
    results = []
    for run in (lambda f, x: f(x), partial(checkpoint, use_reentrant=False)):
        x = drawn.operands[0].clone().requires_grad_()
        loss = run(lambda x: drawn.ours(x.tanh() * 2, *target), x)
        results.append(twice(loss.sum(), x))
    torch.testing.assert_close(*results)


def test_a_changed_operand_is_refused(device: str) -> None:
    """Between the first derivative and the second, as torch's saved tensors refuse it."""
    for changed in ("logits", "target", "grad_output"):
        leaf = torch.randn(5, 3, device=device, requires_grad=True)
        logits, target = leaf * 1, torch.zeros(5, dtype=torch.int64, device=device)
        loss = F.cross_entropy(logits, target, reduction="sum")
        g = torch.ones_like(loss)
        (grad,) = torch.autograd.grad(loss, leaf, g, create_graph=True)
        with torch.no_grad():
            {"logits": logits, "target": target, "grad_output": g}[changed].add_(0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(grad.sum(), leaf)


def test_a_graph_is_freed(device: str) -> None:
    x = torch.randn(5, 3, device=device, requires_grad=True)
    loss = F.cross_entropy(x, torch.zeros(5, dtype=torch.int64, device=device))
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    first, again = (
        torch.autograd.grad(grad.sum(), x, retain_graph=keep)[0] for keep in (True, False)
    )
    identical(first, again)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(grad.sum(), x)


@pytest.mark.parametrize("name", [*ROWS, *ELEMENTS])
def test_batched_gradients(name: str, device: str) -> None:
    """``is_grads_batched``: a Hessian in one call, and a batch of first gradients with a graph."""
    drawn = draw(name, (3, 2), "mean", device)
    results = []
    for function in (drawn.ours, drawn.native):
        x = drawn.operands[0].double().requires_grad_()
        loss = function(x, *drawn.operands[1:])
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        basis = torch.eye(6, dtype=F64, device=device).view(6, 3, 2)
        (hessian,) = torch.autograd.grad(grad, x, basis, is_grads_batched=True, retain_graph=True)
        g = torch.tensor([1.0, 2.0], dtype=F64, device=device)
        (grads,) = torch.autograd.grad(loss, x, g, is_grads_batched=True, create_graph=True)
        results.append([hessian, grads.detach(), *torch.autograd.grad(grads.square().sum(), x)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("name", [*CROSS_ENTROPY, *ELEMENTS])
def test_compiled_and_patched(name: str, patched: bool, device: str) -> None:
    """Dynamo's own backend runs the graph eagerly, so it may be differentiated twice."""
    drawn = draw(name, (5, 3), "mean", device)
    expected = drawn.derivatives("native", F64, 3)
    with fusedstep.patched() if patched else nullcontext():
        if patched:
            torch_name = ELEMENTS[name][0] if name in ELEMENTS else "cross_entropy"
            drawn.ours = partial(drawn.ours.func, getattr(native, torch_name))
        torch.testing.assert_close(drawn.derivatives("ours", F64, 3), expected)
        torch.compiler.reset()
        drawn.ours = torch.compile(drawn.ours, backend="eager", fullgraph=True)
        torch.testing.assert_close(drawn.derivatives("ours", F64, 3), expected)


def test_compiled_autograd_of_the_second(device: str) -> None:
    for name in ("weighted and smoothed", "probabilities", "mse", "weighted bce"):
        drawn = draw(name, (5, 3), "mean", device)
        x, target = drawn.operands[0].double().requires_grad_(), drawn.operands[1:]
        expected = twice(drawn.ours(x, *target), x)
        (grad,) = torch.autograd.grad(drawn.ours(x, *target), x, create_graph=True)
        value = grad.square().sum()
        with torch._dynamo.compiled_autograd._enable(partial(torch.compile, backend="eager")):
            value.backward()
        torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("name", [*ROWS, *ELEMENTS])
def test_counted_once(name: str, device: str) -> None:
    drawn = draw(name, (5, 3), "mean", device)
    x = drawn.operands[0].requires_grad_()
    fusedstep.reset_stats()
    (grad,) = torch.autograd.grad(drawn.ours(*drawn.operands), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sin().sum(), x, create_graph=True)
    if second.requires_grad:
        second.sum().backward()
    stats = fusedstep.stats()
    assert (stats.fused, stats.fell_back) == (1, 1)
    assert [calls.fallbacks for calls in stats.calls if calls.fell_back] == [{REASON: 1}]


def operators_run(work: Callable[[], object]) -> Counter[str]:
    """How often each of torch's operators ran, those inside others too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        work()
    return Counter(event.name for event in profiler.events())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", CROSS_ENTROPY)
def test_no_loss_is_computed_on_the_way(name: str, reduction: str, device: str) -> None:
    """The kernel's gradient, then one softmax and its derivative: why this is faster than torch."""
    drawn = draw_rows(ROWS[name], (10, 5), reduction, device)
    x = drawn.operands[0].requires_grad_()
    ran = operators_run(lambda: twice(drawn.ours(x).sum(), x))
    assert ran["aten::_softmax"] == ran["aten::_softmax_backward_data"] == 1
    assert not [name for name in ran if "log_softmax" in name or "aten::nll" in name]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ELEMENTS)
def test_no_loss_of_elements_is_computed_on_the_way(name: str, reduction: str, device: str) -> None:
    drawn = draw_elements(name, (10, 5), reduction, device, both=False)
    x = drawn.operands[0].requires_grad_()
    ran = operators_run(lambda: twice(drawn.ours(x).sum(), x))
    assert not [name for name in ran if "_loss" in name and name.startswith("aten::")]
    assert ran["aten::sigmoid_"] + ran["aten::sigmoid"] == ("bce" in name)
