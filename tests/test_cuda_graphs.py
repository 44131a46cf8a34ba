"""CUDA graphs: parts of a training step, or all of it, captured once and replayed on new numbers.

One part of this needs no GPU: a captured backward pass can be replayed only if it does not change
in place what a forward pass outside its graph has saved. How single operators are captured is
tested beside each operator.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedstep
import fusedstep.functional as F
from conftest import EMULATED
from numerics import BF16, F16, F32, REDUCTIONS, identical

CLASSES = 10
Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, tuple[Loss, Callable[[Tensor], Tensor]]] = {
    "cross_entropy": (F.cross_entropy, lambda x: torch.randint(CLASSES, x.shape[:1]).to(x.device)),
    "huber": (F.huber_loss, torch.randn_like),
}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_a_captured_backward_leaves_what_its_forward_saved(
    name: str, dtype: torch.dtype, launches: Any, request: pytest.FixtureRequest
) -> None:
    """A gradient is scaled in place by a backward pass in the same graph alone, whose every replay
    follows one of the forward pass."""
    emulated = request.config.stash.get(EMULATED, None)
    if emulated is None:
        pytest.skip("needs the emulator")
    function, make_target = LOSSES[name]
    x = torch.randn(9, CLASSES).to(dtype).requires_grad_()
    t = make_target(x)
    expected = torch.autograd.grad(function(x, t), x, torch.tensor(3.0, dtype=dtype))
    kernels: dict[tuple[int, int], list[str]] = {}
    for forward, backward in ((0, 0), (1, 1), (1, 2), (0, 1), (1, 0)):
        with emulated.capture(forward):
            loss = function(x, t)
        with emulated.capture(backward), launches() as launched:
            grad = torch.autograd.grad(loss, x, torch.tensor(3.0, dtype=dtype))
        identical(grad, expected)
        kernels[forward, backward] = launched
    in_place, elsewhere = kernels[0, 0], kernels[1, 2]
    assert kernels == {
        (0, 0): in_place,
        (1, 1): in_place,
        (1, 2): elsewhere,
        (0, 1): elsewhere,
        (1, 0): elsewhere,
    }
    if dtype is F32:  # torch's own product into new memory
        assert (len(in_place), len(elsewhere)) == (1, 0)


FIRST_STEPS: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, Any]]] = {
    "momentum": (torch.clone, {"momentum": 0.9}),
    "momentum, by torch's functions": (lambda x: x[::2], {"momentum": 0.9}),
    "master weights": (torch.clone, {"master_weights": True}),
    "master weights, by torch's functions": (lambda x: x[::2], {"master_weights": True}),
}


@pytest.mark.parametrize("name", FIRST_STEPS)
def test_a_step_that_makes_state_is_not_captured(
    name: str, device: str, on_cuda: bool, request: pytest.FixtureRequest
) -> None:
    """Replays would make it anew: momentum would always be the gradient, and master weights the
    parameter. A captured step after one that is not finds the state where it was."""
    if not on_cuda:
        pytest.skip("captures a CUDA graph, or has the emulator say so")
    emulated = request.config.stash.get(EMULATED, None)
    view, options = FIRST_STEPS[name]

    def capture() -> AbstractContextManager[Any]:
        return emulated.capture(1) if emulated else torch.cuda.graph(torch.cuda.CUDAGraph())

    def tensors() -> list[Tensor]:
        return [t for state in optimizer.state.values() for t in state.values()]

    dtype = BF16 if "master_weights" in options else F32
    params = [nn.Parameter(view(torch.randn(200, device=device).to(dtype))) for _ in range(2)]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = fusedstep.SGD(params, lr=0.1, **options)
    kept = [param.detach().clone() for param in params]
    with pytest.raises(RuntimeError, match="cannot be captured"), capture():
        optimizer.step()
    assert not tensors()
    for param, before in zip(params, kept, strict=True):
        identical(param.detach(), before)

    optimizer.step()
    made = tensors()
    assert len(made) == 2
    with capture():
        optimizer.step()
    assert all(a is b for a, b in zip(tensors(), made, strict=True))


# ------------------------------------------------------------------ on a card


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_graphed_loss(name: str, dtype: torch.dtype, reduction: str, card: str) -> None:
    """make_graphed_callables captures forward and backward into a graph each."""
    function, make_target = LOSSES[name]

    def loss_function(x: Tensor, t: Tensor) -> Tensor:
        return function(x, t, reduction=reduction)  # type: ignore[call-arg]

    x = torch.randn(33, CLASSES, device=card, dtype=dtype, requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(loss_function, (x, make_target(x)))
    for scale in (1.0, 3.0, 0.0):
        x = torch.randn(33, CLASSES, device=card, dtype=dtype, requires_grad=True)
        t = make_target(x)
        expected = loss_function(x, t)
        grad_output = scale * torch.randn_like(expected)
        (expected_grad,) = torch.autograd.grad(expected, x, grad_output)
        loss = graphed(x, t)
        identical(loss, expected)
        # The second replay of backward, with no forward pass in between.
        for other in (grad_output * 2, grad_output):
            (grad,) = torch.autograd.grad(loss, x, other, retain_graph=True)
            grad = grad.clone()  # the next replay writes to the same memory
        torch.testing.assert_close(grad, expected_grad)


def network(device: str) -> nn.Module:
    return nn.Sequential(nn.Linear(11, 100), nn.Tanh(), nn.Linear(100, CLASSES)).to(device)


class WithLoss(nn.Module):
    """A network that returns its loss."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.criterion = fusedstep.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        loss: Tensor = self.criterion(self.net(x), t)
        return loss


def batch(card: str) -> tuple[Tensor, Tensor]:
    return torch.randn(33, 11, device=card), torch.randint(CLASSES, (33,), device=card)


def test_graphed_network_with_loss_and_our_optimizer(card: str) -> None:
    eager = WithLoss(network(card))
    graphed = copy.deepcopy(eager)
    optimizers = [
        fusedstep.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (eager, graphed)
    ]
    torch.cuda.make_graphed_callables(graphed, batch(card))
    for _ in range(5):
        x, t = batch(card)
        for model, optimizer in zip((eager, graphed), optimizers, strict=True):
            optimizer.zero_grad()
            (2.5 * model(x, t)).backward()
            optimizer.step()
    torch.testing.assert_close(list(eager.parameters()), list(graphed.parameters()))


def warm_up(step: Callable[[], Any]) -> None:
    """What CUDA and its libraries do once, outside the capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.parametrize("dtype", [None, BF16, F16], ids=str)
def test_a_whole_captured_step_with_a_changing_learning_rate(
    dtype: torch.dtype | None, card: str
) -> None:
    """Forward, loss, backward and update in one graph; a scheduler sets the learning rate in place
    between replays. The same in eager mode ends at the same weights."""
    start = network(card)
    batches = [batch(card) for _ in range(9)]

    def training(captured: bool) -> list[Tensor]:
        net = copy.deepcopy(start)
        criterion = fusedstep.CrossEntropyLoss()
        lr = torch.tensor(0.1, device=card)
        optimizer = fusedstep.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=0.01)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
        static_x, static_t = (value.clone() for value in batches[0])

        def step() -> Tensor:
            optimizer.zero_grad()
            with torch.autocast(
                card, dtype=dtype or BF16, enabled=dtype is not None, cache_enabled=False
            ):
                loss: Tensor = criterion(net(static_x), static_t)
            loss.backward()
            optimizer.step()
            return loss.detach()

        losses = []
        if captured:
            warm_up(step)
            graph = torch.cuda.CUDAGraph()
            optimizer.zero_grad()
            with torch.cuda.graph(graph):
                static_loss = step()
        else:
            for _ in range(3):
                step()
        for x, t in batches:
            static_x.copy_(x)
            static_t.copy_(t)
            if captured:
                graph.replay()
                losses.append(static_loss.clone())
            else:
                losses.append(step())
            scheduler.step()
            assert optimizer.param_groups[0]["lr"] is lr  # changed in place
        assert lr.item() == pytest.approx(0.1 * 0.7 ** len(batches))
        return [*losses, *(p.detach() for p in net.parameters())]

    torch.testing.assert_close(training(captured=True), training(captured=False))


def test_a_class_out_of_range_in_a_replay(card: str) -> None:
    """NaN at once, and an IndexError when somebody asks."""
    x = torch.randn(33, CLASSES, device=card, requires_grad=True)
    t = torch.zeros(33, dtype=torch.int64, device=card)

    def step() -> Tensor:
        return F.cross_entropy(x, t)

    warm_up(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    t[5] = CLASSES
    graph.replay()
    assert loss.isnan()
    with pytest.raises(IndexError, match=f"target {CLASSES} at row 5"):
        F.check_targets(card)
    t[5] = 1
    graph.replay()
    identical(loss, step())
