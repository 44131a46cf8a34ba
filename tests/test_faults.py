"""Threads, forks and memory that runs out: whatever happens to the process, no number is wrong."""

from __future__ import annotations

import io
import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fusedstep
import fusedstep.functional as F
from numerics import BF16, F32, identical
from test_cpu_levels import LEVELS, machine_has

pytestmark = pytest.mark.usefixtures("cpu_only")

# ------------------------------------------------------------------ one training, many ways to run


def train(seed: int, steps: int = 4) -> list[Tensor]:
    """A small training in which every loss and SGD take part: parameters and momentum at its end.

    Its sizes reach the parallel loops and, with 800 KB, the memory kept for a next gradient.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    logits, points = nn.Parameter(randn(400, 500)), nn.Parameter(randn(200_000))
    optimizer = fusedstep.SGD([logits, points], lr=0.5, momentum=0.9, weight_decay=0.01)
    for _ in range(steps):
        target = torch.randint(500, (400,), generator=generator)
        other = randn(200_000)
        optimizer.zero_grad()
        loss = F.cross_entropy(logits, target, label_smoothing=0.1)
        loss = loss + F.cross_entropy(logits, target, reduction="none").square().mean()
        for function in (F.l1_loss, F.mse_loss, F.smooth_l1_loss, F.huber_loss):
            loss = loss + function(points, other, reduction="sum")
        loss = loss + F.binary_cross_entropy_with_logits(points, other.sigmoid())
        loss.backward()
        optimizer.step()
    buffers = [optimizer.state[p]["momentum_buffer"] for p in (logits, points)]
    return [logits.detach(), points.detach(), *buffers]


def test_trainings_in_several_threads_give_the_bits_of_one() -> None:
    expected = [train(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        identical(list(pool.map(train, range(4))), expected)


def test_one_module_and_one_target_serve_several_threads() -> None:
    criterion = fusedstep.CrossEntropyLoss(weight=torch.rand(300) + 0.5)
    logits, target = torch.randn(300, 300), torch.randint(300, (300,))

    def work(_: int) -> tuple[Tensor, Tensor]:
        x = logits.detach().requires_grad_()
        loss = criterion(x, target)
        (grad,) = torch.autograd.grad(loss, x)
        return loss.detach(), grad

    expected = work(0)
    with ThreadPoolExecutor(8) as pool:
        for result in pool.map(work, range(24)):
            identical(result, expected)


def test_backward_in_another_thread_than_forward() -> None:
    logits, target = torch.randn(300, 300), torch.randint(300, (300,))

    def gradient(run: Callable[[Callable[[], Any]], Any]) -> Tensor:
        x = logits.detach().requires_grad_()
        loss = F.cross_entropy(x, target)
        run(loss.backward)
        assert x.grad is not None
        return x.grad

    def in_a_thread(work: Callable[[], Any]) -> None:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    identical(gradient(in_a_thread), gradient(lambda work: work()))


def test_the_number_of_threads_may_change_on_the_way() -> None:
    expected = train(0)
    numbers = iter((2, 1, 3, 2))

    class Changing(fusedstep.SGD):
        def step(self, closure: Any = None) -> Any:
            torch.set_num_threads(next(numbers))
            return super().step(closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusedstep, "SGD", Changing)
        identical(train(0), expected)
    assert next(numbers, None) is None


def in_process(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


# ------------------------------------------------------------------ forks


class Worker(torch.utils.data.Dataset[Tensor]):
    """Computes a loss and its gradient in the process that loads the item."""

    def __init__(self, logits: Tensor, target: Tensor) -> None:
        self.logits, self.target = logits, target

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        x = self.logits.detach().requires_grad_()
        loss = F.cross_entropy(x, (self.target + index) % x.shape[1])
        return torch.autograd.grad(loss, x)[0]


@pytest.mark.filterwarnings("ignore:This process")
def test_workers_forked_after_use_compute_the_same_bits() -> None:
    """After a gradient has been kept, and with one live."""
    kept = train(0)
    logits, target = torch.randn(200, 300), torch.randint(300, (200,))
    worker = Worker(logits, target)
    expected = [worker[i] for i in range(len(worker))]
    loader = DataLoader(worker, batch_size=None, num_workers=2, multiprocessing_context="fork")
    for _ in range(2):
        for got, wanted in zip(loader, expected, strict=True):
            identical(got, wanted)
    identical(train(0), kept)


def test_a_loader_with_workers_beside_training() -> None:
    inputs, labels = torch.randn(64, 20), torch.randint(5, (64,))

    def run(workers: int) -> Tensor:
        torch.manual_seed(0)
        model = nn.Linear(20, 5)
        optimizer = fusedstep.SGD(model.parameters(), lr=0.5, momentum=0.9)
        context = "fork" if workers else None
        data = TensorDataset(inputs, labels)
        loader = DataLoader(data, 8, num_workers=workers, multiprocessing_context=context)
        for _ in range(2):
            for x, y in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        return model.weight.detach()

    identical(run(2), run(0))


def _train_into(queue: Any) -> None:
    queue.put([t.numpy() for t in train(0)])


@pytest.mark.filterwarnings("ignore:This process")
def test_a_fork_trains_to_the_bits_of_its_parent() -> None:
    expected = train(0)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_train_into, args=(queue,))
    process.start()
    got = [torch.from_numpy(array) for array in queue.get()]
    process.join()
    assert process.exitcode == 0
    identical(got, expected)


# ------------------------------------------------------------------ memory that runs out

OUT_OF_MEMORY = """
    import resource, torch, fusedstep, fusedstep.functional as F
    from torch import nn
    torch.set_num_threads(1)

    def room(bytes):
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        limit = resource.RLIM_INFINITY if bytes is None else used + bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))

    def refused(call):
        room(40 << 20)
        try:
            call()
        except (RuntimeError, MemoryError) as error:
            assert "alloc" in str(error) or "memory" in str(error), error
        else:
            raise AssertionError("there was memory enough")
        finally:
            room(None)
"""


def test_a_loss_without_memory_leaves_everything_as_it_was() -> None:
    in_process(
        OUT_OF_MEMORY
        + """
    x = torch.randn(2000, 10000)
    t = torch.randint(10000, (2000,))
    other = torch.randn(2000, 10000)
    calls = {
        "gradient in forward": lambda leaf: F.cross_entropy(leaf, t).backward(),
        "in backward": lambda leaf: F.cross_entropy(leaf, t, reduction="none").sum().backward(),
        "pointwise": lambda leaf: F.mse_loss(leaf, other).backward(),
        "there in backward": lambda leaf: F.l1_loss(leaf, other, reduction="none").sum().backward(),
    }
    held = []  # or the next gradient would find the memory of the last
    for name, call in calls.items():
        leaf = x.clone().requires_grad_()
        copy = x.clone()
        refused(lambda: call(leaf))
        assert leaf.grad is None and torch.equal(leaf, copy), name
        call(leaf)
        given = leaf.grad.clone()
        again = x.clone().requires_grad_()
        call(again)
        assert torch.equal(given, again.grad), name
        held += [leaf, again]
    """
    )


def test_a_step_without_memory_for_its_momentum_changes_nothing() -> None:
    """The first parameter's buffer fits, the second's does not."""
    in_process(
        OUT_OF_MEMORY
        + """
    params = [nn.Parameter(torch.randn(n)) for n in (100, 1000, 20_000_000)]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = fusedstep.SGD(params, lr=0.1, momentum=0.9)
    before = [(p.detach().clone(), p.grad.clone(), p._version) for p in params]
    refused(optimizer.step)
    for p, (value, grad, version) in zip(params, before):
        assert torch.equal(p, value) and torch.equal(p.grad, grad) and p._version == version
        assert "momentum_buffer" not in optimizer.state[p]
    optimizer.step()
    twins = [nn.Parameter(value) for value, _, _ in before]
    for q, (_, grad, _) in zip(twins, before):
        q.grad = grad
    fusedstep.SGD(twins, lr=0.1, momentum=0.9).step()
    assert all(torch.equal(p, q) for p, q in zip(params, twins))
    """
    )


def test_a_step_without_memory_for_another_layout_changes_nothing() -> None:
    in_process(
        OUT_OF_MEMORY
        + """
    params = [nn.Parameter(torch.randn(100)), nn.Parameter(torch.randn(5000, 4000))]
    optimizer = fusedstep.SGD(params, lr=0.1, momentum=0.9)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    params[1].grad = torch.randn(4000, 5000).t()
    before = [p.detach().clone() for p in params]
    buffers = [optimizer.state[p]["momentum_buffer"].clone() for p in params]
    refused(optimizer.step)
    for p, value, buffer in zip(params, before, buffers):
        assert torch.equal(p, value)
        assert torch.equal(optimizer.state[p]["momentum_buffer"], buffer)
    optimizer.step()
    assert not torch.equal(params[0], before[0])
    """
    )


def _in_inference_mode() -> nn.Parameter:
    with torch.inference_mode():
        return nn.Parameter(torch.ones(5))


def _with_a_sparse_gradient() -> nn.Parameter:
    param = nn.Parameter(torch.ones(5, 3))
    param.grad = torch.ones(5, 3).to_sparse(1)
    return param


@pytest.mark.parametrize("make", [_in_inference_mode, _with_a_sparse_gradient])
def test_a_step_that_torchs_functions_refuse_changes_nothing(
    make: Callable[[], nn.Parameter],
) -> None:
    """Parameters that are not covered are torch's to update, and torch may raise: for an inference
    tensor outside inference mode, for weight decay with a sparse gradient."""
    refused = make()
    covered = [nn.Parameter(torch.ones(100, dtype=dtype)) for dtype in (F32, BF16)]
    for param in covered:
        param.grad = torch.ones_like(param)
    if refused.grad is None:
        refused.grad = torch.ones_like(refused)
    optimizer = fusedstep.SGD(
        [covered[0], refused, covered[1]],
        lr=0.1,
        momentum=0.9,
        weight_decay=0.1,
        master_weights=True,
    )
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    versions = [param._version for param in covered]
    with pytest.raises(RuntimeError):
        optimizer.step()
    for param, version in zip(covered, versions, strict=True):
        assert param.grad is not None
        assert (param == 1).all() and (param.grad == 1).all() and param._version == version
        assert not optimizer.state.get(param)
    refused.grad = None
    optimizer.step()
    assert all((param != 1).all() and optimizer.state[param] for param in covered)


# ------------------------------------------------------------------ determinism


def test_deterministic_algorithms_change_nothing_and_raise_nothing() -> None:
    """Also where torch fills new memory with NaN, which its switch turns on by default."""
    expected = train(0)
    before = torch.utils.deterministic.fill_uninitialized_memory
    try:
        for warn_only in (False, True):
            for fill in (True, False):
                torch.use_deterministic_algorithms(True, warn_only=warn_only)
                torch.utils.deterministic.fill_uninitialized_memory = fill
                identical(train(0), expected)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


PRINT_BITS = """
    import sys, hashlib, torch
    sys.path[:0] = {paths!r}
    from test_faults import train
    torch.set_num_threads({threads})
    digest = hashlib.sha256()
    for tensor in train(0):
        digest.update(tensor.numpy().tobytes())
    print(digest.hexdigest())
"""


def bits(threads: int, level: str) -> str:
    code = textwrap.dedent(PRINT_BITS).format(paths=sys.path, threads=threads)
    return in_process(code, ATEN_CPU_CAPABILITY=level).strip()


def test_every_process_gives_the_same_bits_whatever_its_threads() -> None:
    level = fusedstep._C.cpu_capability()
    assert len({bits(threads, level) for threads in (1, 1, 2)}) == 1


RESULTS = """
    import io, sys, torch, fusedstep.functional as F
    sys.path[:0] = {paths!r}
    import reference
    torch.manual_seed(0)
    results = []  # and the size of the terms that they are made of

    def call(name, *args):
        loss = getattr(F, name)(*args, reduction="none")
        (grad,) = torch.autograd.grad(loss.sum(), args[0])
        exact = getattr(reference, name)(*args, reduction="none")
        results.append((loss.detach(), exact.loss_scale))
        results.append((grad, exact.grad_scale))

    for dtype in (torch.float32, torch.float64):
        for shape in ((1000, 10), (100, 1000), (3, 20000)):
            x = (3 * torch.randn(shape, dtype=torch.float64)).to(dtype).requires_grad_()
            call("cross_entropy", x, torch.randint(shape[1], shape[:1]))
            other = torch.rand(shape, dtype=torch.float64).to(dtype)
            for name in ("l1_loss", "mse_loss", "smooth_l1_loss", "huber_loss",
                         "binary_cross_entropy_with_logits"):
                call(name, x, other)
    torch.save(results, sys.stdout.buffer)
"""
ROUNDINGS_BETWEEN_LEVELS = 4


def test_levels_differ_by_a_few_roundings() -> None:
    """Between `default`, `avx2` and `avx512` a result differs by at most so many times eps of the
    terms it is made of: vectors' widths change the order of sums, and fused multiply-adds round
    once instead of twice."""
    found = []
    for level in filter(machine_has, LEVELS):
        code = textwrap.dedent(RESULTS).format(paths=sys.path)
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": level}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, check=True, env=environment)
        found.append(torch.load(io.BytesIO(done.stdout), weights_only=True))
    for other in found[1:]:
        for (a, scale), (b, _) in zip(found[0], other, strict=True):
            off = (a.double() - b.double()).abs() / torch.finfo(a.dtype).eps
            assert (off <= ROUNDINGS_BETWEEN_LEVELS * scale).all(), (off / scale).nan_to_num().max()
