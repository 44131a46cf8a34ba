"""The table of optimizers over which the tests of all of them run, and what these tests share."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import fusedstep
import reference
from numerics import BF16, F16, F32, identical

State = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """An optimizer; its class has the name of its rule in csrc/optim/rules.h.

    `exact` is one step in float64: of a parameter, its gradient and the state that it had before,
    which is empty on its first step, and with the options of the parameter's group. It returns the
    new parameter and the new state. `options` has each combination that the kernels tell apart, the
    first one with the least state; `usual` is one of them, with all states.
    """

    ours: Callable[..., Any]
    torchs: type[torch.optim.Optimizer]
    exact: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    options: Sequence[dict[str, Any]]
    usual: dict[str, Any]
    states: tuple[str, ...]  # the keys of what torch's class keeps of a parameter
    lr: float = 0.1

    @property
    def name(self) -> str:
        return self.torchs.__name__

    @property
    def few(self) -> list[dict[str, Any]]:
        """Where all combinations would take too long."""
        return [self.options[0], self.usual]

    @property
    def is_in_torch(self) -> bool:
        return getattr(torch.optim, self.name, None) is self.torchs

    def make(self, params: Any, **options: Any) -> Any:
        """Ours, with the row's learning rate."""
        return self.ours(params, **{"lr": self.lr, **options})

    def native(self, params: Any, **options: Any) -> Any:
        """Torch's for-loop: its fused implementations are not right for all layouts on the CPU."""
        return self.torchs(params, **{"lr": self.lr, "foreach": False, **options})

    def state_of(self, optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, Any]:
        """What torch's class would keep of a parameter; without what ours adds to it."""
        state = optimizer.state.get(param, {})
        return {key: state[key] for key in self.states if state.get(key) is not None}


def _sgd(
    param: Tensor, grad: Tensor, state: State, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    param, buffer = reference.sgd_step(param, grad, state.get("momentum_buffer"), **options)
    return param, {} if buffer is None else {"momentum_buffer": buffer}


ROWS = [
    Row(
        ours=fusedstep.SGD,
        torchs=torch.optim.SGD,
        exact=_sgd,
        options=[
            {
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "maximize": maximize,
            }
            for momentum, dampening, weight_decay, nesterov, maximize in itertools.product(
                (0, 0.9), (0, 0.5), (0, 0.01), (False, True), (False, True)
            )
            if not nesterov or (momentum > 0 and dampening == 0)
        ],
        usual={"momentum": 0.9, "weight_decay": 0.01},
        states=("momentum_buffer",),
    ),
]
BY_NAME = {row.name: row for row in ROWS}


# ------------------------------------------------------------------ parameters and gradients

# Either side of 4, 8, 16 and 32 lanes, of the blocks of torch's kernels, of chunks and of threads.
SIZES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 100, 1000, 4097, 100003)


def name_of(options: dict[str, Any]) -> str:
    return "-".join(f"{k}={v}" for k, v in options.items() if v) or "plain"


def parameters(
    shapes: Iterable[Any], dtype: torch.dtype = F32, device: str | None = None
) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in shapes]


def clones(params: Sequence[Tensor]) -> list[nn.Parameter]:
    """The same values in the same layout, in memory of their own."""
    return [nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in params]


def in_float32(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().float()) for p in params]


def set_random_grads(*copies: Sequence[Tensor]) -> None:
    """The same gradients for each copy of the parameters, in memory of its own each."""
    for same in zip(*copies, strict=True):
        grad = torch.randn_like(same[0])
        for p in same:
            p.grad = grad.clone()


def set_random_halves(params: list[nn.Parameter], twins: list[nn.Parameter]) -> None:
    """16-bit gradients, and the same numbers in float32."""
    set_random_grads(params)
    for p, q in zip(params, twins, strict=True):
        assert p.grad is not None
        q.grad = p.grad.float()


def step_both(ours: Any, theirs: Any, steps: int = 1) -> None:
    """Both optimizers on the same fresh gradients."""
    for _ in range(steps):
        copies = [[p for g in o.param_groups for p in g["params"]] for o in (ours, theirs)]
        set_random_grads(*copies)
        ours.step()
        theirs.step()


# ------------------------------------------------------------------ comparing


def assert_same(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    """The same parameters and state, within a few roundings."""
    for our_group, their_group in zip(ours.param_groups, theirs.param_groups, strict=True):
        for p, q in zip(our_group["params"], their_group["params"], strict=True):
            assert_near(p, q)
            mine, other = ours.state.get(p, {}), theirs.state.get(q, {})
            for key in {*mine, *other}:
                values = [mine.get(key), other.get(key)]
                assert (values[0] is None) == (values[1] is None), key
                if values[0] is not None:
                    assert_near(*map(torch.as_tensor, values))


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Torch rounds 16-bit values after each operation, so that small results of large terms are
    right only to the scale of the terms."""
    actual, expected = actual.detach(), expected.detach()
    if expected.dtype not in (BF16, F16):
        torch.testing.assert_close(actual, expected, equal_nan=True)
    else:
        eps = 4 * torch.finfo(expected.dtype).eps
        scale = expected.abs().max().item() if expected.numel() else 0.0
        torch.testing.assert_close(actual, expected, rtol=eps, atol=eps * scale)


def refuses(
    optimizer: torch.optim.Optimizer,
    params: Sequence[Tensor],
    error: type[Exception],
    subject: str,
) -> None:
    """The step raises, and leaves parameters, gradients and state as they were."""
    kept = [p.detach().clone() for p in params]
    grads = [p.grad if p.grad is None else p.grad.clone() for p in params]
    state = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(error, match=subject):
        optimizer.step()
    identical([p.detach() for p in params], kept)
    for p, grad in zip(params, grads, strict=True):
        assert (p.grad is None) == (grad is None)
        if grad is not None:
            identical(p.grad, grad)
    now = optimizer.state_dict()["state"]
    assert now.keys() == state.keys()
    identical(now, state)


# ------------------------------------------------------------------ ways to use an optimizer


def through_a_file(value: Any, *, weights_only: bool = True) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "deepcopy": copy.deepcopy,
    "saved": partial(through_a_file, weights_only=False),
}


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda v: v.contiguous(),
    "channels_last": lambda v: v.contiguous(memory_format=torch.channels_last),
    "transposed": lambda v: v.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "strided": lambda v: torch.stack([v, v], -1)[..., 0],
}


CANARY = 12345.0


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "every other element": lambda b: b[64 : 64 + 2000 : 2],
    "a column": lambda b: b[: 50 * 60].view(50, 60)[:, 7],
    "a block": lambda b: b[: 50 * 60].view(50, 60)[5:45, 9:33],
    "a transposed block": lambda b: b[: 50 * 60].view(50, 60)[5:45, 9:33].T,
    "an unaligned run": lambda b: b[65:1066],
    "an unaligned matrix": lambda b: b[3 : 3 + 40 * 51].view(40, 51),
    "one element": lambda b: b[1001:1002],
}


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=8),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.3, step_size_up=3),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
}


def scaled_training(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    batches: list[Tensor],
    overflow_at: set[int],
    clip: float | None = None,
) -> list[float]:
    """The documented GradScaler loop; batches at `overflow_at` make infinite gradients."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    scales = []
    for i, batch in enumerate(batches):
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        scaler.scale(loss * (math.inf if i in overflow_at else 1)).backward()
        if clip is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


def network(dtype: torch.dtype = F32) -> nn.Sequential:
    layers = [nn.Linear(17, 101), nn.Tanh(), nn.Linear(101, 101), nn.Tanh(), nn.Linear(101, 9)]
    return nn.Sequential(*layers).to(dtype)


def pair(dtype: torch.dtype = F32) -> tuple[nn.Sequential, nn.Sequential]:
    one = network(dtype)
    return one, copy.deepcopy(one)
