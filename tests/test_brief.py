"""A course on loss functions, back propagation and optimizers, typed as its learners type it: only
the import of the loss and of the optimizer differs."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fusedstep import SGD, CrossEntropyLoss, L1Loss, MSELoss
from models import NETWORKS


@cache
def digits(count: int) -> tuple[Tensor, Tensor]:
    """Real images of handwritten digits: (count, 1, 32, 32) in [0, 1], and their classes."""
    data = load_digits()
    images = torch.tensor(data.images[:count], dtype=torch.float32)[:, None] / 16
    images = nn.functional.interpolate(images, size=(32, 32), mode="bilinear")
    return images, torch.tensor(data.target[:count])


def batches(channels: int, count: int, size: int) -> list[tuple[Tensor, Tensor]]:
    images, targets = digits(count)
    images = images.expand(-1, channels, -1, -1)
    return list(zip(images.split(size), targets.split(size), strict=True))


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, int]:
    """A fresh network and the number of channels it looks at."""
    entry = NETWORKS[request.param]
    return entry.build(), entry.channels


# ------------------------------------------------------------------ loss functions


def test_worked_l1_and_mse() -> None:
    inputs = torch.tensor([1, 2, 3], dtype=torch.float32)
    targets = torch.tensor([1, 2, 5], dtype=torch.float32)
    inputs = torch.reshape(inputs, (1, 1, 1, 3))
    targets = torch.reshape(targets, (1, 1, 1, 3))
    loss = L1Loss(reduction="sum")
    result = loss(inputs, targets)
    assert str(result) == "tensor(2.)"
    assert str(L1Loss()(inputs, targets)) == "tensor(0.6667)"
    loss_mse = MSELoss()
    result_mse = loss_mse(inputs, targets)
    assert str(result_mse) == "tensor(1.3333)"


@pytest.mark.parametrize("loss", [L1Loss, MSELoss])
def test_losses_of_elements_walk_back_to_the_network(loss: type[L1Loss] | type[MSELoss]) -> None:
    net = nn.Linear(3, 2)
    result = loss()(net(torch.randn(4, 3)), torch.randn(4, 2))
    node = {L1Loss: "L1LossBackward0", MSELoss: "MseLossBackward0"}[loss]
    assert result.grad_fn is not None and result.grad_fn.name() == node
    assert result.grad_fn.next_functions[0][0].name() == "AddmmBackward0"
    assert net.weight.grad is None
    result.backward()
    assert net.weight.grad is not None


def test_worked_cross_entropy() -> None:
    x = torch.tensor([0.1, 0.2, 0.3])
    y = torch.tensor([1])
    x = torch.reshape(x, (1, 3))
    loss_cross = CrossEntropyLoss()
    result_cross = loss_cross(x, y)
    assert f"{result_cross.item():.4f}" == "1.1019"
    by_hand = -0.2 + math.log(math.exp(0.1) + math.exp(0.2) + math.exp(0.3))
    assert result_cross.item() == pytest.approx(by_hand, rel=1e-6)
    assert str(result_cross) == "tensor(1.1019)"


def test_reduction_is_the_mean_or_the_sum_of_the_rows() -> None:
    x, y = torch.randn(5, 10), torch.randint(10, (5,))
    rows = CrossEntropyLoss(reduction="none")(x, y)
    torch.testing.assert_close(CrossEntropyLoss()(x, y), rows.mean())
    torch.testing.assert_close(CrossEntropyLoss(reduction="sum")(x, y), rows.sum())


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_loss_of_every_network(network: tuple[nn.Module, int], batch_size: int) -> None:
    net, channels = network
    imgs, targets = batches(channels, batch_size, batch_size)[0]
    outputs = net(imgs)
    assert outputs.shape == (batch_size, 10)
    result_loss = CrossEntropyLoss()(outputs, targets)
    torch.testing.assert_close(result_loss, nn.CrossEntropyLoss()(outputs, targets))


# ------------------------------------------------------------------ back propagation


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_grad_before_and_after_backward(network: tuple[nn.Module, int], batch_size: int) -> None:
    net, channels = network
    native = copy.deepcopy(net)
    imgs, targets = batches(channels, batch_size, batch_size)[0]
    net.zero_grad()
    assert all(p.grad is None for p in net.parameters())

    result_loss = CrossEntropyLoss()(net(imgs), targets)
    result_loss.backward()
    nn.CrossEntropyLoss()(native(imgs), targets).backward()
    once = [p.grad for p in net.parameters()]
    torch.testing.assert_close(once, [p.grad for p in native.parameters()])
    assert all(g is not None and g.abs().sum() > 0 for g in once)

    net.zero_grad()
    assert all(p.grad is None for p in net.parameters())


def test_gradients_of_several_batches_add_up(network: tuple[nn.Module, int]) -> None:
    net, channels = network
    loss = CrossEntropyLoss()
    separate = []
    for imgs, targets in batches(channels, 12, 4):
        net.zero_grad()
        loss(net(imgs), targets).backward()
        separate.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    net.zero_grad()
    for imgs, targets in batches(channels, 12, 4):
        loss(net(imgs), targets).backward()
    total = [torch.stack(grads).sum(0) for grads in zip(*separate, strict=True)]
    torch.testing.assert_close([p.grad for p in net.parameters()], total)


def test_walk_along_the_graph() -> None:
    net = NETWORKS["lenet"].build()
    imgs, targets = batches(1, 1, 1)[0]
    loss = CrossEntropyLoss()(net(imgs), targets)
    assert "CrossEntropyBackward" in str(loss.grad_fn)
    assert loss.grad_fn is not None
    linear = loss.grad_fn.next_functions[0][0]
    assert "AddmmBackward0" in str(linear)
    assert linear is not None
    assert "AccumulateGrad" in str(linear.next_functions[0][0])
    assert "ReluBackward0" in str(linear.next_functions[1][0])


def test_backward_on_the_network_beside_the_loss() -> None:
    net = NETWORKS["lenet"].build()
    imgs, targets = batches(1, 1, 1)[0]
    out = net(imgs)
    loss = CrossEntropyLoss()(out, targets)
    net.zero_grad()
    out.backward(torch.randn(1, 10), retain_graph=True)
    upstream = [p.grad for p in net.parameters()]
    assert all(g is not None for g in upstream)
    net.zero_grad()
    loss.backward()
    expected = copy.deepcopy(net)
    expected.zero_grad()
    nn.CrossEntropyLoss()(expected(imgs), targets).backward()
    torch.testing.assert_close(
        [p.grad for p in net.parameters()], [p.grad for p in expected.parameters()]
    )
    net.zero_grad()
    net(imgs).backward(torch.randn(1, 10))
    assert all(p.grad is not None for p in net.parameters())


# ------------------------------------------------------------------ the optimizer


def test_update_by_hand_and_by_sgd(network: tuple[nn.Module, int]) -> None:
    net, channels = network
    by_hand = copy.deepcopy(net)
    learning_rate = 0.01
    optimizer = SGD(net.parameters(), lr=0.01)
    criterion = CrossEntropyLoss()
    for imgs, targets in batches(channels, 6, 2):
        by_hand.zero_grad()
        criterion(by_hand(imgs), targets).backward()
        for f in by_hand.parameters():
            assert f.grad is not None
            f.data.sub_(f.grad.data * learning_rate)

        optimizer.zero_grad()
        loss = criterion(net(imgs), targets)
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(
        list(net.parameters()), list(by_hand.parameters()), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("batch_size, lr", [(1, 0.001), (2, 0.01), (16, 0.01)])
@pytest.mark.parametrize("zero_grad_first", [True, False])
def test_running_loss_falls_over_twenty_epochs(
    zero_grad_first: bool, batch_size: int, lr: float
) -> None:
    net = NETWORKS["lenet"].build()
    loss = CrossEntropyLoss()
    optim = SGD(net.parameters(), lr=lr, momentum=0.9)
    dataloader = batches(1, 32, batch_size)
    history = []
    for _ in range(20):
        running_loss = 0.0
        for imgs, targets in dataloader:
            if zero_grad_first:
                optim.zero_grad()
                outputs = net(imgs)
                result_loss = loss(outputs, targets)
                result_loss.backward()
                optim.step()
            else:
                outputs = net(imgs)
                result_loss = loss(outputs, targets)
                optim.zero_grad()
                result_loss.backward()
                optim.step()
            running_loss = running_loss + result_loss
        assert isinstance(running_loss, Tensor) and running_loss.requires_grad
        history.append(running_loss.item())
    assert history[-1] < history[len(history) // 2] < history[0]


def test_relatives_of_sgd_work_beside_the_loss() -> None:
    imgs, targets = batches(1, 32, 32)[0]
    for build in (
        lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True),
        lambda p: torch.optim.Adam(p, lr=0.001),
        lambda p: torch.optim.RMSprop(p, lr=0.001),
    ):
        net = NETWORKS["lenet"].build()
        optimizer = build(net.parameters())
        losses = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = CrossEntropyLoss()(net(imgs), targets)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]


# ------------------------------------------------------------------ the same numbers


def epochs(
    net: nn.Module,
    loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: list[tuple[Tensor, Tensor]],
) -> Iterator[float]:
    """Train on and on, yielding each epoch's running loss."""
    while True:
        running_loss = 0.0
        for imgs, targets in data:
            optimizer.zero_grad()
            result_loss = loss(net(imgs), targets)
            result_loss.backward()
            optimizer.step()
            running_loss += result_loss.item()
        yield running_loss


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.float64, 1e-9)])
@pytest.mark.parametrize(
    "name, count, batch_size, options",
    [
        ("lenet", 128, 16, {"lr": 0.01}),
        ("lenet", 128, 32, {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}),
        ("cifar-one-head", 16, 8, {"lr": 0.01}),
        ("cifar", 16, 8, {"lr": 0.01, "momentum": 0.9}),
    ],
)
def test_twenty_epochs_follow_native(
    name: str,
    count: int,
    batch_size: int,
    options: dict[str, float],
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    network = NETWORKS[name]
    fused = network.build().to(dtype)
    native = copy.deepcopy(fused)
    data = [(x.to(dtype), y) for x, y in batches(network.channels, count, batch_size)]
    ours = epochs(fused, CrossEntropyLoss(), SGD(fused.parameters(), **options), data)
    theirs = epochs(
        native,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(native.parameters(), foreach=False, **options),
        data,
    )
    history = list(itertools.islice(zip(ours, theirs, strict=True), 20))
    for epoch, (actual, expected) in enumerate(history):
        assert actual == pytest.approx(expected, rel=tolerance), f"epoch {epoch} of {history}"
    assert history[-1][0] < history[0][0]
