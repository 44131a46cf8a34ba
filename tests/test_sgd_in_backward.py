"""SGD that updates each parameter in backward, as soon as its gradient is complete."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint

from fusedstep import SGD
from numerics import BF16, F16, F32, F64, identical
from optimizers import COPIES, name_of, network, pair, through_a_file
from test_sgd import MOMENTUM, OPTIONS, NativeSGD


def assert_same_training(
    models: tuple[nn.Module, nn.Module],
    ours: SGD,
    theirs: SGD,
    steps: int = 4,
    after: Callable[[], object] = lambda: None,
) -> None:
    """The loop as it is written for any optimizer: the same bits in parameters and state."""
    for _ in range(steps):
        batch = torch.randn(7, 17, dtype=next(models[0].parameters()).dtype)
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            if optimizer is ours:
                assert all(p.grad is None for p in model.parameters() if p.requires_grad)
            optimizer.step()
        after()
    identical(list(models[0].parameters()), list(models[1].parameters()))
    identical(ours.state_dict()["state"], theirs.state_dict()["state"])


@pytest.mark.parametrize("options", OPTIONS[::2], ids=name_of)
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_the_same_bits_as_step(dtype: torch.dtype, options: dict[str, Any]) -> None:
    models = pair(dtype)
    ours = SGD(models[0].parameters(), lr=0.1, **options, in_backward=True)
    assert_same_training(models, ours, SGD(models[1].parameters(), lr=0.1, **options))


@pytest.mark.parametrize("option", ["master_weights", "stochastic_rounding"])
def test_with_the_options_of_16_bit_parameters(option: str) -> None:
    models = pair(BF16)
    ours, theirs = (
        SGD(m.parameters(), **MOMENTUM, **{option: True, "in_backward": o})
        for m, o in zip(models, (True, False), strict=True)
    )
    assert_same_training(models, ours, theirs)


def test_the_same_weights_as_torch() -> None:
    models = pair()
    ours = SGD(models[0].parameters(), **MOMENTUM, in_backward=True)
    theirs = NativeSGD(models[1].parameters(), **MOMENTUM)
    for _ in range(4):
        batch = torch.randn(7, 17)
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(list(models[0].parameters()), list(models[1].parameters()))


@pytest.mark.parametrize("in_backward", [False, True])
def test_gradients_alive_at_once(in_backward: bool) -> None:
    """One, where they would be as many as there are parameters."""
    model = network()
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def count(param: Tensor) -> None:
        nonlocal most
        assert param.grad is not None
        alive.append(weakref.ref(param.grad))
        most = max(most, sum(grad() is not None for grad in alive))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(count)  # runs before the optimizer's
    optimizer = SGD(model.parameters(), **MOMENTUM, in_backward=in_backward)
    for _ in range(2):
        model(torch.randn(7, 17)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert most == (1 if in_backward else 6)


class Tied(nn.Module):
    """The first weight is used four times, once transposed; another only now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(17, 17)
        self.second = nn.Linear(17, 17, bias=False)
        self.second.weight = self.first.weight
        self.sometimes = nn.Linear(17, 17)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(torch.tanh(self.first(x))))
        self.calls += 1
        if self.calls % 2 == 0:
            x = self.sometimes(x)
        return self.second(x) @ self.first.weight


def test_shared_and_unused_parameters() -> None:
    model = Tied()
    models = (model, copy.deepcopy(model))
    assert models[1].first.weight is models[1].second.weight
    updates = []
    ours = SGD(models[0].parameters(), **MOMENTUM, in_backward=True)
    model.first.weight.register_post_accumulate_grad_hook(lambda p: updates.append(p))
    assert_same_training(models, ours, SGD(models[1].parameters(), **MOMENTUM), steps=5)
    assert len(updates) == 5, "once a backward, however often the parameter is used"


def test_groups_schedules_and_groups_added_on_the_way() -> None:
    models = pair()

    def make(model: nn.Sequential, in_backward: bool) -> SGD:
        groups = [
            {"params": model[0].parameters(), "lr": 0.3, "momentum": 0.0},
            {"params": model[2].parameters(), "maximize": True},
        ]
        return SGD(groups, **MOMENTUM, in_backward=in_backward)

    ours, theirs = make(models[0], True), make(models[1], False)
    schedulers = [lr_scheduler.StepLR(o, 2, 0.5) for o in (ours, theirs)]

    def schedule() -> None:
        for scheduler in schedulers:
            scheduler.step()

    models[0][4].requires_grad_(False)
    models[1][4].requires_grad_(False)
    assert_same_training(models, ours, theirs, after=schedule)
    for model, optimizer in zip(models, (ours, theirs), strict=True):
        model[4].requires_grad_(True)
        optimizer.add_param_group({"params": model[4].parameters(), "lr": torch.tensor(0.05)})
    schedulers = []
    assert_same_training(models, ours, theirs, after=schedule)
    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"] < 0.3


def _swap_groups(optimizer: SGD) -> None:
    optimizer.param_groups.reverse()


def _leave_out(optimizer: SGD) -> None:
    optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][1:]


def _move(optimizer: SGD) -> None:
    first, second = (group["params"] for group in optimizer.param_groups)
    second.append(first.pop(0))


def _insert(optimizer: SGD) -> None:
    optimizer.param_groups[0]["params"].insert(0, nn.Parameter(torch.zeros(3)))


@pytest.mark.parametrize("change", [_swap_groups, _leave_out, _move, _insert])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_groups_that_change_under_way(dtype: torch.dtype, change: Callable[[SGD], None]) -> None:
    """A parameter follows the group that it is in, and is left alone once it is in none. With
    stochastic rounding, its place among all decides what is drawn."""
    models = pair(dtype)
    optimizers = [
        SGD(
            [
                {"params": model[0].parameters(), "lr": 0.5},
                {"params": [*model[2].parameters(), *model[4].parameters()], "momentum": 0.5},
            ],
            lr=0.1,
            stochastic_rounding=dtype is BF16,
            in_backward=in_backward,
        )
        for model, in_backward in zip(models, (True, False), strict=True)
    ]
    for number in range(4):
        batch = torch.randn(7, 17, dtype=dtype)
        if number == 2:
            for optimizer in optimizers:
                change(optimizer)
        for model, optimizer in zip(models, optimizers, strict=True):
            model.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
    identical(list(models[0].parameters()), list(models[1].parameters()))


def test_a_hook_that_waits_for_the_gradient_is_not_robbed_of_it() -> None:
    """As those are that average gradients over processes: they run after the optimizer's."""
    model = network()
    kept = copy.deepcopy(list(model.parameters()))
    optimizer = SGD(model.parameters(), **MOMENTUM, in_backward=True)
    bias = model[4].bias
    accumulator = bias.expand_as(bias).grad_fn.next_functions[0][0]
    accumulator.register_hook(lambda *_: bias.grad.mul_(0.5))
    with pytest.raises(RuntimeError, match="waiting"):
        model(torch.randn(7, 17)).square().mean().backward()
    assert bias.grad is not None
    identical(bias, kept[-1])
    del accumulator
    optimizer.zero_grad()
    model(torch.randn(7, 17)).square().mean().backward()
    assert bias.grad is None


def test_an_optimizer_that_could_not_be_made_updates_nothing() -> None:
    """Though the error, which a debugger or a notebook keeps, still holds it."""
    model = network()
    kept = copy.deepcopy(list(model.parameters()))
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": math.nan}]
    with pytest.raises(ValueError, match="learning rate") as error:
        SGD(groups, lr=0.1, in_backward=True)
    model(torch.randn(7, 17)).square().mean().backward()
    identical(list(model.parameters()), kept)
    assert all(p.grad is not None for p in model.parameters()) and error.tb is not None


def test_a_parameter_that_is_unfrozen_later_is_updated_by_step() -> None:
    models = pair()
    for model in models:
        model[0].requires_grad_(False)
    ours = SGD(models[0].parameters(), **MOMENTUM, in_backward=True)
    theirs = SGD(models[1].parameters(), **MOMENTUM)
    for model in models:
        model[0].requires_grad_(True)
    for _ in range(3):
        batch = torch.randn(7, 17)
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
    identical(list(models[0].parameters()), list(models[1].parameters()))


def test_every_backward_is_an_update() -> None:
    """Gradients do not add up over several: each is used with the weights as they then are."""
    models = pair()
    ours = SGD(models[0].parameters(), lr=0.1, in_backward=True)
    theirs = SGD(models[1].parameters(), lr=0.1)
    assert ours.in_backward and not theirs.in_backward
    for _ in range(3):
        batch = torch.randn(7, 17)
        models[0](batch).square().mean().backward()
        theirs.zero_grad()
        models[1](batch).square().mean().backward()
        theirs.step()
    identical(list(models[0].parameters()), list(models[1].parameters()))


def test_a_second_backward_through_old_weights_is_refused() -> None:
    model = network()
    _optimizer = SGD(model.parameters(), lr=0.1, in_backward=True)
    loss = model(torch.randn(7, 17)).square().mean()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_that_are_asked_for_update_nothing() -> None:
    model = network()
    _optimizer = SGD(model.parameters(), lr=0.1, in_backward=True)
    kept = copy.deepcopy(list(model.parameters()))
    loss = model(torch.randn(7, 17)).square().mean()
    grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    torch.autograd.grad(sum(g.square().sum() for g in grads), list(model.parameters()))
    identical(list(model.parameters()), kept)


def test_closure() -> None:
    models = pair()
    data = torch.randn(5, 17)
    losses = []
    for model, in_backward in zip(models, (True, False), strict=True):
        optimizer = SGD(model.parameters(), lr=0.1, in_backward=in_backward)

        def closure(model: nn.Module = model, optimizer: SGD = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(data).square().mean()
            loss.backward()
            return loss

        losses.append([optimizer.step(closure), optimizer.step(closure=closure)])
    identical(*losses)
    identical(list(models[0].parameters()), list(models[1].parameters()))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpoints(use_reentrant: bool) -> None:
    models = pair()
    ours = SGD(models[0].parameters(), **MOMENTUM, in_backward=True)
    theirs = SGD(models[1].parameters(), **MOMENTUM)
    for _ in range(3):
        batch = torch.randn(7, 17, requires_grad=True)
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            optimizer.zero_grad()
            hidden = checkpoint(model[:3], batch, use_reentrant=use_reentrant)
            model[3:](hidden).square().mean().backward()
            optimizer.step()
    identical(list(models[0].parameters()), list(models[1].parameters()))


def test_a_compiled_model() -> None:
    models = pair()
    ours = SGD(models[0].parameters(), **MOMENTUM, in_backward=True)
    theirs = SGD(models[1].parameters(), **MOMENTUM)
    compiled = [torch.compile(model, backend="aot_eager") for model in models]
    for _ in range(3):
        batch = torch.randn(7, 17)
        for model, optimizer in zip(compiled, (ours, theirs), strict=True):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
    identical(list(models[0].parameters()), list(models[1].parameters()))


def test_parameters_that_the_kernels_do_not_cover() -> None:
    """Sparse gradients and tensor subclasses are updated, and dropped, by torch's functions."""
    embeddings = [nn.Embedding(50, 7, sparse=True) for _ in range(2)]
    embeddings[1].load_state_dict(embeddings[0].state_dict())
    ours = SGD(embeddings[0].parameters(), lr=0.1, momentum=0.9, in_backward=True)
    theirs = NativeSGD(embeddings[1].parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        rows = torch.randint(50, (9,))
        for embedding, optimizer in zip(embeddings, (ours, theirs), strict=True):
            optimizer.zero_grad()
            embedding(rows).square().sum().backward()
            optimizer.step()
        assert embeddings[0].weight.grad is None
    torch.testing.assert_close(embeddings[0].weight, embeddings[1].weight)


# ------------------------------------------------------------------ the life of the optimizer


@pytest.mark.parametrize("copied", [*COPIES, "state_dict"])
def test_copies_go_on_alone(copied: str) -> None:
    """A copy of model and optimizer trains the copied parameters, the original its own."""
    model = network()
    optimizer = SGD(model.parameters(), **MOMENTUM, in_backward=True)
    model(torch.randn(7, 17)).square().mean().backward()
    if copied == "state_dict":
        twin = copy.deepcopy(model)
        duplicate = SGD(twin.parameters(), lr=7.0, in_backward=True)
        duplicate.load_state_dict(through_a_file(optimizer.state_dict()))
    else:
        twin, duplicate = COPIES[copied]((model, optimizer))
    assert duplicate.param_groups[0]["params"][0] is next(twin.parameters())
    straight_on = copy.deepcopy(model)
    reference = SGD(straight_on.parameters(), **MOMENTUM)
    reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    kept = copy.deepcopy(list(model.parameters()))
    assert_same_training((twin, straight_on), duplicate, reference)
    identical(list(model.parameters()), kept)


def test_a_copy_of_the_model_alone_is_not_trained() -> None:
    model = network()
    _optimizer = SGD(model.parameters(), **MOMENTUM, in_backward=True)
    average = copy.deepcopy(model)
    average(torch.randn(7, 17)).square().mean().backward()
    assert all(p.grad is not None for p in average.parameters())


def test_one_optimizer_for_a_parameter() -> None:
    model = network()
    first = SGD(model.parameters(), lr=0.1, in_backward=True)
    with pytest.raises(RuntimeError, match="remove_backward_hooks"):
        SGD(model.parameters(), lr=0.1, in_backward=True)
    other = SGD([nn.Parameter(torch.zeros(3))], lr=0.1, in_backward=True)
    with pytest.raises(RuntimeError, match="remove_backward_hooks"):
        other.add_param_group({"params": list(model.parameters())})
    assert len(other.param_groups) == 1
    first.remove_backward_hooks()
    kept = copy.deepcopy(list(model.parameters()))
    model(torch.randn(7, 17)).square().mean().backward()
    identical(list(model.parameters()), kept)
    first.step()
    assert not torch.equal(model[0].weight, kept[0])
    second = SGD(model.parameters(), lr=0.1, in_backward=True)
    second.zero_grad()
    model(torch.randn(7, 17)).square().mean().backward()
    assert model[0].weight.grad is None


def test_an_optimizer_that_is_gone_leaves_gradients_alone() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1, in_backward=True)
    watched = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert watched() is None
    kept = copy.deepcopy(list(model.parameters()))
    model(torch.randn(7, 17)).square().mean().backward()
    identical(list(model.parameters()), kept)
    assert all(p.grad is not None for p in model.parameters())
    successor = SGD(model.parameters(), lr=0.1, in_backward=True)
    successor.zero_grad()
    model(torch.randn(7, 17)).square().mean().backward()
    assert all(p.grad is None for p in model.parameters())


def test_model_and_optimizer_are_collected() -> None:
    model = network()
    optimizer = SGD(model.parameters(), **MOMENTUM, in_backward=True)
    model(torch.randn(7, 17)).square().mean().backward()
    watched = [weakref.ref(optimizer), weakref.ref(model[0].weight)]
    del model, optimizer
    gc.collect()
    assert [ref() for ref in watched] == [None, None]


def test_an_error_in_the_middle_of_backward() -> None:
    """What had its gradient before is updated, the rest is as it was; training can go on."""
    models = pair()
    ours = SGD(
        [{"params": models[0][4].parameters()}, {"params": models[0][:4].parameters(), "lr": 0.2}],
        **MOMENTUM,
        in_backward=True,
    )
    kept = copy.deepcopy(list(models[0].parameters()))
    ours.param_groups[1]["lr"] = math.nan
    batch = torch.randn(7, 17)
    with pytest.raises(ValueError, match="learning rate"):
        models[0](batch).square().mean().backward()
    identical(list(models[0].parameters())[:4], kept[:4])
    assert not torch.equal(models[0][4].weight, kept[4])
    assert set(ours.state) == set(models[0][4].parameters())
    ours.param_groups[1]["lr"] = 0.2
    ours.zero_grad()
    models[0](batch).square().mean().backward()
    assert not torch.equal(models[0][0].weight, kept[0])


def test_grad_scaler_is_refused() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1, in_backward=True)
    scaler = torch.amp.GradScaler(next(model.parameters()).device.type)
    scaler.scale(model(torch.randn(7, 17)).square().mean()).backward()
    with pytest.raises(RuntimeError, match="GradScaler"):
        scaler.step(optimizer)
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1, in_backward=True)
    off = torch.amp.GradScaler(enabled=False)
    off.scale(model(torch.randn(7, 17)).square().mean()).backward()
    off.step(optimizer)


def test_differentiable_is_refused() -> None:
    with pytest.raises(ValueError, match="differentiable"):
        SGD(network().parameters(), lr=0.1, differentiable=True, in_backward=True)


def test_step_hooks_run_in_step_alone() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1, in_backward=True)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    model(torch.randn(7, 17)).square().mean().backward()
    assert seen == []
    kept = copy.deepcopy(list(model.parameters()))
    optimizer.step()
    assert seen == ["pre", "post"]
    identical(list(model.parameters()), kept)


def test_one_launch_for_each_parameter(launches: Any) -> None:
    model = network()
    _optimizer = SGD(model.parameters(), **MOMENTUM, in_backward=True)
    loss = model(torch.randn(7, 17)).square().mean()
    with launches() as kernels:
        loss.backward()
    assert len([kernel for kernel in kernels if "optim::" in kernel]) == 6
