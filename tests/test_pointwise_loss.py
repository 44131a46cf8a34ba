"""The pointwise losses against float64 references and against torch, all from one table."""

from __future__ import annotations

import copy
import ctypes
import inspect
import io
import itertools
import math
import pickle
import platform
import random
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as native
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import fusedstep
import fusedstep.functional as F
import reference
from numerics import (  # the fixture by name: pytest finds it in this module
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    REDUCTION_CODE,
    REDUCTIONS,
    TRANSFORMS,
    FunctionsSeen,
    Logged,
    OperatorsSeen,
    assert_accurate,
    detached,
    fail_in_backward,
    identical,
    pairwise,
    peak_memory,
    place,
    poisoned_outputs,  # noqa: F401
    whole_storage,
    widened,
)

# ------------------------------------------------------------------ the table of losses

Shape = tuple[int, ...]
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Loss:
    """A loss by the names that it has in torch, and what there is to vary about it."""

    function: str
    module: str
    kind: int  # its number in the operators
    node: str  # the name of its node in autograd's graph: that of torch's own
    # Options by the name of the variant. A callable gives the shape of a weight to be drawn.
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"plain": {}})
    parameter: str | None = None  # the option that the operators call `parameter`
    takes_logits: bool = False  # and probabilities as target; the others take any two numbers
    kernels_give_target_gradient: bool = True
    has_deprecated_options: bool = True
    bad_options: tuple[Mapping[str, Any], ...] = ()

    def __str__(self) -> str:
        return self.function

    @property
    def ours(self) -> Function:
        return getattr(F, self.function)

    @property
    def native(self) -> Function:
        return getattr(native, self.function)

    @property
    def reference(self) -> Callable[..., reference.Pointwise]:
        return getattr(reference, self.function)

    @property
    def our_module(self) -> type[nn.Module]:
        return getattr(fusedstep, self.module)

    @property
    def native_module(self) -> type[nn.Module]:
        return getattr(nn, self.module)

    @property
    def wanted(self) -> tuple[tuple[str, ...], ...]:
        """Which gradients may be asked for together."""
        if self.kernels_give_target_gradient:
            return (("input",), ("target",), ("input", "target"))
        return (("input",),)


LOSSES = {
    loss.function: loss
    for loss in (
        Loss("l1_loss", "L1Loss", 0, "L1LossBackward0"),
        Loss("mse_loss", "MSELoss", 1, "MseLossBackward0"),
        Loss(
            "smooth_l1_loss",
            "SmoothL1Loss",
            2,
            "SmoothL1LossBackward0",
            {"plain": {}, "beta": {"beta": 2.5}, "L1": {"beta": 0.0}, "far": {"beta": 100.0}},
            parameter="beta",
            bad_options=({"beta": -1.0}, {"beta": math.nan}, {"beta": "much"}, {"beta": None}),
        ),
        Loss(
            "huber_loss",
            "HuberLoss",
            3,
            "HuberLossBackward0",
            {"plain": {}, "delta": {"delta": 2.5}, "tiny": {"delta": 1e-3}},
            parameter="delta",
            has_deprecated_options=False,
            bad_options=(
                {"delta": 0.0},
                {"delta": -1.0},
                {"delta": math.nan},
                {"delta": "much"},
                {"delta": None},
            ),
        ),
        Loss(
            "binary_cross_entropy_with_logits",
            "BCEWithLogitsLoss",
            4,
            "BinaryCrossEntropyWithLogitsBackward0",
            {
                "plain": {},
                "weight": {"weight": lambda shape: shape},
                "weight of rows": {"weight": lambda shape: shape[:1] + (1,) * len(shape[1:])},
                "pos_weight": {"pos_weight": lambda shape: shape[-1:]},
                "pos_weight of channels": {
                    "pos_weight": lambda shape: shape[1:2] + (1,) * len(shape[2:])
                },
                "both": {"weight": lambda shape: (), "pos_weight": lambda shape: shape[1:]},
            },
            takes_logits=True,
            kernels_give_target_gradient=False,
            bad_options=(
                {"weight": torch.ones(2, 4)},
                {"weight": torch.ones(2, 3, 4)},
                {"pos_weight": torch.ones(2, 4)},
                {"pos_weight": torch.ones(2, 3, 4)},
                {"weight": 2.0},
                {"pos_weight": [1.0] * 4},
                {"weight": torch.ones(4, device="meta")},
            ),
        ),
    )
}
VARIANTS = [(name, variant) for name, loss in LOSSES.items() for variant in loss.variants]

# The operators, in one place: what they are called with.


def operator(name: str = "") -> Any:
    return getattr(torch.ops.fusedstep, f"pointwise_loss{name}").default


def operator_arguments(inputs: Inputs) -> tuple[Any, ...]:
    """(input, target, weight, pos_weight, kind, reduction, parameter), of the composite operator
    and the start of forward's."""
    options = inputs.options
    return (
        inputs.input,
        inputs.target,
        options.get("weight"),
        options.get("pos_weight"),
        inputs.loss.kind,
        REDUCTION_CODE[options["reduction"]],
        options.get(inputs.loss.parameter, 1.0),
    )


def forward_arguments(inputs: Inputs, loss_dtype: torch.dtype, with_grad: bool) -> tuple[Any, ...]:
    """Of forward, which returns the loss and the gradient to the input for a grad_output of 1."""
    return (*operator_arguments(inputs), loss_dtype, with_grad)


def backward_arguments(inputs: Inputs, grad_output: Tensor) -> tuple[Any, ...]:
    """Of backward, which returns the gradient to the input."""
    return (grad_output, *operator_arguments(inputs))


# ------------------------------------------------------------------ inputs


def _step(values: Tensor, dim: int, step: int) -> Tensor:
    return place(values, steps={dim % values.dim(): step} if values.dim() else None)


def _expand(values: Tensor, dims: slice) -> Tensor:
    single = values
    for dim in range(values.dim())[dims]:
        single = single.narrow(dim, 0, min(single.shape[dim], 1))
    return place(single).expand(values.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": place,
    "channels_last": lambda v: (
        place(v, order=[*range(v.dim())[:1], *range(v.dim())[2:], 1][: v.dim()])
        if v.dim() > 1
        else place(v)
    ),
    "transposed": lambda v: place(v, order=range(v.dim())[::-1]),
    "element step": lambda v: _step(v, -1, 3),
    "row step": lambda v: _step(v, 0, 2),
    "row padding": lambda v: _step(v, -2, 2) if v.dim() > 1 else place(v),
    "unaligned": lambda v: place(v, offset=1),
    "unaligned transposed": lambda v: place(v, order=range(v.dim())[::-1], offset=3),
    "expanded": lambda v: _expand(v, slice(None)),
    "expanded rows": lambda v: _expand(v, slice(1)),
    "expanded columns": lambda v: _expand(v, slice(-1, None)),
}
KERNEL_DIMS = 8  # torch takes over for more, and lays gradients as it likes
GRAD_OUTPUTS = ("random", "zero", "negative", "ones", "expanded", "strided")


@dataclass(frozen=True)
class Case:
    """One call: what is asked for, and how its tensors lie in memory."""

    loss: str
    variant: str = "plain"
    dtype: torch.dtype = F32
    shape: Shape = (5, 7)
    reduction: str = "mean"
    wanted: tuple[str, ...] = ("input",)
    layout: str = "contiguous"
    target_layout: str = "contiguous"
    grad_output: str = "random"

    def __str__(self) -> str:
        default = Case(self.loss)
        differing = (
            "+".join(value) if name == "wanted" else str(value).removeprefix("torch.")
            for name, value in vars(self).items()
            if name in ("loss", "dtype", "shape", "reduction") or value != getattr(default, name)
        )
        return "-".join(differing).replace(" ", "")


@dataclass
class Inputs:
    loss: Loss
    input: Tensor
    target: Tensor
    grad_output: Tensor
    options: dict[str, Any]
    wanted: tuple[str, ...] = ("input",)

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers, stored otherwise."""

        def cast(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) else value

        return replace(
            self, **{k: tree_map(cast, v) for k, v in vars(self).items() if k not in ("loss",)}
        )

    @property
    def tensors(self) -> list[Tensor]:
        weights = [value for value in self.options.values() if isinstance(value, Tensor)]
        return [self.input, self.target, *weights]

    def leaves(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Input and target, and those of them whose gradient is wanted."""
        x = self.input.detach().requires_grad_("input" in self.wanted)
        t = self.target.detach().requires_grad_("target" in self.wanted)
        return x, t, [leaf for leaf in (x, t) if leaf.requires_grad]

    def call(
        self, function: Function, input: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        input = self.input if input is None else input
        target = self.target if target is None else target
        return function(input, target, **self.options)

    def loss_and_grads(self, function: Function) -> tuple[Tensor, ...]:
        x, t, leaves = self.leaves()
        loss = self.call(function, x, t)
        grads = torch.autograd.grad(loss, leaves, self.grad_output.to(loss.dtype))
        return loss.detach(), *grads

    def expected(self) -> reference.Pointwise:
        return self.loss.reference(
            self.input, self.target, grad_output=self.grad_output, **self.options
        )


def draw(case: Case, device: str) -> Inputs:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=F64, device=device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=F64, device=device)

    loss = LOSSES[case.loss]
    # One in eight elements is special: equal numbers, or a target of 0, of 1 or outside of [0, 1].
    x = (3 * normal(*case.shape)).to(case.dtype).double()
    special, kind = uniform(*case.shape) < 0.125, uniform(*case.shape)
    if loss.takes_logits:
        odd = torch.where(kind < 0.3, 0.0, torch.where(kind < 0.6, 1.0, 2 * normal(*case.shape)))
        t = torch.where(special, odd, uniform(*case.shape))
    else:
        t = torch.where(special, x, 3 * normal(*case.shape))
    options: dict[str, Any] = {"reduction": case.reduction}
    for name, value in loss.variants[case.variant].items():
        drawn = callable(value)
        options[name] = (0.25 + uniform(*value(case.shape))).to(case.dtype) if drawn else value

    shape = case.shape if case.reduction == "none" else ()
    grad_output = {
        "random": lambda: normal(*shape),
        "zero": lambda: torch.zeros(shape, dtype=F64, device=device),
        "negative": lambda: -1 - normal(*shape).abs(),
        "ones": lambda: torch.ones(shape, dtype=F64, device=device),
        "expanded": lambda: normal(),
        "strided": lambda: normal(*shape, 2)[..., 0],
    }[case.grad_output]()
    return Inputs(
        loss,
        LAYOUTS[case.layout](x.to(case.dtype)),
        LAYOUTS[case.target_layout](t.to(case.dtype)),
        grad_output.to(case.dtype).expand(shape),
        options,
        case.wanted,
    )


# ------------------------------------------------------------------ the comparison


def check_inputs(inputs: Inputs, label: Any) -> None:
    dtype = inputs.input.dtype
    before = [whole_storage(t).clone() for t in inputs.tensors]
    results = inputs.loss_and_grads(inputs.loss.ours)
    for tensor, bytes_before in zip(inputs.tensors, before, strict=True):
        assert torch.equal(whole_storage(tensor), bytes_before), f"{label}: an input was modified"

    peers = [inputs.loss_and_grads(inputs.loss.native)]
    for ours, theirs in zip(results, peers[0], strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), label
    if "input" in inputs.wanted and inputs.input.dim() <= KERNEL_DIMS:
        assert results[1].stride() == torch.empty_like(inputs.input).stride(), label
    if dtype.itemsize == 2:
        peers.append(inputs.to(F32).loss_and_grads(inputs.loss.native))

    expected = inputs.expected()
    truths = {"input": expected.grad, "target": expected.target_grad}
    assert_accurate(
        f"{label}: loss",
        results[0],
        [p[0] for p in peers],
        expected.loss,
        expected.loss_scale,
        dtype,
    )
    for i, wanted in enumerate(inputs.wanted, start=1):
        truth = truths[wanted]
        assert truth is not None
        theirs = [p[i] for p in peers]
        assert_accurate(
            f"{label}: gradient to {wanted}", results[i], theirs, truth, expected.grad_scale, dtype
        )


def check(case: Case, device: str) -> None:
    """No less accurate than torch on the same input; inputs untouched; torch's dtypes and shapes.
    Torch is asked twice for 16-bit types: as it is, and in float32 on the same numbers."""
    check_inputs(draw(case, device), case)


# ------------------------------------------------------------------ the reference itself

SHAPES: tuple[Shape, ...] = ((), (7,), (5, 7), (3, 7, 4), (2, 7, 3, 5), (2, 1, 2, 3, 2))


def cases(loss: str, variant: str, **axes: Any) -> list[Case]:
    """Every combination; `wanted` is varied too."""
    axes = {"wanted": LOSSES[loss].wanted, **axes}
    rows = itertools.product(*axes.values())
    return [Case(loss, variant, **dict(zip(axes, row, strict=True))) for row in rows]


@pytest.mark.parametrize("loss, variant", VARIANTS)
def test_reference_agrees_with_torch_in_float64(loss: str, variant: str) -> None:
    for case in cases(loss, variant, dtype=[F64], shape=SHAPES, reduction=REDUCTIONS):
        inputs = draw(case, "cpu")
        expected = inputs.expected()
        grads = {"input": expected.grad, "target": expected.target_grad}
        results = [expected.loss, *(grads[wanted] for wanted in case.wanted)]
        torch_results = list(inputs.loss_and_grads(inputs.loss.native))
        torch.testing.assert_close(results, torch_results, rtol=1e-12, atol=1e-13)


def test_reference_on_worked_numbers() -> None:
    x, t = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 5.0])
    l1, mse = reference.l1_loss(x, t), reference.mse_loss(x, t, reduction="sum")
    assert (l1.loss.item(), mse.loss.item()) == (pytest.approx(2 / 3), 4.0)
    assert l1.grad.tolist() == pytest.approx([0.0, 0.0, -1 / 3])
    assert mse.grad.tolist() == [0.0, 0.0, -4.0]
    assert mse.target_grad is not None and mse.target_grad.tolist() == [0.0, 0.0, 4.0]
    smooth = reference.smooth_l1_loss(x, t, reduction="none", beta=4.0)
    assert smooth.loss.tolist() == [0.0, 0.0, 0.5] and smooth.grad.tolist() == [0.0, 0.0, -0.5]
    huber = reference.huber_loss(x, t, reduction="none", delta=0.5)
    assert huber.loss.tolist() == [0.0, 0.0, 0.875] and huber.grad.tolist() == [0.0, 0.0, -0.5]
    zeros, half = torch.zeros(2), torch.full((2,), 2.0)
    bce = reference.binary_cross_entropy_with_logits(zeros, torch.tensor([0.0, 1.0]), half)
    assert bce.loss.item() == pytest.approx(2 * math.log(2))
    assert bce.grad.tolist() == [0.5, -0.5]


# ------------------------------------------------------------------ right numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss, variant", VARIANTS)
def test_every_combination_of_options(
    loss: str, variant: str, dtype: torch.dtype, device: str
) -> None:
    for case in cases(loss, variant, dtype=[dtype], shape=SHAPES, reduction=REDUCTIONS):
        check(case, device)


MEMORY = [
    Case(**row)
    for name, loss in LOSSES.items()
    for row in pairwise(
        {
            "loss": (name,),
            "variant": tuple(loss.variants),
            "dtype": DTYPES,
            "shape": ((19,), (6, 19), (3, 19, 18), (2, 21, 5, 17), (2, 5, 3, 4, 9)),
            "reduction": REDUCTIONS,
            "wanted": loss.wanted,
            "layout": tuple(LAYOUTS),
            "target_layout": tuple(LAYOUTS),
            "grad_output": GRAD_OUTPUTS,
        },
        seed=loss.kind,
    )
]


@pytest.mark.level
@pytest.mark.parametrize("case", dict.fromkeys(MEMORY), ids=str)
def test_every_pair_of_options_and_memory_layouts(case: Case, device: str) -> None:
    check(case, device)


@pytest.mark.level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_size_across_vector_widths(
    loss: str, dtype: torch.dtype, device: str, seed: int
) -> None:
    rng = random.Random(seed)
    row = LOSSES[loss]
    for size in range(1, 71):
        check(Case(loss, "plain", dtype, (size,), rng.choice(REDUCTIONS)), device)
        shape = rng.choice([(size,), (3, size), (size, 2), (2, 3, size)])
        layouts = rng.choice(list(LAYOUTS)), rng.choice(list(LAYOUTS))
        variant, wanted = rng.choice(list(row.variants)), rng.choice(row.wanted)
        reduction = rng.choice(REDUCTIONS)
        check(Case(loss, variant, dtype, shape, reduction, wanted, *layouts), device)


BORDERS = [
    *(size + more for size in (128, 256, 512, 1024, 2048, 4096, 16384) for more in (-1, 0, 1)),
    32769,
    100003,
]


@pytest.mark.level
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_sizes_at_chunk_borders(loss: str, dtype: torch.dtype, device: str, seed: int) -> None:
    rng = random.Random(seed)
    for size, reduction in itertools.product(BORDERS, REDUCTIONS):
        wanted = rng.choice(LOSSES[loss].wanted)
        check(Case(loss, "plain", dtype, (size,), reduction, wanted), device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss, variant", VARIANTS)
def test_large_inputs_in_every_dtype(
    loss: str, variant: str, dtype: torch.dtype, device: str, seed: int
) -> None:
    """Rows and columns that chunks cut where they like."""
    rng = random.Random(seed)
    for shape in ((3, 8193), (8193, 3), (2, 21, 31, 33)):
        layouts = rng.choice(list(LAYOUTS)), rng.choice(list(LAYOUTS))
        wanted = rng.choice(LOSSES[loss].wanted)
        check(Case(loss, variant, dtype, shape, rng.choice(REDUCTIONS), wanted, *layouts), device)


@pytest.mark.parametrize("loss, variant", VARIANTS)
def test_many_dimensions_that_cannot_be_merged(
    loss: str, variant: str, device: str, seed: int
) -> None:
    rng = random.Random(seed)
    for dims, reduction in itertools.product((6, 7, 8, 9, 10), REDUCTIONS):
        shape = (2,) * (dims - 1) + (3,)
        wanted = rng.choice(LOSSES[loss].wanted)
        inputs = draw(Case(loss, variant, F32, shape, reduction, wanted), device)
        order = rng.sample(range(dims), dims)
        inputs.input = place(inputs.input, order=order, steps=dict.fromkeys(range(6), 2))
        check_inputs(inputs, f"{dims} dimensions, {reduction}, {wanted}, {order}")


@pytest.mark.parametrize("element_step", [1, 2**27 + 1])
@pytest.mark.parametrize("loss", LOSSES)
def test_offsets_beyond_32_bits(loss: str, element_step: int) -> None:
    """Only the touched pages of the 8 GiB are ever backed by memory."""
    torch._C._set_deterministic_algorithms(False)
    inputs = draw(Case(loss, "plain", BF16, (2, 17)), "cpu")
    storage = torch.empty(2**32 + 2**10, dtype=BF16)
    row_step = 2**32 if element_step == 1 else 3
    far = storage.as_strided((2, 17), (row_step, element_step)).copy_(inputs.input)
    expected = inputs.loss_and_grads(inputs.loss.ours)
    actual = replace(inputs, input=far).loss_and_grads(inputs.loss.ours)
    torch.testing.assert_close(actual, expected)


# ------------------------------------------------------------------ special values


def test_smooth_l1_gradient_is_a_quotient(device: str) -> None:
    """Of float64: d / (beta n) rounded once, where the product beta n is rounded itself."""
    if device == "cpu" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("there is no fused multiply-add")
    for beta, n in (("0x1.c089c0c4259dap-54", 76), ("0x1.1b9e8144796dap+57", 120)):
        size = float.fromhex(beta)
        d = (torch.rand(n, dtype=F64) - 0.5) * size
        x = d.to(device).requires_grad_()
        F.smooth_l1_loss(x, torch.zeros_like(x), beta=size).backward()
        assert x.grad is not None
        assert x.grad.tolist() == [float(Fraction(v) / (Fraction(size) * n)) for v in d.tolist()]


def check_like_torch(inputs: Inputs) -> None:
    """NaN, infinities and zeros where torch has them, and the same finite values within rounding.
    Overflow on the way to a finite result is torch's in float32, not in float64: both will do, and
    where torch's leaves NaN, an infinity of the right sign. So will the exact loss: of a negative
    logit torch adds x - t x and -x, which leaves -t x and what they were rounded by."""
    dtype = inputs.input.dtype
    ours = inputs.loss_and_grads(inputs.loss.ours)
    peers = [peer.loss_and_grads(inputs.loss.native) for peer in (inputs, inputs.to(F64))]
    eps = 16 * torch.finfo(dtype).eps
    for number, (actual, *expected) in enumerate(zip(ours, *peers, strict=True)):
        right = torch.zeros_like(actual, dtype=torch.bool)
        for value in expected:
            right |= actual.isclose(value.to(dtype), rtol=eps, atol=eps, equal_nan=True)
        right |= expected[0].isnan() & actual.isinf() & (actual.sign() == expected[1].sign())
        if number == 0:
            exact = inputs.expected()
            difference = (actual.double() - exact.loss).abs()
            right |= exact.loss_scale.isfinite() & (difference <= eps * exact.loss_scale)
            right |= exact.loss.isinf() & (actual == exact.loss)
            expected.append(exact.loss)
        wrong = ~right
        assert right.all(), (
            [t.expand_as(wrong)[wrong].tolist() for t in (inputs.input, inputs.target)]
            if actual.dim()
            else (inputs.input, inputs.target),
            [t[wrong].tolist() for t in (actual, *expected)],
        )


SPECIAL = (math.nan, math.inf, 3e38, 1e4, 100.0, 2.0, 1.0, 0.5, 0.0, 1e-40)


def extremes(dtype: torch.dtype, device: str) -> Tensor:
    pairs = torch.cartesian_prod(*2 * [torch.tensor([*SPECIAL, *(-x for x in SPECIAL)])])
    pairs = pairs.to(device, dtype)
    # exp(-100) is subnormal in float32, and 0 for us: it shows where an infinite target multiplies
    # it.
    return pairs[~((pairs[:, 0].abs() == 100) & pairs[:, 1].isinf())]


@pytest.mark.level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss, variant", VARIANTS)
def test_extreme_values_like_torch(
    loss: str, variant: str, dtype: torch.dtype, device: str
) -> None:
    pairs = extremes(dtype, device)
    row = LOSSES[loss]
    for pairs_together in (pairs, *pairs.split(19)[:: 1 if dtype is F32 else 5]):
        inputs = draw(Case(loss, variant, dtype, (len(pairs_together),), "none"), device)
        inputs.input, inputs.target = pairs_together.unbind(1)
        inputs.wanted = row.wanted[-1]
        inputs.grad_output = torch.full_like(inputs.input, 1.5)
        check_like_torch(inputs)


@pytest.mark.level
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", LOSSES)
def test_one_extreme_value_in_a_reduction_like_torch(
    loss: str, reduction: str, device: str
) -> None:
    for pair in extremes(F32, device)[::3]:
        for size in (1, 34):
            inputs = draw(Case(loss, "plain", F32, (size,), reduction), device)
            inputs.input[size // 3], inputs.target[size // 3] = pair
            inputs.wanted = inputs.loss.wanted[-1]
            check_like_torch(inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "parameter", [0.5, 1.0, 3.0, 1e-3, 1e4, 2.0**-64, 2.0**64, 1e-30, 1e30, math.inf]
)
def test_on_both_sides_of_the_threshold(parameter: float, dtype: torch.dtype, device: str) -> None:
    """|d| just below, at and just above beta or delta; also where that is no number of the dtype,
    which is not the number the kernels compare with."""
    at = torch.tensor(parameter, dtype=dtype, device=device)
    sides = [at, at.nextafter(at * 0), at.nextafter(at * 2), at * 0, at * 0.5]
    d = torch.stack([*sides, *(-side for side in sides)]).nan_to_num().repeat(7)
    for loss in (loss for loss in LOSSES.values() if loss.parameter):
        for t in (torch.zeros_like(d), torch.full_like(d, 4.0)):
            options = {"reduction": "none", loss.parameter: parameter}
            x = t + d
            inputs = Inputs(loss, x, t, torch.ones_like(d), options, ("input", "target"))
            check_like_torch(inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_equal_numbers_cost_exactly_nothing(
    reduction: str, dtype: torch.dtype, device: str
) -> None:
    for name, loss in LOSSES.items():
        if loss.takes_logits:
            continue
        for variant in loss.variants:
            case = Case(name, variant, dtype, (37,), reduction, ("input", "target"))
            inputs = draw(case, device)
            inputs.target = inputs.input.clone()
            results = inputs.loss_and_grads(loss.ours)
            identical(results, tuple(torch.zeros_like(result) for result in results))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss, variant", VARIANTS)
def test_empty_inputs_like_torch(loss: str, variant: str, reduction: str, device: str) -> None:
    """The mean over nothing is NaN."""
    for shape in ((0,), (0, 5), (2, 0, 3), (2, 5, 0)):
        for case in cases(loss, variant, shape=[shape], reduction=[reduction]):
            inputs = draw(case, device)
            ours, theirs = (
                inputs.loss_and_grads(f) for f in (inputs.loss.ours, inputs.loss.native)
            )
            identical(ours, theirs)
            assert ours[1].shape == shape
            assert reduction != "mean" or ours[0].isnan()


def test_nan_stays_in_its_element(device: str) -> None:
    for loss, variant in VARIANTS:
        clean = draw(Case(loss, variant, F32, (53,), "none"), device)
        dirty = replace(clean, input=clean.input.index_fill(0, torch.tensor([4]), math.nan))
        others = torch.arange(53) != 4
        expected = clean.loss_and_grads(clean.loss.ours)
        results = dirty.loss_and_grads(clean.loss.ours)
        assert results[0][4].isnan()
        identical([r[others] for r in results], [e[others] for e in expected])


# ------------------------------------------------------------------ back propagation

GRADED = [
    case
    for loss, variant in VARIANTS
    for case in cases(loss, variant, dtype=(F32, BF16), shape=[(9, 19)], reduction=REDUCTIONS)
    if case.wanted != ("target",)
]
EACH_LOSS = [Case(name, shape=(9, 19), wanted=row.wanted[-1]) for name, row in LOSSES.items()]


@pytest.mark.parametrize("ones", [False, True], ids=["random", "ones"])
@pytest.mark.parametrize("case", GRADED, ids=str)
def test_second_backward_gives_the_same_bits(case: Case, ones: bool, device: str) -> None:
    """Also when the first result was overwritten, and with another grad_output in between."""
    inputs = draw(replace(case, grad_output="ones" if ones else "random"), device)
    x, t, leaves = inputs.leaves()
    loss = inputs.call(inputs.loss.ours, x, t)
    backward = partial(torch.autograd.grad, loss, leaves, retain_graph=True)
    first = backward(inputs.grad_output)
    kept = [grad.clone() for grad in first]
    doubled = backward(2 * inputs.grad_output)
    identical(list(first), kept)
    torch.testing.assert_close(list(doubled), [2 * grad for grad in first])
    for grad in (*first, *doubled):
        grad.fill_(math.nan)
    identical(list(backward(inputs.grad_output)), kept)


@pytest.mark.parametrize("case", GRADED, ids=str)
def test_accumulated_gradients_belong_to_the_user(case: Case, device: str) -> None:
    inputs = draw(case, device)
    x, t, leaves = inputs.leaves()
    loss = inputs.call(inputs.loss.ours, x, t).sum()

    def gradients() -> list[Tensor]:
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    def clear() -> None:
        for leaf in leaves:
            leaf.grad = None

    loss.backward(retain_graph=True)
    first = gradients()
    kept = [grad.clone() for grad in first]
    assert len(kept) == len(leaves)
    clear()
    loss.backward(retain_graph=True)
    identical(first, kept)
    identical(gradients(), kept)
    for grad in first:  # of input and target: changing one changes no other
        grad.mul_(3)
        first_of_second = gradients()
        identical(first_of_second, kept)
    identical(first, [3 * grad for grad in kept])
    loss.backward(retain_graph=True)
    torch.testing.assert_close(gradients(), [2 * grad for grad in kept])
    clear()
    loss.backward()
    identical(gradients(), kept)


@pytest.mark.parametrize("case", GRADED[::3], ids=str)
def test_backward_twice_needs_retain_graph(case: Case, device: str) -> None:
    inputs = draw(case, device)
    x, t, _ = inputs.leaves()
    loss = inputs.call(inputs.loss.ours, x, t).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("case", EACH_LOSS, ids=str)
def test_a_hook_that_raises_spoils_no_later_backward(case: Case, device: str) -> None:
    inputs = draw(case, device)
    inputs.grad_output = torch.tensor(3.0, device=device)
    _, *expected = inputs.loss_and_grads(inputs.loss.ours)
    x, t, leaves = inputs.leaves()
    loss = inputs.call(inputs.loss.ours, x, t)
    fail_in_backward(loss, inputs.grad_output)
    loss.backward(inputs.grad_output)
    torch.testing.assert_close([leaf.grad for leaf in leaves], expected)


def test_a_node_refuses_what_is_no_gradient_of_its_loss(device: str) -> None:
    for case in EACH_LOSS:
        inputs = draw(case, device)
        node = inputs.call(inputs.loss.ours, inputs.input.requires_grad_()).grad_fn
        assert node is not None
        for wrong in (torch.tensor(2), torch.ones(0), torch.ones(2)):
            with torch.no_grad(), pytest.raises(RuntimeError, match="grad_output must be one"):
                node(wrong.to(device))


@pytest.mark.parametrize("case", [c for c in GRADED if c.wanted == ("input", "target")], ids=str)
def test_one_of_two_gradients(case: Case, device: str) -> None:
    """Asked for alone, each is the same as together."""
    inputs = draw(case, device)
    _, *expected = inputs.loss_and_grads(inputs.loss.ours)
    for i in (0, 1, 0):
        x, t, leaves = inputs.leaves()
        loss = inputs.call(inputs.loss.ours, x, t)
        identical(torch.autograd.grad(loss, leaves[i], inputs.grad_output)[0], expected[i])
    x, t, leaves = inputs.leaves()
    loss = inputs.call(inputs.loss.ours, x, t)
    for i in (0, 1, 1, 0):
        backward = partial(torch.autograd.grad, loss, leaves[i], retain_graph=True)
        identical(backward(inputs.grad_output)[0], expected[i])


@pytest.mark.parametrize("loss", [name for name in LOSSES if len(LOSSES[name].wanted) > 1])
def test_one_tensor_as_input_and_as_target(loss: str, device: str) -> None:
    row = LOSSES[loss]
    for reduction in REDUCTIONS:
        grads = []
        x = torch.randn(9, 9, device=device)
        for function in (row.ours, row.native):
            leaf = x.clone().requires_grad_()
            (function(leaf, leaf.T, reduction=reduction).sum() * 0.7).backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("scale", [0.0, -1.0, 3.7, 65536.0])
@pytest.mark.parametrize("case", EACH_LOSS, ids=str)
def test_scaled_scalar_losses(case: Case, scale: float, device: str) -> None:
    inputs = draw(case, device)
    inputs.grad_output = torch.tensor(scale, device=device)
    _, *grads = inputs.loss_and_grads(inputs.loss.ours)
    _, *expected = inputs.loss_and_grads(inputs.loss.native)
    torch.testing.assert_close(grads, expected, rtol=1e-5, atol=1e-6 * abs(scale))
    x, t, leaves = inputs.leaves()
    (inputs.call(inputs.loss.ours, x, t) * scale).backward()
    identical([leaf.grad for leaf in leaves], grads)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_leaf_gradients_lie_as_torch_lays_them(loss: str, layout: str, device: str) -> None:
    for shape, reduction in itertools.product(((6, 7), (3, 7, 4), (2, 7, 3, 5)), REDUCTIONS):
        wanted = LOSSES[loss].wanted[-1]
        inputs = draw(Case(loss, "plain", F32, shape, reduction, wanted, layout), device)
        grads = []
        for function in (inputs.loss.ours, inputs.loss.native):
            x, t, leaves = inputs.leaves()
            inputs.call(function, x, t).sum().backward()
            grads.append([leaf.grad for leaf in leaves])
        assert [g.stride() for g in grads[0]] == [g.stride() for g in grads[1]]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("case", EACH_LOSS, ids=str)
def test_one_input_many_losses(case: Case, device: str) -> None:
    inputs = draw(case, device)

    def total(function: Function) -> list[Any]:
        x, t, leaves = inputs.leaves()
        losses = [inputs.call(function, x, t) * k for k in (1.0, 0.5, -2.0)]
        (losses[0] + losses[1] * losses[2]).backward()
        return [leaf.grad for leaf in leaves]

    torch.testing.assert_close(total(inputs.loss.ours), total(inputs.loss.native))


@pytest.mark.parametrize("case", EACH_LOSS, ids=str)
def test_no_graph_where_none_is_wanted(case: Case, device: str) -> None:
    inputs = draw(case, device)
    x, t, _ = inputs.leaves()
    expected = inputs.call(inputs.loss.native)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            loss = inputs.call(inputs.loss.ours, x, t)
        assert not loss.requires_grad and loss.grad_fn is None
        torch.testing.assert_close(loss, expected)
        assert loss.is_inference() == isinstance(context, torch.inference_mode)
    assert inputs.call(inputs.loss.ours).grad_fn is None
    with torch.inference_mode():
        made_inside = inputs.input.clone()
        torch.testing.assert_close(inputs.call(inputs.loss.ours, made_inside), expected)


def test_same_bits_with_and_without_a_graph(device: str) -> None:
    for case in GRADED:
        inputs = draw(case, device)
        x, t, _ = inputs.leaves()
        with_graph = inputs.call(inputs.loss.ours, x, t)
        identical(inputs.call(inputs.loss.ours), with_graph.detach())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss, variant", VARIANTS)
def test_changed_arguments_never_change_the_gradient_silently(
    loss: str, variant: str, reduction: str, device: str
) -> None:
    case = Case(loss, variant, F32, (9, 19), reduction, LOSSES[loss].wanted[-1])
    for changed in range(len(draw(case, device).tensors)):
        inputs = draw(case, device)
        _, *expected = inputs.loss_and_grads(inputs.loss.ours)
        leaf, target_leaf, leaves = inputs.leaves()
        x, t = leaf * 1, target_leaf * 1
        result = inputs.call(inputs.loss.ours, x, t)
        [x, t, *inputs.tensors[2:]][changed].zero_()
        try:
            grads = torch.autograd.grad(result, leaves, inputs.grad_output)
        except RuntimeError as refusal:
            assert "modified by an inplace operation" in str(refusal)
        else:
            identical(list(grads), expected)


@pytest.mark.parametrize("case", EACH_LOSS, ids=str)
def test_loss_may_be_changed_in_place(case: Case, device: str) -> None:
    for reduction in REDUCTIONS:
        inputs = draw(replace(case, reduction=reduction), device)
        results = []
        for function in (inputs.loss.ours, inputs.loss.native):
            x, t, leaves = inputs.leaves()
            loss = inputs.call(function, x, t)
            loss.mul_(3).add_(1)
            results.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaves)))
        torch.testing.assert_close(*results)


DIFFERENTIATED = [
    Case(loss, variant, F64, shape, reduction)
    for loss, variant in VARIANTS
    for shape, reduction in (((), "sum"), ((3, 2), "none"), ((2, 1, 3), "mean"))
]


def differentiable_arguments(case: Case, device: str) -> tuple[Function, list[Tensor]]:
    """The loss as a function of everything torch differentiates, away from where |d| has no
    derivative, and the values to start from."""
    inputs = draw(case, device)

    def loss(x: Tensor, t: Tensor) -> Tensor:
        return inputs.call(inputs.loss.ours, x, t)

    leaves = [inputs.input, inputs.target + 0.0123]
    return loss, [leaf.detach().clone().requires_grad_() for leaf in leaves]


@pytest.mark.parametrize("case", DIFFERENTIATED, ids=str)
def test_gradcheck_backward_and_forward_mode(case: Case, device: str) -> None:
    loss, leaves = differentiable_arguments(case, device)
    assert gradcheck(loss, leaves, check_forward_ad=True)
    x, t = leaves
    assert gradcheck(lambda x: loss(x, t.detach()), [x])
    assert gradcheck(lambda t: loss(x.detach(), t), [t])


@pytest.mark.parametrize("case", DIFFERENTIATED, ids=str)
def test_gradgradcheck(case: Case, device: str) -> None:
    loss, leaves = differentiable_arguments(case, device)
    assert gradgradcheck(loss, leaves)
    x, t = leaves
    assert gradgradcheck(lambda x: loss(x, t.detach()), [x])


@pytest.mark.parametrize("case", DIFFERENTIATED, ids=str)
def test_double_backward_like_torch(case: Case, device: str) -> None:
    """A gradient penalty; every leaf takes part, the incoming gradient too."""
    for wanted in (("input",), ("input", "target")):
        inputs = draw(replace(case, dtype=F32, wanted=wanted), device)
        results = []
        for function in (inputs.loss.ours, inputs.loss.native):
            x, t, leaves = inputs.leaves()
            g = inputs.grad_output.detach().clone().requires_grad_()
            loss = inputs.call(function, x, t)
            grads = torch.autograd.grad(loss, leaves, g, create_graph=True)
            assert all(grad.requires_grad for grad in grads)
            penalty = sum(grad.square().sum() for grad in grads) + loss.sum()
            second = torch.autograd.grad(penalty, [*leaves, g], retain_graph=True)
            results.append([*grads, *second, *torch.autograd.grad(loss, leaves, g)])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", [name for name in LOSSES if len(LOSSES[name].wanted) > 1])
def test_double_backward_of_an_operand_that_is_a_function_of_the_other(
    loss: str, reduction: str, device: str
) -> None:
    """As where a network's output is compared with its input."""
    row, values = LOSSES[loss], torch.randn(9, 4, device=device)
    for operands in (lambda x: (x.tanh(), x), lambda x: (x, x.tanh())):
        results = []
        for function in (row.ours, row.native):
            x = values.clone().requires_grad_()
            value = function(*operands(x), reduction=reduction).sum()
            (grad,) = torch.autograd.grad(value, x, create_graph=True)
            results.append((grad, *torch.autograd.grad(grad.square().sum(), x)))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("case", EACH_LOSS, ids=str)
def test_hooks_of_operands_are_called_once_with_create_graph(case: Case, device: str) -> None:
    inputs = draw(case, device)
    _, *expected = inputs.loss_and_grads(inputs.loss.ours)
    x, t, leaves = inputs.leaves()
    inner = [value * 1 for value in (x, t)]
    for value in (*inner, x, t):
        if value.requires_grad:
            value.register_hook(lambda grad: 2 * grad)
    loss = inputs.call(inputs.loss.ours, *inner)
    grads = torch.autograd.grad(loss, leaves, inputs.grad_output, create_graph=True)
    torch.testing.assert_close([g.detach() for g in grads], [4 * grad for grad in expected])


@pytest.mark.parametrize("loss, variant", VARIANTS)
def test_gradient_to_every_target_and_none_to_weights(loss: str, variant: str) -> None:
    """Torch gives the first for all losses, and refuses the second."""
    for reduction in REDUCTIONS:
        inputs = draw(Case(loss, variant, F64, (9, 19), reduction), "cpu")
        for wanted in (("target",), ("input", "target")):
            inputs.wanted = wanted
            results = [inputs.loss_and_grads(f) for f in (inputs.loss.ours, inputs.loss.native)]
            torch.testing.assert_close(*results)
        for value in inputs.tensors[2:]:
            value.requires_grad_()
            for function in (inputs.loss.ours, inputs.loss.native):
                with pytest.raises(RuntimeError, match="weight"):
                    inputs.call(function)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("loss, variant", VARIANTS)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms_like_torch(
    loss: str, variant: str, transform: str, device: str
) -> None:
    inputs = draw(Case(loss, variant, F64, (3, 4)), device)
    results = [
        TRANSFORMS[transform](lambda x, f=function: inputs.call(f, x), inputs.input)
        for function in (inputs.loss.ours, inputs.loss.native)
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("loss", LOSSES)
def test_per_sample_gradients(loss: str, device: str) -> None:
    """vmap over inputs and targets together, as for per-sample gradients."""
    inputs = draw(Case(loss, shape=(6, 5)), device)
    per_sample, expected = (
        torch.func.vmap(torch.func.grad(function))(inputs.input, inputs.target)
        for function in (inputs.loss.ours, inputs.loss.native)
    )
    torch.testing.assert_close(per_sample, expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", EACH_LOSS, ids=str)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batched_grad_outputs(case: Case, reduction: str, device: str) -> None:
    """is_grads_batched, as torch.autograd.functional.jacobian(vectorize=True) uses it."""
    for dtype in (F32, BF16):
        inputs = draw(replace(case, dtype=dtype, shape=(3, 4), reduction=reduction), device)
        grad_outputs = torch.randn(5, *inputs.grad_output.shape, device=device).to(dtype)
        x, t, leaves = inputs.leaves()
        loss = inputs.call(inputs.loss.ours, x, t)
        backward = partial(torch.autograd.grad, loss, leaves, retain_graph=True)
        batched = backward(grad_outputs, is_grads_batched=True)
        one_by_one = zip(*(backward(g) for g in grad_outputs), strict=True)
        torch.testing.assert_close(list(batched), [torch.stack(grads) for grads in one_by_one])


@pytest.mark.parametrize("dual", ["input", "target"])
@pytest.mark.parametrize("loss, variant", VARIANTS)
def test_forward_mode_dual_tensors(loss: str, variant: str, dual: str, device: str) -> None:
    inputs = draw(Case(loss, variant, F64, (3, 4)), device)
    tangents = []
    with forward_ad.dual_level():
        for function in (inputs.loss.ours, inputs.loss.native):
            value = getattr(inputs, dual)
            made = forward_ad.make_dual(value, value.cos())
            tangents.append(forward_ad.unpack_dual(inputs.call(function, **{dual: made})).tangent)
    assert tangents[0] is not None
    torch.testing.assert_close(*tangents)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", EACH_LOSS, ids=str)
def test_forward_mode_through_backward(case: Case, reduction: str, device: str) -> None:
    """What arrives has a tangent, and so have the gradients, which are linear in it. (Some of
    torch's own operators refuse that.)"""
    inputs = draw(replace(case, reduction=reduction), device)
    tangent = torch.randn_like(inputs.grad_output)
    for primal in (inputs.grad_output, torch.ones_like(tangent)):
        x, t, leaves = inputs.leaves()
        loss = inputs.call(inputs.loss.ours, x, t)
        with forward_ad.dual_level():
            duals = torch.autograd.grad(loss, leaves, forward_ad.make_dual(primal, tangent))
            pairs = [forward_ad.unpack_dual(dual) for dual in duals]
        x, t, leaves = inputs.leaves()
        loss = inputs.call(inputs.loss.native, x, t)
        for part, g in enumerate((primal, tangent)):
            expected = torch.autograd.grad(loss, leaves, g, retain_graph=True)
            torch.testing.assert_close([pair[part] for pair in pairs], list(expected))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", EACH_LOSS, ids=str)
def test_saved_tensor_hooks(case: Case, reduction: str, device: str) -> None:
    inputs = draw(replace(case, reduction=reduction), device)
    expected = inputs.loss_and_grads(inputs.loss.ours)
    packed: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.shape)
        return tensor.clone()

    for context in (
        torch.autograd.graph.saved_tensors_hooks(pack, torch.clone),
        torch.autograd.graph.save_on_cpu(),
    ):
        with context:
            identical(inputs.loss_and_grads(inputs.loss.ours), expected)
    assert packed, "nothing was saved for backward where hooks can see it"


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("case", EACH_LOSS, ids=str)
def test_checkpointing(case: Case, use_reentrant: bool, device: str) -> None:
    inputs = draw(case, device)
    _, *expected = inputs.loss_and_grads(inputs.loss.ours)
    x, t, leaves = inputs.leaves()
    call = partial(inputs.call, inputs.loss.ours)
    loss = checkpoint(call, x, t, use_reentrant=use_reentrant)
    assert isinstance(loss, Tensor)
    loss.backward(inputs.grad_output)
    identical([leaf.grad for leaf in leaves], expected)


@pytest.mark.parametrize("case", EACH_LOSS, ids=str)
def test_anomaly_mode_and_graph_hooks(case: Case, device: str) -> None:
    inputs = draw(case, device)
    _, *expected = inputs.loss_and_grads(inputs.loss.ours)
    x, t, leaves = inputs.leaves()
    seen = []

    def doubled(grad: Tensor) -> Tensor:
        seen.append(grad)
        return 2 * grad

    with torch.autograd.set_detect_anomaly(True):
        loss = inputs.call(inputs.loss.ours, x, t)
        loss.register_hook(doubled)
        loss.backward(inputs.grad_output)
    identical(seen, [inputs.grad_output])
    torch.testing.assert_close([leaf.grad for leaf in leaves], [2 * grad for grad in expected])


# ------------------------------------------------------------------ dtypes, autocast, loss scales


@pytest.mark.level
@pytest.mark.parametrize("target_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss, variant", VARIANTS)
def test_mixed_dtypes_like_torch_with_and_without_autocast(
    loss: str, variant: str, dtype: torch.dtype, target_dtype: torch.dtype, device: str
) -> None:
    """Torch's dtypes, torch's refusals; a float32 loss of 16-bit numbers is as accurate as in
    float32, and its gradients are rounded once. Weights have the dtype of the input or float32."""
    has_weights = any(callable(value) for value in LOSSES[loss].variants[variant].values())
    for case, autocast, weight_dtype in itertools.product(
        cases(loss, variant, dtype=[dtype], shape=[(3, 29)], reduction=REDUCTIONS),
        (None, BF16),
        (dtype, F32) if has_weights and dtype.itemsize == 2 else (dtype,),
    ):
        inputs = draw(case, device)
        inputs.target = inputs.target.to(target_dtype)
        if weight_dtype is not dtype:
            for name, value in inputs.options.items():
                if isinstance(value, Tensor):  # no number of 16 bits
                    inputs.options[name] = value.float() * 1.001

        def outcome(function: Function, inputs: Inputs = inputs, autocast: Any = autocast) -> Any:
            enabled = autocast is not None
            with torch.autocast(device, dtype=autocast or BF16, enabled=enabled):
                try:
                    return inputs.loss_and_grads(function)
                except RuntimeError as refusal:
                    return refusal

        ours, theirs = outcome(inputs.loss.ours), outcome(inputs.loss.native)
        if isinstance(theirs, RuntimeError):
            assert isinstance(ours, RuntimeError), f"{case}: torch refuses: {theirs}"
            continue
        assert not isinstance(ours, RuntimeError), f"{case}: torch accepts: {ours}"
        expected = inputs.expected()
        grads = {"input": expected.grad, "target": expected.target_grad}
        truths = [
            (expected.loss, expected.loss_scale),
            *((grads[wanted], expected.grad_scale) for wanted in case.wanted),
        ]
        for name, actual, theirs_, (truth, scale) in zip(
            ("loss", *case.wanted), ours, theirs, truths, strict=True
        ):
            assert (actual.dtype, actual.shape) == (theirs_.dtype, theirs_.shape), (case, name)
            # grad_output came rounded to the dtype of the loss, unless that was float64's.
            label = f"{case}, {target_dtype}, {weight_dtype}, autocast {autocast}: {name}"
            assert_accurate(label, actual, [theirs_], truth, scale, actual.dtype)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("loss_scale", [1.0, 65536.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_scale_keeps_half_gradients_from_vanishing(
    loss: str, loss_scale: float, autocast: bool, device: str
) -> None:
    """The scale arrives with grad_output, after a gradient made in the forward pass could already
    have vanished."""
    case = Case(loss, "plain", F16, (2**18,), "mean", LOSSES[loss].wanted[-1])
    inputs = draw(case, device)
    if not inputs.loss.takes_logits:
        inputs.target = inputs.input + (1e-2 * torch.randn(2**18, device=device)).half()
    inputs.grad_output = torch.tensor(loss_scale, device=device)
    if not autocast:
        inputs.grad_output = inputs.grad_output.clamp(max=2.0**15)
    with torch.autocast(device, dtype=F16, enabled=autocast):
        _, *grads = inputs.loss_and_grads(inputs.loss.ours)
        _, *theirs = inputs.loss_and_grads(inputs.loss.native)
    expected = inputs.expected()
    truths = [expected.grad, expected.target_grad]
    for ours, peer, truth in zip(grads, theirs, truths[: len(grads)], strict=True):
        assert truth is not None and ours.dtype == F16
        assert ((peer != 0) <= (ours != 0)).all(), "a gradient vanished that torch keeps"
        assert_accurate(str(case), ours, [peer], truth, expected.grad_scale, F16)


# ------------------------------------------------------------------ the same bits, always


DETERMINISTIC = [
    Case(loss, variant, dtype, shape, reduction, LOSSES[loss].wanted[-1], layout)
    for loss, variant in VARIANTS
    for dtype, shape, reduction, layout in (
        (F32, (100003,), "mean", "contiguous"),
        (BF16, (33, 4097), "sum", "contiguous"),
        (F64, (4097, 9), "mean", "transposed"),
        (F32, (3, 16385), "none", "row padding"),
    )
]


@pytest.mark.parametrize("case", DETERMINISTIC, ids=str)
def test_same_bits_run_to_run_and_for_any_thread_count(case: Case, device: str) -> None:
    inputs = draw(case, device)
    torch._C._set_deterministic_algorithms(False)
    results = []
    for threads in (1, 2, 3, 2, 1):
        torch.set_num_threads(threads)
        results.append(inputs.loss_and_grads(inputs.loss.ours))
    for result in results[1:]:
        identical(result, results[0])


def test_elements_do_not_depend_on_their_neighbours(device: str) -> None:
    for loss in LOSSES:
        inputs = draw(Case(loss, "plain", F32, (101,), "none"), device)
        results = inputs.loss_and_grads(inputs.loss.ours)
        order = torch.randperm(101, device=device)
        tensors = ("input", "target", "grad_output")
        shuffled = replace(inputs, **{name: getattr(inputs, name)[order] for name in tensors})
        identical(shuffled.loss_and_grads(inputs.loss.ours), tuple(r[order] for r in results))


# ------------------------------------------------------------------ memory


@pytest.mark.usefixtures("cpu_only")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss, variant", VARIANTS)
def test_nothing_but_the_results_is_allocated(loss: str, variant: str, dtype: torch.dtype) -> None:
    """No difference, no copy, whatever the strides, and no expanded weight."""
    layouts = ("contiguous", "channels_last", "transposed", "element step", "expanded rows")
    for i, case in enumerate(cases(loss, variant, shape=[(129, 200)], reduction=REDUCTIONS)):
        layout, target_layout = layouts[i % 5], layouts[i // 5 % 5]
        inputs = draw(replace(case, dtype=dtype, layout=layout, target_layout=target_layout), "cpu")
        inputs.loss_and_grads(inputs.loss.ours)
        one = 129 * 200 * dtype.itemsize
        losses = one if case.reduction == "none" else 0
        peak = peak_memory(partial(inputs.loss_and_grads, inputs.loss.ours))
        assert peak <= losses + one * len(case.wanted) + 4096, case
        peak = peak_memory(partial(inputs.call, inputs.loss.ours))
        assert peak <= losses + 4096, case


@pytest.mark.usefixtures("cpu_only")
@pytest.mark.parametrize("loss", LOSSES)
def test_autocast_copies_no_input(loss: str) -> None:
    inputs = draw(Case(loss, "plain", BF16, (129, 200)), "cpu")
    for target in (inputs.target, inputs.target.float()):
        inputs.target = target
        with torch.autocast("cpu", dtype=BF16):
            inputs.loss_and_grads(inputs.loss.ours)
            peak = peak_memory(partial(inputs.loss_and_grads, inputs.loss.ours))
        assert peak <= inputs.input.nbytes + 4096


def large_gradient(loss: Loss, seed: int) -> tuple[Tensor, Tensor]:
    """A gradient of 2 MB and what it should be."""
    torch.manual_seed(seed)
    x, t = torch.randn(512, 1000, requires_grad=True), torch.rand(512, 1000)
    (expected,) = torch.autograd.grad(loss.native(x, t), x)
    (gradient,) = torch.autograd.grad(loss.ours(x, t), x)
    return gradient, expected


def test_gradients_do_not_share_memory() -> None:
    for row in LOSSES.values():
        kept = [large_gradient(row, seed) for seed in range(3)]
        assert len({gradient.data_ptr() for gradient, _ in kept}) == 3
        torch.testing.assert_close(*zip(*kept, strict=True))

    def check_many(thread: int) -> None:
        for repetition, row in enumerate(LOSSES.values()):
            torch.testing.assert_close(*large_gradient(row, 10 * thread + repetition))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(check_many, range(4)))


@pytest.mark.level
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_gradients_of_confident_logits(device: str, dtype: torch.dtype) -> None:
    """They are small, and as exact as others; the measure over all elements does not see them."""
    x = (87 * (2 * torch.rand(10_000, dtype=dtype, device=device) - 1)).requires_grad_()
    loss = F.binary_cross_entropy_with_logits(x, torch.zeros_like(x), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(
        gradient.double(), x.detach().double().sigmoid(), rtol=4 * torch.finfo(dtype).eps, atol=0
    )


# ------------------------------------------------------------------ speed, by what can be counted


@pytest.mark.level
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flag is x86's")
@pytest.mark.usefixtures("cpu_only")
@pytest.mark.parametrize("numel", [1, 4096, 5000])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_ordinary_numbers_make_no_subnormal_ones(
    loss: str, dtype: torch.dtype, reduction: str, numel: int
) -> None:
    """A subnormal result costs a processor more than a hundred cycles."""
    flags, underflow = ctypes.CDLL("libm.so.6"), 0x10
    input = torch.randn(numel, dtype=dtype).mul_(20).clamp_(-60, 60).requires_grad_()
    target = torch.rand(numel).to(dtype)
    flags.feclearexcept(underflow)
    value = getattr(F, loss)(input, target, reduction=reduction)
    (gradient,) = torch.autograd.grad(value, input, torch.full_like(value, 0.75))
    assert not flags.fetestexcept(underflow)
    flags.feclearexcept(underflow)
    gradient.detach().float().mul_(1e-38).mul_(1e-3)
    assert flags.fetestexcept(underflow) or not gradient.any()


# ------------------------------------------------------------------ living inside torch

EVERYWHERE = [
    Case(loss, variant, dtype, shape, reduction, LOSSES[loss].wanted[-1])
    for loss, variant in VARIANTS
    for dtype, shape, reduction in ((BF16, (4, 7), "none"), (F32, (2, 7, 3), "mean"))
]


def on_other_tensors(inputs: Inputs, convert: Callable[[Tensor], Tensor]) -> Inputs:
    options = {k: convert(v) if isinstance(v, Tensor) else v for k, v in inputs.options.items()}
    return replace(
        inputs, input=convert(inputs.input), target=convert(inputs.target), options=options
    )


@pytest.mark.parametrize("case", EVERYWHERE, ids=str)
def test_meta_tensors(case: Case) -> None:
    inputs = draw(case, "cpu")
    meta = on_other_tensors(inputs, lambda t: t.to("meta"))
    x, t, leaves = meta.leaves()
    loss = meta.call(inputs.loss.ours, x, t)
    expected = inputs.call(inputs.loss.native)
    assert loss.is_meta and (loss.dtype, loss.shape) == (expected.dtype, expected.shape)
    loss.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.shape == leaf.shape for leaf in leaves)


@pytest.mark.parametrize("case", EVERYWHERE, ids=str)
def test_fake_tensors(case: Case) -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    inputs = draw(case, "cpu")
    expected = inputs.call(inputs.loss.native)
    with FakeTensorMode() as mode:
        fake = on_other_tensors(inputs, mode.from_tensor)
        x, t, leaves = fake.leaves()
        loss = fake.call(inputs.loss.ours, x, t)
        loss.sum().backward()
    assert isinstance(loss, FakeTensor)
    assert (loss.dtype, loss.shape) == (expected.dtype, expected.shape)
    assert all(isinstance(leaf.grad, FakeTensor) for leaf in leaves)
    assert all(leaf.grad.dtype == case.dtype for leaf in leaves)


@pytest.mark.parametrize("loss, variant", VARIANTS)
def test_tensor_subclasses(loss: str, variant: str) -> None:
    inputs = draw(Case(loss, variant), "cpu")
    arguments = {"input": inputs.input, "target": inputs.target, **inputs.options}
    expected = inputs.loss.native(**arguments)
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            continue
        Logged.seen.clear()
        result = inputs.loss.ours(**{**arguments, name: value.as_subclass(Logged)})
        assert inputs.loss.native in Logged.seen
        assert type(result) is Logged
        torch.testing.assert_close(result.as_subclass(Tensor), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_parameters_and_buffers_are_ordinary_tensors(loss: str) -> None:
    inputs = draw(Case(loss), "cpu")
    x = nn.Parameter(inputs.input)
    result = inputs.call(inputs.loss.ours, x, nn.Buffer(inputs.target))
    result.backward()
    assert type(result) is Tensor
    torch.testing.assert_close(result, inputs.call(inputs.loss.native, x))


@pytest.mark.parametrize("loss, variant", VARIANTS)
def test_torch_function_mode_sees_the_call(loss: str, variant: str) -> None:
    inputs = draw(Case(loss, variant), "cpu")
    expected = inputs.call(inputs.loss.native)
    with FunctionsSeen() as mode:
        result = inputs.call(inputs.loss.ours)
    torch.testing.assert_close(result, expected)
    assert [function.__name__ for function in mode.seen] == [loss]


@pytest.mark.parametrize("case", EACH_LOSS, ids=str)
def test_torch_dispatch_mode_sees_operators_both_ways(case: Case) -> None:
    for reduction, dtype in itertools.product(REDUCTIONS, (F32, BF16, F16)):
        inputs = draw(replace(case, reduction=reduction, dtype=dtype), "cpu")
        expected, *expected_grads = inputs.loss_and_grads(inputs.loss.ours)
        x, t, leaves = inputs.leaves()
        with OperatorsSeen() as mode:
            loss = inputs.call(inputs.loss.ours, x, t)
            assert mode.seen, "the forward pass is invisible"
            mode.seen.clear()
            loss.backward(inputs.grad_output)
            assert mode.seen, "the backward pass is invisible"
        torch.testing.assert_close(loss.detach(), expected)
        torch.testing.assert_close([leaf.grad for leaf in leaves], expected_grads)


@pytest.mark.parametrize("loss", LOSSES)
def test_compiled_without_a_code_generator(loss: str, device: str) -> None:
    """Every variant and reduction in one graph, with the gradient to input and target."""
    row = LOSSES[loss]
    many = [
        draw(Case(loss, variant, F32, (9, 19), reduction), device)
        for variant, reduction in itertools.product(row.variants, REDUCTIONS)
    ]
    values = many[0].input, many[0].target
    wanted = [name in row.wanted[-1] for name in ("input", "target")]

    def step(x: Tensor, t: Tensor) -> Tensor:
        losses = [row.ours(x * 2, t, **inputs.options).sum() for inputs in many]
        return torch.stack(losses)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, step):
        leaves = [v.clone().requires_grad_(w) for v, w in zip(values, wanted, strict=True)]
        losses = function(*leaves)
        losses.backward(torch.linspace(0.5, 2, len(many), device=device))
        results.append((losses.detach(), *(leaf.grad for leaf in leaves)))
    torch.testing.assert_close(*results)


def test_threads_of_a_program_may_share_it() -> None:
    inputs = [
        draw(Case(loss, variant, F32, (65, 1 + 13 * i)), "cpu")
        for i, (loss, variant) in enumerate(VARIANTS)
    ]

    def work(i: Inputs) -> tuple[Tensor, ...]:
        return i.loss_and_grads(i.loss.ours)

    expected = [work(i) for i in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            identical(list(pool.map(work, inputs)), expected)


@pytest.mark.parametrize("case", GRADED, ids=str)
def test_graph_node_is_readable(case: Case) -> None:
    """It is ours, so the kernels took the call, and it leads on to what made its inputs."""
    inputs = draw(case, "cpu")
    node = "L1LossBackward0" if inputs.options.get("beta") == 0 else inputs.loss.node
    x, t, leaves = inputs.leaves()
    loss = inputs.call(inputs.loss.ours, x.sin(), t.exp() if t.requires_grad else t)
    assert loss.grad_fn is not None
    assert loss.grad_fn.name() == node
    assert node in repr(loss.grad_fn) and node in repr(loss)
    assert type(loss.grad_fn) is not type(inputs.call(inputs.loss.native, x).grad_fn)
    following = [node.name() for node, _ in loss.grad_fn.next_functions if node is not None]
    assert following == ["SinBackward0", "ExpBackward0"][: len(leaves)]


# ------------------------------------------------------------------ the module


def constructions(loss: Loss) -> list[dict[str, Any]]:
    shared = [{}, {"reduction": "sum"}, {"reduction": "none"}]
    deprecated = [
        {"size_average": False},
        {"size_average": True},
        {"reduce": False},
        {"size_average": False, "reduce": True},
    ]
    varied = [draw(Case(loss.function, variant), "cpu").options for variant in loss.variants]
    return [*shared, *(deprecated if loss.has_deprecated_options else []), *varied]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.filterwarnings("ignore:size_average and reduce args")
def test_module_like_torch(loss: str) -> None:
    row = LOSSES[loss]
    inputs = draw(Case(loss), "cpu")
    x, t = inputs.input, inputs.target
    for options in constructions(row):
        ours, theirs = row.our_module(**options), row.native_module(**options)
        expected = theirs(x, t)
        assert isinstance(ours, row.native_module)
        assert repr(ours) == repr(theirs)
        assert ours.__dict__.keys() == theirs.__dict__.keys()
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        copies = (ours, copy.deepcopy(ours), copy.copy(ours), pickle.loads(pickle.dumps(ours)))
        for copied in copies:
            assert type(copied) is row.our_module
            copied._apply(torch.clone)  # unpickled memory is not a device's
            torch.testing.assert_close(copied(x, t), expected)
        theirs.load_state_dict(ours.state_dict())
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(x, t), expected)
        buffer = io.BytesIO()
        torch.save(ours, buffer)
        buffer.seek(0)
        torch.testing.assert_close(torch.load(buffer, weights_only=False)(x, t), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_names_and_signatures_are_torchs(loss: str) -> None:
    row = LOSSES[loss]
    for ours, theirs in ((row.ours, row.native), (row.our_module, row.native_module)):
        parameters = [inspect.signature(f).parameters.values() for f in (ours, theirs)]
        told = [[(p.name, p.kind, p.default) for p in of] for of in parameters]
        assert told[0] == told[1]
        assert ours.__name__ == theirs.__name__ and ours.__doc__
    assert loss in F.__all__
    assert row.module in fusedstep.__all__ and row.module in fusedstep.nn.__all__
    assert row.our_module is getattr(fusedstep.nn, row.module)


@pytest.mark.parametrize("loss", LOSSES)
def test_arguments_by_position_like_torch(loss: str) -> None:
    row = LOSSES[loss]
    inputs = draw(Case(loss), "cpu")
    x, t, weight = inputs.input, inputs.target, torch.rand(5, 7)
    by_name = {
        "weight": weight, "size_average": None, "reduce": None, "reduction": "sum",
        "pos_weight": weight, "beta": 0.7, "delta": 0.7,
    }  # fmt: skip
    names = list(inspect.signature(row.native).parameters)[2:]
    arguments = [x, t, *(by_name[name] for name in names)]
    for count in range(2, len(arguments) + 1):
        torch.testing.assert_close(row.ours(*arguments[:count]), row.native(*arguments[:count]))
    torch.testing.assert_close(row.ours(target=t, input=x), row.native(x, t))


@pytest.mark.parametrize("options", [{"size_average": False}, {"reduce": False}], ids=str)
@pytest.mark.parametrize("loss", [loss for loss in LOSSES if LOSSES[loss].has_deprecated_options])
def test_deprecated_arguments_of_the_function(loss: str, options: dict[str, bool]) -> None:
    inputs = draw(Case(loss), "cpu")
    x, t = inputs.input, inputs.target
    with pytest.warns(UserWarning, match="please use reduction=") as caught:
        result = inputs.loss.ours(x, t, **options)
    with pytest.warns(UserWarning) as expected:
        torch.testing.assert_close(result, inputs.loss.native(x, t, **options))
    assert [str(w.message) for w in caught] == [str(w.message) for w in expected]


@pytest.mark.parametrize("loss, variant", VARIANTS)
def test_module_follows_its_device_dtype_and_mode(loss: str, variant: str) -> None:
    inputs = draw(Case(loss, variant), "cpu")
    row = inputs.loss
    ours, theirs = row.our_module(**inputs.options), row.native_module(**inputs.options)
    x, t = inputs.input.double(), inputs.target.double()
    for module in (ours, theirs):
        module.double().eval().requires_grad_(False)
    torch.testing.assert_close(ours(x, t), theirs(x, t))
    calls = []
    ours.register_forward_hook(lambda module, args, output: calls.append(output))
    result = nn.ModuleList([ours])[0](x, t)
    identical(calls, [result])
    for module in (ours, theirs):
        module.reduction = "none"
        if row.parameter:
            setattr(module, row.parameter, 0.3)
    torch.testing.assert_close(ours(x, t), theirs(x, t))


@pytest.mark.parametrize("loss", LOSSES)
def test_module_may_be_subclassed(loss: str) -> None:
    row = LOSSES[loss]

    class Doubled(row.our_module):  # type: ignore[misc, name-defined]
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return 2 * super().forward(input, target)

    inputs = draw(Case(loss), "cpu")
    x = inputs.input.requires_grad_()
    result = Doubled(reduction="sum")(x, inputs.target)
    expected = 2 * row.native_module(reduction="sum")(x, inputs.target)
    torch.testing.assert_close(result, expected)
    gradients = [torch.autograd.grad(of, x)[0] for of in (result, expected)]
    torch.testing.assert_close(*gradients)
    for options in row.bad_options:
        outcomes = []
        for module in (row.our_module, row.native_module):
            try:
                outcomes.append(repr(module(**options)))
            except Exception as refusal:
                outcomes.append(repr(refusal))
        assert outcomes[0] == outcomes[1]


# ------------------------------------------------------------------ torch's own sample inputs


def check_sample(loss: Loss, *args: Any, **kwargs: Any) -> None:
    """Our loss and gradients against torch's on the same numbers in float64, or torch's own where
    it is torch that computes ours."""
    dtype = args[0].dtype
    for wanted in ((True, False), (True, True)):
        results = []
        for function, cast in (
            (loss.ours, detached), (loss.native, widened), (loss.native, detached),
        ):  # fmt: skip
            *pair, others = *tree_map(cast, args[:2]), tree_map(cast, args[2:])
            leaves = [v.clone().requires_grad_(w) for v, w in zip(pair, wanted, strict=True)]
            result = function(*leaves, *others, **tree_map(cast, kwargs))
            needed = [leaf for leaf in leaves if leaf.requires_grad]
            results.append((result.detach(), *torch.autograd.grad(result.sum(), needed)))
        for ours, wide, theirs in zip(*results, strict=True):
            assert ours.dtype == theirs.dtype == dtype
            if not torch.equal(ours, theirs):
                torch.testing.assert_close(ours, wide.to(dtype), equal_nan=True)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_torch_module_database(loss: str) -> None:
    pytest.importorskip("expecttest")  # which torch.testing._internal imports
    from torch.testing._internal.common_modules import module_db

    row = LOSSES[loss]
    (info,) = [info for info in module_db if info.module_cls is row.native_module]
    samples = [info.module_inputs_func(info, "cpu", dtype, True, True) for dtype in DTYPES]
    assert all(len(of_dtype) >= 4 for of_dtype in samples)
    for sample in itertools.chain(*samples):
        built, called = sample.constructor_input, sample.forward_input
        module = row.our_module(*built.args, **built.kwargs)
        check_sample(row, *called.args, **called.kwargs, **built.kwargs)
        arguments = {**built.kwargs, **called.kwargs}
        identical(module(*called.args, **called.kwargs), row.ours(*called.args, **arguments))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_torch_operator_database(loss: str) -> None:
    pytest.importorskip("expecttest")  # which torch.testing._internal imports
    from torch.testing._internal.common_methods_invocations import op_db

    row = LOSSES[loss]
    (info,) = [info for info in op_db if info.name == f"nn.functional.{loss}"]
    samples = [list(info.sample_inputs("cpu", dtype, requires_grad=True)) for dtype in DTYPES]
    assert all(len(of_dtype) >= 6 for of_dtype in samples)
    for sample in itertools.chain(*samples):
        check_sample(row, sample.input, *sample.args, **sample.kwargs)
    for sample in info.error_inputs("cpu") if info.error_inputs_func else ():
        arguments = (sample.sample_input.input, *sample.sample_input.args)
        compare_outcomes(row, lambda f, a=arguments, s=sample: f(*a, **s.sample_input.kwargs))


# ------------------------------------------------------------------ the operators

OPERATOR_SAMPLES = [
    *(
        Case(loss, variant, F32, (5, 7), REDUCTIONS[i % 3])
        for i, (loss, variant) in enumerate(dict(VARIANTS).items())  # the last of each loss
    ),
    Case("mse_loss", dtype=BF16, shape=(5, 7), reduction="none", layout="transposed"),
    Case("l1_loss", dtype=F64, shape=(2, 7, 3), layout="channels_last"),
]


@pytest.mark.parametrize("case", OPERATOR_SAMPLES, ids=str)
def test_opcheck(case: Case, device: str) -> None:
    inputs = draw(case, device)
    torch._C._set_deterministic_algorithms(False)
    arguments = operator_arguments(inputs)
    torch.testing.assert_close(operator()(*arguments), inputs.call(inputs.loss.ours))
    x, t, _ = replace(inputs, wanted=inputs.loss.wanted[-1]).leaves()
    torch.library.opcheck(operator(), (x, t, *arguments[2:]))


@pytest.mark.parametrize("case", OPERATOR_SAMPLES, ids=str)
def test_opcheck_of_forward_and_backward(case: Case, device: str) -> None:
    """The operators beneath, which have no gradient of their own."""
    inputs = draw(case, device)
    torch._C._set_deterministic_algorithms(False)
    loss, grad = inputs.loss_and_grads(inputs.loss.ours)
    for with_grad in (False, True)[: 1 if case.reduction == "none" else 2]:
        arguments = forward_arguments(inputs, loss.dtype, with_grad)
        torch.library.opcheck(operator("_forward"), arguments)
        outputs = operator("_forward")(*arguments)
        identical(outputs[0], loss)
        if with_grad:
            torch.testing.assert_close(outputs[1] * inputs.grad_output, grad)
    arguments = backward_arguments(inputs, inputs.grad_output)
    torch.library.opcheck(operator("_backward"), arguments)
    torch.testing.assert_close(operator("_backward")(*arguments), grad)


@pytest.mark.parametrize("loss", LOSSES)
def test_operators_refuse_tensors_that_do_not_fit(loss: str) -> None:
    """They are called with anything, and must read nothing that is not there."""
    inputs = draw(Case(loss), "cpu")
    many_dims = draw(Case(loss, shape=(2,) * 10), "cpu")
    many_dims.input = place(many_dims.input, steps=dict.fromkeys(range(10), 2))
    calls = [
        replace(inputs, target=inputs.target[:4]),
        replace(inputs, target=inputs.target.long()),
        replace(inputs, target=inputs.target.double()),
        replace(inputs, target=inputs.target.to("meta")),
        replace(inputs, target=inputs.target.to_sparse()),
        replace(inputs, input=inputs.input.long()),
        many_dims,
    ]
    if inputs.loss.takes_logits:
        weights = (torch.ones(4), torch.ones(7).double(), torch.ones(7).long(), torch.ones(3, 5, 7))
        calls[:0] = [
            replace(inputs, options={**inputs.options, name: weight})
            for name, weight in itertools.product(("weight", "pos_weight"), weights)
        ]
    refused = partial(pytest.raises, (RuntimeError, ValueError, TypeError))
    for wrong in calls:
        with refused():
            operator("_forward")(*forward_arguments(wrong, F32, True))
        with refused():
            operator("_backward")(*backward_arguments(wrong, torch.ones(())))
    for dtype in (F64, BF16, torch.int64):
        with refused():
            operator("_forward")(*forward_arguments(inputs, dtype, True))
    for grad_output in (
        torch.ones(4),
        torch.ones(7),
        torch.ones(5, 7).double(),
        torch.ones(5, 7).long(),
    ):
        with refused():
            operator("_backward")(*backward_arguments(inputs, grad_output))


@pytest.mark.parametrize("loss", LOSSES)
def test_operators_refuse_numbers_and_weights_that_the_loss_does_not_have(
    loss: str, device: str
) -> None:
    inputs = draw(Case(loss), device)
    x, t, weight, pos_weight, kind, reduction, parameter = operator_arguments(inputs)
    tensors = (x, t, weight, pos_weight)
    grad_output = torch.ones((), device=device)

    def refused(message: str, *arguments: Any) -> None:
        with pytest.raises(RuntimeError, match=message):
            operator("_forward")(*arguments, F32, True)
        with pytest.raises(RuntimeError, match=message):
            operator("_backward")(grad_output, *arguments)

    for wrong in (-1, len(LOSSES), 99, 2**32):
        refused(f"no kind {wrong}", *tensors, wrong, reduction, parameter)
    for wrong in (-1, 3, 7, 2**32):
        refused(f"no reduction {wrong}", *tensors, kind, wrong, parameter)
    if inputs.loss.parameter:
        for size in (0.0, -1.0, math.nan):
            refused("a parameter of", *tensors, kind, reduction, size)
    if not inputs.loss.takes_logits:
        one = torch.ones(7, device=device)
        refused(": weight is for", x, t, one, None, kind, reduction, parameter)
        refused(": pos_weight is for", x, t, None, one, kind, reduction, parameter)


# ------------------------------------------------------------------ shapes that broadcast

BROADCAST = (((5, 7), (7,)), ((5, 7), (5, 1)), ((7,), (5, 7)), ((5, 1), (1, 7)), ((5, 7), ()))


@pytest.mark.parametrize("shape, target_shape", [*BROADCAST, ((64, 1), (64,))])
@pytest.mark.parametrize("loss", LOSSES)
def test_broadcasting_like_torch_with_its_warning(
    loss: str, shape: Shape, target_shape: Shape
) -> None:
    """Once for each call, and torch's words; or torch's refusal."""
    row = LOSSES[loss]
    x, t = torch.randn(shape), torch.rand(target_shape)

    def outcome(function: Function) -> Any:
        leaves = [v.clone().requires_grad_() for v in (x, t)]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                result = function(*leaves)
            except ValueError as refusal:
                return str(refusal)
        grads = torch.autograd.grad(result, leaves)
        return [(w.category, str(w.message)) for w in caught], (result.detach(), *grads)

    for ours, theirs in ((row.ours, row.native), (row.our_module(), row.native_module())):
        expected, actual = outcome(theirs), outcome(ours)
        if isinstance(expected, str):
            assert actual == expected
            continue
        assert actual[0] == expected[0] and len(actual[0]) == 1
        torch.testing.assert_close(actual[1], expected[1])


# ------------------------------------------------------------------ bad and odd input

X, T, PAIRS = torch.randn(3, 4), torch.rand(3, 4), torch.rand(4, 2)
CALLS: dict[str, Callable[[Function], Tensor]] = {
    "list for input": lambda f: f([1.0, 2.0], T),
    "array for input": lambda f: f(X.numpy(), T),
    "number for input": lambda f: f(1.0, 2.0),
    "no target": lambda f: f(X, None),
    "list for target": lambda f: f(X, [1.0]),
    "number for target": lambda f: f(X, 1.0),
    "devices": lambda f: f(X, T.to("meta")),
    "devices, the other way": lambda f: f(X.to("meta"), T),
    "reduction": lambda f: f(X, T, reduction="avg"),
    "no reduction": lambda f: f(X, T, reduction=None),
    "empty reduction": lambda f: f(X, T, reduction=""),
    "list for reduction": lambda f: f(X, T, reduction=["mean"]),
    "shapes": lambda f: f(X, T[:, :3]),
    "numbers of dimensions": lambda f: f(X, torch.rand(2, 2, 4)),
    "unknown option": lambda f: f(X, T, alpha=0.1),
    "no arguments": lambda f: f(),
    "long": lambda f: f(X.long(), T.long()),
    "long, unreduced": lambda f: f(X.long(), T.long(), reduction="none"),
    "long target": lambda f: f(X, T.long()),
    "bool": lambda f: f(X > 0, T > 0.5),
    "bool target": lambda f: f(X, T > 0.5),
    "complex": lambda f: f(X + 1j, T + 2j),
    "complex target": lambda f: f(X, T + 2j),
    "sparse": lambda f: f(X.to_sparse(), T.to_sparse()),
    "sparse input": lambda f: f(X.to_sparse(), T),
    "sparse target": lambda f: f(X, T.to_sparse()),
    "float8": lambda f: f(X.to(torch.float8_e4m3fn), T.to(torch.float8_e4m3fn)),
    "weight of the same shape": lambda f: f(X, T, weight=T + 1),
    "weight, summed": lambda f: f(X, T, weight=T + 1, reduction="sum"),
    "weight, unreduced": lambda f: f(X, T, weight=T + 1, reduction="none"),
    "weight, reduction": lambda f: f(X, T, weight=T + 1, reduction="avg"),
    "weight that broadcasts": lambda f: f(X, T, weight=T[0] + 1),
    "weight that does not": lambda f: f(X, T, weight=T[:, :3]),
    "number for weight": lambda f: f(X, T, weight=2.0),
    "list for weight": lambda f: f(X, T, weight=[1.0] * 4),
    "double weight": lambda f: f(X, T, weight=T.double()),
    "half weight": lambda f: f(X, T, weight=T.half()),
    "long weight": lambda f: f(X, T, weight=T.long() + 2),
    "meta weight": lambda f: f(X, T, weight=T.to("meta")),
    "double pos_weight": lambda f: f(X, T, pos_weight=T.double()),
    "half pos_weight": lambda f: f(X, T, pos_weight=T.half()),
    "strided pos_weight": lambda f: f(X, T, pos_weight=PAIRS[:, 1]),
    "expanded weight": lambda f: f(X, T, weight=torch.tensor(2.0).expand(3, 4)),
    "weight of more dimensions": lambda f: f(X, T, weight=T[None]),
    "tensor for beta": lambda f: f(X, T, beta=torch.tensor(0.5)),
    "tensor for delta": lambda f: f(X, T, delta=torch.tensor(0.5)),
    "integer beta": lambda f: f(X, T, beta=1),
    "integer delta": lambda f: f(X, T, delta=1),
    "bool for beta": lambda f: f(X, T, beta=True),
    "integer beta of nothing": lambda f: f(X, T, beta=0),
    "negated view": lambda f: f(torch._neg_view(X), T),
    "negated target": lambda f: f(X, torch._neg_view(T)),
    "real part": lambda f: f((X + 1j).real, T),
    "imaginary part of a conjugate": lambda f: f(X, torch.conj(X + 1j * T).imag),
    "transposed": lambda f: f(X.view(3, 2, 2).mT, T.view(3, 2, 2).mT),
}  # fmt: skip


def compare_outcomes(loss: Loss, call: Callable[[Function], Any], needs_grad: bool = False) -> None:
    """Torch's exception types; where torch accepts, so do we, with the same result and
    gradients."""

    def outcome(function: Function) -> tuple[list[Tensor], Exception | None]:
        leaves: list[Tensor] = []

        def traced(*args: Any, **kwargs: Any) -> Tensor:
            args_ = list(args)
            for i, value in enumerate(args_[:2]):
                if needs_grad and isinstance(value, Tensor) and value.is_floating_point():
                    args_[i] = value.detach().requires_grad_()
                    leaves.append(args_[i])
            return function(*args_, **kwargs)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                result = call(traced)
                grads = torch.autograd.grad(result.sum(), leaves) if leaves else ()
            except Exception as refusal:
                return [], refusal
        return [value.detach() for value in (result, *grads)], None

    (ours, refusal), (theirs, expected) = outcome(loss.ours), outcome(loss.native)
    assert type(refusal) is type(expected), f"{refusal!r} instead of {expected!r}"
    assert refusal is None or str(refusal)
    if not any(value.is_meta for value in theirs):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert [value.dtype for value in ours] == [value.dtype for value in theirs]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("loss", LOSSES)
def test_bad_and_odd_input_like_torch(loss: str, name: str) -> None:
    kept = [t.clone() for t in (X, T)]
    for needs_grad in (False, True):
        compare_outcomes(LOSSES[loss], CALLS[name], needs_grad)
    identical([X, T], kept)


@pytest.mark.parametrize("loss", LOSSES)
def test_bad_options_like_torch(loss: str) -> None:
    for options, needs_grad in itertools.product(LOSSES[loss].bad_options, (False, True)):
        compare_outcomes(LOSSES[loss], lambda f, o=options: f(X, T, **o), needs_grad)


# ------------------------------------------------------------------ CUDA


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("loss, variant", VARIANTS)
def test_one_launch_forward_and_at_most_one_backward(
    loss: str, variant: str, dtype: torch.dtype, launches: Any, device: str
) -> None:
    layouts = ("contiguous", "transposed", "element step", "unaligned")
    shapes = ((3, 5), (65, 131), (3, 16385))
    for i, case in enumerate(cases(loss, variant, shape=shapes, reduction=REDUCTIONS)):
        inputs = draw(replace(case, dtype=dtype, layout=layouts[i % 4]), device)
        x, t, leaves = inputs.leaves()
        with launches() as forward:
            result = inputs.call(inputs.loss.ours, x, t)
        with launches() as backward:
            grads = torch.autograd.grad(result, leaves, inputs.grad_output)
        assert len(forward) == 1, (case, forward)
        assert len(backward) <= 1, (case, backward)
        assert all(grad.isfinite().all() for grad in grads)
        with launches() as alone, torch.no_grad():
            inputs.call(inputs.loss.ours)
        assert len(alone) == 1, (case, alone)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("loss, variant", VARIANTS)
def test_nothing_waits_for_the_device(
    loss: str, variant: str, dtype: torch.dtype, device: str
) -> None:
    many = cases(loss, variant, dtype=[dtype], shape=[(64, 10), (513, 4097)], reduction=REDUCTIONS)
    inputs = [draw(case, device) for case in many]
    inputs[0].loss_and_grads(inputs[0].loss.ours)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for each in inputs:
            each.loss_and_grads(each.loss.ours)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss, variant", VARIANTS)
def test_a_captured_loss_replays_on_new_numbers(
    loss: str, variant: str, reduction: str, device: str
) -> None:
    case = Case(loss, variant, F32, (513, 4097), reduction, LOSSES[loss].wanted[-1])
    static = draw(case, device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        static.loss_and_grads(static.loss.ours)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = static.loss_and_grads(static.loss.ours)
    for _ in range(3):
        fresh = draw(case, device)
        for name in ("input", "target", "grad_output"):
            getattr(static, name).copy_(getattr(fresh, name))
        fresh.options = static.options
        graph.replay()
        identical(captured, fresh.loss_and_grads(fresh.loss.ours))


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("loss", LOSSES)
def test_streams_and_bits_on_a_card(loss: str, device: str) -> None:
    """The same bits on any stream, however many run at once."""
    inputs = draw(Case(loss, "plain", F32, (777, 5003)), device)
    expected = inputs.loss_and_grads(inputs.loss.ours)
    torch.cuda.synchronize()
    results = []
    for _ in range(8):
        with torch.cuda.stream(torch.cuda.Stream()):
            results.append(inputs.loss_and_grads(inputs.loss.ours))
    torch.cuda.synchronize()
    for result in results:
        identical(result, expected)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_card_holds_the_gradient_and_nothing_else(
    loss: str, dtype: torch.dtype, device: str
) -> None:
    inputs = draw(Case(loss, "plain", dtype, (1024, 32000), grad_output="ones"), device)
    inputs.loss_and_grads(inputs.loss.ours)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    inputs.loss_and_grads(inputs.loss.ours)
    peak = torch.cuda.max_memory_allocated() - before
    assert inputs.input.nbytes <= peak <= inputs.input.nbytes + (1 << 20)
