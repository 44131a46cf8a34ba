"""Every optimizer of the table beside torch's class and a float64 reference.

What only one of them has is in a file of its own: test_sgd.py and its like.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

import fusedstep
import reference
from numerics import BF16, DTYPES, F16, F32, F64, identical, poisoned_outputs  # noqa: F401
from optimizers import (
    BY_NAME,
    CANARY,
    COPIES,
    LAYOUTS,
    ROWS,
    SCHEDULERS,
    VIEWS,
    Row,
    assert_same,
    clones,
    in_float32,
    name_of,
    pair,
    parameters,
    refuses,
    scaled_training,
    set_random_grads,
    set_random_halves,
    step_both,
    through_a_file,
)

HALVES = (BF16, F16)
# Either side of a vector's lanes at every level, and of one and two chunks.
SIZES = (1, 3, 7, 8, 17, 33, 100, 1023, 1025, 2049)

every = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def with_options(options_of: Callable[[Row], list[dict[str, Any]]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("row", "options"),
        [
            pytest.param(row, options, id=f"{row.name}-{name_of(options)}")
            for row in ROWS
            for options in options_of(row)
        ],
    )


every_combination = with_options(lambda row: list(row.options))
few_combinations = with_options(lambda row: row.few)


@pytest.fixture
def check(on_cuda: bool) -> Callable[[Any, Any], None]:
    """Compares numbers that torch's operators compute with those of our kernels.

    They are the same bits on the CPU, where both use its fused multiply-add.
    """
    if on_cuda:
        return lambda ours, theirs: torch.testing.assert_close(ours, theirs, equal_nan=True)
    if fusedstep._C.cpu_capability() == "default":  # where torch's vectors and its scalars differ
        return lambda ours, theirs: torch.testing.assert_close(ours, theirs, equal_nan=True)
    return identical


@pytest.fixture
def only_kernels() -> Iterator[None]:
    """Fails if a parameter was left to torch's functions."""
    fusedstep.reset_stats()
    yield
    calls = [fusedstep.stats()[row.name] for row in ROWS]
    assert any(c.fused for c in calls) and not any(c.fallbacks for c in calls), calls


def values(params: Any) -> list[Tensor]:
    return [p.detach() for p in params]


def states(row: Row, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [row.state_of(optimizer, p) for g in optimizer.param_groups for p in g["params"]]


def in_dtype(state: dict[str, Any], param: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """A parameter's state in memory of its own; tensors like the parameter in another dtype."""
    return {
        key: value.to(dtype, copy=True)
        if isinstance(value, Tensor) and value.shape == param.shape and value.dim()
        else copy.deepcopy(value)
        for key, value in state.items()
    }


def random_state(row: Row, params: list[nn.Parameter], **options: Any) -> list[dict[str, Any]]:
    """What torch's class leaves after steps on random gradients, parameters like these."""
    likes = [nn.Parameter(torch.randn(p.shape, device=p.device).to(p.dtype)) for p in params]
    optimizer = row.native(likes, **options)
    for _ in range(2):
        set_random_grads(likes)
        optimizer.step()
    return states(row, optimizer)


# ------------------------------------------------------------------ the table itself


def test_no_optimizer_is_forgotten() -> None:
    assert set(BY_NAME) == set(fusedstep._C.optimizers) == set(fusedstep.optim.__all__)
    for row in ROWS:
        assert row.ours is getattr(fusedstep, row.name) is getattr(fusedstep.optim, row.name)
        assert set(fusedstep._C.optimizers[row.name].states) <= set(row.states)


@every
def test_every_option_is_varied(row: Row) -> None:
    """Those that change what torch's class computes."""
    not_computed = {"self", "params", "lr", "foreach", "capturable", "differentiable", "fused"}
    signature = inspect.signature(row.torchs.__init__).parameters
    for name in set(signature) - not_computed:
        default = signature[name].default
        taken = [options.get(name, default) for options in row.options]
        assert any(value != taken[0] for value in taken), f"{name} is always {taken[0]}"


@every
def test_options_have_the_states_that_the_rule_says(row: Row) -> None:
    rule = fusedstep._C.optimizers[row.name]
    with_states = []
    for options in (*row.options, row.usual):
        optimizer = row.make(parameters([3]), **options)
        (state,) = random_state(row, optimizer.param_groups[0]["params"], **options)
        assert set(rule.states_of(optimizer.param_groups[0])) == set(state) & set(rule.states)
        with_states.append(len(state))
    assert with_states[0] == min(with_states) and with_states[-1] == max(with_states)
    assert set(state) == set(row.states)


@every_combination
def test_reference_agrees_with_torch_in_float64(row: Row, options: dict[str, Any]) -> None:
    (p,) = params = parameters([100], F64)
    optimizer = row.native(params, **options)
    expected: Tensor = p.detach()
    state: dict[str, Tensor] = {}
    for _ in range(4):
        set_random_grads(params)
        expected, state = row.exact(expected, p.grad, state, lr=row.lr, **options)
        optimizer.step()
    torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)
    for key, value in row.state_of(optimizer, p).items():
        torch.testing.assert_close(
            torch.as_tensor(value, dtype=F64),
            torch.as_tensor(state[key], dtype=F64),
            rtol=1e-12,
            atol=1e-12,
        )


# ------------------------------------------------------------------ right numbers


@pytest.mark.level
@pytest.mark.usefixtures("only_kernels")
@every_combination
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_steps_of_every_combination(
    dtype: torch.dtype,
    row: Row,
    options: dict[str, Any],
    device: str,
    check: Callable[[Any, Any], None],
) -> None:
    params = parameters(SIZES, dtype, device)
    twins = clones(params)
    ours, theirs = row.make(params, **options), row.native(twins, **options)
    for _ in range(4):
        step_both(ours, theirs)
        check(values(params), values(twins))
    for mine, other in zip(states(row, ours), states(row, theirs), strict=True):
        check(mine, other)


@pytest.mark.level
@pytest.mark.usefixtures("only_kernels")
@every_combination
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_16_bit_parameters_are_rounded_once(
    dtype: torch.dtype, row: Row, options: dict[str, Any], device: str, on_cuda: bool
) -> None:
    """The step in float32 from the stored numbers, which torch computes, and the exact one: what
    comes of it is rounded once, parameter and state each."""
    params = parameters(SIZES, dtype, device)
    ours = row.make(params, **options)
    same_bits = not on_cuda and fusedstep._C.cpu_capability() != "default"
    eps = torch.finfo(dtype).eps
    for _ in range(4):
        before = copy.deepcopy((params, states(row, ours)))
        twins = in_float32(params)
        theirs = row.native(twins, **options)
        for p, twin, state in zip(params, twins, before[1], strict=True):
            theirs.state[twin] = in_dtype(state, p, F32)
        set_random_halves(params, twins)
        ours.step()
        theirs.step()
        for p, twin, old, state in zip(params, twins, *before, strict=True):
            mine = row.state_of(ours, p)
            if same_bits:
                identical(p.detach(), twin.detach().to(dtype))
                for key, value in row.state_of(theirs, twin).items():
                    identical(
                        torch.as_tensor(mine[key]).to(dtype), torch.as_tensor(value).to(dtype)
                    )
            exact, _ = row.exact(old.detach(), p.grad, state, lr=row.lr, **options)
            terms = old.detach().abs() + p.grad.abs()
            for value in state.values():
                terms = terms + torch.as_tensor(value).abs()
            # Half a unit in the last place, and a hundredth for what float32 rounds before.
            allowed = 0.5 * eps * exact.abs() + 0.01 * eps * terms.double()
            smallest = torch.finfo(dtype).smallest_normal * eps
            excess = (p.detach().double() - exact).abs() - allowed - smallest
            assert excess.max() <= 0, (excess.max(), p.numel())


@pytest.mark.level
@every
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_same_bits_for_any_thread_count(dtype: torch.dtype, row: Row) -> None:
    params = parameters([*SIZES, (300, 1024)], dtype)
    twins = clones(params)
    first, second = row.make(params, **row.usual), row.make(twins, **row.usual)
    for _ in range(2):
        set_random_grads(params, twins)
        torch.set_num_threads(3)
        first.step()
        torch.set_num_threads(1)
        second.step()
    identical(params, twins)
    identical(states(row, first), states(row, second))


@every
def test_options_and_learning_rates_that_change(row: Row) -> None:
    """Between options whose parameters have the same state."""
    params = parameters([100, 1025]) + parameters([33], F64) + parameters([7], BF16)
    twins = clones(params)
    ours, theirs = row.make(params, **row.usual), row.native(twins, **row.usual)
    step_both(ours, theirs)
    kept = set(row.state_of(theirs, twins[0]))
    for i, options in enumerate(row.options):
        probe = row.native(parameters([3]), **options)
        set_random_grads(probe.param_groups[0]["params"])
        probe.step()
        if set(states(row, probe)[0]) != kept:
            continue
        for optimizer in (ours, theirs):
            optimizer.param_groups[0].update(options, lr=(0.1, 0, torch.tensor(0.25))[i % 3])
        step_both(ours, theirs)
        assert_same(ours, theirs)


@every
def test_tensor_learning_rates(row: Row, device: str) -> None:
    """To the bit, on every device, with changes in place."""
    lr = torch.tensor(0.1, dtype=F64, device=device)
    params = [p for dtype in DTYPES for p in parameters([100, 1025], dtype, device)]
    twins = clones(params)
    by_tensor, by_number = row.make(params, lr=lr), row.make(twins, lr=lr.item())
    for change in (1.0, 0.3, -2.0):
        lr.mul_(change)
        by_number.param_groups[0]["lr"] = lr.item()
        set_random_grads(params, twins)
        by_tensor.step()
        by_number.step()
        identical(params, twins)


@pytest.mark.level
@few_combinations
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_special_values_travel_as_in_torch(
    dtype: torch.dtype, row: Row, options: dict[str, Any]
) -> None:
    """Infinite, NaN, huge, subnormal and signed zero, each meeting each."""
    info = torch.finfo(dtype)
    special = [0.0, -0.0, 1.0, math.inf, -math.inf, math.nan, info.max, -info.max]
    special += [info.tiny, info.tiny / 4, -info.tiny / 8, info.eps]
    meeting = torch.tensor(list(itertools.product(special, repeat=3)), dtype=dtype)
    params = [nn.Parameter(meeting[:, 0].clone()) for _ in range(2)]
    ours, theirs = row.make(params[:1], **options), row.native(params[1:], **options)
    for column in (1, 2, 0):
        for p in params:
            p.grad = meeting[:, column].clone()
        ours.step()
        theirs.step()
        torch.testing.assert_close(params[0], params[1], equal_nan=True)
        for mine, other in zip(states(row, ours), states(row, theirs), strict=True):
            torch.testing.assert_close(mine, other, equal_nan=True)


# ------------------------------------------------------------------ memory


@few_combinations
@pytest.mark.parametrize("grad_layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("param_layout", LAYOUTS)
def test_parameter_and_gradient_in_different_layouts(
    param_layout: str, grad_layout: str, row: Row, options: dict[str, Any]
) -> None:
    numbers = torch.randn(4, 3, 5, 7)
    ours_p, theirs_p = nn.Parameter(LAYOUTS[param_layout](numbers)), nn.Parameter(numbers.clone())
    ours, theirs = row.make([ours_p], **options), row.native([theirs_p], **options)
    strides = ours_p.stride()
    for _ in range(3):
        grad = torch.randn_like(numbers)
        if grad_layout == "expanded":
            grad = torch.randn(1, 3, 1, 7).expand(numbers.shape)
        ours_p.grad = grad if grad_layout == "expanded" else LAYOUTS[grad_layout](grad)
        theirs_p.grad = grad.contiguous()
        kept = ours_p.grad.clone()
        ours.step()
        theirs.step()
        identical(ours_p.grad, kept)
        assert ours_p.stride() == strides
        assert_same(ours, theirs)


@every
@pytest.mark.parametrize("state_layout", LAYOUTS)
@pytest.mark.parametrize("param_layout", LAYOUTS)
def test_state_in_another_layout(param_layout: str, state_layout: str, row: Row) -> None:
    numbers = torch.randn(4, 3, 5, 7)
    ours_p, theirs_p = nn.Parameter(LAYOUTS[param_layout](numbers)), nn.Parameter(numbers.clone())
    ours, theirs = row.make([ours_p], **row.usual), row.native([theirs_p], **row.usual)
    (state,) = random_state(row, [theirs_p], **row.usual)
    ours.state[ours_p] = {
        key: LAYOUTS[state_layout](value.clone())
        if isinstance(value, Tensor) and value.dim()
        else copy.deepcopy(value)
        for key, value in state.items()
    }
    theirs.state[theirs_p] = state
    for _ in range(2):
        step_both(ours, theirs)
        assert_same(ours, theirs)


@pytest.mark.level
@few_combinations
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_nothing_outside_a_view_is_written(
    view: str, dtype: torch.dtype, row: Row, options: dict[str, Any]
) -> None:
    """Parameter, gradient and state each lie in a larger buffer full of canaries."""
    frames: dict[str, Tensor] = {}

    def framed(name: str, numbers: Tensor) -> Tensor:
        frames[name] = torch.full((4096,), CANARY, dtype=numbers.dtype, device=numbers.device)
        return VIEWS[view](frames[name]).copy_(numbers)

    shape = VIEWS[view](torch.empty(4096)).shape
    ours_p = nn.Parameter(framed("param", torch.randn(shape).to(dtype)))
    theirs_p = nn.Parameter(ours_p.detach().clone())
    ours_p.grad = framed("grad", torch.randn(shape).to(dtype))
    theirs_p.grad = ours_p.grad.clone()
    ours, theirs = row.make([ours_p], **options), row.native([theirs_p], **options)
    (state,) = random_state(row, [theirs_p], **options)
    ours.state[ours_p] = {
        key: framed(key, value)
        if isinstance(value, Tensor) and value.shape == shape
        else copy.deepcopy(value)
        for key, value in state.items()
    }
    theirs.state[theirs_p] = state
    kept = ours_p.grad.clone()
    ours.step()
    theirs.step()
    assert_same(ours, theirs)
    identical(ours_p.grad, kept)
    for name, frame in frames.items():
        VIEWS[view](frame).fill_(CANARY)
        assert (frame == CANARY).all(), f"memory outside the {name} was written"


@pytest.mark.level
@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alignment_changes_no_bit(dtype: torch.dtype, row: Row, device: str) -> None:
    """One element off a vector's border, in one array or in all of them."""
    for numel in (1, 7, 1023, 1025, 3001):
        param = nn.Parameter(torch.randn(numel, device=device).to(dtype))
        param.grad = torch.randn(numel, device=device).to(dtype)
        (state,) = random_state(row, [param], **row.usual)
        arrays = {"param": param.detach(), "grad": param.grad}
        arrays |= {k: v for k, v in state.items() if isinstance(v, Tensor) and v.dim()}
        results = []
        for shifted in ((), *((name,) for name in arrays), tuple(arrays)):
            moved = {}
            for name, numbers in arrays.items():
                off = int(name in shifted)
                moved[name] = numbers.new_empty(numel + 1)[off:][:numel].copy_(numbers)
            p = nn.Parameter(moved["param"])
            p.grad = moved["grad"]
            optimizer = row.make([p], **row.usual)
            optimizer.state[p] = {k: moved.get(k, copy.deepcopy(v)) for k, v in state.items()}
            optimizer.step()
            results.append([p.detach(), row.state_of(optimizer, p)])
        for result in results[1:]:
            identical(result, results[0])


# ------------------------------------------------------------------ many parameters and groups


@every
@pytest.mark.parametrize("count", [2, 100, 1500])
def test_many_tensors_in_groups_with_options_of_their_own(count: int, row: Row) -> None:
    shapes = [(1 + i % 37,) for i in range(count)]
    params = parameters(shapes) + parameters(shapes[:5], BF16) + parameters(shapes[:5], F64)
    params += parameters([0, (0, 3), ()])
    twins = clones(params)

    def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [
            {"params": params[i::7], **row.options[i * 5 % len(row.options)], "lr": 0.01 * (1 + i)}
            for i in range(min(7, count))
        ]

    ours, theirs = row.make(groups(params)), row.native(groups(twins))
    step_both(ours, theirs, 2)
    assert_same(ours, theirs)


@every
def test_gradients_that_come_late_and_groups_that_are_added(row: Row) -> None:
    params = parameters([100, 33, 1025, 5])
    twins = clones(params)
    ours, theirs = row.make(params[:3], **row.usual), row.native(twins[:3], **row.usual)
    for number, having_grads in enumerate(([0], [0, 2], [1, 3], [0, 1, 2, 3], [], [2])):
        if number == 2:
            ours.add_param_group({"params": params[3:], "lr": 0.2})
            theirs.add_param_group({"params": twins[3:], "lr": 0.2})
        for i, (p, q) in enumerate(zip(params, twins, strict=True)):
            grad = torch.randn_like(p) if i in having_grads else None
            p.grad, q.grad = grad, grad if grad is None else grad.clone()
        before = [p.detach().clone() for p in params]
        ours.step()
        theirs.step()
        for i in {0, 1, 2, 3} - set(having_grads):
            identical(params[i], before[i])
        assert_same(ours, theirs)


@every
@pytest.mark.parametrize("storage", [{}, {"master_weights": True}, {"stochastic_rounding": True}])
@pytest.mark.parametrize("count", [1, 100, 2000])
def test_one_launch(
    count: int, storage: dict[str, Any], row: Row, launches: Any, device: str
) -> None:
    params = parameters([(1 + i % 37,) for i in range(count)], BF16, device)
    params += parameters([4097, 5], F32, device) + parameters([4097, 5], F64, device)
    optimizer = row.make(params, **row.usual, **storage)
    for _ in range(2):
        set_random_grads(params)
        with launches() as kernels:
            optimizer.step()
        assert len(kernels) == 1 and "optim::" in kernels[0], kernels


# ------------------------------------------------------------------ what the kernels do not cover


def _strided(dtype: torch.dtype = F32) -> nn.Parameter:
    return nn.Parameter(torch.randn(200, 3).to(dtype)[::2])


def _dtype_of_its_own(param: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    param.grad_dtype = None
    param.grad = torch.randn(param.shape).to(dtype)
    return param


def _sparse() -> nn.Parameter:
    embedding = nn.Embedding(50, 7, sparse=True)
    embedding(torch.randint(50, (9,))).square().sum().backward()
    return embedding.weight


UNCOVERED: dict[str, Callable[[], nn.Parameter]] = {
    "strided": _strided,
    "strided bfloat16": lambda: _strided(BF16),
    "complex": lambda: nn.Parameter(torch.randn(33, dtype=torch.complex64)),
    "sparse": _sparse,
    "float32 gradient": lambda: _dtype_of_its_own(nn.Parameter(torch.randn(33).bfloat16()), F32),
    "bfloat16 gradient": lambda: _dtype_of_its_own(nn.Parameter(torch.randn(33)), BF16),
}


@few_combinations
@pytest.mark.parametrize("kind", UNCOVERED)
def test_what_is_not_covered_is_torchs(kind: str, row: Row, options: dict[str, Any]) -> None:
    """With covered parameters beside it: the same numbers as torch, or the same error."""
    special, twin = (UNCOVERED[kind]() for _ in range(2))
    with torch.no_grad():
        twin.copy_(special)
    grads = [special.grad if special.grad is not None else torch.randn_like(special)]
    for _ in range(2):
        grads.append(grads[0] * 0.5)
    fusedstep.reset_stats()
    outcomes: list[Any] = []
    covered = parameters([100, 33])
    with_grads = [[torch.randn_like(p) for p in covered] for _ in grads]
    for make, last in ((row.make, special), (row.native, twin)):
        mine = [*clones(covered), last]
        last.grad_dtype = None
        optimizer = make(mine, **options)
        try:
            for grad, others in zip(grads, with_grads, strict=True):
                for p, g in zip(mine, [*others, grad], strict=True):
                    p.grad = g.clone()
                optimizer.step()
        except (RuntimeError, ValueError) as error:
            outcomes.append((type(error), str(error)))
        else:
            outcomes.append((mine, optimizer))
    (ours, our_optimizer), (theirs, their_optimizer) = outcomes
    if isinstance(theirs, type):
        assert ours is theirs and our_optimizer == their_optimizer
    else:
        assert_same(our_optimizer, their_optimizer)
        assert fusedstep.stats()[row.name].fallbacks


@pytest.fixture
def mesh() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.usefixtures("cpu_only", "only_kernels")
@every
def test_distributed_tensors(row: Row, mesh: Any) -> None:
    wholes = parameters([(16, 3), (7,)])
    params = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in wholes]
    ours, theirs = row.make(params, **row.usual), row.native(wholes, **row.usual)
    for _ in range(3):
        set_random_grads(wholes)
        for p, whole in zip(params, wholes, strict=True):
            p.grad = distribute_tensor(whole.grad, mesh, [Shard(0)])
        ours.step()
        theirs.step()
    for p, whole in zip(params, wholes, strict=True):
        identical(p.detach().full_tensor(), whole.detach())
        for key, value in row.state_of(theirs, whole).items():
            kept = ours.state[p][key]
            if value.dim():
                assert isinstance(kept, DTensor) and kept.placements == p.placements
                kept = kept.full_tensor()
            identical(kept, value)


# ------------------------------------------------------------------ errors


@every
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_not_finite_changes_nothing(
    bad: float, steps_before: int, row: Row
) -> None:
    params = parameters([100, 33])
    optimizer = row.make([{"params": params[:1]}, {"params": params[1:]}], **row.usual)
    for _ in range(steps_before):
        set_random_grads(params)
        optimizer.step()
    set_random_grads(params)
    group = optimizer.param_groups[1]
    for key in fusedstep._C.optimizers[row.name].numbers:
        kept = group.get(key)
        if kept is None:
            continue
        spoilt = [bad] if not isinstance(kept, tuple) else [(bad, *kept[1:]), (*kept[:-1], bad)]
        for value in spoilt:
            group[key] = value
            refuses(optimizer, params, ValueError, f"Invalid .*: {bad}")
        with pytest.raises(ValueError, match="Invalid"):
            optimizer.add_param_group({"params": parameters([3]), key: spoilt[0]})
        group[key] = kept
    optimizer.step()


@every
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_state_that_does_not_fit_changes_nothing(steps_before: int, row: Row) -> None:
    params = parameters([100, 33, 7])
    optimizer = row.make(params, **row.usual)
    for _ in range(steps_before):
        set_random_grads(params)
        optimizer.step()
    set_random_grads(params)
    (state,) = random_state(row, params[2:], **row.usual)
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim():
            optimizer.state[params[2]] = {**state, key: torch.zeros(9)}
            refuses(optimizer, params, RuntimeError, rf"{key} of shape \[9\]")


# ------------------------------------------------------------------ the life of an optimizer


@every
def test_class_repr_and_defaults(row: Row) -> None:
    params = parameters([3])
    ours, theirs = row.make(params, **row.usual), row.torchs(params, lr=row.lr, **row.usual)
    assert isinstance(ours, row.torchs) and type(ours).__name__ == row.name
    assert repr(ours) == repr(theirs)
    assert ours.defaults == theirs.defaults
    assert ours.param_groups == theirs.param_groups
    assert ours.state_dict() == theirs.state_dict()


@every
def test_signature_is_torchs_and_ours(row: Row) -> None:
    """Torch's arguments in torch's order with torch's defaults, then what all of ours add."""
    added = ["master_weights", "stochastic_rounding", "seed", "in_backward"]
    ours, theirs = (
        {n: (p.kind, p.default) for n, p in inspect.signature(cls.__init__).parameters.items()}
        for cls in (row.ours, row.torchs)
    )
    assert list(ours)[-len(added) :] == added
    assert {n: v for n, v in ours.items() if n not in added} == theirs
    assert list(ours)[: -len(added)] == list(theirs)


@every
def test_closures_and_hooks(row: Row) -> None:
    models = pair()
    batch = torch.randn(7, 17)
    seen: list[list[Any]] = [[], []]
    for model, make, events in zip(models, (row.make, row.native), seen, strict=True):
        optimizer = make(model.parameters(), **row.usual)
        optimizer.register_step_pre_hook(lambda *_, e=events: e.append("pre"))
        optimizer.register_step_post_hook(lambda *_, e=events: e.append("post"))

        def closure(model: nn.Module = model, optimizer: Any = optimizer) -> Tensor:
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss: Tensor = model(batch).square().mean()
            loss.backward()
            return loss

        with torch.no_grad():
            events += [optimizer.step(closure), optimizer.step(closure=closure)]
        assert optimizer.step() is None
    assert [e for e in seen[0] if isinstance(e, str)] == ["pre", "post"] * 3
    torch.testing.assert_close(*([e.detach() for e in s if isinstance(e, Tensor)] for s in seen))
    torch.testing.assert_close(*(list(model.parameters()) for model in models))


@every
def test_checkpoints_move_both_ways(row: Row) -> None:
    """Mid-training, from torch's class to ours and back, through a file."""
    for start, end in ((row.make, row.native), (row.native, row.make), (row.make, row.make)):
        params = parameters([100, 33, (4, 5)])
        twins = clones(params)
        first, straight_on = start(params, **row.usual), row.native(twins, **row.usual)
        step_both(first, straight_on, 3)
        saved = through_a_file(first.state_dict())
        resumed = end(clones(params), lr=7.0)
        resumed.load_state_dict(saved)
        step_both(resumed, straight_on, 3)
        assert_same(resumed, straight_on)


@every
@pytest.mark.parametrize(
    "options", [{}, {"master_weights": True}, {"stochastic_rounding": True, "seed": 7}], ids=name_of
)
@pytest.mark.parametrize("copied", [*COPIES, "state_dict"])
def test_copies_mid_training_go_on_to_the_bit(
    copied: str, options: dict[str, Any], row: Row
) -> None:
    params = parameters([100, 33], BF16) + parameters([17], F32)
    optimizer = row.make(params, **row.usual, **options)
    for _ in range(2):
        set_random_grads(params)
        optimizer.step()
    if copied == "state_dict":
        duplicate = row.make(clones(params), lr=7.0, **options)
        duplicate.load_state_dict(through_a_file(optimizer.state_dict()))
    else:
        duplicate = COPIES[copied](optimizer)
    assert type(duplicate) is row.ours and repr(duplicate) == repr(optimizer)
    twins = duplicate.param_groups[0]["params"]
    assert not {p.data_ptr() for p in params} & {p.data_ptr() for p in twins}
    for _ in range(2):
        set_random_grads(params, twins)
        optimizer.step()
        duplicate.step()
    identical(params, twins)
    identical(optimizer.state_dict()["state"], duplicate.state_dict()["state"])


@pytest.mark.filterwarnings("error")
@every
@pytest.mark.parametrize("name", ["StepLR", "CosineAnnealingLR", "SequentialLR"])
def test_schedulers(name: str, row: Row) -> None:
    params = parameters([100, 33])
    twins = clones(params)
    optimizers = [row.make(params, **row.usual), row.native(twins, **row.usual)]
    schedulers = [SCHEDULERS[name](optimizer) for optimizer in optimizers]
    for _ in range(5):
        step_both(*optimizers)
        for scheduler in schedulers:
            scheduler.step()
    assert optimizers[0].param_groups[0]["lr"] == optimizers[1].param_groups[0]["lr"] != row.lr
    assert_same(*optimizers)


@every
@pytest.mark.parametrize("implementation", [{"foreach": True}, {"fused": True}], ids=name_of)
def test_choices_of_implementation_are_accepted(implementation: dict[str, Any], row: Row) -> None:
    params = parameters([100, 33]) + parameters([1000], BF16)
    twins = clones(params)
    ours, theirs = row.make(params, **row.usual, **implementation), row.native(twins, **row.usual)
    step_both(ours, theirs, 2)
    assert_same(ours, theirs)


@few_combinations
def test_autograd_notices_the_update_and_gradients_stay(row: Row, options: dict[str, Any]) -> None:
    (p,) = params = parameters([33])
    optimizer = row.make(params, **options)
    for _ in range(2):
        y = (p * p).sum()
        set_random_grads(params)
        grad, kept = p.grad, p.grad.clone()
        held = [v for v in row.state_of(optimizer, p).values() if isinstance(v, Tensor)]
        places = [v.data_ptr() for v in held]
        versions = [t._version for t in (p, *held)]
        optimizer.step()
        now = [v for v in row.state_of(optimizer, p).values() if isinstance(v, Tensor)]
        assert p.grad is grad
        identical(p.grad, kept)
        assert all(t._version > v for t, v in zip((p, *held), versions, strict=True))
        assert not places or [v.data_ptr() for v in now] == places, "the state was replaced"
        assert not any(v.requires_grad for v in now)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


@every
def test_profiler_sees_the_step(row: Row) -> None:
    params = parameters([33])
    optimizer = row.make(params)
    set_random_grads(params)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = {event.name for event in profile.events()}
    expected = {f"Optimizer.{m}#{row.name}.{m}" for m in ("step", "zero_grad")}
    assert expected <= names


@every
def test_compiled_step(row: Row) -> None:
    params = parameters([100, 33])
    twins = clones(params)
    compiled, eager = row.make(params, **row.usual), row.make(twins, **row.usual)
    step = torch.compile(compiled.step, backend="eager")
    for _ in range(3):
        set_random_grads(params, twins)
        step()
        eager.step()
    identical(params, twins)


@every
def test_threads_of_a_program_may_step_their_own(row: Row) -> None:
    sets = [parameters([100, 1000, 33]) for _ in range(6)]
    twins = [clones(params) for params in sets]
    ours = [row.make(params, **row.usual) for params in sets]
    theirs = [row.native(params, **row.usual) for params in twins]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            for params, twin in zip(sets, twins, strict=True):
                set_random_grads(params, twin)
            list(pool.map(lambda optimizer: optimizer.step(), ours))
            for optimizer in theirs:
                optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b)


@every
def test_patched_torch_steps_by_our_kernels(row: Row) -> None:
    if not row.is_in_torch:
        pytest.skip("torch has no such optimizer")
    for options in row.few:
        params = parameters([100, 33])
        twins = clones(params)
        patched, ours = row.torchs(params, lr=row.lr, **options), row.make(twins, **options)
        fusedstep.reset_stats()
        for _ in range(2):
            set_random_grads(params, twins)
            with fusedstep.patched():
                patched.step()
            ours.step()
        assert fusedstep.stats()[row.name].fused == 2 * 2 * len(params)
        identical(params, twins)
        identical(patched.state_dict()["state"], ours.state_dict()["state"])


# ------------------------------------------------------------------ loss scaling


@every
@pytest.mark.parametrize("overflow_at", [set(), {0}, {0, 1, 4}], ids=str)
@pytest.mark.parametrize("fused", [None, True], ids=["default", "fused"])
def test_grad_scaler_loop(fused: bool | None, overflow_at: set[int], row: Row) -> None:
    models = pair()
    ours = row.make(models[0].parameters(), **row.usual, fused=fused)
    theirs = row.native(models[1].parameters(), **row.usual)
    batches = [torch.randn(5, 17) for _ in range(6)]
    scales = [
        scaled_training(optimizer, model, batches, overflow_at)
        for optimizer, model in zip((ours, theirs), models, strict=True)
    ]
    assert scales[0] == scales[1]
    assert_same(ours, theirs)


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("overflows", [(1, 0, 0), (0, 1, 0, 0)], ids=str)
def test_grad_scale_and_found_inf(
    overflows: tuple[int, ...], dtype: torch.dtype, row: Row, device: str
) -> None:
    """What GradScaler sets on an optimizer that says it can unscale for itself."""
    params = parameters([100, 1025], dtype, device)
    twins = clones(params)
    ours, theirs = row.make(params, **row.usual, fused=True), row.native(twins, **row.usual)
    assert ours._step_supports_amp_scaling
    for overflow in overflows:
        set_random_grads(params, twins)
        for p in params:
            p.grad.mul_(8)
        before = values(clones(params))
        ours.grad_scale = torch.tensor(8.0, device=device)
        ours.found_inf = torch.tensor(float(overflow), device=device)
        ours.step()
        if overflow:
            identical(values(params), before)
        else:
            theirs.step()
            identical([p.grad for p in params], [q.grad for q in twins])
            assert_same(ours, theirs)


# ------------------------------------------------------------------ how a parameter is kept


@pytest.mark.level
@pytest.mark.usefixtures("only_kernels")
@every_combination
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_master_weights_are_those_of_float32_training(
    dtype: torch.dtype,
    row: Row,
    options: dict[str, Any],
    device: str,
    check: Callable[[Any, Any], None],
) -> None:
    params = parameters(SIZES, dtype, device)
    twins = in_float32(params)
    ours, theirs = row.make(params, **options, master_weights=True), row.native(twins, **options)
    for _ in range(4):
        set_random_halves(params, twins)
        ours.step()
        theirs.step()
    for p, q in zip(params, twins, strict=True):
        master = ours.state[p]["master_param"]
        check(master, q.detach())
        identical(p.detach(), master.to(dtype))
        check(row.state_of(ours, p), row.state_of(theirs, q))


@pytest.mark.level
@pytest.mark.usefixtures("only_kernels")
@few_combinations
def test_stochastic_rounding_is_of_the_float32_step(
    row: Row, options: dict[str, Any], device: str, on_cuda: bool
) -> None:
    """From the stored numbers: one of the neighbours of what torch computes in float32, the one
    that the documented function draws."""
    params = parameters(SIZES, BF16, device)
    ours = row.make(params, **options, stochastic_rounding=True, seed=123)
    same_bits = not on_cuda and fusedstep._C.cpu_capability() != "default"
    for step in range(3):
        twins = in_float32(params)
        theirs = row.native(twins, **options)
        for p, twin in zip(params, twins, strict=True):
            theirs.state[twin] = in_dtype(row.state_of(ours, p), p, F32)
        set_random_halves(params, twins)
        ours.step()
        theirs.step()
        for place, (p, twin) in enumerate(zip(params, twins, strict=True)):
            exact = twin.detach()
            random = reference.random_bits(123, place, step, range(p.numel()))
            if same_bits:
                identical(p.detach(), reference.stochastically_rounded(exact, random))
            unit = torch.finfo(BF16).eps * exact.abs().clamp(min=2.0**-126)
            assert ((p.detach().float() - exact).abs() <= unit * 1.001).all()


# ------------------------------------------------------------------ updates in backward


@few_combinations
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_updates_in_backward_are_the_same_bits(
    dtype: torch.dtype, row: Row, options: dict[str, Any]
) -> None:
    kinds: list[dict[str, Any]] = [{}]
    if dtype is BF16:
        kinds += [{"master_weights": True}, {"stochastic_rounding": True}]
    for kind in kinds:
        models = pair(dtype)
        optimizers = [
            row.make(model.parameters(), **options, **kind, in_backward=in_backward)
            for model, in_backward in zip(models, (True, False), strict=True)
        ]
        for _ in range(3):
            batch = torch.randn(7, 17, dtype=dtype)
            for model, optimizer in zip(models, optimizers, strict=True):
                optimizer.zero_grad()
                model(batch).square().mean().backward()
                if optimizer.in_backward:
                    assert all(p.grad is None for p in model.parameters())
                optimizer.step()
        identical(*(list(model.parameters()) for model in models))
        identical(*(optimizer.state_dict()["state"] for optimizer in optimizers))


@every
def test_one_launch_for_each_parameter_in_backward(row: Row, launches: Any) -> None:
    model = pair()[0]
    _optimizer = row.make(model.parameters(), **row.usual, in_backward=True)
    loss = model(torch.randn(7, 17)).square().mean()
    with launches() as kernels:
        loss.backward()
    assert len([kernel for kernel in kernels if "optim::" in kernel]) == 6
