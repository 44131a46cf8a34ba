"""SGD with float32 master weights, and with stochastic rounding."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD as TorchSGD

import fusedstep
import reference
from fusedstep import SGD
from numerics import BF16, F16, F32, F64, identical
from optimizers import (
    COPIES,
    SIZES,
    assert_same,
    clones,
    in_float32,
    name_of,
    parameters,
    set_random_grads,
    set_random_halves,
    through_a_file,
)
from test_sgd import MOMENTUM, OPTIONS, NativeSGD

HALVES = (BF16, F16)


def assert_mastered(ours: SGD, theirs: TorchSGD, on_cuda: bool) -> None:
    """Master weights and momentum are the float32 run's, and parameters are their roundings."""
    same_bits = on_cuda or fusedstep._C.cpu_capability() != "default"
    check = identical if same_bits else torch.testing.assert_close
    for our_group, their_group in zip(ours.param_groups, theirs.param_groups, strict=True):
        for p, q in zip(our_group["params"], their_group["params"], strict=True):
            master = ours.state[p]["master_param"]
            assert master.dtype == F32
            check(master, q.detach())
            identical(p.detach(), master.to(p.dtype))
            momentum_buffer = theirs.state[q].get("momentum_buffer")
            if momentum_buffer is None:
                assert "momentum_buffer" not in ours.state[p]
            else:
                check(ours.state[p]["momentum_buffer"], momentum_buffer)


# ------------------------------------------------------------------ master weights


@pytest.mark.level
@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_master_weights_are_those_of_float32_training(
    dtype: torch.dtype, options: dict[str, Any], device: str, on_cuda: bool
) -> None:
    params = parameters(SIZES[:-1], dtype, device)
    twins = in_float32(params)
    ours = SGD(params, lr=0.1, **options, master_weights=True)
    theirs = NativeSGD(twins, lr=0.1, **options)
    for _ in range(10):
        set_random_halves(params, twins)
        ours.step()
        theirs.step()
    assert_mastered(ours, theirs, on_cuda)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_updates_too_small_for_the_parameter_add_up(dtype: torch.dtype, device: str) -> None:
    params = [nn.Parameter(torch.ones(100, dtype=dtype, device=device)) for _ in range(2)]
    optimizers = [SGD(params[:1], lr=2.0**-13), SGD(params[1:], lr=2.0**-13, master_weights=True)]
    for _ in range(512):
        for p, optimizer in zip(params, optimizers, strict=True):
            p.grad = torch.ones_like(p)
            optimizer.step()
    assert (params[0] == 1).all()
    assert (params[1] == 1 - 512 * 2.0**-13).all()


@pytest.mark.level
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_is_written_into_a_parameter_counts(
    dtype: torch.dtype, device: str, on_cuda: bool
) -> None:
    """Where its bits changed the master weight follows; elsewhere it keeps what was dropped."""
    params = parameters(SIZES[:-1], dtype, device)
    twins = in_float32(params)
    ours, theirs = SGD(params, **MOMENTUM, master_weights=True), NativeSGD(twins, **MOMENTUM)
    for _ in range(6):
        set_random_halves(params, twins)
        ours.step()
        theirs.step()
        with torch.no_grad():
            for p, q in zip(params, twins, strict=True):
                written = torch.rand(p.shape, device=device) < 0.3
                values = torch.randn(p.shape, device=device).to(dtype)
                changed = written & (values != p)
                p.copy_(torch.where(written, values, p))
                q.copy_(torch.where(changed, p.float(), q))
    set_random_halves(params, twins)
    ours.step()
    theirs.step()
    assert_mastered(ours, theirs, on_cuda)


def test_a_model_that_is_loaded_over_counts() -> None:
    model, other = (nn.Linear(17, 33).bfloat16() for _ in range(2))
    optimizer = SGD(model.parameters(), lr=0.5, master_weights=True)
    set_random_grads(list(model.parameters()))
    optimizer.step()
    model.load_state_dict(other.state_dict())
    set_random_grads(list(model.parameters()))
    optimizer.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(
            optimizer.state[p]["master_param"], (q.float() - 0.5 * p.grad.float()).detach()
        )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_float32_parameters_are_not_touched_by_the_options(dtype: torch.dtype, device: str) -> None:
    """One launch for all of them, each as in an optimizer of its own."""
    options: tuple[dict[str, Any], ...] = ({"master_weights": True},)
    if dtype is BF16:
        options += ({"stochastic_rounding": True},)
    for option in options:
        ordinary = parameters([100, 1025, 3], F32, device) + parameters([100, 1025], F64, device)
        halves = parameters([100, 1025, 3], dtype, device)
        twins, half_twins = clones(ordinary), clones(halves)
        mixed = [x for pair in zip(halves, ordinary, strict=False) for x in pair] + ordinary[3:]
        together = SGD(mixed, **MOMENTUM, **option)
        apart = SGD(twins, **MOMENTUM)
        alone = SGD(half_twins, **MOMENTUM, master_weights=True)
        for _ in range(3):
            set_random_grads(ordinary, twins)
            set_random_grads(halves, half_twins)
            together.step()
            apart.step()
            alone.step()
        identical(ordinary, twins)
        assert all(set(together.state[p]) == {"momentum_buffer"} for p in ordinary)
        if "master_weights" in option:
            identical(halves, half_twins)


@pytest.mark.parametrize("option", ["master_weights", "stochastic_rounding"])
@pytest.mark.parametrize("count", [1, 100, 700, 2000])
def test_one_launch(count: int, option: str, launches: Any, device: str) -> None:
    shapes = [(1 + i % 37,) for i in range(count)]
    params = parameters(shapes, BF16, device) + parameters([4097, 5], F32, device)
    optimizer = SGD(params, **MOMENTUM, **{option: True})
    for _ in range(2):
        set_random_grads(params)
        with launches() as kernels:
            optimizer.step()
        assert len([kernel for kernel in kernels if "optim::" in kernel]) == 1, kernels


CANARY = 12345.0
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "an unaligned run": lambda b: b[65:1066],
    "an aligned run": lambda b: b[64:2112],
    "an unaligned matrix": lambda b: b[3 : 3 + 40 * 51].view(40, 51),
    "transposed": lambda b: b[: 40 * 51].view(51, 40).T,
    "one element": lambda b: b[1001:1002],
    "every other element": lambda b: b[64 : 64 + 2000 : 2],
}


@pytest.mark.level
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_views_with_master_weights(
    view: str, dtype: torch.dtype, device: str, on_cuda: bool
) -> None:
    """Parameter, gradient and state each lie in a larger buffer full of canaries; strided views
    are torch's to update, with the same state."""
    dtypes = {"param": dtype, "grad": dtype, "momentum_buffer": F32, "master_param": F32}
    frames = {k: torch.full((4096,), CANARY, dtype=v, device=device) for k, v in dtypes.items()}
    inside = {name: VIEWS[view](frame) for name, frame in frames.items()}
    for name in ("param", "grad", "momentum_buffer"):
        inside[name].copy_(torch.randn(inside[name].shape))
    inside["master_param"].copy_(inside["param"])
    param, twin = nn.Parameter(inside["param"]), nn.Parameter(inside["param"].float().contiguous())
    param.grad, twin.grad = inside["grad"], inside["grad"].float()
    ours, theirs = SGD([param], **MOMENTUM, master_weights=True), NativeSGD([twin], **MOMENTUM)
    for key in ("momentum_buffer", "master_param"):
        ours.state[param][key] = inside[key]
    theirs.state[twin]["momentum_buffer"] = inside["momentum_buffer"].clone()
    ours.step()
    theirs.step()
    assert_mastered(ours, theirs, on_cuda)
    for name, frame in frames.items():
        VIEWS[view](frame).fill_(CANARY)
        assert (frame == CANARY).all(), f"memory outside the {name} was written"


def test_state_in_another_layout_or_dtype() -> None:
    """As a checkpoint of another run may leave it."""
    param = nn.Parameter(torch.randn(2, 3, 4, 5).bfloat16().to(memory_format=torch.channels_last))
    twin = nn.Parameter(param.detach().float())
    ours, theirs = SGD([param], **MOMENTUM, master_weights=True), NativeSGD([twin], **MOMENTUM)
    buffer = torch.randn(2, 3, 4, 5).bfloat16()
    ours.state[param] = {"momentum_buffer": buffer, "master_param": param.detach().contiguous()}
    theirs.state[twin]["momentum_buffer"] = buffer.float()
    for _ in range(3):
        set_random_halves([param], [twin])
        ours.step()
        theirs.step()
    torch.testing.assert_close(ours.state[param]["master_param"], twin.detach())
    torch.testing.assert_close(
        ours.state[param]["momentum_buffer"], theirs.state[twin]["momentum_buffer"]
    )


@pytest.mark.parametrize("scale", [1.0, 8.0, 65536.0])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradients_are_unscaled_in_float32(
    dtype: torch.dtype, scale: float, device: str, on_cuda: bool
) -> None:
    """Small ones too, which the gradient's own dtype cannot hold; and an overflow is skipped. The
    strided parameter is torch's to update."""
    params = parameters(SIZES[:-1], dtype, device)
    params.append(nn.Parameter(torch.randn(200, device=device).to(dtype)[::2]))
    twins = in_float32(params)
    ours, theirs = SGD(params, **MOMENTUM, master_weights=True), NativeSGD(twins, **MOMENTUM)
    for overflow in (0.0, 1.0, 0.0, 0.0):
        set_random_halves(params, twins)
        with torch.no_grad():
            for p, q in zip(params, twins, strict=True):
                assert p.grad is not None
                p.grad.mul_(2.0**-10)
                q.grad = p.grad.float() / scale
        ours.grad_scale = torch.tensor(scale, device=device)
        ours.found_inf = torch.tensor(overflow, device=device)
        kept = copy.deepcopy(params)
        ours.step()
        if overflow:
            identical(params, kept)
        else:
            theirs.step()
            identical(
                [p.grad for p in params], [q.grad.to(dtype) for q in twins if q.grad is not None]
            )
    assert_mastered(ours, theirs, on_cuda)


def test_an_overflow_on_the_first_step(device: str, on_cuda: bool) -> None:
    params = parameters([100, 1025], BF16, device)
    twins = in_float32(params)
    ours, theirs = SGD(params, **MOMENTUM, master_weights=True), NativeSGD(twins, **MOMENTUM)
    ours.grad_scale = torch.tensor(2.0, device=device)
    for overflow in (1.0, 0.0, 0.0):
        set_random_halves(params, twins)
        for q in twins:
            assert q.grad is not None
            q.grad /= 2
        ours.found_inf = torch.tensor(overflow, device=device)
        ours.step()
        if not overflow:
            theirs.step()
    assert_mastered(ours, theirs, on_cuda)


def test_gradients_of_other_kinds_with_master_weights() -> None:
    """float32 and sparse gradients are torch's to use, on the same float32 weights."""
    embedding = nn.Embedding(50, 7, sparse=True, dtype=BF16)
    other = nn.Parameter(torch.randn(100).bfloat16())
    other.grad_dtype = None
    params = [embedding.weight, other]
    twins = in_float32(params)
    options = {"lr": 0.1, "momentum": 0.9}
    ours, theirs = SGD(params, **options, master_weights=True), NativeSGD(twins, **options)
    for step in range(4):
        embedding.zero_grad()
        embedding(torch.randint(50, (9,))).float().square().sum().backward()
        assert embedding.weight.grad is not None
        twins[0].grad = embedding.weight.grad.float()
        other.grad = torch.randn(100)
        twins[1].grad = other.grad.clone()
        if step == 2:
            with torch.no_grad():
                other[3] = twins[1][3] = 7.0
        ours.step()
        theirs.step()
        for p, q in zip(params, twins, strict=True):
            torch.testing.assert_close(ours.state[p]["master_param"], q.detach())
            identical(p.detach(), ours.state[p]["master_param"].to(BF16))


def test_a_float32_parameter_with_16_bit_gradients_has_no_master_weight() -> None:
    """Torch's functions do with it what they do without the option: momentum in 16 bits."""
    params = parameters([100], F32)
    params[0].grad_dtype = None
    twins = clones(params)
    ours, theirs = SGD(params, **MOMENTUM, master_weights=True), NativeSGD(twins, **MOMENTUM)
    for _ in range(3):
        grad = torch.randn(100).bfloat16()
        twins[0].grad_dtype = None
        params[0].grad, twins[0].grad = grad.clone(), grad.clone()
        ours.step()
        theirs.step()
    assert_same(ours, theirs)


def test_momentum_of_wide_parameters_is_loaded_as_torch_loads_it() -> None:
    """A float64 parameter keeps no float32 momentum of a run in another dtype."""
    params = parameters([100, 33], F64)
    twins = clones(params)
    saved = SGD(parameters([100, 33], F32), **MOMENTUM)
    set_random_grads(saved.param_groups[0]["params"])
    saved.step()
    ours, theirs = SGD(params, lr=7.0, master_weights=True), NativeSGD(twins, lr=7.0)
    for optimizer in (ours, theirs):
        optimizer.load_state_dict(through_a_file(saved.state_dict()))
    set_random_grads(params, twins)
    ours.step()
    theirs.step()
    assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_resumed_run_is_the_same_bits(dtype: torch.dtype, device: str, on_cuda: bool) -> None:
    params = parameters([100, 33, (4, 5)], dtype, device)
    twins = in_float32(params)
    first, theirs = SGD(params, **MOMENTUM, master_weights=True), NativeSGD(twins, **MOMENTUM)
    for _ in range(3):
        set_random_halves(params, twins)
        first.step()
        theirs.step()
    resumed = SGD(clones(params), lr=7.0, master_weights=True)
    seen = []
    resumed.register_load_state_dict_post_hook(
        lambda o: seen.append({v.dtype for s in o.state.values() for v in s.values()})
    )
    resumed.load_state_dict(through_a_file(first.state_dict()))
    assert seen == [{F32}], "the user's hooks see what will be used"
    resumed_params = resumed.param_groups[0]["params"]
    for _ in range(3):
        set_random_halves(resumed_params, twins)
        resumed.step()
        theirs.step()
    assert_mastered(resumed, theirs, on_cuda)


def test_checkpoints_move_to_torch_and_back() -> None:
    """Torch rounds the state to the parameter's dtype and goes on in 16 bits; what it then leaves
    is where master weights begin."""
    params = parameters([100, 33], BF16)
    ours = SGD(params, **MOMENTUM, master_weights=True)
    assert ours.state_dict().keys() == NativeSGD(clones(params), **MOMENTUM).state_dict().keys()
    set_random_grads(params)
    ours.step()
    theirs = NativeSGD(clones(params), lr=7.0)
    theirs.load_state_dict(through_a_file(ours.state_dict()))
    torch_params = theirs.param_groups[0]["params"]
    for p, q in zip(params, torch_params, strict=True):
        identical(theirs.state[q]["momentum_buffer"], ours.state[p]["momentum_buffer"].bfloat16())
    set_random_grads(torch_params)
    theirs.step()

    back = SGD(clones(torch_params), lr=7.0, master_weights=True)
    back.load_state_dict(through_a_file(theirs.state_dict()))
    back_params = back.param_groups[0]["params"]
    twins = in_float32(torch_params)
    straight_on = NativeSGD(twins, **MOMENTUM)
    for q, twin in zip(torch_params, twins, strict=True):
        straight_on.state[twin]["momentum_buffer"] = theirs.state[q]["momentum_buffer"].float()
    for _ in range(3):
        set_random_halves(back_params, twins)
        back.step()
        straight_on.step()
    for p, twin in zip(back_params, twins, strict=True):
        torch.testing.assert_close(back.state[p]["master_param"], twin.detach())


OURS: list[dict[str, Any]] = [{"master_weights": True}, {"stochastic_rounding": True, "seed": 7}]


@pytest.mark.parametrize("options", OURS, ids=["master_weights", "stochastic_rounding"])
@pytest.mark.parametrize("copied", COPIES)
def test_copies_mid_training(copied: str, options: dict[str, Any]) -> None:
    params = parameters([100, 33], BF16)
    optimizer = SGD(params, **MOMENTUM, **options)
    set_random_grads(params)
    optimizer.step()
    duplicate = COPIES[copied](optimizer)
    twins = duplicate.param_groups[0]["params"]
    for _ in range(2):
        set_random_grads(params, twins)
        optimizer.step()
        duplicate.step()
    identical(params, twins)
    identical(optimizer.state_dict()["state"], duplicate.state_dict()["state"])


@pytest.mark.parametrize("options", OURS, ids=["master_weights", "stochastic_rounding"])
def test_compiled_step(options: dict[str, Any]) -> None:
    params = parameters([100, 33], BF16)
    twins = clones(params)
    compiled, eager = SGD(params, **MOMENTUM, **options), SGD(twins, **MOMENTUM, **options)
    step = torch.compile(compiled.step, backend="eager")
    for _ in range(3):
        set_random_grads(params, twins)
        step()
        eager.step()
    identical(params, twins)
    identical(compiled.state_dict()["state"], eager.state_dict()["state"])


@pytest.mark.parametrize("planted", ["shape", "dtype"])
def test_a_master_weight_that_does_not_fit_changes_nothing(planted: str) -> None:
    params = parameters([100, 33], BF16)
    optimizer = SGD(params, **MOMENTUM, master_weights=True)
    set_random_grads(params)
    optimizer.step()
    master = torch.zeros(7) if planted == "shape" else torch.zeros(33, dtype=torch.int32)
    optimizer.state[params[1]]["master_param"] = master
    kept, state = copy.deepcopy(params), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="master_param"):
        optimizer.step()
    identical(params, kept)
    identical(optimizer.state_dict()["state"], state["state"])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "both": ({"master_weights": True, "stochastic_rounding": True}, "exclude"),
    "differentiable": ({"master_weights": True, "differentiable": True}, "differentiable"),
    "negative seed": ({"stochastic_rounding": True, "seed": -1}, "seed"),
    "large seed": ({"stochastic_rounding": True, "seed": 2**64}, "seed"),
    "fractional seed": ({"stochastic_rounding": True, "seed": 0.5}, "seed: 0.5, not an integer"),
    "no seed": ({"seed": None}, "seed: None, not an integer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_are_refused(name: str) -> None:
    options, subject = REFUSED[name]
    with pytest.raises(ValueError, match=subject):
        SGD(parameters([3], BF16), lr=0.1, **options)


# ------------------------------------------------------------------ stochastic rounding


def draws(step: int = 0, place: int = 0, seed: int = 0, count: int = 100_000) -> Tensor:
    """What the optimizer drew: which elements half way between two values were rounded up."""
    dummies = [nn.Parameter(torch.zeros(1, dtype=BF16)) for _ in range(place)]
    param = nn.Parameter(torch.ones(count, dtype=BF16))
    optimizer = SGD([*dummies, param], lr=1.0, stochastic_rounding=True, seed=seed)
    for _ in range(step + 1):
        with torch.no_grad():
            param.fill_(1)
        param.grad = torch.full_like(param, -(2.0**-8))
        optimizer.step()
    assert ((param == 1) | (param == 1 + 2.0**-7)).all()
    return param.detach() > 1


@pytest.mark.level
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_rounding_is_the_documented_function(momentum: float, device: str) -> None:
    """To the bit, on every kind of device: the step is exact here until float32 rounds it once."""
    params = parameters(SIZES, BF16, device)
    params.insert(3, nn.Parameter(torch.randn(5)))  # not rounded, but counted
    optimizer = SGD(params, lr=0.25, momentum=momentum, stochastic_rounding=True, seed=123)
    for step in range(3):
        set_random_grads(params)
        before = [p.detach().double() for p in params]
        buffers = [optimizer.state[p].get("momentum_buffer", torch.zeros(())) for p in params]
        velocity = [
            momentum * b.double() + (0 if p.grad is None else p.grad.double())
            for p, b in zip(params, buffers, strict=True)
        ]
        optimizer.step()
        for place, p in enumerate(params):
            exact = (before[place] - 0.25 * velocity[place].float().double()).float()
            if p.dtype is F32:
                identical(p.detach(), exact)
            else:
                random = reference.random_bits(123, place, step, range(p.numel()))
                identical(p.detach().cpu(), reference.stochastically_rounded(exact, random))
                assert optimizer.state[p]["step"] == step + 1


@pytest.mark.parametrize("fraction", [1 / 65536, 1 / 16, 0.3, 0.5, 0.9])
def test_rounding_is_unbiased(fraction: float) -> None:
    """Within five standard deviations of the binomial distribution, on both sides of zero."""
    n = 1_000_000
    fraction = round(fraction * 2**16) / 2**16  # exact in float32
    for sign in (1.0, -1.0):
        param = nn.Parameter(torch.full((n,), sign, dtype=BF16))
        param.grad = torch.full((n,), -sign, dtype=BF16)
        SGD([param], lr=fraction * 2.0**-7, stochastic_rounding=True, seed=5).step()
        away = (param.abs() > 1).sum().item()
        assert ((param == sign) | (param == sign * (1 + 2.0**-7))).all()
        assert abs(away - n * fraction) <= 5 * math.sqrt(n * fraction * (1 - fraction))


def test_small_updates_add_up_on_average() -> None:
    n, steps, update = 100_000, 50, 0.1 * 2.0**-8
    params = [nn.Parameter(torch.ones(n, dtype=BF16)) for _ in range(2)]
    nearest = SGD(params[:1], lr=update)
    stochastic = SGD(params[1:], lr=update, stochastic_rounding=True)
    for _ in range(steps):
        for p, optimizer in zip(params, (nearest, stochastic), strict=True):
            p.grad = torch.ones_like(p)
            optimizer.step()
    assert (params[0] == 1).all()
    # Each step's error is below a unit in the last place, with mean 0.
    error = params[1].mean(dtype=F64) - (1 - steps * update)
    assert abs(error) <= 5 * 2.0**-8 * math.sqrt(steps / n)


@pytest.mark.parametrize("what", ["steps", "parameters", "seeds", "neighbours", "rows"])
def test_draws_are_independent(what: str) -> None:
    """Two sets of fair coins agree on half of them, within five standard deviations."""
    one = draws()
    other = {
        "steps": lambda: draws(step=1),
        "parameters": lambda: draws(place=1),
        "seeds": lambda: draws(seed=1),
        "neighbours": lambda: one.roll(1),
        "rows": lambda: one.roll(1024),
    }[what]()
    n = one.numel()
    for statistic in ((one == other).sum().item(), one.sum().item(), other.sum().item()):
        assert abs(statistic - n / 2) <= 5 * math.sqrt(n / 4)


@pytest.mark.level
def test_exact_and_special_values_are_kept(device: str) -> None:
    """Whatever bfloat16 holds, two of each kind of infinity and NaN included."""
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(BF16).to(device)
    param = nn.Parameter(values.clone())
    optimizer = SGD([param], lr=0.0, stochastic_rounding=True)
    for _ in range(3):
        param.grad = torch.ones_like(param)
        optimizer.step()
        identical(param.detach(), values)
    identical(
        torch.signbit(param.detach())[~values.isnan()], torch.signbit(values)[~values.isnan()]
    )


def test_beyond_the_largest_value_infinity_is_the_neighbour() -> None:
    largest = torch.finfo(BF16).max
    unit = largest - torch.nextafter(
        torch.tensor(largest, dtype=BF16), torch.tensor(0.0, dtype=BF16)
    )
    param = nn.Parameter(torch.full((10_000,), largest, dtype=BF16))
    param.grad = torch.full_like(param, -unit.item())
    SGD([param], lr=0.25, stochastic_rounding=True).step()
    up = param.isinf().sum().item()
    assert ((param == largest) | (param == math.inf)).all()
    assert abs(up - 2500) <= 5 * math.sqrt(10_000 * 0.25 * 0.75)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_draws_for_any_thread_count(threads: int) -> None:
    params = parameters([100, (512, 1024), 33], BF16)
    twins = clones(params)
    first, second = (SGD(p, **MOMENTUM, stochastic_rounding=True) for p in (params, twins))
    for _ in range(3):
        set_random_grads(params, twins)
        torch.set_num_threads(threads)
        first.step()
        torch.set_num_threads(1)
        second.step()
    identical(params, twins)


def test_stochastic_runs_resume_to_the_bit() -> None:
    """The state counts each parameter's steps: those without a gradient do not advance."""
    params = parameters([100, 33, 1025], BF16)
    twins = clones(params)
    first, straight_on = (
        SGD(p, **MOMENTUM, stochastic_rounding=True, seed=2**64 - 1) for p in (params, twins)
    )
    for i in range(3):
        set_random_grads(params, twins)
        if i == 1:
            params[2].grad = twins[2].grad = None
        first.step()
        straight_on.step()
    assert [first.state[p]["step"] for p in params] == [3, 3, 2]
    resumed_params = clones(params)
    resumed = SGD(resumed_params, lr=7.0, stochastic_rounding=True, seed=2**64 - 1)
    resumed.load_state_dict(through_a_file(first.state_dict()))
    plain = NativeSGD(clones(params), lr=7.0)
    plain.load_state_dict(through_a_file(first.state_dict()))
    for _ in range(3):
        set_random_grads(resumed_params, twins)
        resumed.step()
        straight_on.step()
    identical(resumed_params, twins)


def test_an_overflow_draws_nothing_on_the_cpu(cpu_only: None) -> None:
    params = parameters([100, 1025], BF16)
    twins = clones(params)
    scaled, plain = (SGD(p, **MOMENTUM, stochastic_rounding=True) for p in (params, twins))
    for overflow in (1.0, 0.0, 1.0, 0.0):
        set_random_grads(params, twins)
        for p in params:
            assert p.grad is not None
            p.grad.mul_(8)
        scaled.grad_scale, scaled.found_inf = torch.tensor(8.0), torch.tensor(overflow)
        scaled.step()
        if not overflow:
            plain.step()
        identical(params, twins)


def test_stochastic_rounding_of_what_is_not_covered_is_refused() -> None:
    cases = {
        "strided": nn.Parameter(torch.randn(20).bfloat16()[::2]),
        "float16": nn.Parameter(torch.randn(20).half()),
    }
    for kind, last in cases.items():
        params = [*parameters([100, 33], BF16), last]
        optimizer = SGD(params, **MOMENTUM, stochastic_rounding=True)
        set_random_grads(params)
        kept = [p.detach().clone() for p in params]
        with pytest.raises((RuntimeError, ValueError), match=kind):
            optimizer.step()
        identical([p.detach() for p in params], kept)
        assert not optimizer.state


def test_stochastic_rounding_is_not_captured(card: str) -> None:
    (param,) = params = parameters([100], BF16, card)
    param.grad = torch.ones_like(param)
    optimizer = SGD(params, lr=0.1, stochastic_rounding=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


def test_a_captured_step_keeps_master_weights(card: str) -> None:
    params = parameters([100, 4097], BF16, card)
    twins = in_float32(params)
    ours, theirs = SGD(params, **MOMENTUM, master_weights=True), NativeSGD(twins, **MOMENTUM)
    set_random_halves(params, twins)
    ours.step()
    theirs.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()
    for _ in range(3):
        for p, q in zip(params, twins, strict=True):
            assert p.grad is not None
            p.grad.normal_()
            q.grad = p.grad.float()
        graph.replay()
        theirs.step()
    assert_mastered(ours, theirs, on_cuda=True)


def test_draws_beyond_32_bit_offsets(card: str) -> None:
    count, tail = 2**32 + 1000, 2000
    param = nn.Parameter(torch.ones(count, dtype=BF16, device=card))
    param.grad = torch.full_like(param, -(2.0**-8))
    SGD([param], lr=1.0, stochastic_rounding=True).step()
    offsets = range(count - tail, count)
    random = reference.random_bits(0, 0, 0, offsets)
    expected = reference.stochastically_rounded(torch.full((tail,), 1 + 2.0**-8), random)
    identical(param.detach()[-tail:].cpu(), expected)
