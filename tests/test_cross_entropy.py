"""The cross-entropy family against float64 references and against torch, all from one table."""

from __future__ import annotations

import copy
import io
import itertools
import math
import os
import pickle
import random
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from decimal import Decimal
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
from numerics import (
    BF16,
    COMPUTE,
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
    error,
    fail_in_backward,
    identical,
    pairwise,
    peak_memory,
    place,
    poisoned_outputs,  # noqa: F401
    slack,
    whole_storage,
    widened,
)


@pytest.fixture(autouse=True)
def no_target_fault_is_left() -> Iterator[None]:
    """An IndexError that CUDA still owes would hit the next test."""
    yield
    F.check_targets()


# ------------------------------------------------------------------ the table of losses

Function = Callable[..., Tensor]


def row_weights(logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """What each row adds to the divisor of a mean."""
    if target.is_floating_point():
        return torch.ones_like(target.select(min(logits.dim() - 1, 1), 0))
    counts = target != ignore_index
    weight = logits.new_ones(max(logits.shape)) if weight is None else weight
    return weight[torch.where(counts, target, 0).long()] * counts


def reduced(rows: Tensor, weights: Tensor, reduction: str) -> Tensor:
    if reduction == "mean":
        return rows.sum() / weights.sum()
    return rows if reduction == "none" else rows.sum()


def torch_z_loss(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, z_loss: float, **options: Any
) -> Tensor:
    """Cross-entropy plus z-loss, as one writes it with torch."""
    weights = row_weights(input, target, weight, options["ignore_index"])
    rows = z_loss * weights * input.logsumexp(min(input.dim() - 1, 1)).square()
    rows = torch.where(weights == 0, 0.0, rows)
    loss = native.cross_entropy(input, target, weight, **options)
    return loss + reduced(rows, weights, options["reduction"])


def torch_focal_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    gamma: float,
    reduction: str,
    ignore_index: int,
) -> Tensor:
    """Focal loss, as one writes it with torch."""
    minus_log_p = native.cross_entropy(input, target, reduction="none", ignore_index=ignore_index)
    weights = row_weights(input, target, weight, ignore_index)
    q = -torch.expm1(-minus_log_p)
    is_some = q > 0
    power = torch.where(is_some, torch.where(is_some, q, 1.0) ** gamma, 0.0)
    return reduced(weights * power * minus_log_p, weights, reduction)


@dataclass(frozen=True)
class Loss:
    """A loss of the family: ours, the same of torch's operators, and the reference."""

    ours: Function
    native: Function
    reference: Callable[..., reference.CrossEntropy]
    operator: str  # and which options it takes behind the reduction and ignore_index
    operator_options: tuple[str, ...] = ()
    # An option of its own, with the numbers to try: the first in the matrices of this file, all of
    # them in test_properties.py.
    options: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    indices_only: bool = False  # and no label smoothing


LOSSES = {
    "cross_entropy": Loss(
        F.cross_entropy,
        native.cross_entropy,
        reference.cross_entropy,
        "cross_entropy",
        ("label_smoothing",),
    ),
    "z_loss": Loss(
        lambda *args, **options: F.cross_entropy_with_lse(*args, **options)[0],
        torch_z_loss,
        reference.cross_entropy,
        "cross_entropy_with_lse",
        ("label_smoothing", "z_loss"),
        {"z_loss": (0.02, 1e-4, 1.0, 0.0)},
    ),
    "focal_loss": Loss(
        F.focal_loss,
        torch_focal_loss,
        reference.focal_loss,
        "focal_loss",
        ("gamma",),
        {"gamma": (1.7, 2.0, 0.0, 0.3, 1.0, 5.0, 20.0)},
        indices_only=True,
    ),
}
OTHERS = tuple(name for name in LOSSES if name != "cross_entropy")


# ------------------------------------------------------------------ inputs


@dataclass(frozen=True)
class Case:
    """One call: what is asked for, and how its tensors lie in memory."""

    dtype: torch.dtype = F32
    shape: tuple[int, ...] = (5, 7)
    reduction: str = "mean"
    weighted: bool = False
    smoothing: float = 0.0
    ignore_index: int = -100
    target: str = "long"
    layout: str = "contiguous"
    target_layout: str = "contiguous"
    grad_output: str = "random"
    loss: str = "cross_entropy"

    def __str__(self) -> str:
        default = Case()
        differing = (
            str(value).removeprefix("torch.").replace(" ", "")
            if name in ("dtype", "shape", "reduction", "target", "layout", "grad_output", "loss")
            else f"{name}={value}"
            for name, value in vars(self).items()
            if name in ("dtype", "shape", "reduction") or value != getattr(default, name)
        )
        return "-".join(differing)

    @property
    def class_dim(self) -> int:
        return min(len(self.shape) - 1, 1)

    @property
    def classes(self) -> int:
        return self.shape[self.class_dim]

    @property
    def row_shape(self) -> tuple[int, ...]:
        return self.shape[: self.class_dim] + self.shape[self.class_dim + 1 :]

    @property
    def has_probabilities(self) -> bool:
        return self.target in ("probabilities", "any floats")

    @property
    def is_refused(self) -> bool:
        """A loss of class indices takes no others. Byte targets are accepted by torch only
        without spatial dimensions, and never by the smoothed, weighted mean; probabilities allow
        no ignore_index of their own."""
        if LOSSES[self.loss].indices_only and (self.has_probabilities or self.smoothing):
            return True
        if self.target == "uint8":
            smoothed_weighted_mean = self.smoothing and self.weighted and self.reduction == "mean"
            return len(self.shape) > 2 or bool(smoothed_weighted_mean)
        return self.has_probabilities and self.ignore_index >= 0


def _rows(values: Tensor, class_dim: int) -> list[int]:
    return [dim for dim in range(values.dim()) if dim != class_dim]


def _class(values: Tensor, class_dim: int) -> list[int]:
    return [dim for dim in range(values.dim()) if dim == class_dim]


def _expand(values: Tensor, dims: Sequence[int]) -> Tensor:
    single = values
    for dim in dims:
        single = single.narrow(dim, 0, min(single.shape[dim], 1))
    return place(single).expand(values.shape)


# Each takes dense values and the class dimension; an index target has none, given as -1.
LAYOUTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "contiguous": lambda v, c: place(v),
    "channels_last": lambda v, c: place(v, order=_rows(v, c) + _class(v, c)),
    "transposed": lambda v, c: place(v, order=range(v.dim())[::-1]),
    "class step": lambda v, c: place(v, steps=dict.fromkeys(_class(v, c), 3)),
    "row step": lambda v, c: place(v, steps=dict.fromkeys(_rows(v, c), 2)),
    "unaligned": lambda v, c: place(v, offset=1),
    "unaligned transposed": lambda v, c: place(v, order=range(v.dim())[::-1], offset=3),
    "expanded rows": lambda v, c: _expand(v, _rows(v, c)),
    "expanded classes": lambda v, c: _expand(v, _class(v, c)),
}


@dataclass
class Inputs:
    logits: Tensor
    target: Tensor
    weight: Tensor | None
    grad_output: Tensor
    options: dict[str, Any]
    loss: Loss = LOSSES["cross_entropy"]

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers, stored otherwise."""

        def cast(tensor: Tensor | None) -> Any:
            return tensor.to(dtype) if tensor is not None and tensor.is_floating_point() else tensor

        return Inputs(
            cast(self.logits),
            cast(self.target),
            cast(self.weight),
            cast(self.grad_output),
            self.options,
            self.loss,
        )

    def expected(self) -> reference.CrossEntropy:
        return self.loss.reference(
            self.logits, self.target, self.weight, grad_output=self.grad_output, **self.options
        )

    def call(self, function: Callable[..., Tensor], logits: Tensor | None = None) -> Tensor:
        logits = self.logits if logits is None else logits
        return function(logits, self.target, weight=self.weight, **self.options)

    def loss_and_grad(self, function: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        logits = self.logits.detach().requires_grad_()
        loss = self.call(function, logits)
        (grad,) = torch.autograd.grad(loss, logits, self.grad_output.to(loss.dtype))
        return loss.detach(), grad


def draw(case: Case, device: str) -> Inputs:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=F64, device=device)

    logits = LAYOUTS[case.layout]((3 * normal(*case.shape)).to(case.dtype), case.class_dim)

    if case.target == "probabilities":
        target = normal(*case.shape).softmax(case.class_dim).to(case.dtype)
    elif case.target == "any floats":
        target = normal(*case.shape).to(case.dtype)
    else:
        dtype = {"long": torch.int64, "uint8": torch.uint8}[case.target]
        target = torch.randint(case.classes, case.row_shape, device=device).to(dtype)
        if torch.iinfo(dtype).min <= case.ignore_index <= torch.iinfo(dtype).max:
            ignored = torch.rand(case.row_shape, device=device) < 0.3
            target = target.masked_fill(ignored & ~ignored.all(), case.ignore_index)
    class_dim = case.class_dim if case.has_probabilities else -1
    target = LAYOUTS[case.target_layout](target, class_dim)

    weight = None
    if case.weighted:
        weight = (0.25 + torch.rand(case.classes, dtype=F64, device=device)).to(case.dtype)
        if not target[target != case.ignore_index].eq(case.classes - 1).all():
            weight[-1] = 0  # a class may well weigh nothing

    shape = case.row_shape if case.reduction == "none" else ()
    grad_output = {
        "random": lambda: normal(*shape),
        "zero": lambda: torch.zeros(shape, dtype=F64, device=device),
        "negative": lambda: -1 - normal(*shape).abs(),
        "expanded": lambda: normal().expand(shape),
        "strided": lambda: normal(*shape, 2)[..., 0],
    }[case.grad_output]()
    if case.grad_output != "expanded":
        grad_output = grad_output.to(case.dtype)
    else:
        grad_output = grad_output.flatten()[:1].to(case.dtype).reshape(()).expand(shape)
    options = {
        "ignore_index": case.ignore_index,
        "reduction": case.reduction,
        **({} if LOSSES[case.loss].indices_only else {"label_smoothing": case.smoothing}),
        **{name: numbers[0] for name, numbers in LOSSES[case.loss].options.items()},
    }
    return Inputs(logits, target, weight, grad_output, options, LOSSES[case.loss])


# ------------------------------------------------------------------ the comparison


def check(case: Case, device: str) -> None:
    """As check_inputs, for inputs drawn at random."""
    check_inputs(draw(case, device), case)


def above(inputs: Inputs) -> float:
    """What a probability is multiplied by at most in the gradient, so that one that vanishes may
    make a difference as many times as large."""
    grads, z_loss = inputs.grad_output.double().abs(), inputs.options.get("z_loss", 0.0)
    lse = inputs.logits.double().logsumexp(min(inputs.logits.dim() - 1, 1)).abs()
    weight = torch.ones(1) if inputs.weight is None else inputs.weight.abs()
    grad, from_lse, most = (t.max().item() if t.numel() else 0.0 for t in (grads, lse, weight))
    return grad * max(most, 1.0) * (1 + 2 * z_loss * from_lse)


def check_inputs(inputs: Inputs, label: Any) -> None:
    """No less accurate than torch on the same input; inputs untouched; torch's dtypes, shapes and
    strides. Torch is asked twice for 16-bit types: as it is, and in float32 on the same numbers,
    because computing in 16 bits is no standard to hold on to."""
    dtype = inputs.logits.dtype
    expected = inputs.expected()
    tensors = [t for t in (inputs.logits, inputs.target, inputs.weight) if t is not None]
    before = [whole_storage(t).clone() for t in tensors]
    loss, grad = inputs.loss_and_grad(inputs.loss.ours)
    for tensor, bytes_before in zip(tensors, before, strict=True):
        assert torch.equal(whole_storage(tensor), bytes_before), f"{label}: an input was modified"

    is_byte = inputs.target.dtype == torch.uint8
    peer = replace(inputs, target=inputs.target.long()) if is_byte else inputs
    peers = [peer.loss_and_grad(inputs.loss.native)]
    if COMPUTE[dtype] != dtype:
        peers.append(peer.to(COMPUTE[dtype]).loss_and_grad(inputs.loss.native))
    assert (loss.dtype, loss.shape) == (peers[0][0].dtype, peers[0][0].shape), label
    assert (grad.dtype, grad.shape) == (dtype, inputs.logits.shape), label
    assert grad.stride() == torch.empty_like(inputs.logits).stride(), label

    losses, grads = zip(*peers, strict=True)
    assert_accurate(f"{label}: loss", loss, losses, expected.loss, expected.loss_scale, dtype)
    assert_accurate(
        f"{label}: gradient",
        *(grad, grads, expected.grad, expected.grad_scale, dtype),
        factor=above(inputs),
    )


# ------------------------------------------------------------------ the reference itself


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("target", ["long", "probabilities", "any floats"])
def test_reference_agrees_with_torch_in_float64(target: str, reduction: str, loss: str) -> None:
    for shape, weighted, smoothing in itertools.product(
        [(7,), (5, 7), (3, 7, 4), (2, 5, 2, 3, 2)], [False, True], [0.0, 0.1, 1.0]
    ):
        case = Case(F64, shape, reduction, weighted, smoothing, target=target, loss=loss)
        if case.is_refused:
            continue
        inputs = draw(case, "cpu")
        logits = inputs.logits.clone().requires_grad_()
        target_leaf = inputs.target.clone()
        leaves = [logits]
        if target_leaf.is_floating_point():
            leaves.append(target_leaf.requires_grad_())
        value = replace(inputs, target=target_leaf).call(inputs.loss.native, logits)
        grads = torch.autograd.grad(value, leaves, inputs.grad_output)
        ours = inputs.expected()
        result = [ours.loss, ours.grad, ours.target_grad][: 1 + len(leaves)]
        torch.testing.assert_close(result, [value.detach(), *grads], rtol=1e-12, atol=1e-13)


def test_reference_on_worked_numbers() -> None:
    logits, target = torch.tensor([[0.1, 0.2, 0.3]], dtype=F64), torch.tensor([1])
    total = math.exp(0.1) + math.exp(0.2) + math.exp(0.3)
    result = reference.cross_entropy(logits, target)
    assert result.loss.item() == pytest.approx(-0.2 + math.log(total), rel=1e-14)
    assert result.loss.item() == pytest.approx(1.1019, abs=5e-5)
    expected = [math.exp(x) / total - (i == 1) for i, x in enumerate((0.1, 0.2, 0.3))]
    assert result.grad[0].tolist() == pytest.approx(expected, rel=1e-13)

    # Two classes with equal logits: every row costs log 2 times its weight.
    logits, target = torch.zeros(3, 2, dtype=F64), torch.tensor([0, 1, -100])
    weight = torch.tensor([1.0, 3.0], dtype=F64)
    rows = reference.cross_entropy(logits, target, weight, reduction="none")
    assert rows.loss.tolist() == pytest.approx([math.log(2), 3 * math.log(2), 0.0])
    mean = reference.cross_entropy(logits, target, weight)
    assert mean.loss.item() == pytest.approx(math.log(2))
    assert mean.grad.tolist() == [[-0.125, 0.125], [0.375, -0.375], [0.0, 0.0]]


def test_references_on_published_numbers() -> None:
    """Lin et al., 2017, section 3.2: with gamma = 2 an example of p = 0.9 costs 100 times less than
    in cross-entropy, one of p = 0.968 a thousand times less; with gamma = 0 the same."""
    for p, factor in ((0.9, 100), (1 - 1000**-0.5, 1000)):
        logits = torch.tensor([[math.log(p), math.log(1 - p)]], dtype=F64)
        target = torch.tensor([0])
        focal = reference.focal_loss(logits, target, gamma=2.0)
        assert focal.loss.item() == pytest.approx(-math.log(p) / factor, rel=1e-12)
        plain = reference.focal_loss(logits, target, gamma=0.0)
        assert plain.loss.item() == pytest.approx(-math.log(p), rel=1e-12)
    # Probabilities multiplied by e: their log-sum-exp is 1.
    z_loss = reference.cross_entropy(logits + 1, target, z_loss=0.5)
    assert z_loss.loss.item() == pytest.approx(-math.log(p) + 0.5, rel=1e-12)


# ------------------------------------------------------------------ right numbers


SHAPES = ((7,), (5, 7), (3, 7, 4), (2, 7, 3, 5), (2, 5, 2, 3, 2))
IGNORED = (-100, -7, 1, 200)  # the default, another negative, a real class, none of the classes
SEMANTICS = [
    case
    for axes in itertools.product(
        DTYPES, SHAPES, REDUCTIONS, (False, True), (0.0, 0.1), IGNORED,
        ("long", "uint8", "probabilities"),
    )
    if not (case := Case(*axes)).is_refused
]  # fmt: skip


def pairs(loss: str, seed: int, **axes: Sequence[Any]) -> list[Case]:
    """Cases in which every two options meet that the loss takes."""
    if LOSSES[loss].indices_only:
        axes["smoothing"] = (0.0,)
        axes["target"] = tuple(kind for kind in axes["target"] if kind in ("long", "uint8"))
    cases = [Case(**row, loss=loss) for row in pairwise(axes, seed)]
    return [case for case in cases if not case.is_refused]


SEMANTICS += [
    case
    for seed, loss in itertools.product(range(3), OTHERS)
    for case in pairs(
        loss,
        seed,
        dtype=DTYPES,
        shape=SHAPES,
        reduction=REDUCTIONS,
        weighted=(False, True),
        smoothing=(0.0, 0.1),
        ignore_index=IGNORED,
        target=("long", "uint8", "probabilities"),
    )
]


@pytest.mark.parametrize("case", dict.fromkeys(SEMANTICS), ids=str)
def test_every_combination_of_options(case: Case, device: str) -> None:
    check(case, device)


MEMORY = [
    case
    for seed, loss in ((0, "cross_entropy"), (1, "cross_entropy"), *enumerate(LOSSES, 2))
    for case in pairs(
        loss,
        seed,
        dtype=DTYPES,
        shape=[(19,), (6, 19), (3, 19, 18), (2, 21, 5, 17), (2, 5, 3, 4, 9)],
        reduction=REDUCTIONS,
        weighted=(False, True),
        smoothing=(0.0, 0.1, 1.0),
        ignore_index=IGNORED,
        target=("long", "uint8", "probabilities", "any floats"),
        layout=tuple(LAYOUTS),
        target_layout=tuple(LAYOUTS),
        grad_output=("random", "zero", "negative", "expanded", "strided"),
    )
]


@pytest.mark.level
@pytest.mark.parametrize("case", dict.fromkeys(MEMORY), ids=str)
def test_every_pair_of_options_and_memory_layouts(case: Case, device: str) -> None:
    check(case, device)


ARRANGEMENTS: tuple[Callable[[int, int], dict[str, Any]], ...] = (
    lambda n, c: {"shape": (n, c)},
    lambda n, c: {"shape": (n, c), "layout": "transposed"},
    lambda n, c: {"shape": (n, c), "layout": "unaligned"},
    lambda n, c: {"shape": (2, c, n)},
    lambda n, c: {"shape": (1, c, n, 2), "layout": "unaligned"},
    lambda n, c: {"shape": (1, c, 2, n), "layout": "channels_last"},
)


@pytest.mark.level
@pytest.mark.parametrize("classes", range(1, 71))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_class_count_across_vector_widths(
    dtype: torch.dtype, classes: int, device: str, seed: int
) -> None:
    rng = random.Random(seed)
    for arrangement in ARRANGEMENTS:
        rows = rng.choice([1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, rng.randint(1, 40)])
        target = rng.choice(["long", "long", "probabilities"])
        options: dict[str, Any] = {
            "smoothing": rng.choice([0.0, 0.1]),
            "weighted": rng.random() < 0.3,
        }
        reduction = rng.choice(REDUCTIONS)
        options |= arrangement(rows, classes)
        check(Case(dtype, reduction=reduction, target=target, **options), device)
        other = Case(dtype, reduction=reduction, **options, loss=rng.choice(OTHERS))
        check(replace(other, smoothing=0.0), device)


BORDERS = [
    *itertools.product((1, 3, 18), (127, 128, 129, 255, 256, 257, 1000, 1023, 1024, 1025)),
    *itertools.product((1, 5), (4095, 4096, 4097, 32000)),
    *itertools.product((1, 2), (128256,)),
    *itertools.product((511, 512, 513, 4095, 4096, 4097), (2, 3, 10, 16, 17, 100)),
    (257, 1000),
]


@pytest.mark.level
@pytest.mark.parametrize("rows, classes", BORDERS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_sizes_at_chunk_borders(dtype: torch.dtype, rows: int, classes: int, device: str) -> None:
    check(Case(dtype, (rows, classes)), device)
    if rows * classes < 20_000:
        for loss in OTHERS:
            check(Case(dtype, (rows, classes), loss=loss), device)


@pytest.mark.parametrize("target", ["long", "probabilities"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "unaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_inputs_in_every_dtype(
    dtype: torch.dtype, layout: str, target: str, device: str
) -> None:
    for shape in [(3, 4097), (1030, 37), (2, 21, 65, 67), (2, 1, 33, 65), (4097, 1)]:
        for reduction in ("none", "mean"):
            case = Case(dtype, shape, reduction, True, 0.1, target=target, layout=layout)
            check(case, device)


@pytest.mark.parametrize("loss", OTHERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_inputs_of_the_other_losses(dtype: torch.dtype, loss: str, device: str) -> None:
    for shape, layout in (
        ((3, 4097), "contiguous"),
        ((1030, 37), "unaligned"),
        ((2, 21, 65, 67), "channels_last"),
    ):
        check(Case(dtype, shape, "mean", True, layout=layout, loss=loss), device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_up_images_cost_their_labels_in_proportion(dtype: torch.dtype, device: str) -> None:
    """The soft targets of mixup and cutmix (Zhang et al., 2018; Yun et al., 2019)."""
    share = torch.rand(33, 1, dtype=F64, device=device)
    labels = torch.randint(100, (2, 33), device=device)
    first, second = native.one_hot(labels, 100).double()
    target = (share * first + (1 - share) * second).to(dtype)
    logits = torch.randn(33, 100, device=device).to(dtype)
    inputs = Inputs(logits, target, None, torch.ones(33, device=device), {"reduction": "none"})
    costs = [reference.cross_entropy(logits, y, reduction="none") for y in labels]
    mixed = share[:, 0] * costs[0].loss + (1 - share[:, 0]) * costs[1].loss
    loss, grad = inputs.loss_and_grad(F.cross_entropy)
    step = torch.finfo(dtype).eps  # of the target
    torch.testing.assert_close(loss.double(), mixed, rtol=4 * step, atol=4 * step)
    expected = share * costs[0].grad + (1 - share) * costs[1].grad
    torch.testing.assert_close(grad.double(), expected, rtol=4 * step, atol=4 * step)


@pytest.mark.parametrize("target", ["probabilities", "any floats"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_to_probabilities(
    dtype: torch.dtype, reduction: str, target: str, device: str
) -> None:
    for shape, weighted, smoothing in itertools.product(SHAPES, [False, True], [0.0, 0.1]):
        inputs = draw(Case(dtype, shape, reduction, weighted, smoothing, target=target), device)

        def target_grad(function: Callable[..., Tensor], inputs: Inputs = inputs) -> Tensor:
            leaf = inputs.target.detach().requires_grad_()
            loss = replace(inputs, target=leaf).call(function)
            return torch.autograd.grad(loss, leaf, inputs.grad_output)[0]

        expected = inputs.expected().target_grad
        assert expected is not None
        ours, theirs = target_grad(F.cross_entropy), target_grad(native.cross_entropy)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        scale = expected.abs() + expected.abs().mean()
        limit = error(theirs, expected, scale, dtype) + slack(dtype)
        assert error(ours, expected, scale, dtype) <= limit, (shape, weighted, smoothing)


@pytest.mark.parametrize("class_step", [1, 2**27 + 1])
def test_offsets_beyond_32_bits(class_step: int) -> None:
    """Only the touched pages of the 8 GiB are ever backed by memory."""
    torch._C._set_deterministic_algorithms(False)
    values = torch.randn(2, 17, dtype=BF16)
    storage = torch.empty(2**32 + 2**10, dtype=BF16)
    row_step = 2**32 if class_step == 1 else 3
    logits = storage.as_strided(values.shape, (row_step, class_step)).copy_(values)
    target = torch.tensor([3, 16])
    loss = F.cross_entropy(logits.requires_grad_(), target)
    values.requires_grad_()
    dense_loss = F.cross_entropy(values, target)
    identical(loss, dense_loss)
    identical(torch.autograd.grad(loss, logits)[0], torch.autograd.grad(dense_loss, values)[0])


# ------------------------------------------------------------------ special values


def check_like_torch(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    loss: Loss = LOSSES["cross_entropy"],
    **options: Any,
) -> None:
    """NaN, infinities and zeros where torch has them, and the same finite values within rounding.
    Overflow on the way to a finite result is torch's in float32, not in float64: both will do. Of a
    loss that torch lacks the reference will do, too: on the way there torch's operators multiply
    infinity by zero."""
    rows = native.cross_entropy(logits, target, reduction="none")
    shape = rows.shape if options.get("reduction") == "none" else ()
    inputs = Inputs(logits, target, weight, torch.full(shape, 1.5), options, loss)
    ours = inputs.loss_and_grad(loss.ours)
    peers = [peer.loss_and_grad(loss.native) for peer in (inputs, inputs.to(F64))]
    if loss is not LOSSES["cross_entropy"]:
        exact = inputs.expected()
        peers.append((exact.loss, exact.grad))
    eps = 16 * torch.finfo(logits.dtype).eps
    for actual, *expected in zip(ours, *peers, strict=True):
        right = torch.zeros_like(actual, dtype=torch.bool)
        for value in expected:
            right |= actual.isclose(value.to(logits.dtype), rtol=eps, atol=eps, equal_nan=True)
        assert right.all(), (actual, expected, options)


EXTREMES = {
    "masked class": [1.0, -math.inf, 2.0, 0.5],
    "all masked but the target": [-math.inf, -math.inf, -3.0, -math.inf],
    "all masked but another": [-math.inf, 7.0, -math.inf, -math.inf],
    "all masked": [-math.inf] * 4,
    "plus infinity": [1.0, math.inf, 2.0, 0.5],
    "plus infinity at the target": [1.0, 2.0, math.inf, 0.5],
    "NaN": [1.0, math.nan, 2.0, 0.5],
    "NaN at the target": [1.0, 0.0, math.nan, 0.5],
    "huge": [3e38, -3e38, 0.0, 1.0],
    "huge at the target": [0.0, -3e38, 3e38, 1.0],
    "huge but negative at the target": [3e38, 0.0, -3e38, 1.0],
    "all huge": [3e38] * 4,
    "all hugely negative": [-3e38] * 4,
    "far apart": [0.0, -200.0, -150.0, -90.0],
    "signed zeros": [0.0, -0.0, 0.0, -0.0],
}


@pytest.mark.level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_logits_like_torch(name: str, dtype: torch.dtype) -> None:
    ordinary = torch.randn(4).tolist()
    padding = torch.randn(33).tolist()
    for row in (EXTREMES[name], EXTREMES[name] + padding):
        block = torch.tensor([row, ordinary + row[4:]], dtype=F64).to(dtype)
        target = torch.tensor([2, 2])
        for logits, classes in (
            (block, target),
            (block.repeat(9, 1), target.repeat(9)),
            (block.T.contiguous().T, target),
            (block.T[None].repeat(1, 1, 9), target.repeat(9)[None]),
        ):
            for options in ({"reduction": "none"}, {}, {"label_smoothing": 0.1}):
                check_like_torch(logits, classes, **options)
            weight = torch.ones(logits.shape[1], dtype=dtype)
            weight[1] = 0.0
            check_like_torch(logits, classes, weight, label_smoothing=0.1, reduction="sum")


@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_logits_with_probabilities_like_torch(name: str) -> None:
    logits = torch.tensor([EXTREMES[name], [0.1, 0.2, 0.3, 0.4]])
    for target in ([0.5, 0.0, 0.5, 0.0], [0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 1.0, 0.0]):
        for options in ({"reduction": "none"}, {}, {"label_smoothing": 0.1}):
            check_like_torch(logits, torch.tensor([target, target]), **options)


def test_masked_class_is_an_exact_case() -> None:
    """A class at -inf does not exist: the same bits as without it, and no gradient."""
    logits, target = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    masked = torch.cat([logits, torch.full((6, 1), -math.inf)], 1)
    (loss, grad), (dense_loss, dense_grad) = (
        Inputs(x, target, None, torch.tensor(1.0), {}).loss_and_grad(F.cross_entropy)
        for x in (masked, logits)
    )
    torch.testing.assert_close(loss, dense_loss)
    torch.testing.assert_close(grad[:, :5], dense_grad)
    identical(grad[:, 5], torch.zeros(6))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (5, 1), (2, 1, 9)], ids=str)
def test_one_class_costs_exactly_nothing(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = 1e4 * torch.randn(shape).to(dtype)
    for reduction, smoothing in itertools.product(REDUCTIONS, [0.0, 0.3]):
        row_shape = shape[:-1] if len(shape) < 3 else (2, 9)
        options = {"reduction": reduction, "label_smoothing": smoothing}
        inputs = Inputs(logits, torch.zeros(row_shape).long(), None, torch.tensor(1.0), options)
        inputs.grad_output = torch.ones(row_shape if reduction == "none" else ())
        loss, grad = inputs.loss_and_grad(F.cross_entropy)
        identical(loss, torch.zeros_like(loss))
        identical(grad, torch.zeros_like(logits))


EMPTY = {
    "no rows": ((0, 5), (0,)),
    "no rows, spatial": ((0, 5, 3), (0, 3)),
    "no pixels": ((2, 5, 0), (2, 0)),
    "no pixels, 2d": ((2, 5, 3, 0), (2, 3, 0)),
    "no rows, probabilities": ((0, 5), (0, 5)),
    "no pixels, probabilities": ((2, 5, 0), (2, 5, 0)),
    "no classes, probabilities": ((3, 0), (3, 0)),
    "no classes, no rows": ((0, 0), (0,)),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", EMPTY)
def test_empty_inputs_like_torch(name: str, reduction: str, device: str) -> None:
    shape, target_shape = EMPTY[name]
    target = torch.zeros(target_shape, device=device)
    target = target if shape == target_shape else target.long()
    for smoothing in (0.0, 0.1):
        losses = []
        for function in (F.cross_entropy, native.cross_entropy):
            logits = torch.randn(shape, device=device, requires_grad=True)
            loss = function(logits, target, reduction=reduction, label_smoothing=smoothing)
            loss.sum().backward()
            identical(logits.grad, torch.zeros(shape, device=device))
            losses.append(loss.detach())
        identical(*losses)


@pytest.mark.level
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(19,), (6, 19), (2, 19, 17)], ids=str)
@pytest.mark.parametrize("ignore_index", [-100, 2])
def test_all_rows_ignored(
    ignore_index: int, shape: tuple[int, ...], smoothing: float, weighted: bool, device: str
) -> None:
    case = Case(F32, shape, weighted=weighted, smoothing=smoothing, ignore_index=ignore_index)
    inputs = draw(case, device)
    inputs.target.fill_(ignore_index)
    zeros = torch.zeros(case.row_shape, device=device)
    for reduction, expected in (("none", zeros), ("sum", zeros.sum()), ("mean", zeros.mean() / 0)):
        inputs.options["reduction"] = reduction
        inputs.grad_output = torch.ones_like(expected)
        loss, grad = inputs.loss_and_grad(inputs.loss.ours)
        identical(loss, expected)
        identical(grad, torch.zeros_like(inputs.logits))


@pytest.mark.level
@pytest.mark.parametrize("classes", [3, 19, 300])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ignored_rows_have_no_part(smoothing: float, classes: int, device: str) -> None:
    """Whatever an ignored row holds, its gradient is exactly zero and the others do not notice."""
    logits = torch.randn(33, classes, device=device)
    target = torch.randint(classes, (33,), device=device)
    ignored = torch.arange(33, device=device) % 3 == 1
    logits[ignored] = torch.tensor([math.nan, math.inf, -math.inf], device=device).repeat(11)[
        :11, None
    ]
    target[ignored] = -100
    options = {"label_smoothing": smoothing}
    for reduction in REDUCTIONS:
        options["reduction"] = reduction
        g = torch.randn(33 if reduction == "none" else (), device=device)
        loss, grad = Inputs(logits, target, None, g, options).loss_and_grad(F.cross_entropy)
        if reduction == "none":
            identical(loss[ignored], torch.zeros(11, device=device))
            loss, g = loss[~ignored], g[~ignored]
        identical(grad[ignored], torch.zeros(11, classes, device=device))
        kept = Inputs(logits[~ignored], target[~ignored], None, g, options)
        expected_loss, expected_grad = kept.loss_and_grad(native.cross_entropy)
        torch.testing.assert_close(loss, expected_loss)
        torch.testing.assert_close(grad[~ignored], expected_grad)


def test_nan_stays_in_its_row(device: str) -> None:
    logits = torch.randn(18, 7, device=device)
    target = torch.randint(7, (18,), device=device)
    clean = Inputs(logits, target, None, torch.ones(18, device=device), {"reduction": "none"})
    expected_loss, expected_grad = clean.loss_and_grad(F.cross_entropy)
    dirty = replace(clean, logits=logits.index_fill(0, torch.tensor([4]), math.nan))
    loss, grad = dirty.loss_and_grad(F.cross_entropy)
    assert loss[4].isnan() and grad[4].isnan().all()
    others = torch.arange(18) != 4
    identical(loss[others], expected_loss[others])
    identical(grad[others], expected_grad[others])


def test_zero_weights_like_torch() -> None:
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, 0, 0])
    for weight in ([0.0, 0.0, 1.0], [0.0, 2.0, 1.0], [0.0, 0.0, 0.0]):
        for reduction, smoothing in itertools.product(REDUCTIONS, [0.0, 0.1]):
            options = {"reduction": reduction, "label_smoothing": smoothing}
            check_like_torch(logits, target, torch.tensor(weight), **options)


# ------------------------------------------------------------------ back propagation


KINDS = ("long", "uint8", "probabilities")
GRADED = [
    Case(dtype, (9, 19), reduction, weighted, smoothing, target=target)
    for dtype, reduction, target in itertools.product((F32, BF16), REDUCTIONS, KINDS)
    for weighted, smoothing in ((False, 0.0), (target != "uint8", 0.1))
]
GRADED += [
    Case(dtype, (9, 19), reduction, True, loss=loss)
    for dtype, reduction, loss in itertools.product((F32, BF16), REDUCTIONS, OTHERS)
]


@pytest.mark.parametrize("ones", [False, True], ids=["random", "ones"])
@pytest.mark.parametrize("case", GRADED, ids=str)
def test_second_backward_gives_the_same_bits(case: Case, ones: bool, device: str) -> None:
    """Also when the first result was overwritten, and with another grad_output in between."""
    inputs = draw(case, device)
    grad_output = torch.ones_like(inputs.grad_output) if ones else inputs.grad_output
    logits = inputs.logits.detach().requires_grad_()
    loss = inputs.call(inputs.loss.ours, logits)
    backward = partial(torch.autograd.grad, loss, logits, retain_graph=True)
    (first,) = backward(grad_output)
    kept = first.clone()
    (doubled,) = backward(2 * grad_output)
    identical(first, kept)
    torch.testing.assert_close(doubled, 2 * first)
    first.fill_(math.nan)
    doubled.fill_(math.nan)
    identical(backward(grad_output)[0], kept)


@pytest.mark.parametrize("case", GRADED, ids=str)
def test_accumulated_gradients_belong_to_the_user(case: Case, device: str) -> None:
    inputs = draw(case, device)
    logits = inputs.logits.detach().requires_grad_()
    loss = inputs.call(inputs.loss.ours, logits).sum()
    loss.backward(retain_graph=True)
    first = logits.grad
    assert first is not None
    kept = first.clone()
    logits.grad = None
    loss.backward(retain_graph=True)
    identical(first, kept)
    identical(logits.grad, kept)
    first.mul_(3)
    identical(logits.grad, kept)
    loss.backward(retain_graph=True)
    torch.testing.assert_close(logits.grad, 2 * kept)
    logits.grad = None
    loss.backward()
    identical(logits.grad, kept)


@pytest.mark.parametrize("case", GRADED[::3], ids=str)
def test_backward_twice_needs_retain_graph(case: Case, device: str) -> None:
    inputs = draw(case, device)
    loss = inputs.call(inputs.loss.ours, inputs.logits.requires_grad_()).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_hook_that_raises_spoils_no_later_backward(device: str) -> None:
    inputs = draw(Case(F32, (9, 19)), device)
    inputs.grad_output = torch.tensor(3.0, device=device)
    _, expected = inputs.loss_and_grad(F.cross_entropy)
    logits = inputs.logits.detach().requires_grad_()
    loss = inputs.call(F.cross_entropy, logits)
    fail_in_backward(loss, inputs.grad_output)
    try:
        loss.backward(inputs.grad_output)
    except RuntimeError as refusal:
        assert "second time" in str(refusal)
    else:
        torch.testing.assert_close(logits.grad, expected)


def test_a_node_refuses_what_is_no_gradient_of_its_loss(device: str) -> None:
    inputs = draw(Case(F32, (9, 19)), device)
    node = inputs.call(F.cross_entropy, inputs.logits.requires_grad_()).grad_fn
    assert node is not None
    for wrong in (torch.tensor(2), torch.ones(0), torch.ones(2)):
        with torch.no_grad(), pytest.raises(RuntimeError, match="grad_output must be one"):
            node(wrong.to(device))


@pytest.mark.parametrize("scale", [0.0, -1.0, 3.7, 65536.0])
def test_scaled_scalar_losses(scale: float, device: str) -> None:
    inputs = draw(Case(F32, (9, 19), "mean", True, 0.1), device)
    inputs.grad_output = torch.tensor(scale, device=device)
    grad = inputs.loss_and_grad(F.cross_entropy)[1]
    expected = inputs.loss_and_grad(native.cross_entropy)[1]
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6 * abs(scale))
    logits = inputs.logits.detach().requires_grad_()
    (inputs.call(F.cross_entropy, logits) * scale).backward()
    identical(logits.grad, grad)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_leaf_gradients_lie_as_torch_lays_them(layout: str, device: str) -> None:
    for shape in ((6, 7), (3, 7, 4), (2, 7, 3, 5)):
        inputs = draw(Case(F32, shape, layout=layout), device)
        grads = []
        for function in (F.cross_entropy, native.cross_entropy):
            logits = inputs.logits.detach().requires_grad_()
            inputs.call(function, logits).backward()
            grads.append(logits.grad)
        assert grads[0].stride() == grads[1].stride()
        torch.testing.assert_close(*grads)


def test_one_logits_tensor_many_losses(device: str) -> None:
    inputs = draw(Case(F32, (9, 19)), device)

    def total(function: Callable[..., Tensor]) -> Tensor:
        logits = inputs.logits.detach().requires_grad_()
        losses = [inputs.call(function, logits) * k for k in (1.0, 0.5, -2.0)]
        (losses[0] + losses[1] * losses[2]).backward()
        assert logits.grad is not None
        return logits.grad

    torch.testing.assert_close(total(F.cross_entropy), total(native.cross_entropy))


def test_no_graph_where_none_is_wanted(device: str) -> None:
    logits = torch.randn(9, 19, device=device, requires_grad=True)
    target = torch.randint(19, (9,), device=device)
    expected = native.cross_entropy(logits, target).detach()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            loss = F.cross_entropy(logits, target)
        assert not loss.requires_grad and loss.grad_fn is None
        torch.testing.assert_close(loss, expected)
        assert loss.is_inference() == isinstance(context, torch.inference_mode)
    assert F.cross_entropy(logits.detach(), target).grad_fn is None
    with torch.inference_mode():
        made_inside = torch.randn(9, 19, device=device)
        torch.testing.assert_close(
            F.cross_entropy(made_inside, target), native.cross_entropy(made_inside, target)
        )


def test_same_bits_with_and_without_a_graph(device: str) -> None:
    for case in GRADED:
        inputs = draw(case, device)
        with_graph = inputs.call(inputs.loss.ours, inputs.logits.detach().requires_grad_())
        identical(inputs.call(inputs.loss.ours), with_graph.detach())


def test_logits_may_change_after_the_forward_pass(device: str) -> None:
    inputs = draw(Case(F32, (9, 19)), device)
    grads = []
    for function in (F.cross_entropy, native.cross_entropy):
        leaf = inputs.logits.detach().requires_grad_()
        logits = leaf * 1
        loss = inputs.call(function, logits)
        logits.zero_()
        grads.append(torch.autograd.grad(loss, leaf)[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("changed", ["target", "weight", "probabilities"])
def test_changed_arguments_never_change_the_gradient_silently(changed: str, device: str) -> None:
    kind = "probabilities" if changed == "probabilities" else "long"
    inputs = draw(Case(F32, (9, 19), weighted=True, target=kind, smoothing=0.1), device)
    _, expected = inputs.loss_and_grad(F.cross_entropy)
    logits = inputs.logits.detach().requires_grad_()
    loss = inputs.call(F.cross_entropy, logits)
    argument = inputs.weight if changed == "weight" else inputs.target
    assert argument is not None
    argument.zero_()
    try:
        (grad,) = torch.autograd.grad(loss, logits, inputs.grad_output)
    except RuntimeError as refusal:
        assert "modified by an inplace operation" in str(refusal)
    else:
        identical(grad, expected)


DIFFERENTIATED = [
    Case(F64, shape, reduction, weighted, smoothing, target=target)
    for shape, target in itertools.product(((4,), (3, 4), (2, 3, 2, 2)), KINDS)
    for reduction, weighted, smoothing in (
        ("none", False, 0.0),
        ("mean", True, 0.0),
        ("sum", False, 0.2),
        ("mean", True, 0.2),
    )
    if not Case(F64, shape, reduction, weighted, smoothing, target=target).is_refused
]
DIFFERENTIATED += [
    Case(F64, shape, reduction, weighted, target=target, ignore_index=-7, loss=loss)
    for shape in ((4,), (3, 4), (2, 3, 2, 2))
    for reduction, weighted in (("none", True), ("mean", True), ("sum", False))
    for loss, target in (("z_loss", "long"), ("focal_loss", "long"))
]
DIFFERENTIATED += [Case(F64, (3, 4), "mean", True, 0.2, target="probabilities", loss="z_loss")]


def differentiable_arguments(case: Case, device: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The loss as a function of everything torch differentiates, and the values to start from."""
    inputs = draw(case, device)

    def loss(logits: Tensor, target: Tensor | None = None) -> Tensor:
        target = inputs.target if target is None else target
        return inputs.loss.ours(logits, target, weight=inputs.weight, **inputs.options)

    leaves = [inputs.logits, inputs.target] if case.has_probabilities else [inputs.logits]
    return loss, [leaf.detach().clone().requires_grad_() for leaf in leaves]


@pytest.mark.parametrize("case", DIFFERENTIATED, ids=str)
def test_gradcheck_backward_and_forward_mode(case: Case, device: str) -> None:
    loss, leaves = differentiable_arguments(case, device)
    assert gradcheck(loss, leaves, check_forward_ad=True)


@pytest.mark.parametrize("case", DIFFERENTIATED, ids=str)
def test_gradgradcheck(case: Case, device: str) -> None:
    assert gradgradcheck(*differentiable_arguments(case, device))


@pytest.mark.parametrize("case", DIFFERENTIATED, ids=str)
def test_double_backward_like_torch(case: Case, device: str) -> None:
    """A gradient penalty; every leaf takes part, the incoming gradient too."""
    inputs = draw(replace(case, dtype=F32), device)
    results = []
    for function in (inputs.loss.ours, inputs.loss.native):
        leaves = [inputs.logits.detach().clone().requires_grad_()]
        if case.has_probabilities:
            leaves.append(inputs.target.detach().clone().requires_grad_())
        g = inputs.grad_output.detach().clone().requires_grad_()
        target = leaves[-1] if case.has_probabilities else inputs.target
        loss = replace(inputs, target=target).call(function, leaves[0])
        grads = torch.autograd.grad(loss, leaves, g, create_graph=True)
        penalty = sum(grad.square().sum() for grad in grads) + loss.sum()
        results.append([*grads, *torch.autograd.grad(penalty, [*leaves, g])])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=1e-6)


def test_ordinary_gradient_with_create_graph_has_the_same_value(device: str) -> None:
    inputs = draw(Case(F32, (9, 19), weighted=True, smoothing=0.1), device)
    _, expected = inputs.loss_and_grad(F.cross_entropy)
    logits = inputs.logits.detach().requires_grad_()
    loss = inputs.call(F.cross_entropy, logits)
    (grad,) = torch.autograd.grad(loss, logits, inputs.grad_output, create_graph=True)
    assert grad.requires_grad
    torch.testing.assert_close(grad.detach(), expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits, inputs.grad_output)[0], expected)


@pytest.mark.parametrize("loss_name", LOSSES)
def test_hooks_of_logits_are_called_once_with_create_graph(loss_name: str, device: str) -> None:
    inputs = draw(Case(F32, (9, 19), loss=loss_name), device)
    _, expected = inputs.loss_and_grad(inputs.loss.ours)
    leaf = inputs.logits.detach().requires_grad_()
    logits = leaf * 1
    for value in (leaf, logits):
        value.register_hook(lambda grad: 2 * grad)
    loss = inputs.call(inputs.loss.ours, logits)
    (grad,) = torch.autograd.grad(loss, leaf, inputs.grad_output, create_graph=True)
    torch.testing.assert_close(grad.detach(), 4 * expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weight_gradient_like_torch(smoothing: float) -> None:
    """Torch differentiates the weight for probabilities and refuses to for class indices."""
    inputs = draw(Case(F64, (9, 19), "sum", True, smoothing, target="probabilities"), "cpu")
    results = []
    for function in (F.cross_entropy, native.cross_entropy):
        assert inputs.weight is not None
        leaves = [t.detach().clone().requires_grad_() for t in (inputs.logits, inputs.weight)]
        loss = replace(inputs, weight=leaves[1]).call(function, leaves[0])
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
        with pytest.raises(RuntimeError, match="weight"):
            function(leaves[0], torch.zeros(9).long(), leaves[1], label_smoothing=smoothing)
    torch.testing.assert_close(*results)


TRANSFORMED = [
    Case(F64, (3, 4), "mean", True, 0.1),
    Case(F64, (3, 4), "mean", True, 0.1, target="probabilities"),
    *(Case(F64, (3, 4), "mean", True, loss=loss) for loss in OTHERS),
]


@pytest.mark.parametrize("case", TRANSFORMED, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms_like_torch(transform: str, case: Case, device: str) -> None:
    inputs = draw(case, device)
    results = [
        TRANSFORMS[transform](lambda x, f=function: inputs.call(f, x), inputs.logits)
        for function in (inputs.loss.ours, inputs.loss.native)
    ]
    torch.testing.assert_close(*results)


def test_per_sample_gradients(device: str) -> None:
    """vmap over logits and targets together, as for per-sample gradients."""
    logits = torch.randn(6, 5, device=device)
    target = torch.randint(5, (6,), device=device)
    per_sample = torch.func.vmap(torch.func.grad(F.cross_entropy))(logits, target)
    expected = torch.func.vmap(torch.func.grad(native.cross_entropy))(logits, target)
    torch.testing.assert_close(per_sample, expected)


@pytest.mark.parametrize("case", TRANSFORMED, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_batched_grad_outputs(reduction: str, case: Case, device: str) -> None:
    """is_grads_batched, as torch.autograd.functional.jacobian(vectorize=True) uses it."""
    for dtype in (F32, BF16):
        inputs = draw(replace(case, dtype=dtype, reduction=reduction), device)
        grad_outputs = torch.randn(5, *inputs.grad_output.shape, device=device).to(dtype)
        logits = inputs.logits.detach().requires_grad_()
        loss = inputs.call(inputs.loss.ours, logits)
        backward = partial(torch.autograd.grad, loss, logits, retain_graph=True)
        (batched,) = backward(grad_outputs, is_grads_batched=True)
        torch.testing.assert_close(batched, torch.stack([backward(g)[0] for g in grad_outputs]))


def test_forward_mode_dual_tensors(device: str) -> None:
    inputs = draw(Case(F64, (3, 4), weighted=True), device)
    tangents = []
    with forward_ad.dual_level():
        for function in (F.cross_entropy, native.cross_entropy):
            dual = forward_ad.make_dual(inputs.logits, inputs.logits.cos())
            tangents.append(forward_ad.unpack_dual(inputs.call(function, dual)).tangent)
    assert tangents[0] is not None
    torch.testing.assert_close(*tangents)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss_name", LOSSES)
def test_forward_mode_through_backward(loss_name: str, reduction: str, device: str) -> None:
    """The gradient is linear in what arrives: its tangent is the gradient for the tangent."""
    inputs = draw(Case(F32, (9, 19), reduction, loss=loss_name), device)
    logits = inputs.logits.detach().requires_grad_()
    loss = inputs.call(inputs.loss.ours, logits)
    backward = partial(torch.autograd.grad, loss, logits, retain_graph=True)
    tangent = torch.randn_like(loss)
    for primal in (inputs.grad_output, torch.ones_like(loss)):
        with forward_ad.dual_level():
            (dual,) = backward(forward_ad.make_dual(primal, tangent))
            actual = [value.detach() for value in forward_ad.unpack_dual(dual)]
        torch.testing.assert_close(actual, [backward(g)[0] for g in (primal, tangent)])


@pytest.mark.parametrize("loss_name", LOSSES)
def test_saved_tensor_hooks(loss_name: str, device: str) -> None:
    inputs = draw(Case(F32, (9, 19), loss=loss_name), device)
    loss, expected = inputs.loss_and_grad(inputs.loss.ours)
    packed: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.shape)
        return tensor.clone()

    for context in (
        torch.autograd.graph.saved_tensors_hooks(pack, torch.clone),
        torch.autograd.graph.save_on_cpu(),
    ):
        with context:
            hooked_loss, grad = inputs.loss_and_grad(inputs.loss.ours)
        identical(hooked_loss, loss)
        identical(grad, expected)
    assert packed, "nothing was saved for backward where hooks can see it"


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant: bool, device: str) -> None:
    inputs = draw(Case(F32, (9, 19), smoothing=0.1), device)
    _, expected = inputs.loss_and_grad(F.cross_entropy)
    logits = inputs.logits.detach().requires_grad_()

    def loss(logits: Tensor) -> Tensor:
        return inputs.call(F.cross_entropy, logits)

    checkpointed = checkpoint(loss, logits, use_reentrant=use_reentrant)
    assert isinstance(checkpointed, Tensor)
    checkpointed.backward(inputs.grad_output)
    identical(logits.grad, expected)


def test_anomaly_mode_and_graph_hooks(device: str) -> None:
    inputs = draw(Case(F32, (9, 19)), device)
    _, expected = inputs.loss_and_grad(F.cross_entropy)
    logits = inputs.logits.detach().requires_grad_()
    seen = []

    def doubled(grad: Tensor) -> Tensor:
        seen.append(grad)
        return 2 * grad

    with torch.autograd.set_detect_anomaly(True):
        loss = inputs.call(F.cross_entropy, logits)
        loss.register_hook(doubled)
        loss.backward(inputs.grad_output)
    identical(seen, [inputs.grad_output])
    torch.testing.assert_close(logits.grad, 2 * expected)


# ------------------------------------------------------------------ log-sum-exp and focal loss


def loss_and_lse(inputs: Inputs, ours: bool, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Both results of cross_entropy_with_lse, of ours or of torch's operators."""
    if ours:
        return F.cross_entropy_with_lse(
            logits, inputs.target, weight=inputs.weight, **inputs.options
        )
    lse = logits.logsumexp(min(logits.dim() - 1, 1))
    if not inputs.target.is_floating_point():
        lse = torch.where(inputs.target == inputs.options["ignore_index"], 0.0, lse)
    return inputs.call(torch_z_loss, logits), lse


def check_both_results(inputs: Inputs, lse_grad: Tensor, label: Any) -> None:
    """As check_inputs, for the log-sum-exp and the gradient through it and the loss together."""
    dtype = inputs.logits.dtype
    class_dim = min(inputs.logits.dim() - 1, 1)
    tensors = [t for t in (inputs.logits, inputs.target, inputs.weight) if t is not None]
    before = [whole_storage(t).clone() for t in (*tensors, lse_grad)]

    def lse_and_grad(these: Inputs, ours: bool) -> tuple[Tensor, Tensor]:
        logits = these.logits.detach().requires_grad_()
        loss, lse = loss_and_lse(these, ours, logits)
        outgoing = (these.grad_output.to(loss.dtype), lse_grad.to(lse.dtype))
        (grad,) = torch.autograd.grad((loss, lse), logits, outgoing)
        return lse.detach(), grad

    ours = lse_and_grad(inputs, True)
    for tensor, bytes_before in zip((*tensors, lse_grad), before, strict=True):
        assert torch.equal(whole_storage(tensor), bytes_before), f"{label}: an input was modified"
    assert [t.dtype for t in ours] == [COMPUTE[dtype], dtype], label
    is_byte = inputs.target.dtype == torch.uint8
    peer = replace(inputs, target=inputs.target.long()) if is_byte else inputs
    peers = [lse_and_grad(peer.to(d), False) for d in {dtype, COMPUTE[dtype]}]
    lses, grads = zip(*peers, strict=True)

    x = inputs.logits.detach().double()
    shifted = x - x.amax(class_dim, keepdim=True)
    log_sum = shifted.exp().sum(class_dim).log()
    counts = torch.ones_like(log_sum)
    if not inputs.target.is_floating_point():
        counts[inputs.target == inputs.options["ignore_index"]] = 0.0
    through = (counts * lse_grad).unsqueeze(class_dim) * shifted.softmax(class_dim)
    loss_alone = inputs.expected()
    lse = counts * (x.amax(class_dim) + log_sum)
    lse_scale = x.abs().amax(class_dim) + log_sum + 1
    # Torch's operators, which give this gradient, take exp(x - lse) of the rounded lse.
    through_scale = through.abs() * (shifted.abs() + lse_scale.unsqueeze(class_dim))
    assert_accurate(f"{label}: log-sum-exp", ours[0], lses, lse, lse_scale, COMPUTE[dtype])
    from_lse = lse_grad.abs().max().item() if lse_grad.numel() else 0.0
    assert_accurate(
        f"{label}: gradient",
        *(ours[1], grads, loss_alone.grad + through, loss_alone.grad_scale + through_scale, dtype),
        factor=max(above(inputs), 1.0) + max(from_lse, 1.0),
        # Each of the two gradients is rounded to the dtype, and their sum.
        more_slack=torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0,
    )


@pytest.mark.parametrize("target", ["long", "probabilities"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(9,), (5, 7), (2, 5, 3, 2)], ids=str)
def test_gradient_through_log_sum_exp(
    shape: tuple[int, ...], reduction: str, target: str, device: str
) -> None:
    """With and without one through the loss, as a value and to be differentiated again."""
    inputs = draw(Case(F64, shape, reduction, True, 0.1, -7, target, loss="z_loss"), device)
    lse_shape = torch.Size(shape[: len(shape) - 1 and 1] + shape[2:])
    through_lse = torch.randn(lse_shape, dtype=F64, device=device)
    for used in ({"lse"}, {"loss", "lse"}, {"loss"}):
        results = []
        for ours in (True, False):
            logits = inputs.logits.detach().requires_grad_()
            loss, lse = loss_and_lse(inputs, ours, logits)
            outgoing = {"loss": (loss, inputs.grad_output), "lse": (lse, through_lse)}
            outputs, grads = zip(*(outgoing[name] for name in sorted(used)), strict=True)
            (grad,) = torch.autograd.grad(outputs, logits, grads, retain_graph=True)
            (again,) = torch.autograd.grad(outputs, logits, grads, create_graph=True)
            (second,) = torch.autograd.grad(again.square().sum(), logits)
            results.append([loss.detach(), lse.detach(), grad, again.detach(), second])
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_sum_exp_in_reduced_precision(dtype: torch.dtype, device: str) -> None:
    inputs = draw(Case(dtype, (9, 19), loss="z_loss"), device)
    logits = inputs.logits.detach().requires_grad_()
    _, lse = loss_and_lse(inputs, True, logits)
    assert lse.dtype == COMPUTE[dtype]
    (grad,) = torch.autograd.grad(lse.sum(), logits)
    assert grad.dtype == dtype
    expected = logits.detach().double().softmax(1)
    expected = expected.masked_fill((inputs.target == -100)[:, None], 0.0)
    torch.testing.assert_close(grad, expected.to(dtype))


@pytest.mark.level
@pytest.mark.parametrize("classes", [8, 300])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
def test_smoothing_of_weights_whose_sum_overflows(
    dtype: torch.dtype, classes: int, device: str
) -> None:
    """Each class weight is a number in float32; the sum over the classes is none."""
    logits = torch.randn(9, classes, device=device).to(dtype)
    weight = torch.full((classes,), 2.0**125, device=device, dtype=dtype)
    target = torch.randint(classes, (9,), device=device)
    huge, plain = (
        F.cross_entropy(
            logits.double() if wide else logits,
            target,
            weight.double() if wide else weight,
            reduction="none",
            label_smoothing=0.25,
        )
        for wide in (False, True)
    )
    finite = plain < torch.finfo(dtype).max
    assert finite.any() and torch.equal(huge.isfinite(), finite)
    torch.testing.assert_close(
        huge[finite].double() / 2.0**125, plain[finite] / 2.0**125, rtol=1e-2, atol=0
    )


@pytest.mark.level
@pytest.mark.parametrize("shape", [(33, 5), (33, 300), (2, 5, 21)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_focal_loss_without_focus_is_cross_entropy(
    dtype: torch.dtype, shape: tuple[int, ...], device: str
) -> None:
    for reduction in REDUCTIONS:
        case = Case(dtype, shape, reduction, True, ignore_index=1)
        inputs = draw(case, device)
        expected = inputs.loss_and_grad(F.cross_entropy)
        del inputs.options["label_smoothing"]
        identical(inputs.loss_and_grad(partial(F.focal_loss, gamma=0.0)), expected)


@pytest.mark.level
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.5, 1.0, 2.0, 5.0, 20.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_focal_loss_for_any_gamma(dtype: torch.dtype, gamma: float, device: str) -> None:
    """No less accurate than torch; logits from near zero to so far apart that p is 0 or 1."""
    for shape, spread in itertools.product([(33, 7), (7, 300), (2, 3, 33)], [0.1, 3.0, 10.0]):
        inputs = draw(Case(dtype, shape, "none", True, loss="focal_loss"), device)
        inputs.logits.mul_(spread / 3)
        inputs.options["gamma"] = gamma
        expected = inputs.expected()
        results = [
            peer.loss_and_grad(function)
            for peer, function in (
                (inputs, F.focal_loss),
                (inputs, torch_focal_loss),
                (inputs.to(COMPUTE[dtype]), torch_focal_loss),
            )
        ]
        for truth, scale, ours, *theirs in zip(
            (expected.loss, expected.grad),
            (expected.loss_scale, expected.grad_scale),
            *results,
            strict=True,
        ):
            errors = [error(t, truth, scale, dtype) for t in theirs]
            assert error(ours, truth, scale, dtype) <= min(errors) + slack(dtype)


@pytest.mark.level
@pytest.mark.parametrize("gamma", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("classes", [5, 300])
@pytest.mark.parametrize("graph", [False, True])
def test_focal_loss_of_certain_rows(gamma: float, classes: int, graph: bool, device: str) -> None:
    """Where p is 1 nothing is lost; where it is 0 the loss is cross-entropy. No NaN in either."""
    logits = torch.zeros(18, classes, device=device)
    logits[:9, 2], logits[9:12, 2], logits[12:, 2] = 1e4, -1e4, -math.inf
    target = torch.full((18,), 2, device=device)
    one = torch.ones(18, device=device)
    expected = Inputs(logits, target, None, one, {"reduction": "none"})
    loss, grad = expected.loss_and_grad(native.cross_entropy)
    leaf = logits.requires_grad_()
    focal = F.focal_loss(leaf, target, gamma, reduction="none")
    (focal_grad,) = torch.autograd.grad(focal, leaf, one, create_graph=graph)
    torch.testing.assert_close(focal.detach(), loss)
    torch.testing.assert_close(focal_grad.detach(), grad)
    if graph:
        (second,) = torch.autograd.grad(focal_grad[:12].square().sum(), leaf)
        assert second.isfinite().all()


OURS_ALONE: dict[str, Function] = {
    "cross_entropy_with_lse": F.cross_entropy_with_lse,
    "focal_loss": F.focal_loss,
}
BAD_OPTIONS: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "negative z_loss": ("cross_entropy_with_lse", {"z_loss": -0.1}, ValueError, "z_loss.*-0.1"),
    "infinite z_loss": ("cross_entropy_with_lse", {"z_loss": math.inf}, ValueError, "z_loss.*inf"),
    "text z_loss": ("cross_entropy_with_lse", {"z_loss": "a"}, RuntimeError, "z_loss"),
    "smoothing": ("cross_entropy_with_lse", {"label_smoothing": 1.5}, RuntimeError, "smoothing"),
    "negative gamma": ("focal_loss", {"gamma": -0.1}, ValueError, "gamma.*-0.1"),
    "NaN gamma": ("focal_loss", {"gamma": math.nan}, ValueError, "gamma.*nan"),
    "text gamma": ("focal_loss", {"gamma": "a"}, RuntimeError, "gamma"),
    "focal smoothing": ("focal_loss", {"label_smoothing": 0.1}, TypeError, "label_smoothing"),
    "probabilities": ("focal_loss", {"target": torch.rand(3, 5)}, RuntimeError, "class indices"),
    **{
        f"{what}, {name}": (name, options, raised, match)
        for name in OURS_ALONE
        for what, options, raised, match in (
            ("reduction", {"reduction": "avg"}, ValueError, "avg"),
            ("short target", {"target": torch.tensor([0, 1])}, ValueError, "target"),
            ("int32 target", {"target": torch.tensor([0, 1, 2]).int()}, RuntimeError, "Int"),
            ("short weight", {"weight": torch.ones(4)}, RuntimeError, "weight"),
            ("list of logits", {"input": [1.0, 2.0]}, RuntimeError, "input"),
            ("integer logits", {"input": torch.ones(3, 5).long()}, RuntimeError, "Long"),
            ("class too large", {"target": torch.tensor([0, 5, 1])}, IndexError, "5"),
            ("no classes", {"input": torch.ones(3, 0)}, IndexError, "0"),
        )
    },
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_arguments_of_our_own_functions(name: str) -> None:
    function, options, raised, match = BAD_OPTIONS[name]
    arguments = {"input": torch.randn(3, 5), "target": torch.tensor([0, 1, 4])} | options
    with pytest.raises(raised, match=match) as error:
        OURS_ALONE[function](**arguments)
        F.check_targets()
    named = re.match(r"\w*(cross_entropy|focal_loss)\w*(?=:)", str(error.value))
    assert named is None or named[0] == function


@pytest.mark.parametrize("name", OURS_ALONE)
def test_what_kernels_do_not_cover_is_composed(name: str) -> None:
    """A weight of another dtype and tensor subclasses."""
    logits, target = torch.randn(3, 5), torch.tensor([0, -100, 4])
    weight = torch.rand(5) + 0.5
    function = OURS_ALONE[name]
    for arguments in (
        (logits, target, weight.double()),
        (logits.as_subclass(Logged), target, weight),
        (logits.bfloat16().as_subclass(Logged), target, weight.bfloat16()),
    ):
        x, y, w = arguments
        plain = x.as_subclass(Tensor)
        result, expected = (
            function(a, y, weight=b, reduction="none") for a, b in ((x, w), (plain, w.to(x.dtype)))
        )
        torch.testing.assert_close(
            tree_map(lambda t: t.as_subclass(Tensor), result), expected, rtol=1e-2, atol=1e-3
        )


@pytest.mark.parametrize("shape", [(5, 7), (3000, 10), (5, 700)], ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_a_class_out_of_range_of_the_other_losses(
    name: str, shape: tuple[int, int], on_cuda: bool, device: str
) -> None:
    inputs = draw(Case(F32, shape, "none", loss=name), device)
    inputs.target[3] = 4242
    logits = inputs.logits.requires_grad_()
    wrong = torch.arange(shape[0], device=device) == 3
    with pytest.raises(IndexError, match="4242 at row 3"):  # on CUDA by the last line
        if name == "z_loss":
            loss, lse = loss_and_lse(inputs, True, logits)
            identical(lse.isnan(), wrong)
        else:
            loss = inputs.call(inputs.loss.ours, logits)
        loss.sum().backward()
        assert logits.grad is not None
        identical(loss.isnan(), wrong)
        identical(logits.grad.isnan().all(1), wrong)
        identical(logits.grad.isnan().any(1), wrong)
        F.check_targets(device)


FOCAL_MODULES: dict[str, tuple[dict[str, Any], str]] = {
    "defaults": ({}, "FocalLoss(gamma=2.0)"),
    "weights": ({"weight": torch.linspace(0.5, 2.0, 7)}, "FocalLoss(gamma=2.0)"),
    "all": (
        {"gamma": 0.5, "ignore_index": 3, "reduction": "sum"},
        "FocalLoss(gamma=0.5, ignore_index=3, reduction='sum')",
    ),
}


@pytest.mark.parametrize("name", FOCAL_MODULES)
def test_focal_module(name: str) -> None:
    options, shown = FOCAL_MODULES[name]
    module = fusedstep.FocalLoss(**options)
    logits, target = torch.randn(9, 7), torch.randint(7, (9,))
    expected = F.focal_loss(logits, target, **options)
    assert isinstance(module, nn.Module) and repr(module) == shown
    assert list(module.state_dict()) == (["weight"] if "weight" in options else [])
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded = fusedstep.FocalLoss(**options | {"weight": options.get("weight", None)})
    loaded.load_state_dict(module.state_dict())
    for copied in (module, copy.deepcopy(module), torch.load(buffer, weights_only=False), loaded):
        copied._apply(torch.clone)  # unpickled memory is not a device's
        identical(copied(logits, target), expected)
    module.double()
    torch.testing.assert_close(module(logits.double(), target), expected.double())


# ------------------------------------------------------------------ autocast and loss scales


@pytest.mark.level
@pytest.mark.parametrize("target", ["long", "probabilities"])
@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64], ids=str)
@pytest.mark.parametrize("autocast_dtype", [BF16, F16], ids=str)
def test_autocast(
    autocast_dtype: torch.dtype, dtype: torch.dtype, target: str, device: str
) -> None:
    """A float32 loss straight from 16-bit logits, their gradient rounded once."""
    cases = [
        Case(dtype, (33, 70), reduction, weighted, smoothing, target=target, loss=loss)
        for reduction, weighted, smoothing in itertools.product(
            REDUCTIONS, [False, True], [0.0, 0.1]
        )
        for loss in (LOSSES if weighted else ["cross_entropy"])
    ]
    for case in cases:
        if case.is_refused:
            continue
        inputs = draw(case, device)
        wide = dtype if dtype is F64 else F32
        inputs.grad_output = inputs.grad_output.to(wide)
        expected = inputs.expected()
        with torch.autocast(device, dtype=autocast_dtype):
            loss, grad = inputs.loss_and_grad(inputs.loss.ours)
            their_loss, their_grad = inputs.loss_and_grad(inputs.loss.native)
        assert (loss.dtype, grad.dtype) == (their_loss.dtype, their_grad.dtype) == (wide, dtype)
        for ours, theirs, truth, scale, stored in (
            (loss, their_loss, expected.loss, expected.loss_scale, wide),
            (grad, their_grad, expected.grad, expected.grad_scale, dtype),
        ):
            limit = error(theirs, truth, scale, stored) + slack(stored)
            assert error(ours, truth, scale, stored) <= limit, case


@pytest.mark.parametrize("loss_scale", [1.0, 65536.0])
def test_loss_scale_keeps_half_gradients_from_vanishing(loss_scale: float, device: str) -> None:
    """The scale arrives with grad_output, after a gradient made in the forward pass could already
    have vanished: 1/2048 of a probability of 1/500 is 16 times the least that float16 holds."""
    logits = (3 * torch.randn(2048, 500, device=device)).half()
    target = torch.randint(500, (2048,), device=device)
    inputs = Inputs(logits, target, None, torch.tensor(loss_scale, device=device), {})
    expected = reference.cross_entropy(logits, target, grad_output=loss_scale)
    with torch.autocast(device, dtype=F16):
        _, grad = inputs.loss_and_grad(F.cross_entropy)
        _, theirs = inputs.loss_and_grad(native.cross_entropy)
    assert grad.dtype == F16
    assert ((theirs != 0) <= (grad != 0)).all(), "a gradient vanished that torch keeps"
    limit = error(theirs, expected.grad, expected.grad_scale, F16) + slack(F16)
    assert error(grad, expected.grad, expected.grad_scale, F16) <= limit


def test_loss_scale_without_autocast(device: str) -> None:
    logits = torch.randn(512, 1000, device=device).half()
    target = torch.randint(1000, (512,), device=device)
    options = {"reduction": "sum"}
    inputs = Inputs(logits, target, None, torch.tensor(1024.0, device=device), options)
    expected = reference.cross_entropy(logits, target, grad_output=1024.0, **options)
    _, grad = inputs.loss_and_grad(F.cross_entropy)
    assert error(grad, expected.grad, expected.grad_scale, F16) <= slack(F16)


# ------------------------------------------------------------------ the same bits, always


DETERMINISTIC = [
    Case(dtype, shape, reduction, True, smoothing, target=target, layout=layout)
    for dtype, shape, reduction, smoothing, target, layout in (
        (F32, (4097, 10), "mean", 0.0, "long", "contiguous"),
        (F32, (4097, 10), "sum", 0.1, "long", "contiguous"),
        (F32, (1025, 1000), "mean", 0.0, "long", "contiguous"),
        (BF16, (1025, 1000), "mean", 0.1, "long", "contiguous"),
        (F64, (33, 32000), "sum", 0.0, "long", "contiguous"),
        (F32, (3, 128256), "mean", 0.1, "long", "contiguous"),
        (F32, (1, 128256), "mean", 0.0, "long", "contiguous"),
        (F16, (2, 21, 129, 131), "mean", 0.0, "long", "contiguous"),
        (F32, (2, 21, 129, 131), "sum", 0.1, "long", "channels_last"),
        (F32, (513, 1000), "mean", 0.1, "probabilities", "contiguous"),
        (F32, (2, 21, 129, 131), "mean", 0.0, "probabilities", "contiguous"),
        (F32, (1000, 1025), "mean", 0.0, "long", "transposed"),
    )
]
DETERMINISTIC += [
    Case(F32, shape, "mean", True, loss=loss)
    for shape, loss in itertools.product([(4097, 10), (257, 1000)], OTHERS)
]


@pytest.mark.parametrize("case", DETERMINISTIC, ids=str)
def test_same_bits_run_to_run_and_for_any_thread_count(case: Case, device: str) -> None:
    inputs = draw(case, device)
    torch._C._set_deterministic_algorithms(False)
    results = []
    for threads in (1, 2, 3, 2, 1):
        torch.set_num_threads(threads)
        results.append(inputs.loss_and_grad(inputs.loss.ours))
    for result in results[1:]:
        identical(result, results[0])


def test_rows_do_not_depend_on_their_neighbours(device: str) -> None:
    """The same row gives the same bits wherever it stands in the batch."""
    for classes in (3, 10, 17, 1000):
        logits = torch.randn(100, classes, device=device)
        target = torch.randint(classes, (100,), device=device)
        losses = F.cross_entropy(logits, target, reduction="none")
        order = torch.randperm(100, device=device)
        identical(F.cross_entropy(logits[order], target[order], reduction="none"), losses[order])


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize("shape", [(5, 7), (5, 700)], ids=str)
def test_an_index_that_goes_out_of_range_behind_autograd_is_refused(
    shape: tuple[int, int], on_cuda: bool
) -> None:
    logits, target = torch.randn(shape, requires_grad=True), torch.zeros(5, dtype=torch.int64)
    loss = F.cross_entropy(logits, target, reduction="none")
    change = target.cpu()
    change.numpy()[3] = 10**9
    target.data.copy_(change)
    if on_cuda:
        loss.sum().backward()
        assert logits.grad is not None
        assert logits.grad.isnan().all(1).tolist() == [False, False, False, True, False]
    else:
        with pytest.raises(IndexError, match="target 1000000000 at row 3"):
            loss.sum().backward()
        assert logits.grad is None


def test_operators_refuse_tensors_that_do_not_fit() -> None:
    forward = torch.ops.fusedstep.cross_entropy_forward
    backward = torch.ops.fusedstep.cross_entropy_backward
    x, y = torch.randn(5, 7), torch.zeros(5, dtype=torch.int64)
    rest = (1, -100, 0.0, 0.0, None, F32, True, True, False)
    with pytest.raises(RuntimeError, match="target of shape"):
        forward(x, y[:4], None, *rest)
    with pytest.raises(RuntimeError, match="weight must have"):
        forward(x, y, torch.ones(6), *rest)
    with pytest.raises(RuntimeError, match="have no classes"):
        forward(x[:, :0], y, None, *rest)
    _, _, stats, _ = forward(x, y, None, *rest)
    for grad_output, wrong in ((torch.ones(4), stats), (torch.ones(()), stats[:-1])):
        with pytest.raises(RuntimeError, match="do not belong"):
            backward(grad_output, x, y, None, -100, 0.0, wrong)
    for wrong in (stats.double(), stats[:, None].expand(-1, 2).contiguous()[:, 0]):
        with pytest.raises(RuntimeError, match="stats must be contiguous and Float"):
            backward(torch.ones(()), x, y, None, -100, 0.0, wrong)
    with pytest.raises(RuntimeError, match="grad_output of dtype Long"):
        backward(torch.ones((), dtype=torch.int64), x, y, None, -100, 0.0, stats)


def test_operators_refuse_dtypes_and_dimensions_that_kernels_do_not_read() -> None:
    forward = torch.ops.fusedstep.cross_entropy_forward
    x, y = torch.randn(5, 7), torch.zeros(5, dtype=torch.int64)
    rest = (1, -100, 0.0, 0.0, None)
    wanted = (True, True, False)
    with pytest.raises(RuntimeError, match="logits of dtype Long"):
        forward(x.long(), y, None, *rest, F32, *wanted)
    for dtype in (torch.float64, torch.float16, torch.int32):
        with pytest.raises(RuntimeError, match="class probabilities of dtype"):
            forward(x, x.to(dtype), None, *rest, F32, *wanted)
    for dtype in (torch.float64, torch.int64):
        with pytest.raises(RuntimeError, match="a loss of dtype"):
            forward(x, y, None, *rest, dtype, *wanted)
    for reduction in (-1, 3, 2**32):
        with pytest.raises(RuntimeError, match=f"no reduction {reduction}"):
            forward(x, y, None, reduction, *rest[1:], F32, *wanted)
    with pytest.raises(RuntimeError, match="9 dimensions"):
        forward(x.view(5, 7, *[1] * 7), y.view(5, *[1] * 7), None, *rest, F32, *wanted)
    with pytest.raises(RuntimeError, match="0 dimensions"):
        forward(x[0, 0], y[0], None, *rest, F32, *wanted)
    with pytest.raises(RuntimeError, match="count up to 2147483647 classes, not 2147483648"):
        forward(x[:, :1].expand(5, 2**31), y, None, *rest, F32, False, False, False)


def large_gradient(seed: int) -> tuple[Tensor, Tensor]:
    """A gradient of 2 MB, whose memory is kept for the next once freed, and what it should be."""
    torch.manual_seed(seed)
    x, y = torch.randn(512, 1000, requires_grad=True), torch.randint(1000, (512,))
    (expected,) = torch.autograd.grad(native.cross_entropy(x, y), x)
    (gradient,) = torch.autograd.grad(F.cross_entropy(x, y), x)
    return gradient, expected


@pytest.mark.usefixtures("cpu_only")
def test_memory_of_a_freed_gradient_serves_the_next_and_that_of_a_live_one_nobody_else() -> None:
    first, expected = large_gradient(0)
    second, _ = large_gradient(1)
    assert first.data_ptr() != second.data_ptr()
    torch.testing.assert_close(first, expected)
    freed = second.data_ptr()
    del second
    third, expected = large_gradient(2)
    assert third.data_ptr() == freed
    third.resize_(2048, 1000)
    torch.testing.assert_close(third[:512], expected)
    torch.testing.assert_close(copy.deepcopy(third)[:512], expected)


def test_gradients_of_several_threads_do_not_share_memory() -> None:
    def check(thread: int) -> None:
        for repetition in range(5):
            gradient, expected = large_gradient(10 * thread + repetition)
            torch.testing.assert_close(gradient, expected)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(check, range(4)))


@pytest.mark.usefixtures("cpu_only")
@pytest.mark.parametrize("target", ["long", "probabilities"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "class step"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_but_the_gradient_is_allocated(
    dtype: torch.dtype, layout: str, target: str
) -> None:
    """No copy of the logits, whatever their strides, nor log-probabilities; a few numbers a row."""
    cases = [
        Case(dtype, shape, reduction, True, 0.1, target=target, layout=layout)
        for shape, reduction in (
            ((129, 200), "mean"),
            ((129, 200), "none"),
            ((2, 21, 30, 31), "mean"),
        )
    ]
    cases += [replace(case, smoothing=0.0, loss=loss) for case in cases for loss in OTHERS]
    for case in cases:
        if case.is_refused:
            continue
        inputs = draw(case, "cpu")
        inputs.loss_and_grad(inputs.loss.ours)
        gradient = inputs.logits.numel() * dtype.itemsize
        rows = math.prod(case.row_shape)
        peak = peak_memory(partial(inputs.loss_and_grad, inputs.loss.ours))
        assert peak <= gradient + 5 * 8 * rows + 8 * case.classes + 4096
        peak = peak_memory(partial(inputs.call, inputs.loss.ours))
        assert peak <= 5 * 8 * rows + 8 * case.classes + 4096


# ------------------------------------------------------------------ living inside torch


WITHOUT_VALUES = [
    Case(BF16, (4, 7), "none"),
    Case(),
    Case(F32, (2, 7, 3), target="probabilities"),
    *(Case(F32, (2, 7, 3), "mean", loss=loss) for loss in OTHERS),
]


def test_meta_tensors() -> None:
    for case in WITHOUT_VALUES:
        inputs = draw(case, "cpu")
        logits = inputs.logits.to("meta").requires_grad_()
        loss = inputs.loss.ours(logits, inputs.target.to("meta"), **inputs.options)
        expected = inputs.call(inputs.loss.native)
        assert loss.is_meta and (loss.dtype, loss.shape) == (expected.dtype, expected.shape)
        loss.sum().backward()
        assert logits.grad is not None and logits.grad.shape == logits.shape


def test_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    for case in WITHOUT_VALUES:
        inputs = draw(case, "cpu")
        with FakeTensorMode() as mode:
            logits = mode.from_tensor(inputs.logits).requires_grad_()
            target = mode.from_tensor(inputs.target)
            loss = inputs.loss.ours(logits, target, **inputs.options)
            loss.sum().backward()
        expected = inputs.call(inputs.loss.native)
        assert isinstance(loss, FakeTensor)
        assert (loss.dtype, loss.shape) == (expected.dtype, expected.shape)
        assert isinstance(logits.grad, FakeTensor) and logits.grad.dtype == case.dtype


@pytest.mark.parametrize("subclassed", ["input", "target", "weight"])
def test_tensor_subclasses(subclassed: str) -> None:
    inputs = draw(Case(F32, (5, 7), weighted=True), "cpu")
    arguments = {"input": inputs.logits, "target": inputs.target, "weight": inputs.weight}
    expected = native.cross_entropy(**arguments)
    value = arguments[subclassed]
    assert value is not None
    arguments[subclassed] = value.as_subclass(Logged)
    Logged.seen.clear()
    loss = F.cross_entropy(**arguments)
    assert native.cross_entropy in Logged.seen
    assert type(loss) is Logged
    torch.testing.assert_close(loss.as_subclass(Tensor), expected)


def test_parameters_and_buffers_are_ordinary_tensors() -> None:
    logits, target = nn.Parameter(torch.randn(5, 7)), torch.randint(7, (5,))
    loss = F.cross_entropy(logits, target)
    loss.backward()
    assert type(loss) is Tensor
    torch.testing.assert_close(loss, native.cross_entropy(logits, target))


def test_torch_function_mode_sees_the_call() -> None:
    inputs = draw(Case(), "cpu")
    expected = inputs.call(native.cross_entropy)
    with FunctionsSeen() as mode:
        loss = inputs.call(F.cross_entropy)
    torch.testing.assert_close(loss, expected)
    assert [function.__name__ for function in mode.seen] == ["cross_entropy"]


def test_torch_dispatch_mode_sees_operators_both_ways() -> None:
    for case in GRADED[:4]:
        inputs = draw(case, "cpu")
        expected = inputs.loss_and_grad(inputs.loss.ours)
        logits = inputs.logits.detach().requires_grad_()
        with OperatorsSeen() as mode:
            loss = inputs.call(inputs.loss.ours, logits)
            assert mode.seen, "the forward pass is invisible"
            mode.seen.clear()
            loss.backward(inputs.grad_output)
            assert mode.seen, "the backward pass is invisible"
        torch.testing.assert_close((loss.detach(), logits.grad), expected)


@pytest.mark.parametrize("loss_name", LOSSES)
def test_compiled_without_a_code_generator(loss_name: str, device: str) -> None:
    smoothing = 0.0 if LOSSES[loss_name].indices_only else 0.1
    case = Case(F32, (9, 19), weighted=True, smoothing=smoothing, loss=loss_name)
    inputs = draw(case, device)

    def step(logits: Tensor) -> Tensor:
        return inputs.call(inputs.loss.ours, logits * 2)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, step):
        logits = inputs.logits.detach().requires_grad_()
        loss = function(logits)
        loss.backward()
        results.append((loss.detach(), logits.grad))
    torch.testing.assert_close(*results)


def test_a_default_device_is_no_reason_for_torchs_own_op() -> None:
    logits, target = torch.randn(5, 7, requires_grad=True), torch.randint(7, (5,))
    ours = type(F.mse_loss(logits, logits.detach()).grad_fn)
    with torch.device("cpu"):
        loss = F.cross_entropy(logits, target)
        assert type(F.mse_loss(logits, logits.detach()).grad_fn) is ours
    assert loss.grad_fn is not None and loss.grad_fn.name() == "CrossEntropyBackward0"
    torch.testing.assert_close(loss, native.cross_entropy(logits, target))


def test_threads_of_a_program_may_share_it() -> None:
    from concurrent.futures import ThreadPoolExecutor

    inputs = [draw(Case(F32, (65, 1 + 13 * i)), "cpu") for i in range(1, 17)]
    expected = [i.loss_and_grad(F.cross_entropy) for i in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            identical(list(pool.map(lambda i: i.loss_and_grad(F.cross_entropy), inputs)), expected)


# ------------------------------------------------------------------ the module


def modules(*args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    return fusedstep.CrossEntropyLoss(*args, **kwargs), nn.CrossEntropyLoss(*args, **kwargs)


CONSTRUCTED: dict[str, dict[str, Any]] = {
    "defaults": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "weights": {"weight": torch.linspace(0.5, 2.0, 7)},
    "ignored class": {"ignore_index": 3, "weight": torch.linspace(0.5, 2.0, 7)},
    "smoothing": {"label_smoothing": 0.1},
    "deprecated sum": {"size_average": False},
    "deprecated mean": {"size_average": True},
    "deprecated none": {"reduce": False},
    "deprecated both": {"size_average": False, "reduce": True},
}


@pytest.mark.parametrize("name", CONSTRUCTED)
@pytest.mark.filterwarnings("ignore:size_average and reduce args")
def test_module_like_torch(name: str) -> None:
    ours, theirs = modules(**CONSTRUCTED[name])
    logits, target = torch.randn(9, 7), torch.randint(7, (9,))
    expected = theirs(logits, target)
    assert isinstance(ours, nn.CrossEntropyLoss)
    assert repr(ours) == repr(theirs)
    assert ours.__dict__.keys() == theirs.__dict__.keys()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for copied in (ours, copy.deepcopy(ours), copy.copy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is fusedstep.CrossEntropyLoss
        copied._apply(torch.clone)  # unpickled memory is not a device's
        torch.testing.assert_close(copied(logits, target), expected)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    torch.testing.assert_close(loaded(logits, target), expected)


@pytest.mark.parametrize("options", [{"size_average": False}, {"reduce": False}], ids=str)
def test_deprecated_arguments_of_the_function(options: dict[str, bool]) -> None:
    logits, target = torch.randn(9, 7), torch.randint(7, (9,))
    with pytest.warns(UserWarning, match="please use reduction="):
        loss = F.cross_entropy(logits, target, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(loss, native.cross_entropy(logits, target, **options))


def test_arguments_by_position_like_torch() -> None:
    logits, target, weight = torch.randn(9, 7), torch.randint(7, (9,)), torch.rand(7)
    arguments = (logits, target, weight, None, 3, None, "sum", 0.1)
    torch.testing.assert_close(F.cross_entropy(*arguments), native.cross_entropy(*arguments))
    by_name = {"input": logits, "target": target, "weight": weight, "label_smoothing": 0.1}
    torch.testing.assert_close(F.cross_entropy(**by_name), native.cross_entropy(**by_name))


def test_module_follows_its_device_dtype_and_mode() -> None:
    ours, theirs = modules(torch.linspace(0.5, 2.0, 7), ignore_index=2)
    logits, target = torch.randn(9, 7, dtype=F64), torch.randint(7, (9,))
    for module in (ours, theirs):
        module.double().eval().requires_grad_(False)
    torch.testing.assert_close(ours(logits, target), theirs(logits, target))
    calls = []
    ours.register_forward_hook(lambda module, args, output: calls.append(output))
    loss = nn.Sequential(ours)[0](logits, target)
    identical(calls, [loss])
    ours.label_smoothing = theirs.label_smoothing = 0.3
    ours.reduction = theirs.reduction = "sum"
    torch.testing.assert_close(ours(logits, target), theirs(logits, target))


def test_graph_node_is_readable() -> None:
    linear = nn.Linear(3, 7)
    for loss in (
        F.cross_entropy(linear(torch.randn(9, 3)), torch.randint(7, (9,))),
        fusedstep.CrossEntropyLoss()(linear(torch.randn(9, 3)), torch.rand(9, 7)),
        F.cross_entropy(linear(torch.randn(9, 3)), torch.randint(7, (9,)), reduction="none"),
    ):
        assert loss.grad_fn is not None
        assert loss.grad_fn.name() == "CrossEntropyBackward0"
        assert "CrossEntropyBackward0" in repr(loss.grad_fn)
        assert "CrossEntropyBackward0" in repr(loss)
        assert loss.grad_fn.next_functions[0][0].name() == "AddmmBackward0"


# ------------------------------------------------------------------ torch's own sample inputs


def check_sample(*args: Any, **kwargs: Any) -> None:
    """Our loss and gradient against torch's on the same numbers in float64."""
    results = []
    for function, cast in ((F.cross_entropy, detached), (native.cross_entropy, widened)):
        logits, *others = tree_map(cast, args)
        leaf = logits.detach().clone().requires_grad_()
        loss = function(leaf, *others, **tree_map(cast, kwargs))
        loss.sum().backward()
        results.append((loss.detach(), leaf.grad))
    (loss, grad), expected = results
    dtype = args[0].dtype
    assert (loss.dtype, grad.dtype) == (dtype, dtype)
    rounded = tree_map(lambda t: t.to(dtype), expected)
    torch.testing.assert_close((loss, grad), rounded, equal_nan=True)


def test_torch_module_database() -> None:
    pytest.importorskip("expecttest")  # which torch.testing._internal imports
    from torch.testing._internal.common_modules import module_db

    (info,) = [info for info in module_db if info.module_cls is nn.CrossEntropyLoss]
    samples = [info.module_inputs_func(info, "cpu", dtype, True, True) for dtype in DTYPES]
    assert [len(of_dtype) for of_dtype in samples] == [105] * 4
    for sample in itertools.chain(*samples):
        built, called = sample.constructor_input, sample.forward_input
        module = fusedstep.CrossEntropyLoss(*built.args, **built.kwargs)
        arguments = {**called.kwargs, **built.kwargs}
        check_sample(*called.args, **arguments)
        options = {**arguments, "input": called.args[0], "target": called.args[1]}
        identical(module(*called.args, **called.kwargs), F.cross_entropy(**options))


def test_torch_module_error_database() -> None:
    pytest.importorskip("expecttest")  # which torch.testing._internal imports
    from torch.testing._internal.common_modules import module_db

    (info,) = [info for info in module_db if info.module_cls is nn.CrossEntropyLoss]
    samples = info.module_error_inputs_func(info, "cpu", F32, False, True)
    assert samples
    for sample in samples:
        built = sample.module_error_input.constructor_input
        called = sample.module_error_input.forward_input
        module = fusedstep.CrossEntropyLoss(*built.args, **built.kwargs)
        with pytest.raises(sample.error_type, match=r"\w"):
            module(*called.args, **called.kwargs)


def test_torch_operator_database() -> None:
    pytest.importorskip("expecttest")  # which torch.testing._internal imports
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = [info for info in op_db if info.name == "nn.functional.cross_entropy"]
    samples = [list(info.sample_inputs("cpu", dtype, requires_grad=True)) for dtype in DTYPES]
    assert all(len(of_dtype) > 10 for of_dtype in samples)
    for sample in itertools.chain(*samples):
        check_sample(sample.input, *sample.args, **sample.kwargs)


OPERATOR_SAMPLES = [
    Case(F32, (5, 7), "mean", True, 0.1),
    Case(F32, (5, 7), "none"),
    Case(BF16, (5, 7), "sum", ignore_index=1),
    Case(F64, (2, 7, 3, 2), "mean", layout="channels_last"),
    Case(F32, (7,), "mean"),
    Case(F32, (5, 7), "mean", target="probabilities"),
    Case(F32, (2, 7, 3), "none", True, 0.1, target="probabilities"),
    Case(F32, (5, 7), "mean", True, 0.1, loss="z_loss"),
    Case(BF16, (2, 7, 3), "none", target="probabilities", loss="z_loss"),
    Case(F32, (5, 7), "mean", True, ignore_index=1, loss="focal_loss"),
    Case(F16, (2, 7, 3), "none", loss="focal_loss"),
]


def operator_arguments(inputs: Inputs) -> dict[str, Any]:
    options = inputs.options
    return {
        "input": inputs.logits,
        "target": inputs.target,
        "weight": inputs.weight,
        "reduction": REDUCTION_CODE[options["reduction"]],
        "ignore_index": options["ignore_index"],
        **{name: options[name] for name in inputs.loss.operator_options},
    }


def forward_arguments(
    inputs: Inputs, loss_dtype: torch.dtype, with_grad: bool, with_stats: bool, with_lse: bool
) -> tuple[Any, ...]:
    options = inputs.options
    return (
        inputs.logits,
        inputs.target,
        inputs.weight,
        REDUCTION_CODE[options["reduction"]],
        options["ignore_index"],
        options.get("label_smoothing", 0.0),
        options.get("z_loss", 0.0),
        options.get("gamma"),
        loss_dtype,
        with_grad,
        with_stats,
        with_lse,
    )


@pytest.mark.parametrize("case", OPERATOR_SAMPLES, ids=str)
def test_opcheck(case: Case, device: str) -> None:
    inputs = draw(case, device)
    torch._C._set_deterministic_algorithms(False)
    operator = getattr(torch.ops.fusedstep, inputs.loss.operator).default
    torch.library.opcheck(operator, (), operator_arguments(inputs))
    result = operator(**operator_arguments(inputs))
    loss = result if isinstance(result, Tensor) else result[0]
    torch.testing.assert_close(loss, inputs.call(inputs.loss.ours))
    inputs.logits.requires_grad_()
    torch.library.opcheck(operator, (), operator_arguments(inputs))


@pytest.mark.parametrize("case", OPERATOR_SAMPLES, ids=str)
def test_opcheck_of_forward_and_backward(case: Case, device: str) -> None:
    """The operators beneath, which have no gradient of their own."""
    inputs = draw(case, device)
    torch._C._set_deterministic_algorithms(False)
    forward = torch.ops.fusedstep.cross_entropy_forward.default
    backward = torch.ops.fusedstep.cross_entropy_backward.default
    loss, grad = inputs.loss_and_grad(inputs.loss.ours)
    for wanted in itertools.product([False, True], repeat=3):
        arguments = forward_arguments(inputs, loss.dtype, *wanted)
        torch.library.opcheck(forward, arguments)
        outputs = forward(*arguments)
        identical(outputs[0], loss)
    logits, target, weight, _, ignore_index, smoothing = arguments[:6]
    grad_output = inputs.grad_output.to(loss.dtype)
    arguments = (grad_output, logits, target, weight, ignore_index, smoothing, outputs[2])
    torch.library.opcheck(backward, arguments)
    torch.testing.assert_close(backward(*arguments), grad)


def operator_outputs(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, gradient, what a backward needs to recompute it, and log-sum-exp."""
    forward = torch.ops.fusedstep.cross_entropy_forward
    return forward(*forward_arguments(inputs, inputs.logits.dtype, True, True, True))


@pytest.mark.level
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [1, 7, 131, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_sum_exp_of_rows(
    dtype: torch.dtype, classes: int, smoothing: float, device: str
) -> None:
    for shape, layout in (((37, classes), "contiguous"), ((2, classes, 9), "channels_last")):
        case = Case(dtype, shape, smoothing=smoothing, ignore_index=0, layout=layout)
        inputs = draw(case, device)
        lse = operator_outputs(inputs)[3]
        expected = inputs.logits.double().logsumexp(1).masked_fill(inputs.target == 0, 0.0)
        scale = 1 + inputs.logits.double().abs().amax(1)
        assert (lse.dtype, lse.shape) == (COMPUTE[dtype], inputs.target.shape)
        assert lse.is_contiguous()
        assert error(lse, expected, scale, COMPUTE[dtype]) <= slack(COMPUTE[dtype])


@pytest.mark.level
@pytest.mark.parametrize("classes", [7, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_a_part_of_the_classes(dtype: torch.dtype, classes: int, device: str) -> None:
    """From log-sum-exps over all classes; a row whose class lies elsewhere has no coefficient."""
    inputs = draw(Case(dtype, (33, classes), "sum", ignore_index=-7), device)
    _, grad, stats, lse = operator_outputs(inputs)
    target, begin = inputs.target, classes // 2
    ignored = target == -7
    here = target >= begin
    part = torch.where(ignored, target, torch.where(here, target - begin, 0))
    rows = torch.stack([lse, (~ignored).to(lse.dtype), here.to(lse.dtype)], 1)
    actual = torch.ops.fusedstep.cross_entropy_backward(
        torch.ones((), device=device),
        inputs.logits[:, begin:],
        part,
        None,
        -7,
        0.0,
        torch.cat([rows.flatten(), stats[-1:]]),
    )
    expected = grad[:, begin:]
    torch.testing.assert_close(actual, expected)


# ------------------------------------------------------------------ bad input

LOGITS, TARGET, WEIGHT = torch.randn(3, 5), torch.tensor([0, 1, 4]), torch.ones(5)
IMAGE, MASK = torch.randn(2, 5, 3, 4), torch.randint(5, (2, 3, 4))
PROBABILITIES = LOGITS.softmax(1)

# What is wrong: the call, and what the message has to speak of.
BAD: dict[str, tuple[Callable[[Function], Tensor], str]] = {
    "0-d logits": (lambda f: f(LOGITS[0, 0], TARGET[0]), "."),
    "0-d logits, probabilities": (lambda f: f(LOGITS[0, 0], LOGITS[0, 1]), "dim"),
    "fewer targets than rows": (lambda f: f(LOGITS, TARGET[:2]), r"3.*2|2.*3"),
    "more targets than rows": (lambda f: f(LOGITS[:2], TARGET), r"3.*2|2.*3"),
    "scalar target for a batch": (lambda f: f(LOGITS, TARGET[0]), "target"),
    "2-d target": (lambda f: f(LOGITS, TARGET[:, None]), "target"),
    "two targets for one row": (lambda f: f(LOGITS[0], TARGET[:2]), "target"),
    "target of one for one row": (lambda f: f(LOGITS[0], TARGET[:1]), "target"),
    "target of one, unreduced": (lambda f: f(LOGITS[0], TARGET[:1], reduction="none"), "target"),
    "missing spatial dimension": (lambda f: f(IMAGE, MASK[:, 0]), "target"),
    "spatial size": (lambda f: f(IMAGE, MASK[:, :2]), r"(?i)size|shape"),
    "1-d spatial size": (lambda f: f(IMAGE[..., 0], MASK[:, :2, 0]), r"(?i)size|shape"),
    "3-d spatial size": (lambda f: f(IMAGE[..., None], MASK[:, :2, :, None]), r"(?i)size|shape"),
    "batch of images": (lambda f: f(IMAGE, MASK[:1]), r"(?i)batch|size|shape"),
    "probabilities, other classes": (lambda f: f(LOGITS, PROBABILITIES[:, :4]), "target"),
    "int32 target": (lambda f: f(LOGITS, TARGET.int()), "(?i)int"),
    "int16 target": (lambda f: f(LOGITS, TARGET.short()), "(?i)short|int16"),
    "int8 target": (lambda f: f(LOGITS, TARGET.to(torch.int8)), "(?i)char|int8"),
    "bool target": (lambda f: f(LOGITS, TARGET.bool()), "(?i)bool"),
    "float target of indices": (lambda f: f(LOGITS, TARGET.float()), "(?i)float"),
    "long target of the logits' shape": (lambda f: f(LOGITS, LOGITS.long()), "(?i)long|int64"),
    "int32 image mask": (lambda f: f(IMAGE, MASK.int()), "(?i)int"),
    "integer logits": (lambda f: f(LOGITS.long(), TARGET), "(?i)long|int64"),
    "bool logits": (lambda f: f(LOGITS.bool(), TARGET), "(?i)bool"),
    "complex logits": (lambda f: f(LOGITS.to(torch.complex64), TARGET), "(?i)complex"),
    "sparse logits": (lambda f: f(LOGITS.to_sparse(), TARGET), "."),
    "sparse target": (lambda f: f(LOGITS, TARGET.to_sparse()), "."),
    "float8 logits": (lambda f: f(LOGITS.to(torch.float8_e4m3fn), TARGET), "(?i)float8"),
    "half weight": (lambda f: f(LOGITS, TARGET, WEIGHT.half()), "(?i)half|float16"),
    "double weight": (lambda f: f(LOGITS, TARGET, WEIGHT.double()), "(?i)double|float64"),
    "long weight": (lambda f: f(LOGITS, TARGET, WEIGHT.long()), "(?i)long|int64"),
    "float weight, bf16 logits": (lambda f: f(LOGITS.bfloat16(), TARGET, WEIGHT), "(?i)float"),
    "short weight": (lambda f: f(LOGITS, TARGET, WEIGHT[:4]), "weight.*4"),
    "long vector of weights": (lambda f: f(LOGITS, TARGET, torch.ones(6)), "weight.*6"),
    "2-d weight": (lambda f: f(LOGITS, TARGET, WEIGHT[:, None]), "weight"),
    "scalar weight": (lambda f: f(LOGITS, TARGET, WEIGHT[0]), "weight"),
    "short weight, probabilities": (lambda f: f(LOGITS, PROBABILITIES, WEIGHT[:4]), "weight.*4"),
    "short weight, image": (lambda f: f(IMAGE, MASK, WEIGHT[:4]), "weight"),
    "ignored probabilities": (lambda f: f(LOGITS, PROBABILITIES, ignore_index=0), "ignore_index"),
    "smoothing above one": (lambda f: f(LOGITS, TARGET, label_smoothing=1.1), "smoothing.*1.1"),
    "smoothing above one, probabilities": (
        lambda f: f(LOGITS, PROBABILITIES, label_smoothing=1.1),
        "smoothing.*1.1",
    ),
    "infinite smoothing": (lambda f: f(LOGITS, TARGET, label_smoothing=math.inf), "smoothing"),
    "reduction": (lambda f: f(LOGITS, TARGET, reduction="avg"), "avg"),
    "no reduction": (lambda f: f(LOGITS, TARGET, reduction=None), "None"),
    "empty reduction": (lambda f: f(LOGITS, TARGET, reduction=""), "reduction"),
    "class too large": (lambda f: f(LOGITS, torch.tensor([0, 5, 1])), "(?s)5"),
    "class negative": (lambda f: f(LOGITS, torch.tensor([0, 1, -1])), "-1"),
    "class enormous": (lambda f: f(LOGITS, torch.tensor([2**40, 1, 1])), str(2**40)),
    "class hugely negative": (lambda f: f(LOGITS, torch.tensor([0, -(2**63), 1])), str(2**63)),
    "class too large, bytes": (lambda f: f(LOGITS, torch.tensor([0, 255, 1]).byte()), "255"),
    "class too large, one row": (lambda f: f(LOGITS[0], torch.tensor(9)), "9"),
    "class too large, image": (lambda f: f(IMAGE, MASK.index_fill(2, torch.tensor(3), 77)), "77"),
    "class too large, 1-d": (lambda f: f(IMAGE[..., 0], MASK[..., 0].clone().fill_(77)), "77"),
    "class too large, smoothed": (
        lambda f: f(LOGITS, torch.tensor([0, 5, 1]), WEIGHT, label_smoothing=0.1),
        "5",
    ),
    "class too large, summed": (lambda f: f(LOGITS, TARGET + 1, reduction="sum"), "5"),
    "class too large, unreduced": (lambda f: f(LOGITS, TARGET + 1, reduction="none"), "5"),
    "default ignore_index with another": (
        lambda f: f(LOGITS, torch.tensor([0, -100, 1]), ignore_index=2),
        "-100",
    ),
    "no classes": (lambda f: f(LOGITS[:, :0], TARGET), "0"),
    "list for logits": (lambda f: f([1.0, 2.0], TARGET), "list"),
    "array for logits": (lambda f: f(LOGITS.numpy(), TARGET), "ndarray"),
    "no target": (lambda f: f(LOGITS, None), "None"),
    "list for target": (lambda f: f(LOGITS, [0, 1, 4]), "list"),
    "list for weight": (lambda f: f(LOGITS, TARGET, [1.0] * 5), "list"),
    "devices": (lambda f: f(LOGITS, TARGET.to("meta")), "meta"),
    "text for smoothing": (lambda f: f(LOGITS, TARGET, label_smoothing="much"), "label_smoothing"),
    "float for ignore_index": (lambda f: f(LOGITS, TARGET, ignore_index=0.5), "ignore_index"),
    "tensor for smoothing": (
        lambda f: f(LOGITS, TARGET, label_smoothing=torch.tensor(0.1)),
        "label_smoothing",
    ),
    "tensor with a gradient for smoothing": (
        lambda f: f(LOGITS, TARGET, label_smoothing=torch.tensor(0.1, requires_grad=True)),
        "label_smoothing",
    ),
    "tensor for ignore_index": (
        lambda f: f(LOGITS, TARGET, ignore_index=torch.tensor(4)),
        "ignore_index",
    ),
    "decimal for ignore_index": (
        lambda f: f(LOGITS, TARGET, ignore_index=Decimal("0.5")),
        "ignore_index",
    ),
    "enormous ignore_index": (lambda f: f(LOGITS, TARGET, ignore_index=2**70), "Overflow"),
    "integer for smoothing": (lambda f: f(LOGITS, TARGET, label_smoothing=1), "label_smoothing"),
    "bool for smoothing": (lambda f: f(LOGITS, TARGET, label_smoothing=True), "label_smoothing"),
    "list for reduction": (lambda f: f(LOGITS, TARGET, reduction=["mean"]), "mean"),
    "unknown option": (lambda f: f(LOGITS, TARGET, smoothing=0.1), "smoothing"),
    "no arguments": (lambda f: f(), "argument"),
}


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_like_torch(name: str, needs_grad: bool) -> None:
    """Torch's exception types; where torch accepts, so do we, with the same result."""
    call, subject = BAD[name]
    kept = [t.clone() for t in (LOGITS, IMAGE, TARGET, MASK)]

    def outcome(function: Function) -> Tensor | Exception:
        def traced(*args: Any, **kwargs: Any) -> Tensor:
            if needs_grad and args and isinstance(args[0], Tensor) and args[0].is_floating_point():
                args = (args[0].detach().requires_grad_(), *args[1:])
            return function(*args, **kwargs)

        try:
            result = call(traced).detach()
            F.check_targets()
            return result
        except Exception as refusal:
            return refusal

    ours, theirs = outcome(F.cross_entropy), outcome(native.cross_entropy)
    if isinstance(theirs, Tensor):
        assert isinstance(ours, Tensor), f"torch accepts this: {ours!r}"
        torch.testing.assert_close(ours, theirs)
    else:
        assert type(ours) is type(theirs), f"{ours!r} instead of {theirs!r}"
        assert re.search(subject, str(ours)), f"{ours} does not speak of {subject}"
    identical([LOGITS, IMAGE, TARGET, MASK], kept)


@pytest.mark.parametrize(
    "target, remedy",
    [
        (TARGET.int(), "target.long()"),
        (TARGET.float(), "target.long()"),
        (native.one_hot(TARGET, 5), "target.to(input.dtype)"),
    ],
    ids=["int32", "float", "one-hot integers"],
)
def test_a_target_of_the_wrong_dtype_is_told_the_right_one(target: Tensor, remedy: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(remedy)):
        F.cross_entropy(LOGITS, target)
    converted = eval(remedy, {"target": target, "input": LOGITS})
    torch.testing.assert_close(F.cross_entropy(LOGITS, converted), F.cross_entropy(LOGITS, TARGET))


ODD_BUT_ACCEPTED: dict[str, Callable[[Function], Tensor]] = {
    "negative smoothing": lambda f: f(LOGITS, TARGET, label_smoothing=-0.1),
    "negative smoothing, probabilities": lambda f: f(LOGITS, PROBABILITIES, label_smoothing=-0.1),
    "NaN smoothing": lambda f: f(LOGITS, TARGET, label_smoothing=math.nan),
    "double probabilities": lambda f: f(LOGITS, PROBABILITIES.double()),
    "half probabilities": lambda f: f(LOGITS, PROBABILITIES.half()),
    "float probabilities, bf16 logits": lambda f: f(LOGITS.bfloat16(), PROBABILITIES),
    "double weight, probabilities": lambda f: f(LOGITS, PROBABILITIES, WEIGHT.double()),
    "half weight, probabilities": lambda f: f(LOGITS, PROBABILITIES, WEIGHT.half()),
    "long weight, probabilities": lambda f: f(LOGITS, PROBABILITIES, WEIGHT.long()),
    "integer smoothing": lambda f: f(LOGITS, TARGET, label_smoothing=1),
    "strided weight": lambda f: f(LOGITS, TARGET, torch.rand(5, 2)[:, 1]),
    "expanded weight": lambda f: f(LOGITS, TARGET, torch.tensor(2.0).expand(5)),
    "negated view": lambda f: f(torch._neg_view(LOGITS), TARGET),
    "ignored byte": lambda f: f(LOGITS, torch.tensor([0, 255, 1]).byte(), ignore_index=255),
}


@pytest.mark.parametrize("name", ODD_BUT_ACCEPTED)
def test_odd_input_that_torch_accepts(name: str) -> None:
    call = ODD_BUT_ACCEPTED[name]
    state = torch.get_rng_state()
    results = []
    for function in (F.cross_entropy, native.cross_entropy):
        torch.set_rng_state(state)
        logits_grads: list[Tensor] = []

        def traced(logits: Tensor, *args: Any, f: Function = function, **kwargs: Any) -> Tensor:
            leaf = logits.detach().requires_grad_()
            loss = f(leaf, *args, **kwargs)
            logits_grads.extend(torch.autograd.grad(loss.sum(), leaf))  # noqa: B023
            return loss.detach()

        results.append((call(traced), logits_grads))
    eps = 0.02 if "bf16" in name else 1e-6  # torch computes these log-probabilities in bfloat16
    torch.testing.assert_close(*results, rtol=eps, atol=eps, equal_nan=True)


@pytest.mark.parametrize("rows", [3, 100, 5000])
def test_class_out_of_range_names_value_and_row(rows: int, device: str) -> None:
    target = torch.randint(7, (rows,), device=device)
    target[rows - 2] = 4242
    for classes, options in ((7, {}), (300, {"reduction": "none"}), (7, {"label_smoothing": 0.1})):
        with pytest.raises(IndexError, match=rf"(?s)4242.*{rows - 2}|{rows - 2}.*4242"):
            F.cross_entropy(torch.randn(rows, classes, device=device), target, **options)
            F.check_targets(device)
    logits = torch.randn(rows, 7, device=device)
    torch.testing.assert_close(
        F.cross_entropy(logits, target.clamp(max=6)),
        native.cross_entropy(logits, target.clamp(max=6)),
    )


def test_byte_masks_of_images_are_right_or_refused() -> None:
    """Torch refuses them; accepting them is a freedom, being wrong is not."""
    try:
        loss = F.cross_entropy(IMAGE, MASK.byte())
    except RuntimeError as refusal:
        assert "Byte" in str(refusal)
    else:
        torch.testing.assert_close(loss, native.cross_entropy(IMAGE, MASK))


# ------------------------------------------------------------------ CUDA


CUDA_WALKS: dict[str, tuple[tuple[int, ...], str, torch.dtype, str]] = {
    # shape, layout, dtype, what names the kernel
    "a row in a few lanes": ((65, 10), "contiguous", F32, r"false, .*Kept\)0, .*LaneGroup"),
    "128 classes in 32 lanes": ((9, 128), "contiguous", BF16, r"false, .*Kept\)0, .*LaneGroup"),
    "a row in a warp": ((9, 1000), "contiguous", F32, r"true, .*Kept\)1, .*LaneGroup"),
    "a row in a block": ((5, 5000), "contiguous", F32, r"true, .*Kept\)1, .*BlockGroup"),
    "a row in a cluster": ((3, 70001), "contiguous", F32, r"true, .*Kept\)1, .*BlockGroup"),
    "doubles in a cluster": (
        (2, 25000),
        "contiguous",
        F64,
        r"true, .*Kept\)1, .*BlockGroup",
    ),
    "a row too long to keep": ((2, 500003), "contiguous", F32, r"true, .*Kept\)2, .*BlockGroup"),
    "a thread to each pixel": ((2, 21, 7, 9), "contiguous", F32, r"false, .*Kept\)2, .*LaneGroup"),
    "a strided row in a block": ((3, 700), "class step", F32, r"false, .*Kept\)2, .*BlockGroup"),
}


def has_clusters(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.get_device_capability() >= (9, 0)
    return float(os.environ.get("EMULATOR_COMPUTE_CAPABILITY", "9.0")) >= 9


@pytest.mark.parametrize("target", ["long", "probabilities"])
@pytest.mark.parametrize("name", CUDA_WALKS)
def test_each_walk_of_cuda(name: str, target: str, launches: Any, device: str) -> None:
    """Each is taken where it should be, in one launch forward and one backward, and is right."""
    shape, layout, dtype, kernel = CUDA_WALKS[name]
    if "cluster" in name and not has_clusters(device):
        kernel = CUDA_WALKS["a row too long to keep"][3]
    for reduction in REDUCTIONS:
        case = Case(dtype, shape, reduction, True, 0.1, layout=layout, target=target)
        inputs = draw(case, device)
        logits = inputs.logits.detach().requires_grad_()
        with launches() as forward:
            loss = inputs.call(F.cross_entropy, logits)
        with launches() as backward:
            (grad,) = torch.autograd.grad(loss, logits, inputs.grad_output)
        assert len(forward) == 1 and re.search(f"forward_kernel<.*{kernel}", forward[0]), forward
        assert len(backward) == 1, backward
        assert grad.isfinite().all()
        check(case, device)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("walk", ["warp", "block", "cluster"])
def test_rows_that_wait_for_their_turn(walk: str, dtype: torch.dtype, device: str) -> None:
    """There are more rows than a device computes at once: each is read while the gradient of the
    one before is written, unless that is ignored or no gradient is wanted."""
    on_card = device == "cuda"
    multiprocessors = torch.cuda.get_device_properties().multi_processor_count if on_card else 5
    long = (40001 if on_card else 13001) * 4 // dtype.itemsize
    rows, classes = {
        "warp": (80 * multiprocessors, 301),
        "block": (20 * multiprocessors, 2051),
        "cluster": (5 * multiprocessors // 2, long),
    }[walk]
    logits = torch.randn(rows, classes, device=device).to(dtype)
    target = torch.randint(classes, (rows,), device=device)
    target[torch.rand(rows, device=device) < 0.2] = -100
    inputs = Inputs(logits, target, None, torch.tensor(2.5, dtype=dtype, device=device), {})
    loss, grad = inputs.loss_and_grad(F.cross_entropy)
    expected_loss, expected_grad = inputs.to(F64).loss_and_grad(native.cross_entropy)
    rtol = max(torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=rtol, atol=0)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=rtol, atol=1e-6 / rows)
    losses = F.cross_entropy(logits.to(F32), target, reduction="none")
    expected_losses = native.cross_entropy(logits.double(), target, reduction="none")
    torch.testing.assert_close(losses.double(), expected_losses, rtol=1e-6, atol=1e-6)


def test_a_gradient_of_one_costs_one_launch_and_no_copy(launches: Any, device: str) -> None:
    logits = torch.randn(64, 10, device=device, requires_grad=True)
    target = torch.randint(10, (64,), device=device)
    with launches() as kernels:
        F.cross_entropy(logits, target).backward()
    assert [re.findall(r"(\w+)_kernel", kernel)[0] for kernel in kernels] == ["forward", "scale"]
    with launches() as kernels, torch.no_grad():
        F.cross_entropy(logits, target)
    assert len(kernels) == 1


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(5, 7), (3000, 10), (5, 700), (3, 40001)], ids=str)
def test_a_class_out_of_range_on_cuda_is_nan_now_and_an_error_later(
    shape: tuple[int, int], reduction: str, on_cuda: bool, device: str
) -> None:
    if not on_cuda:
        pytest.skip("on the CPU the call itself raises")
    rows, classes = shape
    logits = torch.randn(shape, device=device, requires_grad=True)
    target = torch.randint(classes, (rows,), device=device)
    wrong = [1, rows - 1]
    target[1], target[rows - 1] = classes, -7
    loss = F.cross_entropy(logits, target, reduction=reduction)
    loss.sum().backward()
    assert logits.grad is not None
    is_wrong = torch.zeros(rows, dtype=torch.bool, device=device).index_fill(
        0, torch.tensor(wrong, device=device), True
    )
    assert torch.equal(logits.grad.isnan().all(1), is_wrong)
    assert torch.equal(logits.grad.isnan().any(1), is_wrong)
    assert torch.equal(loss.isnan(), is_wrong if reduction == "none" else torch.tensor(True))
    right = target.clamp(0, classes - 1)
    with pytest.raises(IndexError, match=f"target {classes} at row 1 .* {classes} classes"):
        if reduction == "mean":
            F.cross_entropy(logits, right)
        else:
            F.check_targets(device)
    F.check_targets(device)
    torch.testing.assert_close(F.cross_entropy(logits, right), native.cross_entropy(logits, right))


CARD_SHAPES = [(64, 10), (4096, 10), (512, 1000), (64, 50257), (16, 128256), (2, 21, 64, 64)]


@pytest.mark.parametrize("shape", CARD_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_nothing_waits_for_the_device(dtype: torch.dtype, shape: Any, card: str) -> None:
    logits = torch.randn(shape, device=card, dtype=dtype, requires_grad=True)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), device=card)
    F.cross_entropy(logits, target).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for reduction in REDUCTIONS:
            loss = F.cross_entropy(logits, target, reduction=reduction, label_smoothing=0.1)
            loss.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shape", CARD_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_a_captured_loss_replays_on_new_numbers(dtype: torch.dtype, shape: Any, card: str) -> None:
    def draw_numbers() -> tuple[Tensor, Tensor]:
        indices = torch.randint(shape[1], (shape[0], *shape[2:]), device=card)
        return torch.randn(shape, device=card, dtype=dtype), indices

    static_logits, static_target = draw_numbers()
    static_logits.requires_grad_()

    def loss_and_grad(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        loss = F.cross_entropy(logits, target, ignore_index=1)
        return loss.detach(), torch.autograd.grad(loss, logits)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        loss_and_grad(static_logits, static_target)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_and_grad(static_logits, static_target)
    for _ in range(3):
        logits, target = draw_numbers()
        with torch.no_grad():
            static_logits.copy_(logits)
        static_target.copy_(target)
        graph.replay()
        identical(captured, loss_and_grad(logits.requires_grad_(), target))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_card_holds_logits_and_gradient_and_no_third(dtype: torch.dtype, card: str) -> None:
    logits = torch.randn(1024, 32000, device=card, dtype=dtype, requires_grad=True)
    target = torch.randint(32000, (1024,), device=card)
    F.cross_entropy(logits, target).backward()
    logits.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    F.cross_entropy(logits, target).backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert logits.nbytes <= peak <= logits.nbytes + (1 << 20)


def test_streams_and_bits_on_a_card(card: str) -> None:
    """The same bits on any stream, however many run at once."""
    logits = torch.randn(777, 5003, device=card, requires_grad=True)
    target = torch.randint(5003, (777,), device=card)

    def loss_and_grad() -> tuple[Tensor, Tensor]:
        loss = F.cross_entropy(logits, target)
        return loss.detach(), torch.autograd.grad(loss, logits)[0]

    expected = loss_and_grad()
    torch.cuda.synchronize()
    results = []
    for _ in range(8):
        with torch.cuda.stream(torch.cuda.Stream()):
            results.append(loss_and_grad())
    torch.cuda.synchronize()
    for result in results:
        identical(result, expected)
