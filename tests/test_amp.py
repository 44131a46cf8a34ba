"""Automatic mixed precision: autocast around the losses, GradScaler around the optimizer.

The protocol is torch's, with torch's own classes on the other side of each comparison. What a loss
rounds to under autocast is tested beside each loss.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fusedstep
from numerics import BF16, F16, F32, identical, peak_memory

NativeSGD = partial(torch.optim.SGD, foreach=False)
MOMENTUM: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
CLASSES = 10


# ------------------------------------------------------------------ autocast

TARGETS: dict[str, Callable[[Tensor], Tensor]] = {
    "CrossEntropyLoss": lambda x: torch.randint(x.shape[1], x.shape[:1], device=x.device),
    "L1Loss": lambda x: torch.randn(x.shape, device=x.device),
    "MSELoss": lambda x: torch.randn(x.shape, device=x.device),
    "SmoothL1Loss": lambda x: torch.randn(x.shape, device=x.device),
    "HuberLoss": lambda x: torch.randn(x.shape, device=x.device),
    "BCEWithLogitsLoss": lambda x: torch.rand(x.shape, device=x.device),
}


def peak(device: str, work: Callable[[], Any]) -> int:
    """The most bytes that were allocated at once, counted from the start of the work."""
    if device == "cpu":
        return peak_memory(work)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = work()
    assert kept is not None
    return torch.cuda.max_memory_allocated() - before


def test_every_loss_that_torch_has_is_in_the_table() -> None:
    assert set(TARGETS) == {name for name in fusedstep.nn.__all__ if hasattr(nn, name)}


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("name", TARGETS)
def test_a_loss_holds_no_wider_copy_of_its_input(
    name: str, dtype: torch.dtype, device: str, request: pytest.FixtureRequest
) -> None:
    """Under autocast, memory for the gradient, a few numbers for each row, and no float32 copy."""
    if request.config.getoption("--device") == "emulator":
        pytest.skip("the emulator's device shares memory with the host's bookkeeping")
    x = torch.randn(256, 1000, device=device).to(dtype)
    t = TARGETS[name](x)
    criterion = getattr(fusedstep, name)()

    def loss_and_grad() -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        with torch.autocast(device, dtype=dtype):
            loss = criterion(leaf, t)
        loss.backward(torch.full_like(loss, 3.0))
        assert leaf.grad is not None
        return loss.detach(), leaf.grad

    loss, grad = loss_and_grad()
    assert (loss.dtype, grad.dtype) == (F32, dtype)
    few = 64 * x.shape[0] + (1 << 16)
    assert few < x.nbytes / 4  # so that a copy, of half the width even, would show
    assert x.nbytes <= peak(device, loss_and_grad) <= x.nbytes + few


@pytest.mark.parametrize("name", TARGETS)
def test_no_operator_widens_the_input(name: str, device: str) -> None:
    class Casts(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.shapes: list[torch.Size] = []

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten._to_copy.default:
                self.shapes.append(args[0].shape)
            return func(*args, **(kwargs or {}))

    found = []
    for library in (fusedstep, nn):
        x = torch.randn(9, CLASSES, device=device).to(BF16).requires_grad_()
        t = TARGETS[name](x)
        with Casts() as casts:
            with torch.autocast(device, dtype=BF16):
                loss = getattr(library, name)()(x, t)
            loss.backward()
        found.append(x.shape in casts.shapes)
    assert found == [False, True]


# ------------------------------------------------------------------ GradScaler

# Which steps overflow.
OVERFLOWS = {
    "never": set(),
    "first": {0},
    "middle": {4},
    "last": {7},
    "first three": {0, 1, 2},
    "three in a row": {3, 4, 5},
    "all but one": {0, 1, 2, 4, 5, 6, 7},
}


@dataclass
class Task:
    """A network with a head that may have an optimizer of its own, and batches for it."""

    body: nn.Module
    head: nn.Module
    batches: list[tuple[Tensor, Tensor]]

    @classmethod
    def draw(cls, device: str) -> Task:
        body = nn.Sequential(nn.Linear(17, 100), nn.Tanh()).to(device)
        head = nn.Linear(100, CLASSES).to(device)
        batches = [
            (torch.randn(9, 17, device=device), torch.randint(CLASSES, (9,), device=device))
            for _ in range(8)
        ]
        return cls(body, head, batches)

    def copy(self) -> Task:
        return Task(copy.deepcopy(self.body), copy.deepcopy(self.head), self.batches)

    def parameters(self) -> list[nn.Parameter]:
        return [*self.body.parameters(), *self.head.parameters()]


@dataclass
class Run:
    """What is left after training."""

    parameters: list[Tensor]
    losses: list[Tensor]
    scales: list[float] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)


def train(
    task: Task,
    sgd: Callable[..., torch.optim.Optimizer],
    overflow_at: set[int],
    *,
    criterion: nn.Module,
    separate: bool = False,
    clip: float | None = None,
    spoiled: str = "both",
    spoil: float = math.inf,
    autocast: torch.dtype | None = None,
    accumulate: int = 1,
    options: dict[str, Any] = MOMENTUM,
    init_scale: float = 2.0**10,
) -> Run:
    """The loop of torch's documentation. Steps in overflow_at meet gradients that are not finite,
    in the body, in the head or in both."""
    task = task.copy()
    device = task.parameters()[0].device.type
    if separate:
        optimizers = [sgd(m.parameters(), **options) for m in (task.body, task.head)]
    else:
        optimizers = [sgd(task.parameters(), **options)]
    scaler = torch.amp.GradScaler(device, init_scale=init_scale, growth_interval=3)
    run = Run(task.parameters(), [])
    for i, (x, t) in enumerate(task.batches):
        with torch.autocast(device, dtype=autocast or BF16, enabled=autocast is not None):
            loss = criterion(task.head(task.body(x)), t) / accumulate
        scaler.scale(loss).backward()
        run.losses.append(loss.detach())
        if i in overflow_at:
            modules = {"body": [task.body], "head": [task.head], "both": [task.body, task.head]}
            for module in modules[spoiled]:
                (first, *_) = module.parameters()
                assert first.grad is not None
                first.grad.view(-1)[-1] = spoil
        if (i + 1) % accumulate:
            continue
        for optimizer in optimizers:
            if clip is not None:
                scaler.unscale_(optimizer)
                params = optimizer.param_groups[0]["params"]
                run.norms.append(nn.utils.clip_grad_norm_(params, clip))
            scaler.step(optimizer)
        scaler.update()
        run.scales.append(scaler.get_scale())
        for optimizer in optimizers:
            optimizer.zero_grad()
    run.states = [optimizer.state_dict() for optimizer in optimizers]
    return run


def both(task: Task, overflow_at: set[int], **how: Any) -> tuple[Run, Run]:
    """Our SGD and torch's, with one loss, so that their gradients are the same."""
    how.setdefault("criterion", fusedstep.CrossEntropyLoss())
    return (
        train(task, fusedstep.SGD, overflow_at, **how),
        train(task, NativeSGD, overflow_at, **how),
    )


def assert_same(ours: Run, theirs: Run) -> None:
    """To the bit: a scale is a power of two, and dividing by it is exact."""
    assert ours.scales == theirs.scales
    identical(ours.losses, theirs.losses)
    identical(ours.norms, theirs.norms)
    identical(ours.parameters, theirs.parameters)
    assert all(torch.isfinite(p).all() for p in ours.parameters)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_steps_that_overflow(
    overflow: str, clip: float | None, fused: bool | None, device: str
) -> None:
    """With fused=True the step is given the scale and the flag."""
    how: dict[str, Any] = {"criterion": fusedstep.CrossEntropyLoss(), "clip": clip}
    task, overflow_at = Task.draw(device), OVERFLOWS[overflow]
    ours = train(task, fusedstep.SGD, overflow_at, options={**MOMENTUM, "fused": fused}, **how)
    theirs = train(task, NativeSGD, overflow_at, **how)
    assert_same(ours, theirs)
    if overflow == "first":
        assert ours.scales[0] == 512.0
    elif overflow == "never":
        assert ours.scales[-1] > 1024.0


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.1},
        {**MOMENTUM, "nesterov": True},
        {**MOMENTUM, "dampening": 0.5},
        {**MOMENTUM, "maximize": True},
        {**MOMENTUM, "fused": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("overflow", ["first three", "three in a row"])
def test_options_of_the_optimizer(overflow: str, options: dict[str, Any], device: str) -> None:
    """Dampening tells a first step from the others: a step that overflowed was none."""
    task, loss = Task.draw(device), fusedstep.CrossEntropyLoss()
    ours = train(task, fusedstep.SGD, OVERFLOWS[overflow], criterion=loss, options=options)
    options = {**options, "fused": None}
    theirs = train(task, NativeSGD, OVERFLOWS[overflow], criterion=loss, options=options)
    assert_same(ours, theirs)


@pytest.mark.parametrize("spoil", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("spoiled", ["body", "head", "both"])
def test_several_optimizers(spoiled: str, spoil: float, device: str) -> None:
    """An optimizer whose own gradients are finite takes its step; the scale is everybody's."""
    task = Task.draw(device)
    for overflow in ("first", "three in a row"):
        for clip in (None, 0.05):
            how: dict[str, Any] = {"separate": True, "spoiled": spoiled, "spoil": spoil}
            ours, theirs = both(task, OVERFLOWS[overflow], clip=clip, **how)
            assert ours.scales == theirs.scales
            identical(ours.parameters, theirs.parameters)
            identical(ours.norms, theirs.norms)


def test_our_optimizer_beside_another(device: str) -> None:
    """One scaler, our SGD for the body and torch's Adam for the head."""
    task, runs = Task.draw(device), []
    for sgd in (fusedstep.SGD, NativeSGD):
        made: list[torch.optim.Optimizer] = []

        def make(params: Any, sgd: Any = sgd, made: Any = made, **options: Any) -> Any:
            made.append(torch.optim.Adam(params) if made else sgd(params, **options))
            return made[-1]

        runs.append(
            train(
                task,
                make,
                {0, 3, 4},
                criterion=fusedstep.CrossEntropyLoss(),
                separate=True,
                spoiled="body",
            )
        )
    assert_same(*runs)


def test_accumulated_gradients(device: str) -> None:
    """An overflow in a batch that no step follows at once."""
    for overflow_at in ({0}, {1, 4}):
        assert_same(*both(Task.draw(device), overflow_at, accumulate=2))


def test_a_scale_that_is_no_power_of_two(device: str) -> None:
    """Torch multiplies by the rounded inverse, we divide: a rounding apart."""
    ours, theirs = both(Task.draw(device), {2}, init_scale=1000.0)
    assert ours.scales == theirs.scales
    torch.testing.assert_close(ours.parameters, theirs.parameters)


def test_checkpoints_of_a_scaled_training_move_both_ways(device: str) -> None:
    for overflow_at in (set(), {0}, {4}):
        runs = both(Task.draw(device), overflow_at)
        params = [[nn.Parameter(p.detach().clone()) for p in run.parameters] for run in runs]
        grads = [torch.randn_like(p) for p in params[0]]
        for run, of_run, sgd in zip(runs, params, (NativeSGD, fusedstep.SGD), strict=True):
            optimizer = sgd(of_run, lr=0.5)
            optimizer.load_state_dict(run.states[0])
            for p, grad in zip(of_run, grads, strict=True):
                p.grad = grad.clone()
            optimizer.step()
        identical(*params)


def test_sparse_gradients(device: str) -> None:
    """Torch's own step takes them, unscaled, in the same call."""
    results = []
    start = nn.Embedding(50, 17, sparse=True, device=device)
    linear = nn.Linear(17, CLASSES, device=device)
    tokens, t = (
        torch.randint(50, (8, 9), device=device),
        torch.randint(CLASSES, (9,), device=device),
    )
    for sgd in (fusedstep.SGD, NativeSGD):
        net = nn.Sequential(copy.deepcopy(start), copy.deepcopy(linear))
        optimizer = sgd(net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(device, init_scale=1024.0)
        for i in range(8):
            optimizer.zero_grad()
            loss = fusedstep.CrossEntropyLoss()(net(tokens[i]), t)
            scaler.scale(loss * (math.inf if i in (0, 3) else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append([p.detach() for p in net.parameters()])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("overflow", ["first", "three in a row"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_autocast_and_scaler_together(dtype: torch.dtype, overflow: str, device: str) -> None:
    """Everything ours against everything torch's; and our update against torch's, to the bit."""
    task, overflow_at = Task.draw(device), OVERFLOWS[overflow]
    assert_same(*both(task, overflow_at, autocast=dtype, clip=1.0))
    ours = train(
        task, fusedstep.SGD, overflow_at, criterion=fusedstep.CrossEntropyLoss(), autocast=dtype
    )
    native = train(task, NativeSGD, overflow_at, criterion=nn.CrossEntropyLoss(), autocast=dtype)
    assert ours.scales == native.scales
    # A 16-bit gradient may be rounded to either neighbour: at most 2e-5 of a weight was seen.
    torch.testing.assert_close(ours.losses, native.losses, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.parameters, native.parameters, rtol=0.0, atol=1e-4)


class Clipping(fusedstep.SGD):
    """Has a step around ours that looks like it."""

    @functools.wraps(fusedstep.SGD.step)
    def step(self, closure: Any = None) -> Any:
        nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 1.0)
        return super().step(closure)


class NativeClipping(torch.optim.SGD):
    @functools.wraps(torch.optim.SGD.step)
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 1.0)
        return super().step(closure)


def clipping_by_hook(sgd: Callable[..., torch.optim.Optimizer], params: Any, **options: Any) -> Any:
    def clip(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)

    optimizer = sgd(params, **options)
    optimizer.register_step_pre_hook(clip)
    return optimizer


@pytest.mark.parametrize("by", ["hook", "subclass"])
def test_what_surrounds_a_step_meets_gradients_without_the_scale(by: str, device: str) -> None:
    """And is left out with a step that overflowed, as with torch's SGD unless it is fused."""
    task, loss = Task.draw(device), fusedstep.CrossEntropyLoss()
    if by == "hook":
        pair = tuple(partial(clipping_by_hook, sgd) for sgd in (fusedstep.SGD, NativeSGD))
    else:
        pair = (Clipping, partial(NativeClipping, foreach=False))
    assert_same(*(train(task, sgd, {0, 3}, criterion=loss) for sgd in pair))


@pytest.mark.parametrize("fused", [None, False, True])
def test_who_unscales_is_what_torch_says(fused: bool | None) -> None:
    """GradScaler, its subclasses and the libraries around them look at this attribute."""
    params = [nn.Parameter(torch.ones(3))]
    ours, theirs = (
        getattr(sgd(params, lr=0.1, fused=fused), "_step_supports_amp_scaling", False)
        for sgd in (fusedstep.SGD, torch.optim.SGD)
    )
    assert ours == theirs == bool(fused)


def test_a_disabled_scaler_is_not_there(device: str) -> None:
    results = []
    for sgd in (fusedstep.SGD, NativeSGD):
        (p,) = params = [nn.Parameter(torch.ones(100, device=device))]
        optimizer = sgd(params, **MOMENTUM)
        scaler = torch.amp.GradScaler(device, enabled=False)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(p.square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(p.detach())
    identical(*results)


def test_a_closure_is_refused_as_by_torch(device: str) -> None:
    for sgd in (fusedstep.SGD, NativeSGD):
        p = nn.Parameter(torch.ones(100, device=device))
        optimizer = sgd([p], lr=0.1)
        scaler = torch.amp.GradScaler(device)
        scaler.scale(p.sum()).backward()
        with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
            scaler.step(optimizer, closure=lambda: None)
