"""stats(): what ran, what fell back, and why."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedstep
from fusedstep import _stats
from fusedstep import functional as F

SUBCLASS = "a tensor subclass"


class Subclass(Tensor):
    pass


@pytest.fixture(autouse=True)
def counts_from_zero() -> Iterator[None]:
    fusedstep.reset_stats()
    yield
    fusedstep.reset_stats()


def logits(**options: Any) -> Tensor:
    return torch.randn(6, 4, **options)


def labels() -> Tensor:
    return torch.randint(4, (6,))


FALLBACKS: list[tuple[str, str, Callable[[], object]]] = [
    (
        "cross_entropy",
        "a torch.func transform",
        lambda: torch.func.grad(F.cross_entropy)(logits(), labels()),
    ),
    (
        "cross_entropy",
        "a target that requires a gradient",
        lambda: F.cross_entropy(logits(), torch.rand(6, 4, requires_grad=True)),
    ),
    (
        "cross_entropy",
        "class probabilities of another dtype than input",
        lambda: F.cross_entropy(logits(), torch.rand(6, 4).double()),
    ),
    (
        "cross_entropy",
        "forward-mode differentiation",
        lambda: forward_mode(lambda x: F.cross_entropy(x, labels())),
    ),
    (
        "cross_entropy",
        "a number of dimensions that the kernels do not walk",
        lambda: F.cross_entropy(torch.randn(1, 4, *[1] * 70), torch.zeros(1, *[1] * 70).long()),
    ),
    ("cross_entropy", SUBCLASS, lambda: F.cross_entropy(logits().as_subclass(Subclass), labels())),
    (
        "cross_entropy",
        "a backward pass that is differentiated itself (create_graph=True)",
        lambda: twice(lambda x: F.cross_entropy(x, labels())),
    ),
    (
        "l1_loss",
        "a weight for each element",
        lambda: F.l1_loss(logits(), logits(), weight=logits()),
    ),
    (
        "mse_loss",
        "a weight for each element",
        lambda: F.mse_loss(logits(), logits(), weight=logits()),
    ),
    (
        "huber_loss",
        "a weight for each element",
        lambda: F.huber_loss(logits(), logits(), weight=logits()),
    ),
    (
        "l1_loss",
        "a dtype that the kernels do not compute",
        lambda: F.l1_loss(*[logits(dtype=torch.complex64)] * 2),
    ),
    (
        "mse_loss",
        "a target of another dtype than input",
        lambda: F.mse_loss(logits(), logits().double()),
    ),
    ("smooth_l1_loss", "a torch.func transform", lambda: torch.vmap(F.smooth_l1_loss)(*pair())),
    (
        "l1_loss",
        "forward-mode differentiation",
        lambda: forward_mode(lambda x: F.l1_loss(x, x + 1)),
    ),
    ("l1_loss", SUBCLASS, lambda: F.l1_loss(logits(), logits().as_subclass(Subclass))),
    (
        "mse_loss",
        "a backward pass that is differentiated itself (create_graph=True)",
        lambda: twice(lambda x: F.mse_loss(x, torch.zeros(6, 4))),
    ),
    (
        "binary_cross_entropy_with_logits",
        "a target that requires a gradient",
        lambda: F.binary_cross_entropy_with_logits(logits(), torch.rand(6, 4, requires_grad=True)),
    ),
    (
        "binary_cross_entropy_with_logits",
        "a weight of another dtype than input",
        lambda: F.binary_cross_entropy_with_logits(*pair(), weight=torch.ones(4).double()),
    ),
]


def pair() -> tuple[Tensor, Tensor]:
    return logits(), torch.rand(6, 4)


def twice(loss: Callable[[Tensor], Tensor]) -> None:
    x = logits(requires_grad=True)
    torch.autograd.grad(loss(x), x, create_graph=True)


def forward_mode(loss: Callable[[Tensor], Tensor]) -> None:
    import torch.autograd.forward_ad as fwad

    with fwad.dual_level():
        loss(fwad.make_dual(logits(), torch.ones(6, 4)))


@pytest.mark.parametrize(
    ("operator", "reason", "call"), FALLBACKS, ids=[f"{f[0]}: {f[1]}" for f in FALLBACKS]
)
def test_reasons(operator: str, reason: str, call: Callable[[], object], device: str) -> None:
    call()
    calls = fusedstep.stats()[operator]
    assert calls.fallbacks == {reason: 1}
    assert calls.fell_back == fusedstep.stats().fell_back == 1
    assert calls.device == device
    # A backward pass falls back alone.
    assert calls.fused == (1 if "backward" in reason else 0)


def test_more_classes_than_a_lane_counts() -> None:
    logits = torch.empty(1, 2**31, device="meta")
    F.cross_entropy(logits, torch.empty(1, dtype=torch.int64, device="meta"))
    F.cross_entropy(logits[:, 1:], torch.empty(1, dtype=torch.int64, device="meta"))
    reason = "more classes than the kernels count"
    assert fusedstep.stats()["cross_entropy"].fallbacks == {reason: 1}


def test_shapes_that_broadcast() -> None:
    with pytest.warns(UserWarning, match="target size"):
        F.mse_loss(logits(), torch.zeros(4))
    assert fusedstep.stats()["mse_loss"].fallbacks == {"shapes that broadcast": 1}


@pytest.mark.parametrize("patch", [nullcontext, fusedstep.patched])
@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
def test_a_default_device_counts_once(patch: Any, device: str) -> None:
    with patch(), torch.device(device):
        mse_loss = F.mse_loss if patch is nullcontext else torch.nn.functional.mse_loss
        mse_loss(logits(), logits())
        mse_loss(logits(), logits(), weight=logits())
        mse_loss(logits(), logits().double())
        mse_loss(logits(), logits()[:1])
    calls = fusedstep.stats()["mse_loss"]
    assert calls.fused == 1 and calls.fell_back == 3 == len(calls.fallbacks)


@pytest.mark.parametrize(
    "call",
    [
        lambda: F.mse_loss(logits(), logits(), reduction="median"),
        lambda: F.cross_entropy(logits(), labels() + 4),
        lambda: F.cross_entropy(logits(), labels()[:3]),
        lambda: F.l1_loss("logits", logits()),  # type: ignore[arg-type]
    ],
)
def test_errors_do_not_count(call: Callable[[], object], cpu_only: None) -> None:
    with pytest.raises((ValueError, IndexError, TypeError, AttributeError)):
        call()
    assert fusedstep.stats().calls == ()


def parameter(device: str, **options: Any) -> nn.Parameter:
    p = nn.Parameter(torch.randn(10, device=device, **options))
    p.grad = torch.randn_like(p)
    return p


SGD_FALLBACKS: dict[str, Callable[[str], tuple[nn.Parameter, dict[str, Any]]]] = {
    "a dtype that the kernels do not compute": lambda d: (
        parameter(d, dtype=torch.complex64),
        {"lr": 0.1},
    ),
    "a sparse gradient": lambda d: (sparse(d), {"lr": 0.1}),
    "a strided view as a parameter": lambda d: (strided(d), {"lr": 0.1}),
    "a parameter, gradient or state in the memory of another": lambda d: (
        its_own_gradient(d),
        {"lr": 0.1},
    ),
    "a tensor subclass": lambda d: (subclass(d), {"lr": 0.1}),
    "differentiable=True": lambda d: (parameter(d), {"lr": 0.1, "differentiable": True}),
}


def sparse(device: str) -> nn.Parameter:
    p = parameter(device)
    p.grad = torch.ones(10, device=device).to_sparse()
    return p


def strided(device: str) -> nn.Parameter:
    p = nn.Parameter(torch.randn(20, device=device)[::2])
    p.grad = torch.randn(10, device=device)
    return p


def its_own_gradient(device: str) -> nn.Parameter:
    p = parameter(device)
    p.grad = p.detach()
    return p


def subclass(device: str) -> nn.Parameter:
    p = torch.randn(10, device=device).as_subclass(Subclass).requires_grad_()
    p.grad = torch.randn(10, device=device).as_subclass(Subclass)
    return p  # type: ignore[return-value]


@pytest.mark.parametrize("reason", SGD_FALLBACKS)
def test_sgd_reasons(reason: str, device: str) -> None:
    param, options = SGD_FALLBACKS[reason](device)
    step = fusedstep.SGD([param], **options).step
    if options.get("differentiable"):
        param.requires_grad_(False)
    step()
    step()
    calls = fusedstep.stats()["SGD"]
    assert (calls.fused, calls.fallbacks, calls.device) == (0, {reason: 2}, device)


def test_sgd_counts_updates(device: str) -> None:
    params = [parameter(device) for _ in range(5)]
    params[3].grad = None
    params.append(sparse(device))
    optimizer = fusedstep.SGD(params, lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.step()
    calls = fusedstep.stats()["SGD"]
    assert calls.fused == 3 * 4
    assert calls.fallbacks == {"a sparse gradient": 3}


@pytest.mark.parametrize("what", ["an error", "an overflow"])
def test_a_step_that_changes_nothing_does_not_count(what: str, device: str) -> None:
    params = [parameter(device), sparse(device), parameter(device)]
    optimizer = fusedstep.SGD([{"params": params[:2]}, {"params": params[2:]}], lr=0.1)
    if what == "an error":
        optimizer.param_groups[1]["lr"] = math.nan
        with pytest.raises(ValueError, match="learning rate"):
            optimizer.step()
    else:
        optimizer.found_inf = torch.ones((), device=device)
        optimizer.step()
    assert fusedstep.stats().calls == ()


def test_losses_count_by_name() -> None:
    for times, name in enumerate(F._TORCH, start=1):
        for _ in range(times):
            getattr(F, name)(logits(), labels() if name == "cross_entropy" else logits())
    stats = fusedstep.stats()
    assert [stats[name].fused for name in F._TORCH] == list(range(1, len(F._TORCH) + 1))
    assert stats.fused == sum(range(1, len(F._TORCH) + 1)) and stats.fell_back == 0


def test_a_compiled_program_counts_when_it_runs() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(F.cross_entropy, backend="aot_eager", fullgraph=True)
    for _ in range(4):
        compiled(logits(), labels())
    torch._dynamo.reset()
    assert fusedstep.stats()["cross_entropy"].fused == 4


def test_every_thread_counts() -> None:
    def work() -> None:
        x, y = logits(), labels()
        for _ in range(200):
            F.cross_entropy(x, y)
            F.mse_loss(x, x, weight=x)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = fusedstep.stats()
    assert stats["cross_entropy"].fused == 1200
    assert stats["mse_loss"].fallbacks == {"a weight for each element": 1200}


def test_a_summary_does_not_change() -> None:
    F.mse_loss(logits(), logits())
    before = fusedstep.stats()
    F.mse_loss(logits(), logits())
    fusedstep.reset_stats()
    assert before["mse_loss"].fused == 1
    assert fusedstep.stats().calls == () and fusedstep.stats()["mse_loss"].fused == 0


def test_replaced() -> None:
    assert fusedstep.stats().replaced == ()
    with fusedstep.patched():
        replaced = fusedstep.stats().replaced
    methods = {"torch.optim.SGD.step", "torch.optim.SGD.zero_grad"}
    assert set(replaced) == {f"torch.nn.functional.{name}" for name in F._TORCH} | methods
    assert fusedstep.stats().replaced == ()


def test_table(device: str) -> None:
    for _ in range(12):
        F.mse_loss(logits(), logits())
    F.mse_loss(logits(), logits().double())
    for _ in range(2):
        F.mse_loss(logits(), logits(), weight=logits())
    lines = str(fusedstep.stats()).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "operator device fused torch's why",
        f"mse_loss {device} 12 2 a weight for each element",
        "1 a target of another dtype than input",
        "patched: nothing",
    ]
    assert lines[1].index("a weight") == lines[2].index("a target")


def test_what_is_printed_at_exit() -> None:
    F.mse_loss(logits(), logits())
    ran, table = fusedstep.stats(), str(fusedstep.stats())
    fusedstep.reset_stats()
    nothing, patched = fusedstep.stats(), "patched: nothing"
    assert _stats._report(ran, []) == table
    assert _stats._report(ran, ["Adam"]) == f"{table}\nnot replaced: Adam"
    assert _stats._report(nothing, []) == f"none of its kernels ran\n{patched}"
    for used, names in {
        ("Adam",): "Adam",
        ("Adadelta", "nll_loss"): "Adadelta and nll_loss",
        ("kl_div", "Adam", "nll_loss"): "kl_div, Adam and nll_loss",
    }.items():
        said = f"this script used {names}, which fusedstep does not replace"
        assert _stats._report(nothing, used) == f"none of its kernels ran: {said}\n{patched}"


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_focal_loss_counts_as_itself(gamma: float, device: str) -> None:
    """Without focus too, where it is cross-entropy."""
    x = logits(requires_grad=True)
    F.focal_loss(x, labels(), gamma).backward()
    twice(lambda x: F.focal_loss(x, labels(), gamma))
    F.focal_loss(logits(), labels(), gamma, weight=torch.ones(4).double())
    (calls,) = fusedstep.stats().calls
    assert (calls.operator, calls.fused, calls.fell_back) == ("focal_loss", 2, 2)
    assert fusedstep.stats()["focal_loss"].fused == 2


@pytest.mark.parametrize("operator", sorted({*F.__all__, "SGD"} - {"check_targets"}))
def test_every_operator_has_counts(operator: str) -> None:
    assert fusedstep.stats()[operator].fused == 0
    fusedstep._C.count_fallback(operator, torch.device("cpu"), "why not")
    assert fusedstep.stats()[operator].fallbacks == {"why not": 1}


def test_an_unknown_operator_is_named() -> None:
    with pytest.raises(KeyError, match="nll_loss"):
        fusedstep.stats()["nll_loss"]
    with pytest.raises(ValueError, match="nll_loss"):
        fusedstep._C.count_fallback("nll_loss", torch.device("cpu"), "why not")
