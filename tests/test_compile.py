"""Programs that torch traces: torch.compile, AOT and compiled autograd, checkpoints.

Most compile with the backend "aot_eager", which traces and differentiates as the default one does
and runs the graph without generating code: that takes a second on every graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as native
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._inductor.utils import fresh_cache
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import fusedstep
import fusedstep.functional as F
from numerics import BF16, F16, F32, F64, REDUCTIONS, TRANSFORMS, OperatorsSeen, identical

CLASSES = 7
Make = Callable[[Tensor], Tensor]


def indices(logits: Tensor) -> Tensor:
    return torch.randint(CLASSES, (*logits.shape[:1], *logits.shape[2:]), device=logits.device)


def probabilities(logits: Tensor) -> Tensor:
    return torch.rand_like(logits)


# The function, its target and its options.
LOSSES: dict[str, tuple[str, Make, dict[str, Any]]] = {
    "cross_entropy": ("cross_entropy", indices, {}),
    "smoothed": ("cross_entropy", indices, {"label_smoothing": 0.1, "ignore_index": 2}),
    "probabilities": ("cross_entropy", probabilities, {}),
    "l1": ("l1_loss", torch.randn_like, {}),
    "mse": ("mse_loss", torch.randn_like, {}),
    "smooth_l1": ("smooth_l1_loss", torch.randn_like, {"beta": 0.5}),
    "huber": ("huber_loss", torch.randn_like, {"delta": 0.5}),
    "bce": ("binary_cross_entropy_with_logits", probabilities, {}),
}


def test_every_loss_that_torch_has_is_in_the_table() -> None:
    assert {function for function, _, _ in LOSSES.values()} == F.stand_ins.keys()


def pair(name: str, **options: Any) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """A loss of the table, ours and torch's."""
    function, _, own = LOSSES[name]
    options = {**own, **options}
    return partial(getattr(F, function), **options), partial(getattr(native, function), **options)


def draw(name: str, shape: tuple[int, ...] = (9, CLASSES), **kind: Any) -> tuple[Tensor, Tensor]:
    logits = torch.randn(shape, **kind)
    target = LOSSES[name][1](logits)
    return logits, target


def operators(graph: torch.fx.Graph) -> list[str]:
    """Our operators in a graph, by name."""
    names = (str(node.target) for node in graph.nodes if node.op == "call_function")
    return [name.removesuffix(".default") for name in names if name.startswith("fusedstep")]


def loss_and_grad(loss: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient for a grad_output that differs from element to element."""
    leaf = x.detach().requires_grad_()
    result = loss(leaf)
    grad_output = torch.linspace(0.3, 1.7, result.numel(), device=x.device).to(result.dtype)
    (grad,) = torch.autograd.grad(result, leaf, grad_output.view_as(result))
    return result.detach(), grad


@pytest.fixture(autouse=True)
def compile_anew() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


# ------------------------------------------------------------------ losses in one graph


@pytest.mark.parametrize("name", LOSSES)
def test_one_graph_for_every_size(name: str, device: str) -> None:
    """Forward and backward, with our operator in them, traced once for any number of rows."""
    ours, theirs = zip(*(pair(name, reduction=r) for r in REDUCTIONS), strict=True)
    backend = CompileCounterWithBackend("aot_eager")

    def losses(functions: tuple[Callable[..., Tensor], ...], x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([function(2 * x, t).flatten() for function in functions])

    compiled = torch.compile(partial(losses, ours), backend=backend, fullgraph=True, dynamic=True)
    for rows in (9, 64, 33):
        x, t = draw(name, (rows, CLASSES), device=device)
        actual = loss_and_grad(lambda x, t=t: compiled(x, t), x)
        torch.testing.assert_close(actual, loss_and_grad(lambda x, t=t: losses(theirs, x, t), x))
    assert counters["stats"]["unique_graphs"] == 1
    assert len(operators(backend.graphs[-1].graph)) == len(REDUCTIONS)


BCE_WEIGHTS: list[dict[str, tuple[int, ...]]] = [
    {"weight": (CLASSES,)},
    {"weight": (9, 1), "pos_weight": (CLASSES,)},
    {"weight": (), "pos_weight": (9, CLASSES)},
]


@pytest.mark.parametrize("shapes", BCE_WEIGHTS, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights_of_bce_in_a_graph(
    shapes: dict[str, tuple[int, ...]], reduction: str, device: str
) -> None:
    """Weights of every shape that expands, as inputs of the graph, for any number of rows."""
    backend = CompileCounterWithBackend("aot_eager")
    function = partial(F.binary_cross_entropy_with_logits, reduction=reduction)
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)
    for rows in (9, 64, 33):
        weights = {
            name: torch.rand([rows if size == 9 else size for size in shape], device=device)
            for name, shape in shapes.items()
        }
        x, t = draw("bce", (rows, CLASSES), device=device)
        actual = loss_and_grad(lambda x, t=t, w=weights: compiled(x, t, **w), x)
        torch.testing.assert_close(
            actual, loss_and_grad(lambda x, t=t, w=weights: function(x, t, **w), x)
        )
    assert counters["stats"]["unique_graphs"] == 1
    assert operators(backend.graphs[-1].graph) == ["fusedstep.pointwise_loss"]

    operands = (
        *draw("bce", device=device),
        *(torch.rand(s, device=device) for s in shapes.values()),
    )

    def step(x: Tensor, t: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return loss_and_grad(lambda x: function(x, t, **dict(zip(shapes, weights, strict=True))), x)

    traced = make_fx(step, tracing_mode="symbolic")(*operands)
    names = ["fusedstep.pointwise_loss_forward", "fusedstep.pointwise_loss_backward"]
    assert operators(traced.graph) == names[: 2 if reduction == "none" else 1]
    torch.testing.assert_close(traced(*operands), step(*operands))


@pytest.mark.parametrize("dtype", [BF16, F16, F64], ids=str)
@pytest.mark.parametrize("name", ["smoothed", "huber"])
def test_one_graph_in_every_dtype(name: str, dtype: torch.dtype, device: str) -> None:
    """16 bits are recomputed in backward: a compiled graph rounds as an eager call does."""
    ours, _ = pair(name)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x, t = draw(name, device=device, dtype=dtype)
    actual = loss_and_grad(lambda x: compiled(x, t), x)
    identical(actual, loss_and_grad(lambda x: ours(x, t), x))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_autocast_inside_and_around_a_graph(dtype: torch.dtype, device: str) -> None:
    net = nn.Linear(11, CLASSES)
    x, t = torch.randn(9, 11), torch.randint(CLASSES, (9,))

    def inside(x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(device, dtype=dtype):
            return F.cross_entropy(net(x), t)

    def around(x: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(net(x), t)

    results = []
    for function in (
        inside,
        torch.compile(inside, backend="aot_eager", fullgraph=True),
        torch.compile(around, backend="aot_eager", fullgraph=True),
    ):
        net.zero_grad()
        with torch.autocast(device, dtype=dtype):
            loss = function(x, t)
        assert loss.dtype == F32
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in net.parameters())])
    identical(results[1], results[0])
    identical(results[2], results[0])


@pytest.mark.parametrize("options", [{"size_average": False}, {"reduce": False}], ids=str)
@pytest.mark.parametrize("name", ["cross_entropy", "l1", "bce"])
@pytest.mark.filterwarnings("ignore:size_average and reduce:UserWarning")
def test_a_reduction_by_its_old_arguments(name: str, options: dict[str, bool]) -> None:
    ours, theirs = pair(name, **options)
    backend = CompileCounterWithBackend("eager")
    x, t = draw(name)
    actual = torch.compile(ours, backend=backend, fullgraph=True)(x, t)
    torch.testing.assert_close(actual, theirs(x, t))
    assert len(operators(backend.graphs[-1].graph)) == 1


def test_what_the_kernels_do_not_cover_is_in_the_graph_as_torchs_own() -> None:
    x = torch.randn(9, CLASSES)
    # Broadcast, with torch's warning.
    compiled = torch.compile(lambda x: F.mse_loss(x, torch.ones(9, 1)), backend="aot_eager")
    with pytest.warns(UserWarning, match="broadcast"):
        actual = loss_and_grad(compiled, x)
    with pytest.warns(UserWarning, match="broadcast"):
        torch.testing.assert_close(
            actual, loss_and_grad(lambda x: native.mse_loss(x, torch.ones(9, 1)), x)
        )
    # A weight of another dtype.
    weight = torch.rand(CLASSES, dtype=F64)
    results = []
    for function in (
        F.binary_cross_entropy_with_logits,
        native.binary_cross_entropy_with_logits,
    ):
        compiled = torch.compile(
            lambda x, f=function: f(x, x.sigmoid().detach(), weight), backend="aot_eager"
        )
        results.append(loss_and_grad(compiled, x))
    torch.testing.assert_close(*results)
    # A gradient to the target.
    results = []
    for function in (F.cross_entropy, native.cross_entropy):
        compiled = torch.compile(lambda t, f=function: f(x, t), backend="aot_eager", fullgraph=True)
        results.append(loss_and_grad(compiled, x.softmax(1)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("transform", ["grad", "vmap of grad", "jvp", "hessian"])
def test_function_transforms_inside_a_graph(transform: str) -> None:
    x, t = draw("smoothed", dtype=F64)
    results = [
        torch.compile(
            lambda x, f=function: TRANSFORMS[transform](lambda y: f(y, t), x), backend="aot_eager"
        )(x)
        for function in pair("smoothed")
    ]
    torch.testing.assert_close(*results)


def test_generated_code() -> None:
    """The default backend: a network, two losses and their backward in one graph."""
    net = nn.Sequential(nn.Linear(11, 17), nn.ReLU(), nn.Linear(17, CLASSES))
    criterion, penalty = fusedstep.CrossEntropyLoss(label_smoothing=0.1), fusedstep.HuberLoss()

    def step(x: Tensor, t: Tensor) -> Tensor:
        logits = net(x)
        return criterion(logits, t) + 0.1 * penalty(logits, logits.detach().relu())

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for rows in (9, 33):
        x, t = torch.randn(rows, 11), torch.randint(CLASSES, (rows,))
        results = []
        for function in (compiled, step):
            net.zero_grad()
            loss = function(x, t)
            loss.backward()
            results.append([loss.detach(), *(p.grad for p in net.parameters())])
        torch.testing.assert_close(*results)
    assert counters["stats"]["unique_graphs"] == 1


def test_generated_code_calls_operators_that_it_was_not_told_of() -> None:
    """Forward and backward of both families, where nothing is called that has no lowering."""
    x, t = draw("cross_entropy")

    def losses(x: Tensor) -> Tensor:
        return F.cross_entropy(2 * x, t, reduction="none") + F.mse_loss(
            x, x.detach().sin(), reduction="none"
        ).sum(1)

    compiled = torch.compile(losses, fullgraph=True)
    with torch._inductor.config.patch(implicit_fallbacks=False, force_disable_caches=True):
        actual = loss_and_grad(compiled, x)
    torch.testing.assert_close(actual, loss_and_grad(losses, x))


def test_graphs_on_disk_are_kept_for_these_operators() -> None:
    """And are not found where an operator takes other arguments."""
    names = {
        name.removeprefix("fusedstep::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("fusedstep::")
    }
    assert names == set(fusedstep._fakes.OPERATORS)
    compiled = torch.compile(F.cross_entropy, fullgraph=True)
    x, t = draw("cross_entropy")
    hits = []
    with fresh_cache():
        for tag in ("", "", " of another schema"):
            torch._dynamo.reset()
            counters.clear()
            ours = torch.compiler.config.cache_key_tag
            with torch.compiler.config.patch(cache_key_tag=ours + tag):
                compiled(x, t)
            hits.append(counters["aot_autograd"]["autograd_cache_hit"])
    assert hits == [0, 1, 0] and "fusedstep" in ours


# ------------------------------------------------------------------ the optimizer


def breaks() -> int:
    return sum(counters["graph_break"].values())


Optimizers = tuple[type[torch.optim.Optimizer], type[torch.optim.Optimizer]]
BOTH: Optimizers = (fusedstep.SGD, torch.optim.SGD)
OPTIONS: list[dict[str, Any]] = [
    {"momentum": 0.9, "weight_decay": 0.01},
    {"foreach": False},
    {"fused": True, "momentum": 0.9},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_compiled_step_breaks_no_more_graphs_than_torchs(options: dict[str, Any]) -> None:
    batches = [(torch.randn(9, 11), torch.randint(CLASSES, (9,))) for _ in range(3)]
    start = nn.Sequential(nn.Linear(11, 100), nn.ReLU(), nn.Linear(100, CLASSES))
    found, nets = [], []
    for optimizer_class in BOTH:
        net = copy.deepcopy(start)
        optimizer = optimizer_class(net.parameters(), lr=0.1, **options)

        def step(x: Tensor, t: Tensor, net: nn.Module, optimizer: Any) -> None:
            optimizer.zero_grad()
            F.cross_entropy(net(x), t).backward()
            optimizer.step()

        counters.clear()
        compiled = torch.compile(step, backend="eager")
        for batch in batches:
            compiled(*batch, net, optimizer)
        found.append(breaks())
        torch._dynamo.reset()
        nets.append(net)
    ours, theirs = found
    assert 1 <= ours <= theirs
    torch.testing.assert_close(*(list(net.parameters()) for net in nets))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_compiled_optimizer_alone(options: dict[str, Any]) -> None:
    """The step itself runs as it is, so that a learning rate may change without a new graph."""
    params = [nn.Parameter(torch.randn(n)) for n in (100, 33)]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    ours = fusedstep.SGD(params, lr=0.1, **options)
    theirs = torch.optim.SGD(twins, lr=0.1, **{**options, "fused": None, "foreach": False})
    counter = CompileCounter()
    step = torch.compile(ours.step, backend=counter)
    zero_grad = torch.compile(ours.zero_grad, backend=counter)
    for i in range(12):
        for p, q in zip(params, twins, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.param_groups[0]["lr"] = theirs.param_groups[0]["lr"] = 0.1 * 0.7**i
        step()
        theirs.step()
        identical(params, twins)
        zero_grad()
        assert all(p.grad is None for p in params)
    assert (counter.frame_count, breaks()) == (0, 0)


def test_hooks_and_closures_of_a_compiled_step() -> None:
    """A closure that is compiled itself is traced as ever."""
    (p,) = params = [nn.Parameter(torch.randn(100))]
    twin = nn.Parameter(p.detach().clone())
    ours, theirs = (cls([q], lr=0.1, momentum=0.9) for cls, q in zip(BOTH, (p, twin), strict=True))
    calls: list[str] = []
    ours.register_step_pre_hook(lambda *_: calls.append("before"))
    ours.register_step_post_hook(lambda *_: calls.append("after"))
    counter = CompileCounterWithBackend("aot_eager")
    loss = torch.compile(lambda: p.square().sum(), backend=counter)

    def closure() -> Tensor:
        ours.zero_grad()
        value = loss()
        value.backward()
        calls.append("closure")
        return value

    compiled = torch.compile(lambda: ours.step(closure), backend="aot_eager")
    for _ in range(3):
        theirs.zero_grad()
        expected = twin.square().sum()
        expected.backward()
        torch.testing.assert_close(compiled(), expected)
        theirs.step()
        torch.testing.assert_close(params, [twin])
    assert calls == ["before", "closure", "after"] * 3
    assert counter.frame_count == 1


def test_a_subclass_with_a_step_of_its_own_is_compiled_around_ours() -> None:
    class Counting(fusedstep.SGD):
        count = 0

        def step(self, closure: Any = None) -> Any:
            self.count += 1
            return super().step(closure)

    p = nn.Parameter(torch.randn(100))
    before = p.detach().clone()
    optimizer = Counting([p], lr=0.5)
    step = torch.compile(optimizer.step, backend="aot_eager")
    for _ in range(2):
        p.grad = torch.ones_like(p)
        step()
    assert optimizer.count == 2
    identical(p.detach(), before - 0.5 - 0.5)


# ------------------------------------------------------------------ graphs by other means


def beneath(name: str) -> str:
    """What the operators beneath a loss of the table begin with."""
    room = "cross_entropy" if LOSSES[name][0] == "cross_entropy" else "pointwise_loss"
    return f"fusedstep.{room}"


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name", LOSSES)
def test_traced_with_gradient(name: str, mode: str, device: str) -> None:
    """make_fx, which shows the operators beneath and no Python function."""
    for reduction in REDUCTIONS:
        ours, _ = pair(name, reduction=reduction)

        def step(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            return loss_and_grad(lambda x: ours(x, t), x)  # noqa: B023

        traced = make_fx(step, tracing_mode=mode)(*draw(name, device=device))
        names = [f"{beneath(name)}_forward", f"{beneath(name)}_backward"]
        assert operators(traced.graph) == names[: 2 if reduction == "none" else 1]
        numbers = draw(name, device=device)
        torch.testing.assert_close(traced(*numbers), step(*numbers))


@pytest.mark.parametrize("name", LOSSES)
def test_aot_autograd(name: str, device: str) -> None:
    """By itself, without torch.compile's tracing of Python in front of it."""
    seen: list[str] = []

    def compiler(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        seen.extend(operators(module.graph))
        return make_boxed_func(module.forward)

    ours, theirs = pair(name, reduction="none")
    x, t = draw(name, device=device)
    compiled = aot_function(lambda x, t: ours(x * 2, t), compiler)
    actual = loss_and_grad(lambda x: compiled(x, t), x)
    torch.testing.assert_close(actual, loss_and_grad(lambda x: theirs(x * 2, t), x))
    assert seen == [f"{beneath(name)}_forward", f"{beneath(name)}_backward"]


# ------------------------------------------------------------------ compiled autograd


def test_compiled_autograd_by_its_switch() -> None:
    net = nn.Linear(11, CLASSES)
    x, t = torch.randn(9, 11), torch.randint(CLASSES, (9,))

    def step() -> None:
        F.cross_entropy(net(x), t).backward()

    step()
    expected = [p.grad for p in net.parameters()]
    net.zero_grad()
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(step, backend="aot_eager")()
    torch.testing.assert_close([p.grad for p in net.parameters()], expected)


def compiled_backward(losses: Any, inputs: list[Tensor], grad_outputs: Any, **how: Any) -> Any:
    """The backward pass of eager losses, traced and run as one graph."""
    counter = CompileCounterWithBackend("aot_eager")
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend=counter, fullgraph=True)):
        grads = torch.autograd.grad(losses, inputs, grad_outputs, **how)
    assert counter.frame_count == 1
    return grads


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_backward_of_an_eager_loss_in_a_graph(name: str, dtype: torch.dtype, device: str) -> None:
    x, t = draw(name, device=device, dtype=dtype)
    x.requires_grad_()
    losses = [pair(name, reduction=reduction)[0](x, t) for reduction in REDUCTIONS]
    grad_outputs = [torch.randn_like(loss) for loss in losses]
    expected = torch.autograd.grad(losses, x, grad_outputs, retain_graph=True)
    identical(compiled_backward(losses, [x], grad_outputs), expected)


@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1)], ids=str)
def test_gradients_of_input_and_target_in_a_graph(wanted: tuple[int, ...], device: str) -> None:
    operands = [torch.randn(9, 5, device=device, requires_grad=True) for _ in range(2)]
    inputs = [operands[i] for i in wanted]
    loss = F.huber_loss(*operands)
    grad_output = torch.tensor(0.7, device=device)
    expected = torch.autograd.grad(loss, inputs, grad_output, retain_graph=True)
    identical(compiled_backward(loss, inputs, grad_output), expected)


def test_weights_and_saved_tensor_hooks_in_a_graph(device: str) -> None:
    x, t = draw("cross_entropy", device=device)
    x.requires_grad_()
    weight = torch.rand(CLASSES, device=device)
    options: dict[str, Any] = {"weight": weight, "reduction": "none"}
    grad_output = torch.randn(9, device=device)
    (expected,) = torch.autograd.grad(F.cross_entropy(x, t, **options), x, grad_output)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t + 1, lambda t: t - 1):
        loss = F.cross_entropy(x, t, **options)
    (grad,) = compiled_backward(loss, [x], grad_output)
    torch.testing.assert_close(grad, expected)


def test_a_graph_of_backward_serves_the_next_numbers_and_another_loss_gets_its_own(
    device: str,
) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiler = torch.compile(backend=counter, fullgraph=True)
    for graphs, options in ((1, {}), (2, {"label_smoothing": 0.3}), (3, {"ignore_index": 1})):
        for _ in range(3):
            x, t = draw("cross_entropy", device=device)
            x.requires_grad_()
            loss = F.cross_entropy(x, t, reduction="none", **options)
            grad_output = torch.randn_like(loss)
            expected = torch.autograd.grad(loss, x, grad_output, retain_graph=True)
            with torch._dynamo.compiled_autograd._enable(compiler):
                identical(torch.autograd.grad(loss, x, grad_output), expected)
        assert counter.frame_count == graphs


def test_a_second_backward_and_a_freed_graph(device: str) -> None:
    x, t = draw("mse", device=device)
    x.requires_grad_()
    loss = F.mse_loss(x, t)
    grad_output = torch.tensor(0.7, device=device)
    first = compiled_backward(loss, [x], grad_output, retain_graph=True)
    torch._dynamo.reset()
    identical(compiled_backward(loss, [x], grad_output), first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, x, grad_output)


# ------------------------------------------------------------------ checkpoints


def calls_of(operator: Any, work: Callable[[], Any]) -> int:
    """How often work calls an operator."""
    with OperatorsSeen() as mode:
        work()
    return mode.seen.count(operator)


FORWARD = {
    "cross_entropy": torch.ops.fusedstep.cross_entropy_forward.default,
    "bce": torch.ops.fusedstep.pointwise_loss_forward.default,
}


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", FORWARD)
def test_selective_checkpoint(name: str, reduction: str, saved: bool, device: str) -> None:
    """The result of our operator is kept, or made again in the backward pass, as a policy says."""
    ours, _ = pair(name, reduction=reduction)
    operator = FORWARD[name]

    def policy(_: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = saved and func is operator
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    x, t = draw(name, device=device)
    x.requires_grad_()
    expected_loss = ours(x.sin(), t)
    grad_output = torch.randn_like(expected_loss)
    (expected,) = torch.autograd.grad(expected_loss, x, grad_output)
    losses: list[Tensor] = []

    def forward() -> None:
        context = partial(create_selective_checkpoint_contexts, policy)
        losses.append(
            checkpoint(lambda x: ours(x.sin(), t), x, use_reentrant=False, context_fn=context)
        )

    assert calls_of(operator, forward) == 1
    identical(losses[0], expected_loss)
    assert calls_of(operator, lambda: losses[0].backward(grad_output)) == (0 if saved else 1)
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("name", ["smoothed", "mse"])
def test_checkpoint_inside_a_graph(name: str, device: str) -> None:
    ours, _ = pair(name)
    x, t = draw(name, device=device)

    def step(x: Tensor) -> Tensor:
        return checkpoint(lambda x: ours(x.sin(), t), x, use_reentrant=False)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    expected = loss_and_grad(lambda x: ours(x.sin(), t), x)
    torch.testing.assert_close(loss_and_grad(compiled, x), expected)
