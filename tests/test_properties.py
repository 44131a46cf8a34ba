"""Properties that hold for every input, tried on inputs that hypothesis makes up.

`make test` tries the same few inputs each time; `make properties` tries new ones for a given time
and says how many. A failure shows the smallest input that hypothesis can find for it.

Every tensor lies in a buffer of its own, full of poison. After the call every byte of an input, and
every byte of a buffer around its tensor, must be unchanged. Strides are whatever torch allows:
permuted, stepped, zero, overlapping; not negative ones, which torch has not (`flip` copies).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn

import test_cross_entropy as cross_entropy
import test_pointwise_loss as pointwise_loss
from fusedstep import SGD
from numerics import COMPUTE, DTYPES, F64, REDUCTIONS, poisoned_outputs, whole_storage  # noqa: F401
from test_pointwise_loss import LOSSES

NativeSGD = partial(torch.optim.SGD, foreach=False)  # torch's fused SGD is not right on the CPU
Shape = tuple[int, ...]

EVER = settings(
    deadline=None,
    database=None,
    print_blob=True,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
    stateful_step_count=40,
)


class Explorer:
    """Tries a property on a fixed set of examples, or on new ones for as long as is asked for."""

    def __init__(self, seconds: float, share: float) -> None:
        self.seconds = seconds
        self.share = share
        self.tried = 0

    def __call__(self, attempt: Callable[[settings], Any], examples: int) -> None:
        if not self.seconds:
            attempt(settings(EVER, max_examples=int(examples * self.share), derandomize=True))
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            attempt(settings(EVER, max_examples=examples))


@pytest.fixture
def explore(
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
) -> Any:
    is_slow = request.config.getoption("--device") == "emulator"
    explorer = Explorer(request.config.getoption("--explore"), share=0.2 if is_slow else 1)
    yield explorer
    assert explorer.tried > 0
    record_property("examples", explorer.tried)
    if explorer.seconds:
        with capsys.disabled():
            print(f"\n{request.node.name}: {explorer.tried} examples")


# ------------------------------------------------------------------ tensors

SIZES = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 127, 129, 257, 511, 1025, 4097)
SPECIAL = (math.nan, math.inf, 3e38, 65504.0, 1e4, 88.8, 1.0, 1e-6, 6e-8, 1e-40, 0.0)
SPECIAL = (*SPECIAL, *(-value for value in SPECIAL))


@dataclass(frozen=True)
class Numbers:
    """A tensor by what it is made from: normal numbers times `spread`, or special ones where they
    are `planted`, at `strides` and `offset` of a buffer that else holds poison."""

    shape: Shape
    strides: Shape
    offset: int
    seed: int
    spread: float = 1.0
    planted: tuple[tuple[int, float], ...] = ()

    def values(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        values = torch.randn(self.shape, generator=generator, dtype=F64, device="cpu") * self.spread
        for where, value in self.planted if values.numel() else ():
            values.view(-1)[where % values.numel()] = value
        return values

    def tensor(self, dtype: torch.dtype, device: str) -> Tensor:
        return self.place(self.values().to(dtype).to(device))

    def place(self, values: Tensor) -> Tensor:
        return carve(values, self.strides, self.offset)


def carve(values: Tensor, strides: Sequence[int], offset: int) -> Tensor:
    """The values at these strides in a buffer of poison, with some before and behind them; of
    elements that share a place one stays."""
    extent = 1 + sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True))
    size = GUARD + offset + max(extent, 0) + GUARD
    poison = math.nan if values.is_floating_point() else torch.iinfo(values.dtype).max
    buffer = torch.full((size,), poison, dtype=values.dtype, device=values.device)
    where = torch.arange(size, device=values.device)
    where = where.as_strided(values.shape, strides, GUARD + offset)
    buffer[where.reshape(-1)] = values.reshape(-1)
    return buffer.as_strided(values.shape, strides, GUARD + offset)


GUARD = 70


def shapes(dims: int, largest: int, least: int = 1) -> st.SearchStrategy[Shape]:
    @st.composite
    def strategy(draw: st.DrawFn) -> Shape:
        shape: Shape = ()
        for _ in range(dims):
            room = largest // max(math.prod(shape), 1)
            allowed = [size for size in (0, *SIZES) if least <= size <= max(room, 1)]
            shape = (*shape, draw(st.sampled_from(allowed)))
        return tuple(draw(st.permutations(shape)))

    return strategy()


def strides(shape: Shape, overlapping: bool) -> st.SearchStrategy[Shape]:
    """Dimensions in any order in memory, some with holes; where `overlapping`, anything."""

    @st.composite
    def strategy(draw: st.DrawFn) -> Shape:
        kinds = ("dense", "permuted", "stepped", "expanded", "any")
        kind = draw(st.sampled_from(kinds if overlapping else kinds[:3]))
        if kind == "any":
            return tuple(draw(st.integers(0, 40)) for _ in shape)
        order = draw(st.permutations(range(len(shape)))) if kind != "dense" else range(len(shape))
        result, extent = [0] * len(shape), 1
        for dim in reversed(order):
            step = draw(st.sampled_from((1, 1, 2, 3))) if kind == "stepped" else 1
            result[dim] = extent * step
            extent = result[dim] * max(shape[dim], 1)
        if kind == "expanded":
            result = [draw(st.sampled_from((0, stride))) for stride in result]
        return tuple(result)

    return strategy()


@st.composite
def numbers(
    draw: st.DrawFn, shape: Shape, *, overlapping: bool = True, special: bool = False
) -> Numbers:
    one = st.tuples(st.integers(0, 10**6), st.sampled_from(SPECIAL))
    return Numbers(
        shape,
        draw(strides(shape, overlapping)),
        draw(st.integers(0, 17)),
        draw(st.integers(0, 2**32 - 1)),
        draw(st.sampled_from((3.0, 1.0, 0.01, 30.0))),
        tuple(draw(st.lists(one, min_size=1, max_size=4))) if special else (),
    )


# ------------------------------------------------------------------ cross-entropy


@dataclass(frozen=True)
class CrossEntropyCall:
    dtype: torch.dtype
    logits: Numbers
    target_kind: str
    target: Numbers
    weighted: bool
    ignore_index: int
    smoothing: float
    reduction: str
    grad_output: Numbers
    ignores: bool
    loss: str
    own_options: dict[str, float]

    def inputs(self, device: str) -> cross_entropy.Inputs:
        loss = cross_entropy.LOSSES[self.loss]
        shape = self.logits.shape
        class_dim = min(len(shape) - 1, 1)
        drawn = self.target.values()
        if self.target_kind == "probabilities":
            target = self.target.place(drawn.softmax(class_dim).to(self.dtype).to(device))
        else:
            classes = shape[class_dim]
            target = (drawn.abs() * 1e6).long() % classes
            ignored = (drawn.abs() * 1e9).long() % 4 == 0
            ignored &= ~ignored.all()  # where nothing counts, a mean is NaN: tested elsewhere
            dtype = torch.uint8 if self.target_kind == "uint8" else torch.int64
            limits = torch.iinfo(dtype)
            if self.ignores and limits.min <= self.ignore_index <= limits.max:
                target = target.masked_fill(ignored, self.ignore_index)
            target = self.target.place(target.to(dtype).to(device))
        weight = None
        if self.weighted:
            generator = torch.Generator().manual_seed(self.logits.seed)
            weight = 0.25 + torch.rand(shape[class_dim], generator=generator, dtype=F64)
            weight = carve(weight.to(self.dtype).to(device), (1,), self.logits.offset)
        return cross_entropy.Inputs(
            self.logits.tensor(self.dtype, device),
            target,
            weight,
            self.grad_output.tensor(self.dtype, device),
            {
                "ignore_index": self.ignore_index,
                "reduction": self.reduction,
                **({} if loss.indices_only else {"label_smoothing": self.smoothing}),
                **self.own_options,
            },
            loss,
        )


@st.composite
def cross_entropy_calls(draw: st.DrawFn, loss: str, special: bool = False) -> CrossEntropyCall:
    row = cross_entropy.LOSSES[loss]
    indices_only = row.indices_only
    dims = draw(st.sampled_from((2, 2, 1, 3, 4, 5)))
    shape = draw(shapes(dims, largest=300 if special else 9000))
    class_dim = min(dims - 1, 1)
    rows = shape[:class_dim] + shape[class_dim + 1 :]
    kinds = ["long"] if indices_only else ["long", "probabilities"]
    if shape[class_dim] < 200 and not special:
        kinds.append("uint8")
    kind = draw(st.sampled_from(kinds))
    reduction = draw(st.sampled_from(REDUCTIONS))
    indices = kind != "probabilities"
    return CrossEntropyCall(
        draw(st.sampled_from(DTYPES)),
        draw(numbers(shape, special=special)),
        kind,
        draw(numbers(rows if indices else shape)),
        draw(st.booleans()),
        draw(st.sampled_from((-100, -7, 0, 200))) if indices and not special else -100,
        0.0 if indices_only else draw(st.sampled_from((0.0, 0.1, 1.0))),
        reduction,
        draw(numbers(rows if reduction == "none" else ())),
        loss=loss,
        own_options={name: draw(st.sampled_from(xs)) for name, xs in row.options.items()},
        ignores=not special,  # torch's gradient of an ignored row is NaN where a logit is
    )


@pytest.mark.parametrize("loss", cross_entropy.LOSSES)
def test_losses_of_classes_are_accurate(loss: str, explore: Explorer, device: str) -> None:
    """No less accurate than torch, nothing written but the results."""

    def attempt(profile: settings) -> None:
        @profile
        @given(cross_entropy_calls(loss))
        def holds(call: CrossEntropyCall) -> None:
            explore.tried += 1
            cross_entropy.check_inputs(call.inputs(device), call)

        holds()

    explore(attempt, examples=100)


@pytest.mark.parametrize("loss", cross_entropy.LOSSES)
def test_losses_of_classes_of_special_values(loss: str, explore: Explorer, device: str) -> None:
    """NaN, infinities and zeros where torch has them, and else torch's numbers."""

    def attempt(profile: settings) -> None:
        @profile
        @given(cross_entropy_calls(loss, special=True))
        def holds(call: CrossEntropyCall) -> None:
            explore.tried += 1
            inputs = call.inputs(device)
            cross_entropy.check_like_torch(
                inputs.logits, inputs.target, inputs.weight, inputs.loss, **inputs.options
            )

        holds()

    explore(attempt, examples=100)


def test_gradients_through_both_results_are_accurate(explore: Explorer, device: str) -> None:
    """Loss and log-sum-exp, no less accurate than torch, nothing written but the results."""

    def attempt(profile: settings) -> None:
        @profile
        @given(cross_entropy_calls("z_loss"), st.data())
        def holds(call: CrossEntropyCall, data: st.DataObject) -> None:
            explore.tried += 1
            class_dim = min(len(call.logits.shape) - 1, 1)
            rows = call.logits.shape[:class_dim] + call.logits.shape[class_dim + 1 :]
            through_lse = data.draw(numbers(rows))
            inputs = call.inputs(device)
            lse_grad = through_lse.tensor(COMPUTE[call.dtype], device)
            cross_entropy.check_both_results(inputs, lse_grad, (call, through_lse))

        holds()

    explore(attempt, examples=100)


# ------------------------------------------------------------------ losses of elements


@dataclass(frozen=True)
class PointwiseCall:
    loss: str
    variant: str
    dtype: torch.dtype
    input: Numbers
    target: Numbers
    factors: tuple[tuple[str, Numbers], ...]
    reduction: str
    grad_output: Numbers
    wanted: tuple[str, ...]

    def inputs(self, device: str) -> pointwise_loss.Inputs:
        loss = LOSSES[self.loss]
        options = {
            name: value
            for name, value in loss.variants[self.variant].items()
            if not callable(value)
        }
        for name, factor in self.factors:
            options[name] = factor.place(factor.values().abs().to(self.dtype).to(device))
        return pointwise_loss.Inputs(
            loss,
            self.input.tensor(self.dtype, device),
            self.target.tensor(self.dtype, device),
            self.grad_output.tensor(self.dtype, device),
            {"reduction": self.reduction, **options},
            self.wanted,
        )


@st.composite
def pointwise_calls(draw: st.DrawFn, special: bool) -> PointwiseCall:
    name = draw(st.sampled_from(sorted(LOSSES)))
    loss = LOSSES[name]
    variant = draw(st.sampled_from(sorted(loss.variants)))
    dims = draw(st.sampled_from((1, 2, 0, 3, 4, 5, 8)))
    shape = draw(shapes(dims, largest=300 if special else 9000))
    factors = []
    for factor, value in loss.variants[variant].items():
        if callable(value):
            factors.append((factor, draw(numbers(value(shape)))))
    reduction = draw(st.sampled_from(REDUCTIONS))
    return PointwiseCall(
        name,
        variant,
        draw(st.sampled_from(DTYPES)),
        draw(numbers(shape, special=special)),
        draw(numbers(shape, special=special and draw(st.booleans()))),
        tuple(factors),
        reduction,
        draw(numbers(shape if reduction == "none" else ())),
        draw(st.sampled_from(loss.wanted)),
    )


def test_pointwise_losses_are_accurate(explore: Explorer, device: str) -> None:
    """No less accurate than torch, nothing written but the results."""

    def attempt(profile: settings) -> None:
        @profile
        @given(pointwise_calls(special=False))
        def holds(call: PointwiseCall) -> None:
            explore.tried += 1
            pointwise_loss.check_inputs(call.inputs(device), call)

        holds()

    explore(attempt, examples=100)


def test_pointwise_losses_of_special_values(explore: Explorer, device: str) -> None:
    """NaN, infinities and zeros where torch has them, and else torch's numbers."""

    def attempt(profile: settings) -> None:
        @profile
        @given(pointwise_calls(special=True))
        def holds(call: PointwiseCall) -> None:
            explore.tried += 1
            inputs = call.inputs(device)
            # Small factors: which product overflows on the way depends on their order.
            inputs.grad_output = torch.full_like(inputs.grad_output, 0.5)
            for factor, _ in call.factors:
                inputs.options[factor] = inputs.options[factor].clamp(0.1, 0.75)
            pointwise_loss.check_like_torch(inputs)

        holds()

    explore(attempt, examples=100)


# ------------------------------------------------------------------ SGD


OPTIONS = st.sampled_from(
    [
        {"lr": lr, **options}
        for lr in (0.1, 1.0, 0.0)
        for options in (
            {},
            {"momentum": 0.9},
            {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
            {"momentum": 0.5, "dampening": 0.25, "maximize": True},
            {"weight_decay": 0.1, "maximize": True},
            {"momentum": 0.9, "weight_decay": 0.01, "dampening": 1.0},
        )
    ]
)
PARAM_SIZES = (0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 65, 129, 1025)


@dataclass
class Twin:
    """A parameter, and its like in float64 for torch."""

    param: nn.Parameter
    exact: nn.Parameter
    outside: Tensor  # what lies around the parameter

    @property
    def dtype(self) -> torch.dtype:
        return self.param.dtype

    def surroundings(self) -> Tensor:
        return around(self.param)


def around(view: Tensor) -> Tensor:
    """The bytes of the buffer behind a view, those of the view itself blanked."""
    storage = whole_storage(view).clone()
    blank = storage.view(view.dtype).as_strided(view.shape, view.stride(), view.storage_offset())
    blank.zero_()
    return storage


class StepsOfSGD(RuleBasedStateMachine):
    """Any history of an optimizer, beside torch's for-loop SGD in float64.

    float64 parameters follow torch's to the bit from beginning to end. Others are compared step by
    step: torch starts each step from the numbers that ours is stored as, and ours may differ by the
    roundings of one step.
    """

    def __init__(self, device: str, on_cuda: bool, explorer: Explorer) -> None:
        super().__init__()
        self.device = device
        self.on_cuda = on_cuda
        self.twins: list[Twin] = []
        explorer.tried += 1

    # ---- parameters

    def new_params(self, made: list[tuple[torch.dtype, Numbers]]) -> tuple[list[Any], list[Any]]:
        twins = []
        for dtype, where in made:
            view = where.tensor(dtype, self.device)
            exact = nn.Parameter(view.double().clone())
            twins.append(Twin(nn.Parameter(view), exact, around(view)))
        self.twins += twins
        return [t.param for t in twins], [t.exact for t in twins]

    @staticmethod
    def params() -> st.SearchStrategy[list[tuple[torch.dtype, Numbers]]]:
        @st.composite
        def one(draw: st.DrawFn) -> tuple[torch.dtype, Numbers]:
            dims = draw(st.sampled_from((1, 2, 0, 4)))
            shape = tuple(
                draw(st.sampled_from(PARAM_SIZES if dims < 3 else (1, 2, 3, 5)))
                for _ in range(dims)
            )
            assume(math.prod(shape) < 5000)
            return draw(st.sampled_from(DTYPES)), draw(numbers(shape, overlapping=False))

        return st.lists(one(), min_size=1, max_size=4)

    @initialize(made=params(), options=OPTIONS)
    def start(self, made: list[tuple[torch.dtype, Numbers]], options: dict[str, Any]) -> None:
        ours, exact = self.new_params(made)
        self.ours, self.theirs = SGD(ours, **options), NativeSGD(exact, **options)

    @rule(made=params(), options=OPTIONS)
    @precondition(lambda self: len(self.twins) < 8)
    def add_param_group(
        self, made: list[tuple[torch.dtype, Numbers]], options: dict[str, Any]
    ) -> None:
        ours, exact = self.new_params(made)
        self.ours.add_param_group({"params": ours, **options})
        self.theirs.add_param_group({"params": exact, **options})

    # ---- gradients

    @rule(data=st.data(), which=st.integers(0, 7), special=st.integers(0, 9))
    def gradient_appears(self, data: st.DataObject, which: int, special: int) -> None:
        twin = self.twins[which % len(self.twins)]
        shape = tuple(twin.param.shape)
        drawn = data.draw(numbers(shape, special=special == 0))
        self.set_gradient(twin, drawn)

    @rule(data=st.data())
    def every_gradient_appears(self, data: st.DataObject) -> None:
        for twin in self.twins:
            self.set_gradient(twin, data.draw(numbers(tuple(twin.param.shape))))

    def set_gradient(self, twin: Twin, drawn: Numbers) -> None:
        twin.param.grad = drawn.tensor(twin.dtype, self.device)
        twin.exact.grad = twin.param.grad.double().clone()

    @rule(which=st.integers(0, 7))
    def gradient_vanishes(self, which: int) -> None:
        twin = self.twins[which % len(self.twins)]
        twin.param.grad = twin.exact.grad = None

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none: bool) -> None:
        if not set_to_none:  # in place, which torch refuses where elements share a place
            for twin in self.twins:
                if twin.param.grad is not None:
                    twin.param.grad = twin.param.grad.clone()
        self.ours.zero_grad(set_to_none)
        self.theirs.zero_grad(set_to_none)
        for twin in self.twins:
            assert (twin.param.grad is None) == (twin.exact.grad is None)
            assert twin.param.grad is None or not twin.param.grad.any()

    # ---- options and state

    @rule(
        which=st.integers(0, 7),
        lr=st.sampled_from((0.0, 1e-3, 0.1, 1, 2.5, torch.tensor(0.25), "tensor")),
    )
    def change_lr(self, which: int, lr: Any) -> None:
        for optimizer in (self.ours, self.theirs):
            group = optimizer.param_groups[which % len(optimizer.param_groups)]
            group["lr"] = torch.tensor(0.5, dtype=F64, device=self.device) if lr == "tensor" else lr

    @rule(which=st.integers(0, 7), options=OPTIONS)
    def change_options(self, which: int, options: dict[str, Any]) -> None:
        whole = {"momentum": 0, "dampening": 0, "weight_decay": 0, "maximize": False, **options}
        whole["nesterov"] = options.get("nesterov", False)
        for optimizer in (self.ours, self.theirs):
            optimizer.param_groups[which % len(optimizer.param_groups)].update(whole)

    @rule()
    def reload_state(self) -> None:
        for optimizer in (self.ours, self.theirs):
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    @rule()
    def exchange_state(self) -> None:
        """Torch's checkpoint for ours; ours for torch's would take its float64 numbers away."""
        self.synchronize()
        self.ours.load_state_dict(copy.deepcopy(self.theirs.state_dict()))

    # ---- steps

    @rule()
    def step(self) -> None:
        self.compare_step(lambda: self.ours.step())

    @rule()
    def step_with_closure(self) -> None:
        self.compare_step(lambda: self.ours.step(lambda: torch.tensor(1.5)))

    @rule(scale=st.sampled_from((None, 1.0, 8.0, 65536.0)), overflow=st.booleans())
    def step_by_grad_scaler(self, scale: float | None, overflow: bool) -> None:
        for twin in self.twins:
            grad = twin.param.grad
            if scale is not None and grad is not None:
                twin.param.grad = grad.clone().mul_(scale) if scale != 1 else grad.clone()
                unscaled = twin.param.grad.div(scale).double()
                twin.exact.grad = unscaled.contiguous()
        self.ours.found_inf = torch.tensor(float(overflow), device=self.device)
        self.ours.grad_scale = None if scale is None else torch.tensor(scale, device=self.device)
        try:
            if overflow:
                self.expect_nothing(lambda: self.ours.step())
            else:
                self.compare_step(lambda: self.ours.step(), unscales=True)
        finally:
            del self.ours.found_inf, self.ours.grad_scale
        if overflow and scale is not None:  # as it would be after an update of the scale
            self.zero_grad(True)

    def momentum_buffers(self) -> list[Tensor | None]:
        return [self.ours.state[t.param].get("momentum_buffer") for t in self.twins]

    def expect_nothing(self, step: Callable[[], Any]) -> None:
        params = [t.param for t in self.twins]
        before = copy.deepcopy((params, [p.grad for p in params], self.momentum_buffers()))
        step()
        buffers = self.momentum_buffers()
        if self.on_cuda:  # where the device alone knows of an overflow, zeros are left
            buffers = [
                None if old is None and new is not None and not new.any() else new
                for old, new in zip(before[2], buffers, strict=True)
            ]
        assert same_bits((params, [p.grad for p in params], buffers), before)

    def synchronize(self) -> None:
        """Torch starts from what ours is stored as."""
        for twin in self.twins:
            buffer = self.ours.state[twin.param].get("momentum_buffer")
            state = self.theirs.state[twin.exact]
            if buffer is None:
                assert state.get("momentum_buffer") is None
            elif twin.dtype != F64 or "momentum_buffer" not in state:
                state["momentum_buffer"] = buffer.double().clone()
            if twin.dtype != F64:
                twin.exact.data.copy_(twin.param.detach())

    def compare_step(self, step: Callable[[], Any], unscales: bool = False) -> None:
        self.synchronize()
        old = [
            (twin.param.detach().double().clone(), None if b is None else b.double().clone())
            for twin, b in zip(self.twins, self.momentum_buffers(), strict=True)
        ]
        grads = [None if t.param.grad is None else whole_storage(t.param.grad) for t in self.twins]
        kept = copy.deepcopy(grads)
        step()
        self.theirs.step()
        if not unscales:
            assert same_bits(grads, kept), "a gradient was written"
        groups = {id(p): g for g in self.theirs.param_groups for p in g["params"]}
        for twin, (param, buffer) in zip(self.twins, old, strict=True):
            allowed = roundings(twin, param, buffer, groups[id(twin.exact)])
            assert_within(twin.param, twin.exact, allowed[0])
            ours = self.ours.state[twin.param].get("momentum_buffer")
            theirs = self.theirs.state[twin.exact].get("momentum_buffer")
            assert (ours is None) == (theirs is None)
            if ours is not None and theirs is not None:
                assert_within(ours, theirs, allowed[1])

    @invariant()
    def nothing_outside_is_written(self) -> None:
        for twin in self.twins:
            assert torch.equal(twin.surroundings(), twin.outside)
            grad = twin.param.grad
            if grad is not None and grad.storage_offset() >= GUARD:
                frame = torch.empty(0, dtype=grad.dtype, device=grad.device)
                frame.set_(grad.untyped_storage())
                assert frame[:GUARD].isnan().all() and frame[-GUARD:].isnan().all()


def roundings(
    twin: Twin, param: Tensor, buffer: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """What one step may round of parameter and momentum buffer: storing each, and eight roundings
    of the arithmetic on the scale of its terms. float64 has to be torch's to the bit."""
    if twin.dtype == F64 or twin.param.grad is None or twin.exact.grad is None:
        zero = torch.zeros_like(param)
        return zero, zero
    compute = torch.finfo(COMPUTE[twin.dtype])
    # What torch computes for us, strided views and some mixtures of layouts, it rounds each time.
    grad = twin.param.grad
    is_ours = torch.empty_like(twin.param).stride() == twin.param.stride() == grad.stride()
    is_ours &= buffer is None or buffer.stride() == grad.stride()
    eps = compute.eps if is_ours else torch.finfo(twin.dtype).eps
    lr, momentum = float(options["lr"]), options["momentum"]
    terms = twin.exact.grad.abs() + options["weight_decay"] * param.abs()
    kept = terms
    if momentum and buffer is not None:
        kept = momentum * buffer.abs() + abs(1 - options["dampening"]) * terms
    step = terms + momentum * kept if options["nesterov"] else kept
    buffer_allowed = 4 * eps * kept + stored(kept, twin.dtype)
    allowed = 4 * eps * (param.abs() + lr * (step + terms)) + lr * buffer_allowed
    allowed = allowed + stored(twin.exact.detach(), twin.dtype)
    may_overflow = ~(step + kept + param.abs() < compute.max / 8)
    return allowed.masked_fill(may_overflow, math.inf), buffer_allowed.masked_fill(
        may_overflow, math.inf
    )


def stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    """What storing a value may change: half a unit in its last place, subnormal ones included."""
    info = torch.finfo(dtype)
    return 0.5 * info.eps * value.abs().clamp(min=info.smallest_normal) * (1 + info.eps)


def assert_within(actual: Tensor, exact: Tensor, allowed: Tensor) -> None:
    largest = torch.finfo(actual.dtype).max
    actual, exact = actual.detach().double(), exact.detach()
    agree = (actual == exact) | (actual.isnan() & exact.isnan()) | allowed.isinf()
    agree |= actual.isinf() & (exact.abs() + allowed >= largest)
    excess = torch.where(agree, 0.0, (actual - exact).abs() - allowed)
    wrong = ~(excess <= 0)
    assert not wrong.any(), [t[wrong].tolist() for t in (actual, exact, allowed)]


def same_bits(a: Any, b: Any) -> bool:
    """Of tensors in any structure of lists and tuples."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        a, b = (t.detach().clone(memory_format=torch.contiguous_format) for t in (a, b))
        return torch.equal(whole_storage(a), whole_storage(b))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return a is b is None


def test_histories_of_sgd(explore: Explorer, device: str, on_cuda: bool) -> None:
    explore(
        lambda profile: run_state_machine_as_test(
            lambda: StepsOfSGD(device, on_cuda, explore), settings=profile
        ),
        examples=25,
    )
