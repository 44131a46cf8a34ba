"""What the tests of losses and optimizers share: dtypes, memory layouts, measures of error."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, F64, BF16, F16)
REDUCTIONS = ("none", "mean", "sum")
identical = partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """Fill what torch allocates uninitialised with NaN, so that an unwritten output shows.

    The public switch, torch.use_deterministic_algorithms, imports the compiler first: seconds.
    """
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    yield
    torch._C._set_deterministic_algorithms(False)


def fail_in_backward(loss: Tensor, grad_output: Tensor) -> None:
    """Run backward with a hook on the loss's node that raises; the hook is removed afterwards."""

    def fail(*_: Any) -> None:
        raise KeyError

    assert loss.grad_fn is not None
    hook = loss.grad_fn.register_hook(fail)
    with pytest.raises(KeyError):
        loss.backward(grad_output)
    hook.remove()


def place(
    values: Tensor,
    order: Sequence[int] | None = None,
    steps: Mapping[int, int] | None = None,
    offset: int = 0,
) -> Tensor:
    """The values in a buffer of their own: dimensions in `order` from outermost to innermost,
    every `steps[dim]`-th element used, `offset` elements in front. The rest is garbage that shows
    when it is read (NaN, or a class out of range)."""
    strides, extent = [0] * values.dim(), 1
    for dim in reversed(order if order is not None else range(values.dim())):
        strides[dim] = extent * (steps or {}).get(dim, 1)
        extent = strides[dim] * max(values.shape[dim], 1)
    garbage = math.nan if values.is_floating_point() else torch.iinfo(values.dtype).max
    buffer = torch.full((offset + extent + 1,), garbage, dtype=values.dtype, device=values.device)
    return buffer.as_strided(values.shape, strides, offset).copy_(values)


def whole_storage(tensor: Tensor) -> Tensor:
    """Every byte of the buffer behind a view."""
    return torch.tensor([], dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


# float64 is computed in float64, all else in float32; 16-bit results are rounded once, at the end.
COMPUTE = {F64: F64, F32: F32, BF16: F32, F16: F32}


def slack(dtype: torch.dtype) -> float:
    """How far beyond torch's error ours may lie, relative to the scale of the terms.

    Torch happens to be exact on some inputs, where any other order of operations is not. Four
    units in the last place of the arithmetic pay for an exp within one unit and three further
    roundings (shift, product, quotient); the reference itself is that inexact for float64, which
    doubles them. Storing 16 bits costs half a unit of the storage.
    """
    compute = torch.finfo(COMPUTE[dtype]).eps * (8 if dtype is F64 else 4)
    return compute + (0.5 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0)


def smallest_step(dtype: torch.dtype) -> float:
    """Below this, results may vanish: half of float16's spacing near zero, which gradients do
    reach; elsewhere the smallest normal number, since exponentials may flush what is under it."""
    info = torch.finfo(dtype)
    return 0.5 * info.smallest_normal * info.eps if dtype is F16 else info.smallest_normal


def error(
    actual: Tensor, expected: Tensor, scale: Tensor, dtype: torch.dtype, factor: float = 1.0
) -> float:
    """The largest error, in multiples of the scale; infinite where only one side is finite. What
    may vanish is multiplied by a factor, if that is greater than 1."""
    if actual.shape != expected.shape:
        return math.inf
    actual = actual.double()
    agree = (actual == expected) | (actual.isnan() & expected.isnan())
    vanishing = max(factor, 1.0) * smallest_step(dtype)
    excess = ((actual - expected).abs() - vanishing).clamp(min=0) / scale
    excess = torch.where(agree | (excess == 0), 0.0, excess).nan_to_num(math.inf)
    return excess.max().item() if excess.numel() else 0.0


def saturated(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Infinite where the dtype cannot hold the value."""
    stored = values.to(dtype)
    return torch.where(stored.isinf(), stored.to(values.dtype), values)


def assert_accurate(
    name: str,
    ours: Tensor,
    peers: Sequence[Tensor],
    truth: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    *,
    factor: float = 1.0,
    more_slack: float = 0.0,
) -> None:
    """Ours is wrong by no more than the best of torch's, and the slack."""
    truth = saturated(truth, dtype)
    best = min(error(saturated(p, dtype), truth, scale, dtype, factor) for p in peers)
    limit = best + slack(dtype) + more_slack
    actual = error(ours, truth, scale, dtype, factor)
    assert actual <= limit, f"{name} is wrong by {actual:.3g}, torch by {limit:.3g}"


def pairwise(axes: Mapping[str, Sequence[Any]], seed: int) -> list[dict[str, Any]]:
    """Rows in which every value of every axis meets every value of every other axis."""

    def pairs(row: dict[str, Any]) -> set[Any]:
        return set(itertools.combinations(row.items(), 2))

    rng = random.Random(seed)
    names = list(axes)
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(axes[a], axes[b])
    }
    rows = []
    while missing:
        forced = dict(rng.choice(sorted(missing, key=repr)))
        candidates = [
            {name: forced.get(name, rng.choice(axes[name])) for name in names} for _ in range(30)
        ]

        best = max(candidates, key=lambda row: len(missing & pairs(row)))
        missing -= pairs(best)
        rows.append(best)
    return rows


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "grad and value": lambda f, x: torch.func.grad_and_value(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.tensor(0.7, dtype=x.dtype)),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),)),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, x.sin(), x.cos()])),
    "vmap in the middle": lambda f, x: torch.func.vmap(f, in_dims=1)(torch.stack([x, x.sin()], 1)),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, x.sin()])),
    "grad of grad": lambda f, x: torch.func.grad(lambda y: torch.func.grad(f)(y).square().sum())(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "linearize": lambda f, x: torch.func.linearize(f, x)[1](x.cos()),
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
    "old jacobian": lambda f, x: torch.autograd.functional.jacobian(f, x),
    "old hessian": lambda f, x: torch.autograd.functional.hessian(f, x),
}


def peak_memory(work: Callable[[], Any]) -> int:
    """The most bytes that were allocated at once, counted from the start of the work."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = work()
    events = profile.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    assert changes and kept is not None
    return max(itertools.accumulate(changes))


class Logged(Tensor):
    """A tensor subclass that notes which public functions it passes through."""

    seen: ClassVar[list[Any]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


class FunctionsSeen(TorchFunctionMode):
    """Notes which public functions are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class OperatorsSeen(TorchDispatchMode):
    """Notes which operators reach the kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def detached(value: Any) -> Any:
    """A tensor without its history; anything else as it is."""
    return value.detach() if isinstance(value, Tensor) else value


def widened(value: Any) -> Any:
    """A tensor of floats without its history, in float64; anything else as it is."""
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().double() if is_float else value


REDUCTION_CODE = {"none": 0, "mean": 1, "sum": 2}
