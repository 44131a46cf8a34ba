"""What users of similar libraries have complained about: a test for each, from its symptom.

docs/reliability.md lists the complaints by their public issue numbers, with their tests, some of
which are in other files; the last test here checks that every test on the list exists.
"""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as native
from torch import Tensor, nn

import fusedstep
import fusedstep.functional as F
from numerics import BF16, F16, F32, F64, identical

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
NativeSGD = torch.optim.SGD


def case(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(shape), torch.randint(shape[1], shape[:1])


# ------------------------------------------------------------------ losses


def test_logits_are_still_the_users_after_backward() -> None:
    for shape in ((4, 5), (300, 700)):
        logits, target = case(*shape)
        kept = logits.clone()
        leaf = logits.requires_grad_()
        version = leaf._version
        loss = F.cross_entropy(leaf, target)
        probabilities = leaf.softmax(1)
        (loss + probabilities.square().mean()).backward()
        identical(leaf.detach(), kept)
        assert leaf._version == version
        expected = kept.clone().requires_grad_()
        probabilities = expected.softmax(1)
        (native.cross_entropy(expected, target) + probabilities.square().mean()).backward()
        torch.testing.assert_close(leaf.grad, expected.grad)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_unreduced_losses_take_any_grad_output(dtype: torch.dtype) -> None:
    logits, target = case(40, 7)
    for grad_output in (
        torch.randn(40),
        torch.zeros(40),
        torch.full((), -2.5).expand(40),
        torch.randn(40, 3)[:, 1],
    ):
        ours = logits.to(dtype, copy=True).requires_grad_()
        exact = ours.detach().to(F64, copy=True).requires_grad_()
        upstream = grad_output.to(dtype)
        F.cross_entropy(ours, target, reduction="none").backward(upstream)
        native.cross_entropy(exact, target, reduction="none").backward(upstream.double())
        assert ours.grad is not None and exact.grad is not None
        torch.testing.assert_close(ours.grad, exact.grad.to(dtype))
        assert grad_output.any() == ours.grad.any()


def test_a_target_out_of_range_is_refused_before_anything_is_written(on_cuda: bool) -> None:
    if on_cuda:
        pytest.skip("raises with the next call; tests/test_cross_entropy.py has it")
    for wrong in (-1, 7, 2**40, -(2**40)):
        logits, target = torch.randn(5, 7, requires_grad=True), torch.zeros(5, dtype=torch.int64)
        target[3] = wrong
        with pytest.raises(IndexError, match=f"target {wrong} at row 3"):
            F.cross_entropy(logits, target)
        assert logits.grad is None


@pytest.mark.parametrize("ignored", [0, 1, 5, 9])
def test_ignored_rows_are_not_counted_in_the_mean(ignored: int) -> None:
    """By hand: the mean is over the rows that count, and nothing else."""
    logits, target = case(10, 6)
    target[:ignored] = -100
    leaf = logits.clone().requires_grad_()
    loss = F.cross_entropy(leaf, target)
    loss.backward()
    rows = [
        math.log(sum(math.exp(v) for v in row)) - row[y]
        for row, y in zip(logits.double().tolist(), target.tolist(), strict=True)
        if y != -100
    ]
    assert loss.item() == pytest.approx(sum(rows) / (10 - ignored), rel=1e-5)
    assert leaf.grad is not None and not leaf.grad[:ignored].any()


def test_ignored_rows_hold_no_garbage_when_compiled() -> None:
    logits, target = case(9, 6)
    logits[:4] = math.nan
    target[:4] = -100
    leaf = logits.requires_grad_()
    compiled = torch.compile(F.cross_entropy, backend="aot_eager")
    for reduction in ("none", "mean"):
        loss = compiled(leaf, target, reduction=reduction)
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        assert loss.isfinite().all() and not grad[:4].any() and grad[4:].isfinite().all()


def test_backward_twice_gives_the_same_gradient() -> None:
    for reduction in ("none", "mean"):
        for dtype in (F32, BF16):
            logits, target = case(40, 130)
            leaf = logits.to(dtype).requires_grad_()
            loss = F.cross_entropy(leaf, target, reduction=reduction).sum() * 3
            first, second = (
                torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2)
            )
            identical(first, second)


@pytest.mark.parametrize("classes", [3, 40, 1000])
def test_masked_logits_give_no_nan(classes: int) -> None:
    logits, target = torch.randn(6, classes), torch.zeros(6, dtype=torch.int64)
    logits[:, 1::2] = -math.inf
    leaf = logits.requires_grad_()
    loss = F.cross_entropy(leaf, target)
    loss.backward()
    dense = native.cross_entropy(logits.detach()[:, ::2], target)
    torch.testing.assert_close(loss.detach(), dense)
    assert leaf.grad is not None and leaf.grad.isfinite().all() and not leaf.grad[:, 1::2].any()


def test_a_cpu_is_enough() -> None:
    logits, target = (t.to("cpu") for t in case(8, 5))
    leaf = logits.requires_grad_()
    loss = F.cross_entropy(leaf, target)
    assert loss.grad_fn is not None
    loss.backward()
    assert leaf.grad is not None and leaf.grad.device.type == "cpu"


def test_label_smoothing_is_there() -> None:
    """By its definition: the target keeps 1 - e and every class gets e / C."""
    logits, target = case(8, 5)
    soft = torch.full((8, 5), 0.1 / 5).scatter_(1, target[:, None], 0.9 + 0.1 / 5)
    expected = -(soft * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(F.cross_entropy(logits, target, label_smoothing=0.1), expected)


def test_the_same_call_gives_the_same_bits() -> None:
    logits, target = case(3000, 300)
    results = []
    for threads in (1, 2, 1, 2):
        torch.set_num_threads(threads)
        leaf = logits.clone().requires_grad_()
        loss = F.cross_entropy(leaf, target)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for result in results[1:]:
        identical(result, results[0])


# ------------------------------------------------------------------ SGD


def pair(values: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(values), nn.Parameter(values.detach().clone())


def test_momentum_is_torchs() -> None:
    """The learning rate acts where the velocity is applied, and the first step has no dampening."""
    ours_p, theirs_p = pair(torch.randn(100))
    options: dict[str, Any] = {"momentum": 0.9, "dampening": 0.3}
    ours = fusedstep.SGD([ours_p], lr=0.5, **options)
    theirs = NativeSGD([theirs_p], lr=0.5, foreach=False, **options)
    for lr in (0.5, 0.1, 2.0):
        ours.param_groups[0]["lr"] = theirs.param_groups[0]["lr"] = lr
        ours_p.grad = torch.randn(100)
        theirs_p.grad = ours_p.grad.clone()
        ours.step()
        theirs.step()
        torch.testing.assert_close(ours_p, theirs_p)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_no_block_of_a_16_bit_parameter_stands_still(dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.zeros(1000, dtype=dtype))
    param.grad = torch.ones_like(param)
    fusedstep.SGD([param], lr=0.5, momentum=0.9).step()
    assert (param == -0.5).all()


def test_an_overflow_on_the_first_step_leaves_no_garbage_in_the_momentum() -> None:
    param, twin = pair(torch.randn(1000))
    optimizer = fusedstep.SGD([param], lr=0.1, momentum=0.9)
    torch.full((1000,), math.nan)  # memory for a forgotten buffer to land in
    param.grad = torch.full((1000,), math.inf)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), torch.tensor(8.0)
    optimizer.step()
    identical(param, twin)
    param.grad = torch.full((1000,), 8.0)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    torch.testing.assert_close(param.detach(), twin.detach() - 0.1)


def test_a_channels_last_parameter_takes_a_contiguous_gradient() -> None:
    values = torch.randn(4, 3, 5, 5)
    ours_p = nn.Parameter(values.contiguous(memory_format=torch.channels_last))
    grad = torch.randn(4, 3, 5, 5)
    ours_p.grad = grad
    fusedstep.SGD([ours_p], lr=0.5).step()
    torch.testing.assert_close(ours_p.detach(), values - 0.5 * grad)


def test_nothing_beside_a_strided_parameter_is_written() -> None:
    base = torch.zeros(50, 4)
    param = nn.Parameter(base[:, 1])
    param.grad = torch.ones(50)
    fusedstep.SGD([param], lr=0.5, momentum=0.9).step()
    assert (base[:, 1] == -0.5).all()
    base[:, 1] = 0
    assert not base.any()


def test_a_first_gradient_may_come_late() -> None:
    first, second = (nn.Parameter(torch.zeros(100)) for _ in range(2))
    optimizer = fusedstep.SGD([first, second], lr=0.5, momentum=0.9)
    first.grad = torch.ones(100)
    optimizer.step()
    second.grad = torch.ones(100)
    optimizer.step()
    torch.testing.assert_close(first.detach(), torch.full((100,), -0.5 - 0.5 * 1.9))
    assert (second == -0.5).all()


# ------------------------------------------------------------------ the list

PEERS = [
    "Liger#272",
    "Liger#1251",
    "Liger#678",
    "Liger#968",
    "Liger#1298",
    "TE#1879",
    "TE#2139",
    "pytorch#43840",
    "pytorch#49882",
    "pytorch#18014",
    "pytorch#194802",
    "TE#2476",
    "Liger#1338",
    "quack#209",
    "flash-attention#1930",
    "flash-attention#714",
    "apex#1654",
    "TE#2918",
    "Liger#323",
    "Liger#227",
    "quack#68",
    "apex#1393",
    "pytorch#121857",
    "apex#323",
    "apex#1012",
    "apex#1548",
    "flash-attention#945",
    "flash-attention#1226",
    "flash-attention#347",
    "Liger#401",
    "pytorch#71367",
    "pytorch#46024",
    "apex#1143",
    "ROCm/apex#97",
    "Liger#81",
    "pytorch#120376",
    "CCE#55",
    "pytorch#191763",
]


def test_every_complaint_has_a_test_that_exists() -> None:
    section = PAGE.read_text().partition("## What users of similar libraries complain about")[2]
    rows = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    listed = {name for row in rows for name in re.findall(r"[\w/-]+#\d+", row)}
    assert listed == set(PEERS)
    for row in rows:
        if row.endswith("| test |"):  # a header
            continue
        named = re.findall(r"`(\w+\.py)::(\w+)`", row)
        assert named, f"no test in {row}"
        for file, test in named:
            tree = ast.parse((ROOT / "tests" / file).read_text())
            functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert test in functions, f"tests/{file} has no {test}"
