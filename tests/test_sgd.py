"""SGD against torch's for-loop implementation and against a float64 reference."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD as TorchSGD
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import reference
from fusedstep import _C, SGD
from numerics import BF16, COMPUTE, DTYPES, F16, F32, F64, identical
from optimizers import (
    BY_NAME,
    CANARY,
    COPIES,
    LAYOUTS,
    SCHEDULERS,
    SIZES,
    VIEWS,
    assert_near,
    assert_same,
    clones,
    name_of,
    parameters,
    refuses,
    scaled_training,
    set_random_grads,
    step_both,
    through_a_file,
)

NativeSGD = partial(TorchSGD, foreach=False)  # torch's fused SGD is not right on the CPU

OPTIONS = BY_NAME["SGD"].options
MOMENTUM: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


def buffers(optimizer: torch.optim.Optimizer) -> list[Tensor | None]:
    params = (p for group in optimizer.param_groups for p in group["params"])
    return [optimizer.state[p].get("momentum_buffer") for p in params]


# ------------------------------------------------------------------ the reference itself


@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
def test_reference_agrees_with_torch_in_float64(options: dict[str, Any]) -> None:
    (p,) = params = parameters([100], F64)
    optimizer = NativeSGD(params, lr=0.1, **options)
    expected, momentum_buffer = p.detach(), None
    for _ in range(5):
        set_random_grads(params)
        assert p.grad is not None
        expected, momentum_buffer = reference.sgd_step(
            expected, p.grad, momentum_buffer, lr=0.1, **options
        )
        optimizer.step()
    torch.testing.assert_close(p.detach(), expected, rtol=1e-13, atol=1e-13)


def test_reference_on_worked_numbers() -> None:
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    assert reference.sgd_step(one, two, None, lr=0.1)[0].item() == pytest.approx(0.8)
    param, buffer = reference.sgd_step(one, two, None, lr=0.1, momentum=0.5, dampening=0.25)
    assert (param.item(), buffer.item()) == pytest.approx((0.8, 2.0))
    param, buffer = reference.sgd_step(param, two, buffer, lr=0.1, momentum=0.5, dampening=0.25)
    assert (param.item(), buffer.item()) == pytest.approx((0.55, 2.5))
    nesterov = reference.sgd_step(one, two, None, lr=0.1, momentum=0.5, nesterov=True)
    assert nesterov[0].item() == pytest.approx(0.7)
    ascent = reference.sgd_step(one, two, None, lr=0.1, weight_decay=1.0, maximize=True)
    assert ascent[0].item() == pytest.approx(1.1)


# ------------------------------------------------------------------ right numbers


def rounding(value: Tensor, dtype: torch.dtype) -> Tensor:
    """What storing a value may change: half a unit in its last place, subnormal ones included."""
    info = torch.finfo(dtype)
    return 0.5 * info.eps * value.abs().clamp(min=info.smallest_normal)


def assert_one_step_is_rounded_once(
    before: Tensor, grad: Tensor, buffer: Tensor | None, after: Tensor, options: dict[str, Any]
) -> None:
    """The distance to the exact step from the stored numbers: storing the parameter and the
    momentum buffer (which the parameter may or may not see rounded), and six roundings of the
    arithmetic, one for each product and sum of the rule."""
    dtype = after.dtype
    expected, new_buffer = reference.sgd_step(before, grad, buffer, lr=0.1, **options)
    terms = before.abs() + 0.1 * (grad.abs() + 0.01 * before.abs()).double() * 2
    allowed = rounding(expected, dtype)
    if new_buffer is not None:
        terms = terms + 0.2 * (0 if buffer is None else buffer.double().abs())
        allowed = allowed + 0.2 * rounding(new_buffer, dtype)
    allowed = allowed + 6 * 0.5 * torch.finfo(COMPUTE[dtype]).eps * terms
    excess = (after.detach().double() - expected).abs() / allowed
    assert excess.max() <= 1, f"{excess.max():.3g} times the allowed error"


def distance(actual: Sequence[Tensor], expected: Sequence[tuple[Tensor, Tensor | None]]) -> float:
    """The root mean square of all errors."""
    pairs = zip(actual, expected, strict=True)
    errors = torch.cat([(p.detach().double() - q).flatten() for p, (q, _) in pairs])
    return errors.square().mean().sqrt().item()


@pytest.mark.level
@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fifty_steps_of_every_combination(
    dtype: torch.dtype, options: dict[str, Any], device: str
) -> None:
    params = parameters(SIZES, dtype, device)
    twins = clones(params)
    exact: list[tuple[Tensor, Tensor | None]] = [(p.detach().double(), None) for p in params]
    ours, theirs = SGD(params, lr=0.1, **options), NativeSGD(twins, lr=0.1, **options)
    for step in range(50):
        set_random_grads(params, twins)
        before = copy.deepcopy((params, buffers(ours))) if step in (0, 1, 49) else None
        ours.step()
        theirs.step()
        for i, p in enumerate(params):
            assert p.grad is not None
            exact[i] = reference.sgd_step(exact[i][0], p.grad, exact[i][1], lr=0.1, **options)
            if before is not None:
                old, old_buffer = before[0][i].detach(), before[1][i]
                assert_one_step_is_rounded_once(old, p.grad, old_buffer, p, options)
    if dtype in (F32, F64):
        identical(params, twins)
    # Rounding errors of fifty steps walk at random. Torch's walks over all elements tell how far
    # they lead; by chance some go further, the less so the more elements a tensor has.
    theirs_typically = distance(twins, exact)
    for p, q in zip(params, exact, strict=True):
        luck = 1 + 10 / math.sqrt(p.numel())
        assert distance([p], [q]) <= luck * theirs_typically + torch.finfo(COMPUTE[dtype]).eps
    for ours_buffer, theirs_buffer in zip(buffers(ours), buffers(theirs), strict=True):
        assert (ours_buffer is None) == (theirs_buffer is None) == (options["momentum"] == 0)
        if ours_buffer is not None and theirs_buffer is not None and dtype in (F32, F64):
            assert_near(ours_buffer, theirs_buffer)


@pytest.mark.level
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_bits_for_any_thread_count(threads: int) -> None:
    params = parameters([*SIZES, (512, 1024)])
    twins = clones(params)
    first, second = SGD(params, **MOMENTUM), SGD(twins, **MOMENTUM)
    for _ in range(3):
        set_random_grads(params, twins)
        torch.set_num_threads(threads)
        first.step()
        torch.set_num_threads(1)
        second.step()
    identical(params, twins)
    identical(buffers(first), buffers(second))


# ------------------------------------------------------------------ torch's fused SGD is wrong here


@pytest.mark.level
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_every_element_of_a_16_bit_parameter_moves(dtype: torch.dtype) -> None:
    params = parameters([100, 1000, 4097], dtype)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.full_like(p, 64.0)
    SGD(params, lr=0.1).step()
    for p, old in zip(params, before, strict=True):
        assert (p != old).all()
        assert_near(p, old - 0.1 * 64)


@pytest.mark.parametrize("steps_before", [0, 1, 3])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {**MOMENTUM, "nesterov": True}])
def test_an_overflow_changes_nothing(
    options: dict[str, Any], steps_before: int, on_cuda: bool
) -> None:
    """On the first step above all, where there is no momentum buffer yet. On CUDA, where the device
    alone knows of the overflow, there is one behind it, of zeros."""
    options = {"lr": 0.1, **options}
    params = parameters([100, 1000])
    twins = clones(params)
    ours, theirs = SGD(params, **options, fused=True), NativeSGD(twins, **options)
    device = params[0].device.type
    scaler = torch.amp.GradScaler(device, init_scale=1024.0, growth_interval=1000)
    scale = torch.tensor(1024.0)

    def scaled_step(overflow: bool) -> None:
        nonlocal scale
        set_random_grads(params, twins)
        for p in params:
            assert p.grad is not None
            p.grad.mul_(scale)
        if overflow:
            assert params[1].grad is not None
            params[1].grad[77] = math.inf
        scaler.scale(torch.ones(()))  # what a training loop does first: the scaler wakes up here
        scaler.step(ours)
        scaler.update()
        if not overflow:
            theirs.step()
        scale = torch.tensor(scaler.get_scale())

    for _ in range(steps_before):
        scaled_step(overflow=False)
    kept = [p.detach().clone() for p in params]
    kept_state = copy.deepcopy(ours.state_dict())
    torch.full((1000,), math.nan)  # memory for a forgotten buffer to land in
    scaled_step(overflow=True)
    identical(params, kept)
    if on_cuda and steps_before == 0:
        identical(buffers(ours), [None if b is None else b * 0 for b in buffers(ours)])
    else:
        identical(ours.state_dict()["state"], kept_state["state"])
    assert scaler.get_scale() == 512.0
    for _ in range(2):
        scaled_step(overflow=False)
    assert_same(ours, theirs)
    scaled_step(overflow=True)
    assert_same(ours, theirs)


@pytest.mark.parametrize("grad_layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("param_layout", LAYOUTS)
@pytest.mark.parametrize("options", [{"lr": 0.1}, MOMENTUM], ids=["plain", "momentum"])
def test_parameter_and_gradient_in_different_layouts(
    options: dict[str, Any], param_layout: str, grad_layout: str
) -> None:
    values = torch.randn(4, 3, 5, 7)
    ours_p = nn.Parameter(LAYOUTS[param_layout](values))
    theirs_p = nn.Parameter(values.clone())
    ours, theirs = SGD([ours_p], **options), NativeSGD([theirs_p], **options)
    strides = ours_p.stride()
    for _ in range(3):
        if grad_layout == "expanded":
            grad = torch.randn(1, 3, 1, 7).expand(values.shape)
            ours_p.grad, theirs_p.grad = grad, grad.contiguous()
        else:
            grad = torch.randn_like(values)
            ours_p.grad, theirs_p.grad = LAYOUTS[grad_layout](grad), grad
        kept = ours_p.grad.clone()
        ours.step()
        theirs.step()
        identical(ours_p.grad, kept)
        assert ours_p.stride() == strides
        assert_same(ours, theirs)


@pytest.mark.parametrize("buffer_layout", LAYOUTS)
@pytest.mark.parametrize("param_layout", LAYOUTS)
def test_momentum_buffer_in_another_layout(param_layout: str, buffer_layout: str) -> None:
    values, momentum_buffer = torch.randn(2, 4, 3, 5, 7).unbind()
    ours_p, theirs_p = nn.Parameter(LAYOUTS[param_layout](values)), nn.Parameter(values.clone())
    ours, theirs = SGD([ours_p], **MOMENTUM), NativeSGD([theirs_p], **MOMENTUM)
    ours.state[ours_p]["momentum_buffer"] = LAYOUTS[buffer_layout](momentum_buffer)
    theirs.state[theirs_p]["momentum_buffer"] = momentum_buffer.clone()
    for _ in range(3):
        step_both(ours, theirs)
        assert_same(ours, theirs)


@pytest.mark.level
@pytest.mark.parametrize("options", [{"lr": 0.1}, MOMENTUM], ids=["plain", "momentum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_nothing_outside_a_view_is_written(
    view: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Parameter, gradient and momentum buffer each lie in a larger buffer full of canaries."""
    frames = {
        name: torch.full((4096,), CANARY, dtype=dtype) for name in ("param", "grad", "buffer")
    }
    param, grad, momentum_buffer = (VIEWS[view](frame) for frame in frames.values())
    for inside in (param, grad, momentum_buffer):
        inside.copy_(torch.randn(inside.shape))
    ours_p, theirs_p = nn.Parameter(param), nn.Parameter(param.clone())
    ours_p.grad, theirs_p.grad = grad, grad.clone()
    ours, theirs = SGD([ours_p], **options), NativeSGD([theirs_p], **options)
    if "momentum" in options:
        ours.state[ours_p]["momentum_buffer"] = momentum_buffer
        theirs.state[theirs_p]["momentum_buffer"] = momentum_buffer.clone()
    kept = grad.clone()
    ours.step()
    theirs.step()
    assert_same(ours, theirs)
    identical(grad, kept)
    for name, frame in frames.items():
        VIEWS[view](frame).fill_(CANARY)
        assert (frame == CANARY).all(), f"memory outside the {name} was written"


def test_a_parameter_whose_first_gradient_comes_late() -> None:
    params = parameters([100, 33, 1000])
    twins = clones(params)
    ours, theirs = SGD(params, **MOMENTUM), NativeSGD(twins, **MOMENTUM)
    for having_grads in ([0], [0], [0, 2], [1, 2], [0, 1, 2], [1], [0, 1, 2]):
        for i, (p, q) in enumerate(zip(params, twins, strict=True)):
            grad = torch.randn_like(p) if i in having_grads else None
            p.grad, q.grad = grad, grad if grad is None else grad.clone()
        before = [p.detach().clone() for p in params]
        ours.step()
        theirs.step()
        for i in {0, 1, 2} - set(having_grads):
            identical(params[i], before[i])
        assert_same(ours, theirs)


# ------------------------------------------------------------------ many kinds of parameters


def test_mixed_dtypes_sizes_and_layouts_in_one_group() -> None:
    params = parameters([100, (3, 5)], F32) + parameters([33, 1000], BF16)
    params += parameters([17, (4, 4)], F64) + parameters([129], F16)
    params.append(nn.Parameter(torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last)))
    params.append(nn.Parameter(torch.randn(0, 3)))
    params.append(nn.Parameter(torch.randn(())))
    twins = clones(params)
    ours, theirs = SGD(params, **MOMENTUM), NativeSGD(twins, **MOMENTUM)
    step_both(ours, theirs, 3)
    assert_same(ours, theirs)


def test_groups_with_options_of_their_own() -> None:
    params = parameters([100, 33, 1000, 7, 16])
    twins = clones(params)

    def groups(p: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [
            {"params": p[:2]},
            {"params": p[2], "lr": 0.5, "momentum": 0.0, "maximize": True},
            {"params": p[3:4], "weight_decay": 0.3, "nesterov": True},
            {"params": p[4:], "lr": torch.tensor(0.25), "dampening": 0.7},
        ]

    ours = SGD(groups(params), lr=0.1, momentum=0.9)
    theirs = NativeSGD(groups(twins), lr=0.1, momentum=0.9)
    step_both(ours, theirs, 4)
    assert_same(ours, theirs)


def test_groups_added_on_the_way() -> None:
    params = parameters([100, 33])
    twins = clones(params)
    ours, theirs = SGD(params[:1], **MOMENTUM), NativeSGD(twins[:1], **MOMENTUM)
    step_both(ours, theirs, 2)
    ours.add_param_group({"params": params[1:], "lr": 0.2})
    theirs.add_param_group({"params": twins[1:], "lr": 0.2})
    step_both(ours, theirs, 2)
    assert_same(ours, theirs)


@pytest.mark.parametrize("count", [1, 2, 100, 2000])
def test_many_tensors_in_one_call(count: int) -> None:
    """However many tensors there are, Python crosses into the extension once per step."""
    shapes = [(1 + i % 37,) for i in range(count)]
    params = parameters(shapes) + parameters(shapes[:3], BF16) + parameters(shapes[:3], F64)
    twins = clones(params)
    ours = SGD(
        [{"params": params[:1], "lr": 0.2}, {"params": params[1:]}], **MOMENTUM, nesterov=True
    )
    theirs = NativeSGD(
        [{"params": twins[:1], "lr": 0.2}, {"params": twins[1:]}], **MOMENTUM, nesterov=True
    )
    step_both(ours, theirs)
    calls = []

    def watch(frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call" and called is _C.optimizers["SGD"].step:
            calls.append(called)

    set_random_grads(params, twins)
    sys.setprofile(watch)
    ours.step()
    sys.setprofile(None)
    theirs.step()
    assert len(calls) == 1, calls
    assert_same(ours, theirs)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("shared", ["whole", "parts", "twice"])
def test_parameters_that_share_memory(shared: str, device: str) -> None:
    """One after the other, as with torch, whoever else computes at the same time."""
    torch.set_num_threads(2)
    bystanders = parameters([100, 7], F32, device)
    memories = [torch.randn(100_000, device=device)]
    memories.append(memories[0].clone())
    optimizers = []
    for memory, make in zip(memories, (SGD, NativeSGD), strict=True):
        parts = [memory, memory] if shared != "parts" else [memory[5:], memory[:-3]]
        params = [nn.Parameter(part) for part in parts]
        if shared == "twice":
            params[1] = params[0]
        others = clones(bystanders)
        optimizers.append(make([others[0], params[0], others[1], params[1]], **MOMENTUM))
    for _ in range(3):
        set_random_grads(*(optimizer.param_groups[0]["params"] for optimizer in optimizers))
        for optimizer in optimizers:
            optimizer.step()
    assert_same(*optimizers)


def _shared_buffer(params: list[nn.Parameter], state: Any, memory: Tensor) -> None:
    for p in params:
        state[p]["momentum_buffer"] = memory[1:]


def _grad_of_another(params: list[nn.Parameter], state: Any, memory: Tensor) -> None:
    params[1].grad = params[0].detach()


def _strided_grad_of_another(params: list[nn.Parameter], state: Any, memory: Tensor) -> None:
    params[1].data = params[1].detach()[::2].clone()
    params[1].grad = params[0].detach()[::2]


def _strided_grad_over_param(params: list[nn.Parameter], state: Any, memory: Tensor) -> None:
    params[0].data = memory[: len(memory) // 2]
    params[0].grad = memory[: len(memory) // 2 * 2 : 2]


def _grad_is_param(params: list[nn.Parameter], state: Any, memory: Tensor) -> None:
    params[0].grad = params[0].detach()


def _buffer_is_grad(params: list[nn.Parameter], state: Any, memory: Tensor) -> None:
    state[params[0]]["momentum_buffer"] = params[0].grad


def _buffer_is_param(params: list[nn.Parameter], state: Any, memory: Tensor) -> None:
    state[params[0]]["momentum_buffer"] = params[0].detach()


def _grad_before_param(params: list[nn.Parameter], state: Any, memory: Tensor) -> None:
    params[0].data, params[0].grad = memory[1:], memory[:-1]


def _buffer_before_grad(params: list[nn.Parameter], state: Any, memory: Tensor) -> None:
    params[0].grad, state[params[0]]["momentum_buffer"] = memory[1:], memory[:-1]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize(
    "share",
    [
        _shared_buffer,
        _grad_of_another,
        _strided_grad_of_another,
        _strided_grad_over_param,
        _grad_is_param,
        _buffer_is_grad,
        _buffer_is_param,
        _grad_before_param,
        _buffer_before_grad,
    ],
)
def test_gradients_and_buffers_that_share_memory(
    share: Callable[[list[nn.Parameter], Any, Tensor], None],
    weight_decay: float,
    threads: int,
    device: str,
) -> None:
    """As torch's operators do in their order, or refused as they refuse."""
    torch.set_num_threads(threads)
    size = 100_000
    params, memory = parameters([size] * 3, device=device), torch.randn(size + 1, device=device)
    grads = [torch.randn_like(p) for p in params]
    options = MOMENTUM | {"weight_decay": weight_decay}
    outcomes: list[list[Tensor] | str] = []
    for make in (SGD, NativeSGD):
        mine = clones(params)
        optimizer = make(mine, **options)
        for p, grad in zip(mine, grads, strict=True):
            p.grad = grad.clone()
        share(mine, optimizer.state, memory.clone())
        try:
            optimizer.step()
        except RuntimeError as error:
            outcomes.append(str(error))
        else:
            outcomes.append([p.detach() for p in mine])
    ours, theirs = outcomes
    if isinstance(theirs, list):
        torch.testing.assert_close(ours, theirs)
    else:
        assert ours == theirs


def test_parameters_that_do_not_train() -> None:
    frozen, unused, trained = params = parameters([33, 33, 33])
    frozen.requires_grad_(False)
    kept = [frozen.detach().clone(), unused.detach().clone()]
    trained.grad = torch.ones(33)
    optimizer = SGD(params, **MOMENTUM)
    optimizer.step()
    identical([frozen.detach(), unused.detach()], kept)
    assert list(optimizer.state) == [trained]
    SGD([frozen], lr=0.1).step()
    identical(frozen, kept[0])


def test_gradients_on_frozen_parameters_are_used_as_torch_does() -> None:
    params = parameters([33, 100])
    twins = clones(params)
    ours, theirs = SGD(params, lr=0.1), NativeSGD(twins, lr=0.1)
    set_random_grads(params, twins)
    for p in (params[0], twins[0]):
        p.requires_grad_(False)
    ours.step()
    theirs.step()
    assert_same(ours, theirs)


def test_parameters_and_gradients_of_different_dtypes() -> None:
    """Mixed precision: 16-bit parameters with float32 gradients or momentum."""
    values = torch.randn(100).bfloat16()
    params = [nn.Parameter(values.clone()) for _ in range(2)]
    ours, theirs = SGD(params[:1], **MOMENTUM), NativeSGD(params[1:], **MOMENTUM)
    for p in params:
        p.grad_dtype = None
    for _ in range(3):
        grad = torch.randn(100)
        for p in params:
            p.grad = grad.clone()
        ours.step()
        theirs.step()
        assert_same(ours, theirs)


def test_sparse_gradients() -> None:
    for options in ({}, {"momentum": 0.9}, {"maximize": True}):
        embeddings = [nn.Embedding(50, 7, sparse=True) for _ in range(2)]
        embeddings[1].load_state_dict(embeddings[0].state_dict())
        extras = parameters([100])
        extras += clones(extras)
        ours, theirs = (
            cls([e.weight, x], lr=0.1, **options)
            for cls, e, x in zip((SGD, NativeSGD), embeddings, extras, strict=True)
        )
        for _ in range(3):
            rows = torch.randint(50, (9,))
            for embedding, extra in zip(embeddings, extras, strict=True):
                embedding.zero_grad()
                (embedding(rows).square().sum() + extra.square().sum()).backward()
            ours.step()
            theirs.step()
        assert_near(embeddings[0].weight, embeddings[1].weight)
        assert_near(extras[0], extras[1])


@pytest.mark.parametrize("options", OPTIONS[::3], ids=name_of)
def test_complex_parameters(options: dict[str, Any]) -> None:
    params = [*parameters([100], torch.complex64), *parameters([33]), *parameters([7], F64)]
    twins = clones(params)
    ours, theirs = SGD(params, lr=0.1, **options), NativeSGD(twins, lr=0.1, **options)
    step_both(ours, theirs, 3)
    assert_same(ours, theirs)


def test_differentiable() -> None:
    """The step itself is part of the graph, as torch makes it."""
    results = []
    start, grad, buffer = torch.randn(3, 7, dtype=F64).unbind()
    for cls in (SGD, NativeSGD):
        leaves = [t.clone().requires_grad_() for t in (start, grad, buffer)]
        param = leaves[0].clone()
        param.grad = leaves[1]
        optimizer = cls([param], lr=0.1, momentum=0.9, weight_decay=0.1, differentiable=True)
        optimizer.state[param]["momentum_buffer"] = leaves[2].clone()
        optimizer.step()
        outcome = param.square().sum() + optimizer.state[param]["momentum_buffer"].sum()
        results.append([outcome.detach(), *torch.autograd.grad(outcome, leaves)])
    torch.testing.assert_close(*results)


def test_learning_rate_that_requires_grad() -> None:
    results = []
    start, grad = torch.randn(2, 7, dtype=F64).unbind()
    for cls in (SGD, NativeSGD):
        lr = torch.tensor(0.1, dtype=F64, requires_grad=True)
        param = start.clone().requires_grad_().clone()
        param.grad = grad.clone()
        cls([param], lr=lr, differentiable=True).step()
        results.append(torch.autograd.grad(param.square().sum(), lr)[0])
    torch.testing.assert_close(*results)


class Wrapped(Tensor):
    """A subclass that changes nothing."""


def test_tensor_subclasses_and_buffers_of_other_kinds() -> None:
    values = torch.randn(100)
    params = [nn.Parameter(values.clone().as_subclass(Wrapped)) for _ in range(2)]
    ours, theirs = SGD(params[:1], **MOMENTUM), NativeSGD(params[1:], **MOMENTUM)
    step_both(ours, theirs, 3)
    assert_same(ours, theirs)
    assert type(params[0].detach()) is type(params[1].detach())


def test_meta_parameters_take_steps() -> None:
    param = nn.Parameter(torch.empty(33, device="meta"))
    param.grad = torch.empty_like(param)
    optimizer = SGD([param], **MOMENTUM)
    optimizer.step()
    optimizer.step()
    assert optimizer.state[param]["momentum_buffer"].is_meta


def test_devices_mixed_in_one_group() -> None:
    params = [*parameters([33]), nn.Parameter(torch.empty(33, device="meta")), *parameters([7])]
    twins = clones([params[0], params[2]])
    ours, theirs = SGD(params, **MOMENTUM), NativeSGD(twins, **MOMENTUM)
    for _ in range(2):
        set_random_grads([params[0], params[2]], twins)
        params[1].grad = torch.empty_like(params[1])
        ours.step()
        theirs.step()
    assert_near(params[0], twins[0])
    assert_near(params[2], twins[1])


@pytest.mark.level
@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_special_values_travel_as_in_torch(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Infinite, NaN, huge, subnormal and signed zero, each meeting each."""
    info = torch.finfo(dtype)
    values = [0.0, -0.0, 1.0, math.inf, -math.inf, math.nan, info.max, -info.max]
    values += [info.tiny, info.tiny / 4, -info.tiny / 8, info.eps]
    meeting = torch.tensor(list(itertools.product(values, repeat=3)), dtype=dtype)
    params = [nn.Parameter(meeting[:, 0].clone()) for _ in range(2)]
    ours, theirs = SGD(params[:1], lr=0.1, **options), NativeSGD(params[1:], lr=0.1, **options)
    for column in (1, 2, 0):
        for p in params:
            p.grad = meeting[:, column].clone()
        ours.step()
        theirs.step()
        torch.testing.assert_close(params[0], params[1], equal_nan=True)
        for mine, other in zip(buffers(ours), buffers(theirs), strict=True):
            torch.testing.assert_close(mine, other, equal_nan=True)


def test_a_parameter_that_is_its_own_gradient() -> None:
    params = parameters([100])
    twins = clones(params)
    ours, theirs = SGD(params, **MOMENTUM), NativeSGD(twins, **MOMENTUM)
    for (p,) in (params, twins):
        p.grad = p.detach()
    for _ in range(3):
        ours.step()
        theirs.step()
    assert_same(ours, theirs)


def test_offsets_beyond_32_bits() -> None:
    """Only the touched pages of the 8 GiB are ever backed by memory."""
    storage = torch.empty(2**32 + 2**10, dtype=BF16)
    param = nn.Parameter(storage.as_strided((2, 17), (2**32, 1)).copy_(torch.randn(2, 17)))
    twin = clones([param.contiguous()])
    ours, theirs = SGD([param], **MOMENTUM), NativeSGD(twin, **MOMENTUM)
    for _ in range(2):
        grad = torch.randn(2, 17, dtype=BF16)
        param.grad, twin[0].grad = grad, grad.clone()
        ours.step()
        theirs.step()
    assert_near(param, twin[0])


# ------------------------------------------------------------------ learning rates and schedules


@pytest.mark.parametrize(
    "lr", [torch.tensor(0.1), torch.tensor([0.1]), torch.tensor(0.1, dtype=F64)]
)
def test_tensor_learning_rates(lr: Tensor) -> None:
    params = parameters([100, 33])
    twins = clones(params)
    ours, theirs = SGD(params, lr=lr, momentum=0.9), NativeSGD(twins, lr=lr, momentum=0.9)
    step_both(ours, theirs, 2)
    assert_same(ours, theirs)
    assert ours.param_groups[0]["lr"] is lr
    lr.mul_(0.5)  # both see it
    step_both(ours, theirs, 2)
    lr.fill_(0.1)
    assert_same(ours, theirs)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "nesterov": True}], ids=name_of)
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("lr_dtype", DTYPES, ids=str)
def test_a_tensor_learning_rate_is_its_number(
    lr_dtype: torch.dtype, shape: tuple[int, ...], options: dict[str, Any], device: str
) -> None:
    """To the bit, in parameters of every dtype; and its changes in place count."""
    lr = torch.full(shape, 0.1, dtype=lr_dtype, device=device)
    params = [p for dtype in DTYPES for p in parameters([100, 4097], dtype, device)]
    twins = clones(params)
    by_tensor, by_number = SGD(params, lr=lr, **options), SGD(twins, lr=lr.item(), **options)
    for change in (1.0, 0.3, -2.0):
        lr.mul_(change)
        by_number.param_groups[0]["lr"] = lr.item()
        set_random_grads(params, twins)
        by_tensor.step()
        by_number.step()
        identical(params, twins)
    assert by_tensor.param_groups[0]["lr"] is lr


def test_learning_rates_in_several_places(device: str) -> None:
    params = parameters([100, 33, 7, 5], device=device)
    twins = clones(params)
    rates: list[Any] = [0.1, torch.tensor(0.2, device="cpu"), torch.tensor(0.3, device=device)]
    rates.append(torch.tensor(1, device=device))  # an integer
    ours = SGD([{"params": p, "lr": lr} for p, lr in zip(params, rates, strict=True)])
    theirs = NativeSGD([{"params": p, "lr": lr} for p, lr in zip(twins, rates, strict=True)])
    step_both(ours, theirs, 3)
    assert_same(ours, theirs)


NUMBERS: dict[str, dict[str, Any]] = {
    "integers": {"lr": 1, "momentum": 1, "weight_decay": 1},
    "numpy doubles": {"lr": np.float64(0.1), "momentum": np.float64(0.9)},
    "numpy floats": {"lr": np.float32(0.1), "weight_decay": np.float32(0.01)},
    "booleans": {"lr": True, "nesterov": 0, "maximize": 1},
    "tensor weight decay": {"lr": 0.1, "weight_decay": torch.tensor(0.01)},
    "everything off": {"lr": 0.0, "momentum": 0.0, "weight_decay": 0.0},
    "full dampening": {"lr": 0.1, "momentum": 0.9, "dampening": 1.0},
    "beyond one": {"lr": 3.0, "momentum": 1.5, "dampening": -0.5, "weight_decay": 2.0},
    "tiny": {"lr": 1e-50, "momentum": 1e-50, "weight_decay": 1e-50},
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_every_kind(name: str) -> None:
    params = parameters([100, 33]) + parameters([33], F64)
    twins = clones(params)
    ours, theirs = SGD(params, **NUMBERS[name]), NativeSGD(twins, **NUMBERS[name])
    step_both(ours, theirs, 3)
    assert_same(ours, theirs)


def test_options_changed_between_steps() -> None:
    params = parameters([100, 33])
    twins = clones(params)
    ours, theirs = SGD(params, **MOMENTUM), NativeSGD(twins, **MOMENTUM)
    changes = [{"lr": 0.3}, {"lr": 0}, {"momentum": 0}, {"momentum": 0.5}, {"weight_decay": 0}]
    changes += [{"nesterov": True}, {"maximize": True}, {"dampening": 0.5, "nesterov": False}]
    for change in changes:
        for optimizer in (ours, theirs):
            optimizer.param_groups[0].update(change)
        step_both(ours, theirs, 2)
        assert_same(ours, theirs)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str, tensor_lr: bool) -> None:
    params = parameters([100, 33])
    twins = clones(params)
    lr: Any = torch.tensor(0.1) if tensor_lr else 0.1
    optimizers = [SGD(params, lr=lr, momentum=0.9)]
    optimizers.append(NativeSGD(twins, lr=lr.clone() if tensor_lr else lr, momentum=0.9))
    schedulers = [SCHEDULERS[name](optimizer) for optimizer in optimizers]
    for _ in range(7):
        step_both(*optimizers)
        for scheduler in schedulers:
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert optimizers[0].param_groups[0]["lr"] == optimizers[1].param_groups[0]["lr"] != 0.1
    assert_same(*optimizers)


# ------------------------------------------------------------------ the life of an optimizer


def test_closure_and_return_value() -> None:
    model, twin = nn.Linear(7, 3), nn.Linear(7, 3)
    twin.load_state_dict(model.state_dict())
    data = torch.randn(5, 7)
    losses = []
    for module, cls in ((model, SGD), (twin, NativeSGD)):
        optimizer = cls(module.parameters(), lr=0.1)

        def closure(module: nn.Module = module, optimizer: Any = optimizer) -> Tensor:
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = module(data).square().mean()
            loss.backward()
            return loss

        with torch.no_grad():
            losses.append([optimizer.step(closure), optimizer.step(closure=closure)])
        assert optimizer.step() is None
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()))


def test_zero_grad_both_ways() -> None:
    params = parameters([100, 33, 7])
    optimizer = SGD(params, lr=0.1)
    params[0].grad = torch.ones(100)
    params[1].grad = torch.ones(33)
    grads = [params[0].grad, params[1].grad]
    optimizer.zero_grad(set_to_none=False)
    assert params[0].grad is grads[0] and params[1].grad is grads[1] and params[2].grad is None
    identical(grads, [torch.zeros(100), torch.zeros(33)])
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)
    identical(grads, [torch.zeros(100), torch.zeros(33)])
    optimizer.zero_grad()
    attached = torch.ones(100, requires_grad=True) * 2
    params[0].grad = attached
    optimizer.zero_grad(set_to_none=False)
    assert params[0].grad is not None and params[0].grad.grad_fn is None


def test_step_hooks_in_order() -> None:
    (p,) = params = parameters([33])
    optimizer = SGD(params, lr=0.1)
    seen: list[str] = []
    p.grad = torch.ones(33)
    before = p.detach().clone()

    def pre(name: str) -> Callable[..., None]:
        def hook(opt: Any, args: Any, kwargs: Any) -> None:
            assert opt is optimizer
            identical(p, before)
            seen.append(name)

        return hook

    def post(name: str) -> Callable[..., None]:
        def hook(opt: Any, args: Any, kwargs: Any) -> None:
            assert opt is optimizer
            assert (p != before).all()
            seen.append(name)

        return hook

    handles = [
        register_optimizer_step_pre_hook(pre("global pre")),
        register_optimizer_step_post_hook(post("global post")),
        optimizer.register_step_pre_hook(pre("pre 1")),
        optimizer.register_step_pre_hook(pre("pre 2")),
        optimizer.register_step_post_hook(post("post")),
    ]
    optimizer.step()
    assert seen == ["global pre", "pre 1", "pre 2", "post", "global post"]
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert len(seen) == 5


def test_hooks_of_a_class_whose_step_somebody_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    """As tools do that trace or time. Hooks run once, in a subclass with its own step too."""
    original = SGD.step

    @functools.wraps(original)
    def wrapped(self: SGD, closure: Any = None) -> Any:
        return original(self, closure)

    class Subclass(SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    monkeypatch.setattr(SGD, "step", wrapped)
    for cls in (SGD, Subclass):
        seen: list[str] = []
        optimizer = cls(parameters([3]), lr=0.1)
        optimizer.register_step_pre_hook(lambda *_, seen=seen: seen.append("pre"))
        optimizer.register_step_post_hook(lambda *_, seen=seen: seen.append("post"))
        optimizer.step()
        assert seen == ["pre", "post"]


def test_hooks_that_change_the_arguments() -> None:
    (p,) = params = parameters([33])
    optimizer = SGD(params, lr=0.1)
    losses = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 7.0), {}))
    optimizer.register_step_post_hook(lambda o, args, kwargs: losses.append(args[1]()))
    assert optimizer.step() == 7.0
    assert losses == [7.0]

    bad = SGD(params, lr=0.1)
    bad.register_step_pre_hook(lambda o, args, kwargs: "nonsense")
    kept = p.detach().clone()
    p.grad = torch.ones(33)
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        bad.step()
    identical(p, kept)


def test_hooks_that_change_gradients_or_options() -> None:
    (p,) = params = parameters([33])
    optimizer = SGD(params, lr=0.1)
    p.grad = torch.ones(33)
    before = p.detach().clone()

    def hook(opt: Any, args: Any, kwargs: Any) -> None:
        assert p.grad is not None
        p.grad.mul_(3)
        opt.param_groups[0]["lr"] = 0.5

    optimizer.register_step_pre_hook(hook)
    optimizer.step()
    assert_near(p, before - 1.5)


def test_a_subclass_with_its_own_step() -> None:
    class Counting(SGD):
        steps = 0

        def step(self, closure: Any = None) -> Any:
            self.steps += 1
            return super().step(closure)

    params = parameters([33])
    twins = clones(params)
    ours, theirs = Counting(params, **MOMENTUM), NativeSGD(twins, **MOMENTUM)
    step_both(ours, theirs, 2)
    assert ours.steps == 2
    assert_same(ours, theirs)


def test_checkpoints_move_both_ways() -> None:
    """Mid-training, from torch's SGD to ours and back, through a file."""
    for start, end in ((SGD, NativeSGD), (NativeSGD, SGD), (SGD, SGD)):
        params = parameters([100, 33, (4, 5)])
        twins = clones(params)
        first, straight_on = start(params, **MOMENTUM), NativeSGD(twins, **MOMENTUM)
        step_both(first, straight_on, 3)
        saved = through_a_file(first.state_dict())
        resumed_params = clones(params)
        resumed = end(resumed_params, lr=7.0)
        resumed.load_state_dict(saved)
        step_both(resumed, straight_on, 3)
        assert_same(resumed, straight_on)
    fresh = [cls(parameters([3]), **MOMENTUM).state_dict() for cls in (SGD, TorchSGD)]
    assert fresh[0] == fresh[1]


def test_checkpoints_of_older_versions() -> None:
    """Written before `maximize`, `foreach` and their like existed, or with None for no momentum."""
    params = parameters([100, 33])
    twins = clones(params)
    ours, theirs = SGD(params, **MOMENTUM), NativeSGD(twins, **MOMENTUM)
    step_both(ours, theirs, 2)
    for optimizer in (ours, theirs):
        old = optimizer.state_dict()
        for key in ("nesterov", "maximize", "foreach", "differentiable", "fused"):
            del old["param_groups"][0][key]
        old["state"][1]["momentum_buffer"] = None
        optimizer.load_state_dict(old)
    step_both(ours, theirs, 2)
    assert_same(ours, theirs)


@pytest.mark.parametrize("copied", COPIES)
def test_copies_mid_training(copied: str) -> None:
    params = parameters([100, 33])
    twins = clones(params)
    ours, theirs = SGD(params, **MOMENTUM), NativeSGD(twins, **MOMENTUM)
    step_both(ours, theirs, 3)
    duplicate = COPIES[copied](ours)
    assert type(duplicate) is SGD and repr(duplicate) == repr(ours)
    frozen = [p.detach().clone() for p in params]
    step_both(duplicate, theirs, 3)
    assert_same(duplicate, theirs)
    identical(params, frozen)


def test_class_and_repr() -> None:
    params = parameters([3])
    ours, theirs = SGD(params, **MOMENTUM), TorchSGD(params, **MOMENTUM)
    assert isinstance(ours, TorchSGD) and issubclass(SGD, torch.optim.Optimizer)
    assert repr(ours) == repr(theirs)
    assert ours.defaults == theirs.defaults
    assert ours.param_groups == theirs.param_groups


@pytest.mark.parametrize(
    "flags",
    [{"foreach": v} for v in (True, False, None)] + [{"fused": v} for v in (True, False, None)],
    ids=name_of,
)
def test_choices_of_implementation_are_accepted(flags: dict[str, Any]) -> None:
    params = parameters([100, 33]) + parameters([1000], BF16)
    twins = clones(params)
    ours, theirs = SGD(params, **MOMENTUM, **flags), NativeSGD(twins, **MOMENTUM)
    step_both(ours, theirs, 3)
    assert_same(ours, theirs)
    (name, value), *_ = flags.items()
    assert ours.param_groups[0][name] is value


def test_profiler_sees_the_step() -> None:
    params = parameters([33])
    optimizer = SGD(params, lr=0.1)
    set_random_grads(params)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = {event.name for event in profile.events()}
    assert {"Optimizer.step#SGD.step", "Optimizer.zero_grad#SGD.zero_grad"} <= names


@pytest.mark.parametrize("options", [{"lr": 0.1}, MOMENTUM], ids=["plain", "momentum"])
def test_autograd_notices_the_update(options: dict[str, Any]) -> None:
    (p,) = params = parameters([33])
    optimizer = SGD(params, **options)
    for _ in range(2):
        y = (p * p).sum()
        p.grad = torch.ones(33)
        version = p._version
        optimizer.step()
        assert p._version > version
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()
    buffer = optimizer.state[p].get("momentum_buffer")
    if buffer is not None:
        version = buffer._version
        optimizer.step()
        assert buffer._version > version
    assert p.is_leaf and p.requires_grad and p.grad_fn is None


def test_gradients_are_not_consumed() -> None:
    params = parameters([100, 33])
    for options in ({"lr": 0.1}, {**MOMENTUM, "nesterov": True, "maximize": True}):
        optimizer = SGD(params, **options)
        set_random_grads(params)
        grads = [p.grad for p in params]
        kept = [g.clone() for g in grads if g is not None]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(params, grads, strict=True))
        identical(grads, kept)
        first_buffers = [b.data_ptr() for b in buffers(optimizer) if b is not None]
        optimizer.step()
        identical(grads, kept)
        now = [b.data_ptr() for b in buffers(optimizer) if b is not None]
        assert now == first_buffers, "the momentum buffers were replaced"


def test_under_every_grad_mode() -> None:
    params = parameters([100])
    twins = clones(params)
    ours, theirs = SGD(params, **MOMENTUM), NativeSGD(twins, **MOMENTUM)
    for context in (torch.no_grad, torch.enable_grad, torch.autograd.set_detect_anomaly):
        with context(*([True] if context is torch.autograd.set_detect_anomaly else [])):
            step_both(ours, theirs)
    assert_same(ours, theirs)


def test_gradients_that_carry_a_graph() -> None:
    """As create_graph leaves them."""
    params = parameters([33])
    twins = clones(params)
    ours, theirs = SGD(params, **MOMENTUM), NativeSGD(twins, **MOMENTUM)
    for _ in range(2):
        for (p,) in (params, twins):
            p.grad = None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                p.pow(3).sum().backward(create_graph=True)
        ours.step()
        theirs.step()
        for optimizer in (ours, theirs):
            (buffer,) = buffers(optimizer)
            assert buffer is not None and not buffer.requires_grad
    assert_same(ours, theirs)


# ------------------------------------------------------------------ loss scaling


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("overflow_at", [set(), {0}, {3}, {7}, {0, 1, 4, 7}], ids=str)
@pytest.mark.parametrize("fused", [None, True], ids=["default", "fused"])
def test_grad_scaler_loop(fused: bool | None, overflow_at: set[int], clip: float | None) -> None:
    models = [nn.Linear(17, 33), nn.Linear(17, 33)]
    models[1].load_state_dict(models[0].state_dict())
    ours = SGD(models[0].parameters(), **MOMENTUM, fused=fused)
    theirs = NativeSGD(models[1].parameters(), **MOMENTUM)
    batches = [torch.randn(5, 17) for _ in range(8)]
    scales = [
        scaled_training(optimizer, model, batches, overflow_at, clip)
        for optimizer, model in zip((ours, theirs), models, strict=True)
    ]
    assert scales[0] == scales[1]
    assert_same(ours, theirs)
    if overflow_at == set():
        grads = [[p.grad for p in model.parameters()] for model in models]
        torch.testing.assert_close(*grads, msg="gradients are left unscaled, as torch leaves them")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grad_scale_and_found_inf_attributes(dtype: torch.dtype) -> None:
    """What GradScaler sets on an optimizer that says it can unscale for itself."""
    params = parameters([100, 33], dtype)
    twins = clones(params)
    ours, theirs = SGD(params, **MOMENTUM, fused=True), NativeSGD(twins, **MOMENTUM)
    assert ours._step_supports_amp_scaling
    for found_inf in (1.0, 0.0, 1.0, 0.0, 0.0):
        set_random_grads(params, twins)
        for p in params:
            assert p.grad is not None
            p.grad.mul_(8)
        before = [p.detach().clone() for p in params]
        ours.grad_scale, ours.found_inf = torch.tensor(8.0), torch.tensor(found_inf)
        ours.step()
        if found_inf:
            identical(params, before)
        else:
            theirs.step()
            assert_same(ours, theirs)
    del ours.grad_scale, ours.found_inf
    step_both(ours, theirs)
    assert_same(ours, theirs)


def test_grad_scaler_with_every_kind_of_parameter() -> None:
    """Unscaling reaches strided, 16-bit and differently laid out parameters and gradients too."""
    base = torch.randn(2, 20)
    params = [nn.Parameter(base[:, ::2]), *parameters([100], BF16), *parameters([33], F64)]
    params.append(nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)))
    twins = clones(params)
    ours, theirs = SGD(params, **MOMENTUM, fused=True), NativeSGD(twins, **MOMENTUM)
    for _ in range(3):
        set_random_grads(params, twins)
        params[3].grad = params[3].grad.contiguous()
        kept = [p.grad.clone() for p in params]
        for p in params:
            p.grad.mul_(16)
        ours.grad_scale, ours.found_inf = torch.tensor(16.0), torch.tensor(0.0)
        ours.step()
        theirs.step()
        assert_same(ours, theirs)
        torch.testing.assert_close([p.grad for p in params], kept)


SCALED: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.1},
    "momentum": MOMENTUM,
    "nesterov": {**MOMENTUM, "nesterov": True},
    "dampening": {**MOMENTUM, "dampening": 0.5, "maximize": True},
}


@pytest.mark.parametrize("overflows", ["10100", "1100", "01001", "000"])
@pytest.mark.parametrize("scale", [None, 1.0, 8.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCALED)
def test_steps_that_overflow_are_as_if_they_had_not_been(
    name: str, dtype: torch.dtype, scale: float | None, overflows: str, device: str
) -> None:
    """To the bit, wherever the scale and the flag lie; the division by a power of two is exact."""
    params = parameters(SIZES[:-1], dtype, device)
    twins = clones(params)
    scaled, unscaled = SGD(params, **SCALED[name]), SGD(twins, **SCALED[name])
    for overflow in overflows:
        set_random_grads(params, twins)
        for p in params:
            assert p.grad is not None
            p.grad.mul_(scale or 1)
        scaled.found_inf = torch.tensor(float(overflow), device=device)
        scaled.grad_scale = None if scale is None else torch.tensor(scale, device=device)
        if overflow == "1":
            kept = [p.grad.clone() for p in params if p.grad is not None]
            scaled.step()
            identical([p.grad for p in params], kept)
        else:
            scaled.step()
            unscaled.step()
            identical([p.grad for p in params], [q.grad for q in twins])
        identical(params, twins)
    identical(buffers(scaled), buffers(unscaled))


# ------------------------------------------------------------------ torch's own configurations


def _optim_info() -> Any:
    pytest.importorskip("expecttest")  # which torch.testing._internal imports
    from torch.testing._internal.common_optimizers import optim_db

    (info,) = [info for info in optim_db if info.optim_cls is TorchSGD]
    return info


def test_torch_optimizer_database() -> None:
    for dtype in DTYPES:
        inputs = _optim_info().optim_inputs_func("cpu", dtype)
        assert len(inputs) == 9
        for entry in inputs:
            params = parameters([100, (5, 7), 1000], dtype)
            twins = clones(params)
            options = copy.deepcopy(entry.kwargs)
            ours, theirs = SGD(params, **options), NativeSGD(twins, **options)
            step_both(ours, theirs, 5)
            assert_same(ours, theirs)


def test_torch_optimizer_error_database() -> None:
    entries = _optim_info().optim_error_inputs_func("cpu", F32)
    assert len(entries) == 7
    for entry in entries:
        params = entry.optimizer_error_input.params
        params = parameters([3]) if params is None else params
        if issubclass(entry.error_type, Warning):
            with pytest.warns(entry.error_type, match=entry.error_regex):
                SGD(params, **entry.optimizer_error_input.kwargs)
        else:
            with pytest.raises(entry.error_type, match=entry.error_regex):
                SGD(params, **entry.optimizer_error_input.kwargs)


# ------------------------------------------------------------------ bad input

P = nn.Parameter(torch.zeros(3))
Q = nn.Parameter(torch.zeros(3))
BAD: dict[str, tuple[Callable[[Any], Any], str]] = {
    "negative lr": (lambda cls: cls([P], lr=-0.1), "-0.1"),
    "negative tensor lr": (lambda cls: cls([P], lr=torch.tensor(-0.5)), "-0.5"),
    "two learning rates": (lambda cls: cls([P], lr=torch.ones(2)), "1-element"),
    "text lr": (lambda cls: cls([P], lr="0.1"), "str"),
    "negative momentum": (lambda cls: cls([P], lr=0.1, momentum=-0.5), "-0.5"),
    "negative weight decay": (lambda cls: cls([P], lr=0.1, weight_decay=-0.5), "-0.5"),
    "nesterov without momentum": (lambda cls: cls([P], lr=0.1, nesterov=True), "(?i)nesterov"),
    "nesterov with dampening": (
        lambda cls: cls([P], lr=0.1, nesterov=True, momentum=0.9, dampening=0.1),
        "(?i)nesterov",
    ),
    "no parameters": (lambda cls: cls([], lr=0.1), "empty"),
    "exhausted generator": (lambda cls: cls(iter(()), lr=0.1), "empty"),
    "a tensor for parameters": (lambda cls: cls(P, lr=0.1), "iterable"),
    "numbers for parameters": (lambda cls: cls([1.0, 2.0], lr=0.1), "float"),
    "a set of parameters": (lambda cls: cls([{"params": {P, Q}}], lr=0.1), "(?i)set"),
    "not a leaf": (lambda cls: cls([P * 2], lr=0.1), "leaf"),
    "the same in two groups": (
        lambda cls: cls([{"params": [P]}, {"params": [P]}], lr=0.1),
        "more than one",
    ),
    "group without parameters": (lambda cls: cls([{"lr": 0.1}], lr=0.1), "params"),
    "some names missing": (lambda cls: cls([("p", P), Q], lr=0.1), "names"),
    "fused and differentiable": (
        lambda cls: cls([P], lr=0.1, fused=True, differentiable=True),
        "differentiable",
    ),
    "fused and foreach": (lambda cls: cls([P], lr=0.1, fused=True, foreach=True), "foreach"),
    "unknown option": (lambda cls: cls([P], lr=0.1, betas=(0.9, 0.9)), "betas"),
    "two closures": (lambda cls: cls([P], lr=0.1).step(None, None), "step"),
    "closure that is none": (lambda cls: cls([P], lr=0.1).step(3), "int"),
    "state of another optimizer": (
        lambda cls: cls([P], lr=0.1).load_state_dict(cls([P, Q], lr=0.1).state_dict()),
        "group",
    ),
    "state of more groups": (
        lambda cls: cls([P], lr=0.1).load_state_dict(
            cls([{"params": [P]}, {"params": [Q]}], lr=0.1).state_dict()
        ),
        "groups",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_like_torch(name: str) -> None:
    call, subject = BAD[name]
    with pytest.raises(Exception) as theirs:
        call(TorchSGD)
    with pytest.raises(theirs.type, match=subject):
        call(SGD)


def test_duplicate_parameters_warn_as_in_torch() -> None:
    with pytest.warns(UserWarning, match="duplicate parameters"):
        ours = SGD([P, P], lr=0.1)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        theirs = TorchSGD([P, P], lr=0.1)
    assert len(ours.param_groups[0]["params"]) == len(theirs.param_groups[0]["params"])


NOT_FINITE = [math.nan, math.inf, torch.tensor(math.nan), torch.tensor([math.inf])]


@pytest.mark.parametrize("lr", NOT_FINITE, ids=str)
def test_learning_rates_that_are_not_finite_are_refused(lr: Any) -> None:
    with pytest.raises(ValueError, match=r"(?i)learning rate.*(nan|inf)"):
        SGD([P], lr=lr)
    with pytest.raises(ValueError, match=r"(?i)learning rate.*(nan|inf)"):
        SGD([{"params": [P], "lr": lr}], lr=0.1).step()


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize(
    "option, name",
    [
        ("lr", "learning rate"),
        ("momentum", "momentum value"),
        ("weight_decay", "weight_decay value"),
        ("dampening", "dampening value"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_option_that_became_not_finite_changes_nothing(
    value: float, option: str, name: str, steps_before: int
) -> None:
    params = parameters([100, 33])
    optimizer = SGD([{"params": params[:1]}, {"params": params[1:]}], **MOMENTUM)
    for _ in range(steps_before):
        set_random_grads(params)
        optimizer.step()
    set_random_grads(params)
    optimizer.param_groups[1][option] = value
    refuses(optimizer, params, ValueError, f"Invalid {name}: {value}")


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize(
    "planted, complaint",
    [
        ("shape", r"gradient of shape \[7\] .* parameter of shape \[5\]"),
        ("buffer shape", r"momentum_buffer of shape \[9\] .* gradient of shape \[7\]"),
        ("more elements", r"gradient of shape \[7\] .* parameter of shape \[7, 3\]"),
        ("dtype", "gradient of dtype ComplexFloat .* parameter of dtype Float"),
        ("overlap", "more than one element of the written-to tensor"),
    ],
)
def test_a_step_that_fails_changes_nothing(planted: str, complaint: str, steps_before: int) -> None:
    """What fits no parameter is planted behind torch's back, in the last of several."""
    params = parameters([100, 33, 7])
    optimizer = SGD(params, **MOMENTUM)
    for _ in range(steps_before):
        set_random_grads(params)
        optimizer.step()
    set_random_grads(params)
    if planted == "buffer shape":
        optimizer.state[params[2]]["momentum_buffer"] = torch.zeros(9)
    elif planted == "dtype":
        params[2].grad_dtype = None
        params[2].grad = torch.randn(7, dtype=torch.complex64)
    elif planted == "overlap":
        params[2].data = torch.zeros(1).expand(7)
    else:
        params[2].data = torch.zeros(5 if planted == "shape" else (7, 3))
        optimizer.state.pop(params[2], None)
    refuses(optimizer, params, RuntimeError, complaint)


def test_numbers_too_large_for_the_parameter_change_nothing() -> None:
    """Finite, but not in float32: torch refuses to convert them."""
    params = parameters([100, 33])
    optimizer = SGD([{"params": params[:1]}, {"params": params[1:], "lr": 1e300}], lr=0.1)
    set_random_grads(params)
    complaint = r"hyperparameter of magnitude 1e\+300 overflows a parameter of dtype Float"
    refuses(optimizer, params, RuntimeError, complaint)


def test_compiled_step() -> None:
    params = parameters([100, 33])
    twins = clones(params)
    ours, theirs = SGD(params, **MOMENTUM), NativeSGD(twins, **MOMENTUM)
    compiled = torch.compile(ours.step, backend="eager")
    for _ in range(3):
        set_random_grads(params, twins)
        compiled()
        theirs.step()
    assert_same(ours, theirs)


def test_threads_of_a_program_may_step_their_own() -> None:
    from concurrent.futures import ThreadPoolExecutor

    sets = [parameters([100, 1000, 33]) for _ in range(8)]
    twins = [clones(params) for params in sets]
    ours = [SGD(params, **MOMENTUM) for params in sets]
    theirs = [NativeSGD(params, **MOMENTUM) for params in twins]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for params, twin in zip(sets, twins, strict=True):
                set_random_grads(params, twin)
            list(pool.map(lambda o: o.step(), ours))
            for optimizer in theirs:
                optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b)


# ------------------------------------------------------------------ on CUDA


TABLES = [(1, "4096ul"), (10, "4096ul"), (200, "32760ul"), (2000, "TableOnDevice")]


@pytest.mark.parametrize(("count", "table"), TABLES)
def test_one_launch_for_any_number_of_tensors(
    count: int, table: str, launches: Any, device: str
) -> None:
    """Wherever the list of tensors travels; gradients lie elsewhere in every step."""
    params = parameters([(1 + i % 37,) for i in range(count)], device=device)
    params += parameters([4097, 5], BF16, device) + parameters([4097, 5], F64, device)
    twins = clones(params)
    ours, theirs = SGD(params, **MOMENTUM), NativeSGD(twins, **MOMENTUM)
    grads = []
    for _ in range(3):
        set_random_grads(params, twins)
        grads += [p.grad for p in params]
        with launches() as kernels:
            ours.step()
        theirs.step()
        assert len(kernels) == 1, kernels
        assert "optim::" in kernels[0] and table in kernels[0]
        assert_same(ours, theirs)


@pytest.mark.parametrize("count", [50, 100, 800])
def test_one_launch_for_any_number_of_groups(count: int, launches: Any, device: str) -> None:
    params = parameters([33] * count, device=device)
    twins = clones(params)

    def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [
            {
                "params": p,
                "lr": 0.01 * (1 + i % 7),
                "momentum": 0.3 * (i % 3),
                "maximize": i % 5 < 2,
            }
            for i, p in enumerate(params)
        ]

    ours, theirs = SGD(groups(params)), NativeSGD(groups(twins))
    for _ in range(2):
        set_random_grads(params, twins)
        with launches() as kernels:
            ours.step()
        theirs.step()
        assert len(kernels) == 1, kernels
    assert_same(ours, theirs)


def test_no_launch_without_an_element(launches: Any, device: str) -> None:
    params = parameters([0, (3, 0)], device=device)
    set_random_grads(params)
    optimizer = SGD(params, **MOMENTUM)
    with launches() as kernels:
        optimizer.step()
        SGD(params, lr=0.1).zero_grad()
        optimizer.step()
    assert kernels == []
    assert all(b is not None and b.numel() == 0 for b in buffers(optimizer))


@pytest.mark.level
@pytest.mark.parametrize("unaligned", ["param", "grad", "buffer", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alignment_changes_no_bit(dtype: torch.dtype, unaligned: str, device: str) -> None:
    """One element off a vector's border, in one array or in all of them."""
    for numel in (1, 7, 1023, 1025, 9001):
        aligned = dict(zip(("param", "grad", "buffer"), torch.randn(3, numel), strict=True))
        steps = []
        for shifted in (False, True):
            arrays = {}
            for name, values in aligned.items():
                off = int(shifted and unaligned in (name, "all"))
                arrays[name] = torch.empty(numel + 1, dtype=dtype, device=device)[off:][:numel]
                arrays[name].copy_(values)
            param = nn.Parameter(arrays["param"])
            param.grad = arrays["grad"]
            optimizer = SGD([param], **MOMENTUM)
            optimizer.state[param]["momentum_buffer"] = arrays["buffer"]
            optimizer.step()
            steps.append([param, arrays["buffer"]])
        identical(*steps)


def test_a_failed_launch_names_the_operator(request: pytest.FixtureRequest, on_cuda: bool) -> None:
    """The emulated device has memory of its own, which numpy does not know."""
    if request.config.getoption("--device") != "emulator":
        pytest.skip("needs memory that a kernel cannot reach")
    param = nn.Parameter(torch.from_numpy(np.zeros(7, dtype=np.float32)))
    param.grad = torch.ones(7)
    with pytest.raises(RuntimeError, match=r"SGD\.step failed"):
        SGD([param], lr=0.1).step()


def test_nothing_waits_for_the_device(card: str) -> None:
    lr = torch.tensor(0.1, device=card)
    for count in (10, 1000):
        params = parameters([33] * count, device=card)
        optimizer = SGD(params, lr=lr, momentum=0.9)
        optimizer.grad_scale = torch.tensor(2.0, device=card)
        optimizer.found_inf = torch.tensor(0.0, device=card)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                set_random_grads(params)
                optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("count", [10, 200, 2000])
def test_a_captured_step_replays_on_new_numbers(count: int, card: str) -> None:
    """Gradients, the learning rate, the scale and the flag, all changed in place."""
    params = parameters([(1 + i % 37,) for i in range(count)], device=card)
    twins = clones(params)
    lr, scale, found_inf = torch.tensor([0.1, 1.0, 0.0], device=card).unbind()
    ours, theirs = SGD(params, lr=lr, momentum=0.9), SGD(twins, lr=0.1, momentum=0.9)
    ours.grad_scale, ours.found_inf = scale, found_inf
    set_random_grads(params, twins)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ours.step()
    torch.cuda.current_stream().wait_stream(stream)
    theirs.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()
    for new_lr, new_scale, overflow in [(0.2, 4.0, 0.0), (0.3, 1.0, 1.0), (0.4, 2.0, 0.0)]:
        for p, q in zip(params, twins, strict=True):
            assert p.grad is not None
            p.grad.normal_()
            q.grad = p.grad / new_scale
        for number, value in zip(
            (lr, scale, found_inf), (new_lr, new_scale, overflow), strict=True
        ):
            number.fill_(value)
        theirs.param_groups[0]["lr"] = lr.item()
        graph.replay()
        if not overflow:
            theirs.step()
        identical(params, twins)


def test_a_step_runs_on_the_current_stream(card: str) -> None:
    params = parameters([100003, 33], device=card)
    twins = clones(params)
    ours, theirs = SGD(params, **MOMENTUM), SGD(twins, **MOMENTUM)
    for _ in range(20):
        set_random_grads(params, twins)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000)
            for p in params:
                assert p.grad is not None
                p.grad.mul_(2)
            ours.step()
        torch.cuda.current_stream().wait_stream(stream)
        for q in twins:
            assert q.grad is not None
            q.grad.mul_(2)
        theirs.step()
    identical(params, twins)


def test_more_elements_than_32_bits_count(card: str) -> None:
    param = nn.Parameter(torch.zeros(2**31 + 4099, dtype=BF16, device=card))
    param.grad = torch.ones_like(param)
    SGD([param], lr=0.5).step()
    assert (param == -0.5).all()


def test_devices_with_one_optimizer(card: str) -> None:
    """Parameters on a card and on the CPU, with GradScaler's numbers on the card."""
    params = parameters([100], device=card) + parameters([33], device="cpu")
    twins = clones(params)
    ours, theirs = SGD(params, **MOMENTUM), NativeSGD(twins, **MOMENTUM)
    for overflow in (1.0, 0.0, 1.0, 0.0):
        set_random_grads(params, twins)
        for p in params:
            assert p.grad is not None
            p.grad.mul_(8)
        ours.grad_scale = torch.tensor(8.0, device=card)
        ours.found_inf = torch.tensor(overflow, device=card)
        ours.step()
        if not overflow:
            theirs.step()
        assert_same(ours, theirs)
