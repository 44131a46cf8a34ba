"""patch(), unpatch() and patched(): torch's names mean ours, and are put back."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import multiprocessing.spawn
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import fusedstep
from numerics import FunctionsSeen

TorchCrossEntropyLoss = nn.CrossEntropyLoss
F = torch.nn.functional
LOSSES = {
    "cross_entropy": nn.CrossEntropyLoss,
    "l1_loss": nn.L1Loss,
    "mse_loss": nn.MSELoss,
    "smooth_l1_loss": nn.SmoothL1Loss,
    "huber_loss": nn.HuberLoss,
    "binary_cross_entropy_with_logits": nn.BCEWithLogitsLoss,
}


class EarlierLoss(nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return 2 * super().forward(input, target)


class EarlierSGD(torch.optim.SGD):
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        self.steps = getattr(self, "steps", 0) + 1
        return super().step(closure)


class PlainSGD(torch.optim.SGD):
    """Has a step of its own, as scripts do, and knows nothing of a scale."""

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p -= group["lr"] * p.grad


@pytest.fixture(scope="module")
def prepared_torch() -> None:
    """Torch has changed its own classes, as it does once in a process."""
    torch.optim.SGD([torch.zeros(1)])
    torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1))


@pytest.fixture(autouse=True)
def unpatched(prepared_torch: None) -> Iterator[None]:
    fusedstep.reset_stats()
    before = everything()
    yield
    fusedstep.unpatch()
    after = everything()
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] is not after[name]] == []


def everything() -> dict[str, Any]:
    """Every attribute of the modules and classes that could have been touched."""
    owners: list[Any] = [
        torch.nn,
        torch.nn.functional,
        torch.nn.modules,
        torch.nn.modules.loss,
        torch.optim,
        sys.modules["torch.optim.sgd"],
        torch.optim.SGD,
        torch.optim.Optimizer,
        torch.distributions.bernoulli,
        multiprocessing.spawn,
        *LOSSES.values(),
    ]
    return {
        f"{o.__name__}.{name}": value
        for o in owners
        for name, value in vars(o).items()
        if name != "__warningregistry__"
    }


def operands(name: str) -> tuple[Tensor, Tensor]:
    x = torch.randn(7, 5, requires_grad=True)
    return x, torch.randint(5, (7,)) if name == "cross_entropy" else torch.rand(7, 5)


def fused(operator: str) -> int:
    return fusedstep.stats()[operator].fused


def parameters(device: str = "cpu") -> list[nn.Parameter]:
    ps = [nn.Parameter(torch.randn(n, device=device)) for n in (130, 1, 64)]
    for p in ps:
        p.grad = torch.randn_like(p)
    return ps


# ---- What names mean ----


@pytest.mark.parametrize("name", LOSSES)
def test_losses_mean_ours(name: str) -> None:
    earlier = LOSSES[name]()
    x, t = operands(name)
    expected = getattr(fusedstep.functional, name)(x, t)
    fusedstep.reset_stats()
    with fusedstep.patched():
        from torch.nn import CrossEntropyLoss  # noqa: F401

        module = getattr(__import__("torch.nn", fromlist=[name]), LOSSES[name].__name__)()
        function = getattr(__import__("torch.nn.functional", fromlist=[name]), name)
        losses = [earlier(x, t), module(x, t), function(x, t), copy.deepcopy(earlier)(x, t)]
        assert fused(name) == len(losses)
    for loss in losses:
        assert torch.equal(loss, expected)
        assert type(loss.grad_fn) is type(expected.grad_fn)
    assert type(earlier(x, t).grad_fn) is not type(expected.grad_fn)
    assert fused(name) == len(losses)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "nesterov": True}], ids=str)
def test_sgd_means_ours(options: dict[str, Any]) -> None:
    start = parameters()
    expected, before, during, subclassed = (copy.deepcopy(start) for _ in range(4))
    for theirs in (expected, before, during, subclassed):
        for p, q in zip(theirs, start, strict=True):
            p.grad = q.grad
    earlier = torch.optim.SGD(before, lr=0.5, **options)
    ours = fusedstep.SGD(expected, lr=0.5, **options)
    with fusedstep.patched():
        optimizers = [
            earlier,
            torch.optim.SGD(during, lr=0.5, **options),
            EarlierSGD(subclassed, lr=0.5, **options),
        ]
        for _ in range(3):
            for optimizer in optimizers:
                optimizer.step()
        assert fused("SGD") == 3 * len(optimizers) * len(start)
        earlier.zero_grad()
        assert all(p.grad is None for p in before)
    for _ in range(3):
        ours.step()
    assert optimizers[2].steps == 3  # type: ignore[attr-defined]
    for params in (before, during, subclassed):
        for p, q in zip(params, expected, strict=True):
            assert torch.equal(p, q)
    fusedstep.reset_stats()
    for optimizer in optimizers:  # torch's again
        optimizer.step()
    assert fused("SGD") == 0


def test_classes_stay_torchs() -> None:
    before = nn.CrossEntropyLoss()
    with fusedstep.patched():
        during = nn.CrossEntropyLoss()

        class Mine(nn.CrossEntropyLoss):
            def forward(self, input: Tensor, target: Tensor) -> Tensor:
                return super().forward(input, target) + 1

        mine, earlier = Mine(), EarlierLoss()
        x, t = operands("cross_entropy")
        assert torch.equal(mine(x, t), fusedstep.functional.cross_entropy(x, t) + 1)
        assert torch.equal(earlier(x, t), 2 * fusedstep.functional.cross_entropy(x, t))
        optimizer = torch.optim.SGD(parameters(), lr=0.1)
        assert isinstance(fusedstep.CrossEntropyLoss(), nn.CrossEntropyLoss)
        assert nn.CrossEntropyLoss is TorchCrossEntropyLoss
        for loss in (before, during, mine, earlier):
            assert isinstance(loss, nn.CrossEntropyLoss)
    for loss in (before, during, mine, earlier):
        assert isinstance(loss, nn.CrossEntropyLoss)
    assert type(during) is type(before) and type(optimizer) is torch.optim.SGD


def test_every_replaced_loss_is_in_the_table() -> None:
    assert LOSSES.keys() == fusedstep.functional.stand_ins.keys()


def test_signatures_are_torchs() -> None:
    import inspect

    for name in LOSSES:
        torchs = inspect.signature(getattr(F, name))
        with fusedstep.patched():
            ours = inspect.signature(getattr(F, name))
        assert [(p.name, p.default) for p in ours.parameters.values()] == [
            (p.name, p.default) for p in torchs.parameters.values()
        ]


# ---- When ----


def is_patched() -> bool:
    return F.cross_entropy is not fusedstep.functional._TORCH["cross_entropy"]


def test_patch_is_idempotent() -> None:
    fusedstep.unpatch()
    assert not is_patched()
    fusedstep.patch()
    ours = F.cross_entropy
    fusedstep.patch()
    assert F.cross_entropy is ours
    fusedstep.unpatch()
    assert not is_patched()
    fusedstep.unpatch()
    assert not is_patched()


def test_blocks_nest() -> None:
    with fusedstep.patched():
        with fusedstep.patched():
            assert is_patched()
        assert is_patched()
        fusedstep.unpatch()
        assert is_patched()
    assert not is_patched()
    fusedstep.patch()
    with fusedstep.patched():
        pass
    assert is_patched()
    with fusedstep.patched():
        fusedstep.unpatch()
        assert is_patched()
    assert not is_patched()


def test_a_block_ends_by_an_error() -> None:
    with pytest.raises(KeyError), fusedstep.patched():
        raise KeyError
    assert not is_patched()


def test_decorator() -> None:
    @fusedstep.patched()
    def recursive(depth: int) -> bool:
        return is_patched() and (depth == 0 or recursive(depth - 1)) and is_patched()

    assert recursive(3) and recursive(0)
    assert not is_patched()


def test_threads() -> None:
    barrier = threading.Barrier(8)
    seen = []

    def work() -> None:
        barrier.wait()
        for _ in range(200):
            with fusedstep.patched():
                seen.append(is_patched())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 1600 and all(seen)
    assert not is_patched()


def test_what_somebody_else_replaced_is_left_alone() -> None:
    torchs = F.mse_loss
    fusedstep.patch()

    def theirs(*args: Any, **kwargs: Any) -> Tensor:
        return torchs(*args, **kwargs)

    F.mse_loss = theirs
    assert "torch.nn.functional.mse_loss" not in fusedstep.stats().replaced
    fusedstep.unpatch()
    assert F.mse_loss is theirs
    F.mse_loss = torchs
    assert not is_patched()


# ---- What the kernels do not cover ----


class Seen(Tensor):
    calls: ClassVar[list[Any]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_fallbacks_end_at_torch() -> None:
    x, t = operands("mse_loss")
    labels = torch.randint(5, (7,))
    with fusedstep.patched():
        with pytest.warns(UserWarning, match="target size"):
            F.l1_loss(x, t[:1]).backward()
        F.mse_loss(x, t, weight=torch.rand(7, 5)).backward()
        F.huber_loss(x, t, weight=torch.rand(7, 5)).backward()
        torch.func.vmap(F.smooth_l1_loss)(x, t)
        F.cross_entropy(x.to(torch.complex64).real.double(), labels).backward()
        (grad,) = torch.autograd.grad(F.cross_entropy(x, labels), x, create_graph=True)
        grad.sum().backward()
        with pytest.raises(ValueError, match="reduction"):
            F.l1_loss(x, t, reduction="median")
        Seen.calls.clear()
        for name in LOSSES:
            y, u = operands(name)
            F.__dict__[name](y.detach().as_subclass(Seen), u)
            assert F.__dict__[name] in Seen.calls


def test_a_function_mode_sees_the_public_name() -> None:
    x, t = operands("cross_entropy")
    with fusedstep.patched(), FunctionsSeen() as mode:
        F.cross_entropy(x, t)
        assert F.cross_entropy in mode.seen
    assert fused("cross_entropy") == 1
    with FunctionsSeen() as mode:
        fusedstep.functional.cross_entropy(x, t)
    assert fusedstep.functional.cross_entropy in mode.seen


def test_jit_compiles_torchs_own() -> None:
    x, t = operands("cross_entropy")
    with fusedstep.patched():
        scripted = torch.jit.script(nn.CrossEntropyLoss())
        loss = scripted(x, t)
    scripted = torch.jit.script(fusedstep.CrossEntropyLoss())
    assert torch.equal(loss, F.cross_entropy(x, t)) and torch.equal(loss, scripted(x, t))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_jit_trace_records_torchs_own(name: str, reduction: str) -> None:
    """And not the numbers of the call that it watches."""
    criterion = LOSSES[name](reduction=reduction)
    x, t = operands(name)
    with fusedstep.patched():
        traced = torch.jit.trace(criterion, (x, t))
        ours = torch.jit.trace(
            getattr(fusedstep, LOSSES[name].__name__)(reduction=reduction), (x, t)
        )
    reasons = fusedstep.stats()[name].fallbacks
    assert list(reasons) == ["a program that torch.jit.trace records"]
    torch.jit.save(traced, stored := io.BytesIO())
    stored.seek(0)
    x, t = operands(name)
    for recorded in (traced, ours, torch.jit.load(stored)):
        assert torch.equal(recorded(x, t), criterion(x, t))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_reduction_by_its_old_name() -> None:
    x, t = operands("cross_entropy")
    expected = F.cross_entropy(x, t)
    with fusedstep.patched(), pytest.warns(UserWarning, match="use reduction='mean'"):
        torch.testing.assert_close(F.cross_entropy(x, t, reduction="elementwise_mean"), expected)
    assert fused("cross_entropy") == 1


def test_inference_tensors_as_torch_takes_them() -> None:
    for name in LOSSES:
        with torch.inference_mode():
            x, t = operands(name)
        weight = torch.ones(5, requires_grad=True)
        outcomes: list[Any] = []
        for patch in (contextlib.nullcontext, fusedstep.patched):
            try:
                with patch():
                    loss = F.__dict__[name](x.clone() * weight, t)
                outcomes.append(torch.autograd.grad(loss, weight)[0])
            except RuntimeError as error:
                outcomes.append(str(error))
        if name == "l1_loss":
            torch.testing.assert_close(*outcomes)
        else:
            assert outcomes[0] == outcomes[1]


def test_compile_traces_ours() -> None:
    x, t = operands("cross_entropy")
    criterion = nn.CrossEntropyLoss()
    torch._dynamo.reset()
    with fusedstep.patched():
        compiled = torch.compile(lambda x, t: criterion(x, t), fullgraph=True, backend="aot_eager")
        compiled(x, t).backward()
        assert fused("cross_entropy") == 1
        assert fusedstep.stats().fell_back == 0
    torch._dynamo.reset()


BEFORE_THE_COMPILER = """
import sys, fusedstep, torch
from fusedstep import _torchs_own
torchs = {name: vars(torch.nn.functional)[name] for name in fusedstep.functional.stand_ins}
torchs["nll_loss"] = torch.nn.functional.nll_loss
fusedstep.patch()
_torchs_own.note()
assert not {"torch._dynamo", "torch._inductor"} & sys.modules.keys()
ours = {name: vars(torch.nn.functional)[name] for name in torchs}
assert all(ours[name] is not torchs[name] for name in torchs)
optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
assert "torch._dynamo" in sys.modules

from torch._dynamo.trace_rules import get_torch_obj_rule_map
rules = get_torch_obj_rule_map()
assert all(torchs[name] in rules and ours[name] not in rules for name in torchs)

graphs = []
def backend(graph, _):
    graphs.append({node.target for node in graph.graph.nodes})
    return graph
@torch.compile(fullgraph=True, backend=backend)
def losses(x, t):
    F = torch.nn.functional
    return F.cross_entropy(x, t) + F.nll_loss(x, t)
losses(torch.randn(2, 3), torch.ones(2).long())
assert _torchs_own.used() == ("nll_loss",)
(graph,) = graphs
assert torchs["nll_loss"] in graph and not graph & {*ours.values(), torchs["cross_entropy"]}

fusedstep.unpatch()
calls = []
optimizer.register_step_pre_hook(lambda *_: calls.append("hook"))
optimizer.step()
assert calls == ["hook"]
print("done")
"""


def test_patching_before_the_compiler_is_loaded(cpu_only: None) -> None:
    """It does not load it, for that takes seconds; and the compiler knows torch's functions."""
    done = subprocess.run(
        [sys.executable, "-c", BEFORE_THE_COMPILER], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("done\n", "")


# ---- SGD's surroundings ----


def test_hooks_outlive_the_patch() -> None:
    with fusedstep.patched():
        optimizer = torch.optim.SGD(parameters(), lr=0.1)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.step()
    with fusedstep.patched():
        optimizer.step()
    assert calls == ["pre", "post"] * 2


@pytest.mark.parametrize("kind", [torch.optim.SGD, EarlierSGD, PlainSGD], ids=lambda k: k.__name__)
@pytest.mark.parametrize("scheduler", ["none", "before", "while"])
def test_grad_scaler(kind: type[torch.optim.SGD], scheduler: str) -> None:
    def steps(patch: bool) -> list[nn.Parameter]:
        torch.manual_seed(7)
        params = [nn.Parameter(torch.randn(130))]
        x = torch.randn(130)
        optimizer = kind(params, lr=0.5)
        scaler = torch.amp.GradScaler(x.device.type, init_scale=1024.0)
        if scheduler == "before":
            torch.optim.lr_scheduler.ConstantLR(optimizer)
        if patch:
            fusedstep.patch()
        if scheduler == "while":
            torch.optim.lr_scheduler.ConstantLR(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale((params[0] * x).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        fusedstep.unpatch()
        return params

    assert torch.equal(steps(True)[0], steps(False)[0])
    torchs = kind is PlainSGD or (kind is torch.optim.SGD and scheduler == "before")
    assert fused("SGD") == (0 if torchs else 3)


def test_a_subclass_of_our_sgd_gets_gradients_without_the_scale() -> None:
    class Ours(fusedstep.SGD):
        step = PlainSGD.step  # type: ignore[assignment]

    p = nn.Parameter(torch.zeros(5))
    optimizer = Ours([p], lr=1.0)
    scaler = torch.amp.GradScaler(p.device.type, init_scale=1024.0)
    scaler.scale(p.sum()).backward()
    scaler.step(optimizer)
    assert torch.equal(p, -torch.ones(5))


def test_what_was_taken_while_patched_stays_ours() -> None:
    params = parameters()
    params.append(nn.Parameter(torch.randn(20)[::2]))  # left to torch's functions
    params[-1].grad = torch.ones(10)
    with fusedstep.patched():
        optimizer = torch.optim.SGD(params, lr=0.5, momentum=0.9)
        zero_grad = optimizer.zero_grad
        torch.optim.lr_scheduler.StepLR(optimizer, 3)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    for p, old in zip(params, before, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.detach(), old - 0.5 * p.grad)
    assert fused("SGD") == 3
    zero_grad()
    assert all(p.grad is None for p in params)


class NamedSGD(torch.optim.SGD):
    """Has attributes of its own that are called as arguments of ours."""

    master_weights = True
    stochastic_rounding = True
    in_backward = True
    seed = None


@pytest.mark.parametrize("fused", [None, True])
def test_attributes_of_a_subclass_are_its_own(fused: bool | None) -> None:
    results = []
    for patch in (contextlib.nullcontext, fusedstep.patched):
        p = nn.Parameter(torch.ones(20, dtype=torch.bfloat16)[::2])  # left to torch's functions
        with patch():
            optimizer = NamedSGD([p], lr=0.5, fused=fused if patch is fusedstep.patched else None)
            scaler = torch.amp.GradScaler(p.device.type, init_scale=4.0)
            scaler.scale(p.sum()).backward()
            scaler.step(optimizer)
        results.append(p.detach())
        assert not optimizer.state[p]
    assert torch.equal(*results)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}], ids=str)
def test_torchs_other_implementations(options: dict[str, bool]) -> None:
    ours, theirs = parameters(), parameters()
    for p, q in zip(ours, theirs, strict=True):
        p.data, p.grad = q.detach().clone(), q.grad
    with fusedstep.patched():
        torch.optim.SGD(ours, lr=0.5, **options).step()
    torch.optim.SGD(theirs, lr=0.5, foreach=False).step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    assert fused("SGD") == len(ours)


# ---- Spawned processes ----


SPAWNS = """
import multiprocessing, sys
sys.path.insert(0, sys.argv[1])
import fusedstep

def is_patched():
    sys.exit("torch.optim.SGD.step" not in fusedstep.stats().replaced)

if __name__ == "__main__":
    fusedstep.patch()
    child = multiprocessing.get_context("spawn").Process(target=is_patched)
    child.start()
    child.join()
    sys.exit(child.exitcode)
"""


def test_a_spawned_process_finds_us_where_its_parent_did(tmp_path: Path, cpu_only: None) -> None:
    """Not by an installation: without `site`, an editable one is not seen."""
    (tmp_path / "spawns.py").write_text(SPAWNS)
    packages = os.pathsep.join(p for p in sys.path if p.endswith("-packages"))
    folder = Path(fusedstep.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-S", "spawns.py", str(folder)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": packages},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# ---- Pickles ----


WITHOUT_US = """
import pickle, sys, torch
sys.modules["fusedstep"] = None  # any import of it is an ImportError
stored = pickle.loads(sys.stdin.buffer.read())
import io
loss, optimizer, partial = stored["pickled"]
saved = torch.load(io.BytesIO(stored["saved"]), weights_only=False)
states = torch.load(io.BytesIO(stored["states"]))
assert type(loss) is torch.nn.CrossEntropyLoss and type(saved["loss"]) is torch.nn.CrossEntropyLoss
assert type(optimizer) is torch.optim.SGD
x = torch.ones(2, 3)
t = torch.tensor([0, 1])
assert partial.func is torch.nn.functional.cross_entropy
assert torch.equal(loss(x, t), saved["loss"](x, t)) and torch.equal(partial(x, t), 2 * loss(x, t))
(p,) = optimizer.param_groups[0]["params"]
assert "momentum_buffer" in optimizer.state[p]
optimizer.step()
fresh = torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=1.0)
fresh.load_state_dict(states["optimizer"])
assert "momentum_buffer" in fresh.state_dict()["state"][0]
print("loaded")
"""


def test_pickles_load_without_us(cpu_only: None) -> None:
    def save(thing: Any) -> bytes:
        torch.save(thing, buffer := io.BytesIO())
        return buffer.getvalue()

    with fusedstep.patched():
        loss = nn.CrossEntropyLoss()
        p = nn.Parameter(torch.zeros(3))
        p.grad = torch.ones(3)
        optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9)
        torch.optim.lr_scheduler.StepLR(optimizer, 3)
        optimizer.step()
        partial = functools.partial(F.cross_entropy, reduction="sum")
        stored = {
            "pickled": (loss, optimizer, partial),
            "saved": save({"loss": loss}),
            "states": save({"optimizer": optimizer.state_dict(), "loss": loss.state_dict()}),
        }
        data = pickle.dumps({**stored, "pickled": stored["pickled"]})
    assert b"fusedstep" not in data
    assert b"fusedstep" not in pickle.dumps((loss, optimizer))  # nor once torch is itself again
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_US], input=data, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.split() == [b"loaded"]
