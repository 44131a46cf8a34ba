"""The benchmarks themselves: what they train, check, measure and report, but never how fast."""

from __future__ import annotations

import gc
import math
import re
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import bench_bandwidth
import bench_cross_entropy
import bench_data_parallel
import bench_linear_cross_entropy
import bench_pointwise_loss
import bench_scaling
import bench_sgd
import bench_sgd_options
import bench_train_step
import cli
import compare
import correctness
import data
import driver
import goals
import gpu_check
import launches
import memory
import nll_loss
import page
import peers
import process_group
import readme
import report
import run as run_all
import suite
import tables
import timing
import train_cnn
import train_ddp
import training
from launches import Launches
from models import NETWORKS
from results import Results
from suite import LARGE_COPY, OURS, Row

BENCHMARKS = Path(cli.__file__).parent

SCRIPTS = {
    "train_cnn": (training.Config, train_cnn.main),
    "train_ddp": (train_ddp.Config, train_ddp.main),
    "bench_bandwidth": (bench_bandwidth.Options, driver.main),
    "bench_cross_entropy": (bench_cross_entropy.Options, driver.main),
    "bench_data_parallel": (bench_data_parallel.Options, driver.main),
    "bench_linear_cross_entropy": (bench_linear_cross_entropy.Options, driver.main),
    "bench_pointwise_loss": (bench_pointwise_loss.Options, driver.main),
    "bench_scaling": (bench_scaling.Options, driver.main),
    "bench_sgd": (bench_sgd.Options, driver.main),
    "bench_sgd_options": (bench_sgd_options.Options, driver.main),
    "bench_train_step": (bench_train_step.Options, driver.main),
    "gpu_check": (gpu_check.Options, gpu_check.main),
    "run": (run_all.Options, run_all.main),
}

# The smallest run of each benchmark.
TINY = {
    "bench_cross_entropy": "--sizes 1x10,3x5 --no-shapes",
    "bench_linear_cross_entropy": "--sizes 3x4x5,2x3x7",
    "bench_pointwise_loss": "--sizes 7,3x5 --losses mse_loss",
    "bench_sgd": "--sets lenet --modes plain,momentum",
    "bench_sgd_options": "--options master_weights,in_backward --sets lenet --models lenet",
    "bench_train_step": "--models lenet --batch-sizes 1,2 --modes plain --no-curves",
}
UNHURRIED = "--minutes 1e6"  # however busy the machine is, there is time for every case
TINY_CHECK = (
    f"{UNHURRIED} --device cpu --quick --sizes 3x5,2x3x4 --sets lenet --against native,quack,fused"
)


@pytest.fixture(autouse=True)
def default_device() -> None:
    """Benchmarks name the device of all they make: here it stays torch's own default."""


def run(script: str, arguments: str) -> None:
    cli.run(*SCRIPTS[script], arguments.split())


def refusal(script: str, arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit status and the one line with which `script` refuses `arguments`."""
    with pytest.raises(SystemExit) as exit:
        run(script, arguments)
    output = capsys.readouterr()
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1 and output.err.endswith("\n")
    return exit.value.code, output.err


# Command lines


@pytest.mark.parametrize(
    ("script", "arguments", "part"),
    [
        ("train_cnn", "--model resnet", "resnet"),
        ("train_cnn", "--data mnist", "mnist"),
        ("train_cnn", "--no-such-option", "--no-such-option"),
        ("train_cnn", "surplus", "surplus"),
        ("train_cnn", "--batch-size 0", "--batch-size"),
        ("train_cnn", "--batch-size 2.5", "--batch-size"),
        ("train_cnn", "--epochs 99999999999999999999", "--epochs"),
        ("train_cnn", "--samples -1", "--samples"),
        ("train_cnn", "--threads 0", "--threads"),
        ("train_cnn", "--seed -1", "--seed"),
        ("train_cnn", "--lr", "--lr"),
        ("train_cnn", "--lr fast", "--lr"),
        ("train_cnn", "--lr -0.1", "--lr"),
        ("train_cnn", "--lr nan", "--lr"),
        ("train_cnn", "--lr inf", "--lr"),
        ("train_cnn", "--momentum -1", "--momentum"),
        ("train_cnn", "--weight-decay nan", "--weight-decay"),
        ("train_cnn", "--nesterov --momentum 0", "--nesterov"),
        ("train_cnn", "--dtype float16", "float16"),
        ("train_cnn", "--plot curves.pdf", "curves.pdf"),
        ("train_cnn", "--plot /no/such/folder/curves.png", "/no/such/folder/curves.png"),
        ("train_cnn", "--tensorboard /dev/null/events", "/dev/null/events"),
        ("train_ddp", "--samples 8", "torchrun --standalone"),
        ("bench_cross_entropy", "--sizes 64", "64"),
        ("bench_cross_entropy", "--sizes 64x10,0x10", "0x10"),
        ("bench_cross_entropy", "--dtypes int8", "int8"),
        ("bench_cross_entropy", "--threads 0", "--threads"),
        ("bench_cross_entropy", "--json /no/such/folder/rows.json", "/no/such/folder/rows.json"),
        ("bench_pointwise_loss", "--sizes 64x10,64x", "64x"),
        ("bench_pointwise_loss", "--losses cross_entropy", "cross_entropy"),
        ("bench_pointwise_loss", "--dtypes int8", "int8"),
        ("bench_sgd", "--sets vgg", "vgg"),
        ("bench_sgd", "--modes adam", "adam"),
        ("bench_sgd_options", "--options fused", "fused"),
        ("bench_train_step", "--models vgg", "vgg"),
        ("bench_train_step", "--batch-sizes 1,-4", "1,-4"),
        ("bench_linear_cross_entropy", "--sizes 64x10", "64x10"),
        ("bench_scaling", "--axes columns", "columns"),
        ("run", "--ops softmax", "softmax"),
        ("run", "--sizes 64", "64"),
        ("run", "--sets vgg", "vgg"),
        ("run", "--models vgg", "vgg"),
        ("run", "--batch-sizes 0", "0"),
        ("run", "--dtypes int8", "int8"),
        ("run", "--against numpy", "numpy"),
        ("run", "--threads 0", "--threads"),
        ("run", "--minutes -1", "--minutes"),
        ("run", "--out /dev/null/report", "/dev/null/report"),
        ("run", "--results no-such.json", "no-such.json"),
        ("run", "--compare no-such.json", "no-such.json"),
        ("gpu_check", "--device cpu --sizes 64", "64"),
        ("gpu_check", "--device cpu --sizes 0x10", "0x10"),
        ("gpu_check", "--device cpu --sets vgg", "vgg"),
        ("gpu_check", "--device cpu --against numpy", "numpy"),
        ("gpu_check", "--device cpu --minutes -1", "--minutes"),
    ],
)
def test_a_bad_value_gets_one_line(
    script: str,
    arguments: str,
    part: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, line = refusal(script, arguments, capsys)
    assert status == 2
    assert part in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_missing_gpu_gets_one_line(
    script: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, line = refusal(script, "--device cuda", capsys)
    assert status == 2
    assert "cuda" in line


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_build_without_cuda_kernels_is_not_measured_on_cuda(
    script: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *key: False)
    status, line = refusal(script, "--device cuda", capsys)
    assert status == 2
    assert "this build of fusedstep has no CUDA kernels" in line
    training.Config(device="cuda", implementation="native")  # has no need of them


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_fusedstep_there_is_one_line(
    script: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "fusedstep", None)
    status, line = refusal(script, "--device cpu", capsys)
    assert status == 2
    assert "fusedstep" in line


def test_native_training_needs_no_fusedstep(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "fusedstep", None)
    run("train_cnn", "--model lenet --samples 8 --epochs 1 --implementation native")
    assert Path("train_cnn.png").exists()


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [("--data cifar10", "torchvision"), ("--tensorboard events", "tensorboard")],
)
def test_a_missing_package_gets_one_line(
    arguments: str,
    missing: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    for module in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    status, line = refusal("train_cnn", arguments, capsys)
    assert status == 2
    assert missing in line


def test_missing_cifar10_gets_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def find_nothing(root: Path, train: bool, transform: object) -> None:
        raise RuntimeError("Dataset not found or corrupted.")

    torchvision = types.ModuleType("torchvision")
    datasets = types.ModuleType("torchvision.datasets")
    transforms = types.ModuleType("torchvision.transforms")
    datasets.CIFAR10 = find_nothing
    transforms.ToTensor = transforms.Compose = lambda *steps: steps
    for module in (torchvision, datasets, transforms):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    status, line = refusal("train_cnn", "--data cifar10 --data-root images", capsys)
    assert status == 2
    assert "images" in line and "download" in line


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_script_starts_from_any_folder(script: str, tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / f"{script}.py", "--threads", "0"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stdout == ""
    # On a new machine Matplotlib may say before that it is making its cache of fonts.
    assert process.stderr.endswith("error: --threads must be 1 to 1024, not 0\n")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_the_options(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        run(script, "--help")
    assert exit.value.code == 0
    assert "--threads" in capsys.readouterr().out


# Networks and data


@pytest.mark.parametrize(
    ("name", "channels", "parameters"),
    [("lenet", 1, 81_194), ("cifar", 3, 145_578), ("cifar-one-head", 3, 89_578)],
)
def test_a_network_has_the_documented_shape(name: str, channels: int, parameters: int) -> None:
    network = NETWORKS[name]
    model = network.build()
    assert network.channels == channels
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model(torch.zeros(2, channels, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("channels", [1, 3])
def test_digits_are_scaled_images_in_a_fixed_split(channels: int) -> None:
    training_set, test_set = data.digits(channels)
    assert (len(training_set), len(test_set)) == (1437, 360)
    assert set(training_set.indices).isdisjoint(test_set.indices)
    assert training_set.indices == data.digits(channels)[0].indices
    images, labels = training_set.dataset.tensors
    assert images.shape == (1797, channels, 32, 32)
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    assert images.min() == 0 and images.max() == 1
    assert torch.equal(images[:, 0], images[:, -1])
    assert set(labels[test_set.indices].tolist()) == set(range(10))


# Training


def config(**settings: object) -> training.Config:
    return training.Config(**{"model": "lenet", "samples": 12, "epochs": 2, **settings})


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("model", NETWORKS)
def test_both_implementations_train_alike(model: str, dtype: str) -> None:
    result = training.train(config(model=model, dtype=dtype, lr=0.01, weight_decay=1e-3))
    first, last = result.epochs
    for epoch in result.epochs:
        assert epoch.loss_difference <= (1e-5 if dtype == "float32" else 1e-12)
        assert epoch.accuracies["fused"] == pytest.approx(epoch.accuracies["native"], abs=0.01)
        assert 0 < epoch.accuracies["fused"] < 1
        assert len(epoch.loading) == 3
    assert last.losses["native"] < first.losses["native"]
    assert [len(epoch.steps.seconds["fused"]) for epoch in result.epochs] == [1, 3]
    assert len(result.steps.seconds["native"]) == 4


def test_a_seed_fixes_a_run_and_another_changes_it() -> None:
    losses = [training.train(config(seed=seed)).epochs[-1].losses for seed in (1, 1, 2)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_steps_alternate_on_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[tuple[bool, torch.Tensor]] = []
    step = training.Trainer.step

    def record(trainer: training.Trainer, images: torch.Tensor, labels: torch.Tensor) -> object:
        turns.append((type(trainer.optimizer) is torch.optim.SGD, images))
        return step(trainer, images, labels)

    monkeypatch.setattr(training.Trainer, "step", record)
    progress: list[tuple[int, int]] = []
    training.train(config(), on_step=lambda done, total: progress.append((done, total)))
    pairs = list(zip(turns[::2], turns[1::2], strict=True))
    assert [native for (native, _), _ in pairs] == [True, False] * 3
    assert [native for _, (native, _) in pairs] == [False, True] * 3
    assert all(first is second for (_, first), (_, second) in pairs)
    assert progress == [(done, 6) for done in range(1, 7)]


@pytest.mark.parametrize("implementation", ["both", "fused"])
def test_a_run_is_shown_plotted_and_logged(
    implementation: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plot, events = tmp_path / "run [1].png", tmp_path / "events"
    settings = config(implementation=implementation, plot=plot, tensorboard=events)
    train_cnn.main(settings)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"plot saved in {plot}"
    assert [line.split()[0] for line in lines if line.split()[0].isdecimal()] == ["1", "2"]
    assert any(line.startswith("speed-up") for line in lines) == (implementation == "both")
    assert plot.read_bytes().startswith(b"\x89PNG")

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(events)).Reload()
    assert [event.step for event in log.Scalars("loss/fused")] == [1, 2]
    assert ("loss/native" in log.Tags()["scalars"]) == (implementation == "both")


def test_two_processes_end_at_the_same_weights(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = [
        "--model",
        "lenet",
        "--samples",
        "30",
        "--epochs",
        "2",
        "--momentum",
        "0.9",
        "--lr",
        "0.1",
    ]
    process = subprocess.run(
        [*torchrun, BENCHMARKS / "train_ddp.py", *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()  # of one process alone
    assert lines[1].endswith("processes: 2")
    assert [line.split()[0] for line in lines if line.split()[0].isdecimal()] == ["1", "2"]
    assert lines[-2] == "final weights, between processes: the same bits"
    assert lines[-1].endswith("equal within 1e-10")


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [(None, 0, ""), (3, 3, ""), (True, 1, ""), (-1, 255, ""), ("why", 1, "why\n")],
)
def test_a_rank_ends_with_the_status_of_its_script(
    code: object,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Ended(BaseException):
        pass

    def end(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(process_group.atexit, "_run_exitfuncs", lambda: None)
    monkeypatch.setattr(process_group.os, "_exit", end)
    with pytest.raises(Ended, match=f"^{status}$"):
        process_group.run_rank(partial(sys.exit, code))
    assert capsys.readouterr().err == said


A_RANK = """
import atexit, sys
sys.path.insert(0, BENCHMARKS)
from process_group import run_rank
atexit.register(lambda: sys.stdout.write("said at exit"))

class Last:
    def __del__(self):
        print("the interpreter has ended")

def main():
    global last
    last = Last()
    last.itself = last
    sys.stdout.write("said, ")
    raise KeyError("why")

run_rank(main)
"""


def test_a_rank_runs_what_is_to_run_at_exit() -> None:
    """But ends without the interpreter, which gloo's threads may not survive."""
    code = A_RANK.replace("BENCHMARKS", repr(str(BENCHMARKS)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "said, said at exit")
    assert done.stderr.startswith("Traceback") and done.stderr.endswith("KeyError: 'why'\n")


# Timing


class Machine:
    """A clock that only the candidates move, each by its own cost."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        monkeypatch.setattr(timing, "perf_counter", lambda: self.now)

    def candidate(self, name: str, cost: float) -> Callable[[], None]:
        def call() -> None:
            self.calls.append(name)
            self.now += cost

        return call


def test_each_round_holds_every_candidate_in_a_new_order(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    candidates = {name: machine.candidate(name, 1.0) for name in "abcd"}
    measured = timing.measure(candidates, "cpu", rounds=10)
    calls = machine.calls[-40:]
    rounds = ["".join(calls[start : start + 4]) for start in range(0, 40, 4)]
    assert all(sorted(order) == list("abcd") for order in rounds)
    assert len(set(rounds)) > 2
    assert all(len(measured.seconds[name]) == 10 for name in "abcd")


def test_short_calls_fill_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    cost = timing.BLOCK_SECONDS["cpu"] / 100
    measured = timing.measure({"short": machine.candidate("short", cost)}, "cpu", rounds=1)
    assert measured.time("short").median == pytest.approx(cost)
    warm_up = 1 + 3 * (1 + 2 + 4 + 8 + 16 + 32 + 64 + 128)
    assert len(machine.calls) == warm_up + 128


def test_several_calls_of_a_candidate_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    timing.measure({"x": [machine.candidate(name, 1.0) for name in "012"]}, "cpu", rounds=6)
    warm_up, sizing = 3, 1
    assert "".join(machine.calls) == ("012" * 4)[: warm_up + sizing + 6]


def test_every_call_is_warm_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    cold = set("0123456789")

    def call(name: str) -> None:
        machine.now += 100.0 if name in cold else 1.0
        cold.discard(name)

    calls = [partial(call, name) for name in sorted(cold)]
    measured = timing.measure({"x": calls}, "cpu", rounds=10)
    assert measured.seconds["x"] == [1.0] * 10


def test_medians_are_over_rounds_and_ratios_within_them() -> None:
    measured = timing.Measurement({"slow": [6.0, 60.0, 6.6], "fast": [2.0, 15.0, 2.2]})
    assert measured.time("slow") == timing.Spread(6.6, 6.3, 33.3)
    assert measured.ratio("slow", "fast").median == pytest.approx(3.0)
    assert measured.ratio("slow", "fast").high == pytest.approx(3.5)


def test_garbage_collection_resumes_after_a_failure() -> None:
    def fail() -> None:
        assert not gc.isenabled()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        timing.measure({"failing": fail}, "cpu", rounds=1)
    assert gc.isenabled()


def test_cuda_is_timed_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            happened.append("record")

        def synchronize(self) -> None:
            happened.append("wait for the event")

        def elapsed_time(self, end: Event) -> float:
            assert end is not self
            return 2.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("wait for the GPU"))
    result, seconds = timing.timed(lambda: happened.append("call") or "result", "cuda")
    assert (result, seconds) == ("result", 2.5e-3)
    assert happened == ["wait for the GPU", "record", "call", "record", "wait for the event"]


def test_cuda_operands_outgrow_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = types.SimpleNamespace(L2_cache_size=50_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: gpu)
    assert timing.buffer_sets(1_000_000_000, "cuda") == 2
    assert timing.buffer_sets(10_000_000, "cuda") == 11
    assert timing.buffer_sets(40, "cuda") == timing.MAX_BUFFER_SETS
    assert timing.buffer_sets(40, "cpu") == 1


def test_rounds_end_with_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    calls = {"x": machine.candidate("x", 1.0), "y": machine.candidate("y", 3.0)}
    for seconds, rounds in [(math.inf, 20), (32.0, 8), (0.0, timing.LEAST_ROUNDS)]:
        measured = timing.measure(calls, "cpu", rounds=20, seconds=seconds)
        assert len(measured.seconds["x"]) == len(measured.seconds["y"]) == rounds


def test_memory_is_what_a_call_holds_at_once() -> None:
    def call() -> None:
        first = torch.empty(1000, dtype=torch.float64)
        del first
        kept = [torch.empty(500, dtype=torch.float64) for _ in range(3)]
        kept.clear()

    call()
    found = memory.footprint(call, "cpu")
    assert (found.peak_bytes, found.allocations) == (12_000, 4)


@pytest.mark.parametrize("elements", [10, 200_000])
def test_memory_that_fusedstep_keeps_for_the_next_gradient_counts(elements: int) -> None:
    mse_loss = cli.require_fusedstep().functional.mse_loss
    x = torch.zeros(elements, requires_grad=True)

    def call() -> None:
        mse_loss(x, x.detach()).backward()
        x.grad = None

    call()
    for _ in range(2):
        peak = memory.footprint(call, "cpu").peak_bytes
        assert x.nbytes <= peak < x.nbytes + 100


def test_memory_on_cuda_is_the_allocators(monkeypatch: pytest.MonkeyPatch) -> None:
    held = [100]
    count = "allocation.all.allocated"
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held[-1])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: max(held))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: held.__setitem__(0, 100))
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {count: len(held)})
    call = partial(held.extend, [130, 110])
    assert memory.footprint(call, "cuda") == memory.Footprint(30, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_waited_for() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    _, seconds = timing.timed(lambda: [x @ x for _ in range(20)], "cuda")
    assert seconds > 0
    assert torch.cuda.current_stream().query()


# Benchmarks


@pytest.fixture
def small_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "COPY_BYTES", 2**12)


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile takes seconds a shape."""
    monkeypatch.delitem(peers.ALL, "compile")


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "BLOCK_SECONDS", {"cpu": 1e-5, "cuda": 1e-5})


@pytest.fixture
def wide_console(monkeypatch: pytest.MonkeyPatch) -> None:
    """No header is wrapped, whatever the times in its table."""
    monkeypatch.setattr(report.console, "width", 1000)


@pytest.mark.usefixtures("short_blocks", "without_compiler", "wide_console")
@pytest.mark.parametrize("script", TINY)
def test_a_benchmark_reports_tables_and_json(
    script: str, device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.json"
    run(script, f"{TINY[script]} --device {device} --quick --json {path}")
    output = capsys.readouterr().out
    assert "share of the floor" in output and "Where fusedstep is slower" in output
    results = Results.load(path)
    assert set(results.environment) == {
        *("torch", "fusedstep", "python", "cpu", "capability", "cores", "gpu", "memory", "load"),
        *("command", "date"),
    }
    assert results.environment["torch"] == torch.__version__
    assert (results.environment["gpu"] is None) == (device == "cpu")
    assert results.failures == {} and results.left_out == []
    assert len(results.rows) == 2
    for row in results.rows:
        assert {OURS, row.native} <= set(row.implementations)
        assert row.floor in row.samples and row.threads == 1
        assert len({len(seconds) for seconds in row.samples.values()}) == 1
        assert row.peak_bytes.keys() == row.allocations.keys() == set(row.implementations)
        assert "Liger" not in row.samples or device == "cuda"


@pytest.fixture
def session(device: str, without_compiler: None) -> suite.Session:
    return suite.Session(cli.require_fusedstep(), device, 2, peers.load(peers.ALL, device), 0.0)


@pytest.mark.usefixtures("short_blocks", "small_copy")
@pytest.mark.parametrize("case", bench_cross_entropy.SHAPES, ids=lambda case: case.name)
def test_every_shape_is_measured(case: bench_cross_entropy.Case, session: suite.Session) -> None:
    _, classes, *positions = case.shape
    small = replace(case, shape=(2, classes, *(3 for _ in positions)))
    x = small.operands(session.device).x
    assert x.is_contiguous() != case.channels_last
    row = small.measured(session)
    assert row.case == case.name and row.bytes_moved == 2 * x.nbytes
    assert row.others == ["native"]


@pytest.mark.usefixtures("short_blocks", "small_copy")
def test_stochastic_rounding_is_held_against_rounding_to_nearest(session: suite.Session) -> None:
    shapes = [(1000,), (7,)]
    case = bench_sgd_options.Rounding(
        "", shapes, "momentum", "stochastic_rounding", dtype="bfloat16"
    )
    row = case.measured(session)
    assert bench_sgd_options.NEAREST in row.floors and row.bytes_moved == 10 * 1007
    assert {"for-loop", "foreach"} <= set(row.others)


def test_a_step_by_hand_keeps_what_rounding_would_drop() -> None:
    parameter = torch.nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
    optimizer = bench_sgd_options.on_float32_copies(torch.optim.SGD, [parameter], lr=0.1)
    for _ in range(64):
        parameter.grad = torch.full_like(parameter, 2**-7)  # moves it by less than half an ulp
        optimizer.step()
    assert torch.equal(parameter.detach(), torch.full((100,), 1 - 6.4 * 2**-7).bfloat16())


@pytest.mark.usefixtures("short_blocks")
def test_an_update_in_backward_holds_fewer_gradients(session: suite.Session) -> None:
    row = bench_sgd_options.InBackward("lenet", 1, "momentum").measured(session)
    gradients = 4 * 81_194
    assert gradients < row.peak_bytes["step()"]
    assert row.peak_bytes[OURS] < row.peak_bytes["step()"] - gradients / 10
    assert row.others == ["native", "step()"]


def test_two_processes_are_measured_together(session: suite.Session) -> None:
    row = bench_data_parallel.Case("lenet", 2, "momentum").measured(session)
    assert row.case == "LeNet, batch 2, momentum" and row.floor == bench_train_step.NETWORK_ALONE
    assert row.others == ["native", "fused"]
    assert {len(seconds) for seconds in row.samples.values()} == {timing.LEAST_ROUNDS - 3}


def test_what_a_process_raises_is_told_in_one_line(session: suite.Session) -> None:
    """Before any collective, where each process raises of itself: not because another has ended."""
    case = bench_data_parallel.Case("alexnet", 2, "momentum")
    with pytest.raises(RuntimeError, match=r"^KeyError: 'alexnet'$"):
        case.measured(session)


@pytest.mark.parametrize(("size", "floor"), [("255x1000", "round trip"), ("256x1000", "exp")])
def test_the_floor_follows_the_size(size: str, floor: str) -> None:
    assert bench_cross_entropy.sized(size).cpu_floor == floor


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("dtype", bench_cross_entropy.DTYPES)
@pytest.mark.parametrize("loss", bench_pointwise_loss.LOSSES)
def test_every_pointwise_loss_is_measured(loss: str, dtype: str, session: suite.Session) -> None:
    row = bench_pointwise_loss.Case(loss, (2, 3, 5), dtype=dtype).measured(session)
    assert (row.case, row.dtype, row.others) == (f"{loss}, 2x3x5", dtype, ["native"])


@pytest.mark.parametrize(("size", "floor"), [(255_999, "round trip"), (256_000, "add")])
def test_the_floor_of_a_pointwise_loss_follows_the_size(size: int, floor: str) -> None:
    assert bench_pointwise_loss.Case("mse_loss", (size,)).cpu_floor == floor


@pytest.mark.usefixtures("short_blocks")
def test_the_fused_heads_of_torch_are_compared(session: suite.Session) -> None:
    row = bench_linear_cross_entropy.Case(4, 3, 5).measured(session)
    heads = {"F.linear_cross_entropy", "F.linear_cross_entropy (chunked)"}
    assert heads < set(row.others) and not row.missing


@pytest.mark.usefixtures("short_blocks")
def test_nll_loss_is_held_against_its_floor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "nll.json"
    arguments = ["--sizes", "3x5,2x7x4", "--rounds", "3", "--json", str(path)]
    cli.run(nll_loss.Options, nll_loss.main, arguments)
    assert "geometric mean" in capsys.readouterr().out
    rows = Results.load(path).rows
    assert [row.case for row in rows] == ["3x5", "2x7x4"]
    assert all(set(row.samples) == {nll_loss.NATIVE, nll_loss.FLOOR} for row in rows)
    with pytest.raises(SystemExit):
        cli.run(nll_loss.Options, nll_loss.main, ["--sizes", "64"])
    assert capsys.readouterr().err.startswith("error: --sizes takes sizes like 64x10")


@pytest.mark.usefixtures("short_blocks")
def test_bandwidth_has_no_competitors(session: suite.Session) -> None:
    row = bench_bandwidth.Case(4096).measured(session)
    assert set(row.samples) == set(tables.ARRAYS_MOVED) and row.others == []


def test_plots_cover_their_axes_and_name_their_points() -> None:
    for quick in (True, False):
        cases = bench_scaling.Options(quick=quick).cases
        by_axis: dict[str, list[float]] = {}
        for case in cases:
            assert case.point is not None
            by_axis.setdefault(case.point.axis, []).append(case.point.x)
        assert (min(by_axis["classes C"]), max(by_axis["classes C"])) == (10, 262_144)
        assert (min(by_axis["tensors"]), max(by_axis["tensors"])) == (1, 2000)
        most = 100_000_000 if quick else 500_000_000
        assert (min(by_axis["parameters"]), max(by_axis["parameters"])) == (1000, most)
        assert set(by_axis["threads"]) == set(bench_scaling.thread_counts())
        assert len(
            {(case.operation, str(case), case.threads, case.point) for case in cases}
        ) == len(cases)


@pytest.mark.parametrize(
    ("name", "tensors", "floats"),
    [
        ("cifar", 10, 145_578),
        ("lenet", 10, 81_194),
        ("resnet18", 62, 11_689_512),
        ("many", 1000, 1_000_000),
        ("flat", 1, 13_000_000),
        ("resnet50", 161, 25_557_032),
        ("more", 2000, 2_000_000),
        ("large", 1, 134_217_728),
    ],
)
def test_a_parameter_set_has_its_size(name: str, tensors: int, floats: int) -> None:
    shapes = list(bench_sgd.SETS[name]())
    assert len(shapes) == tensors
    assert sum(math.prod(shape) for shape in shapes) == floats


class Traffic(TorchDispatchMode):
    """Counts the bytes that in-place operations read and write, and notes where they lie."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.places: list[list[int]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), settings: Any = None
    ) -> Any:
        operands = [operand for operand in arguments if isinstance(operand, torch.Tensor)]
        read = operands[1:] if function is torch.ops.aten.copy_.default else operands
        self.bytes += sum(operand.nbytes for operand in [operands[0], *read])
        self.places.append([operand.data_ptr() for operand in operands])
        return function(*arguments, **(settings or {}))


SGD_SHAPES = [(3, 5), (1000,), (), (2, 4)]  # 1,024 elements


@pytest.mark.parametrize(
    ("case", "moved", "name"),
    [
        *(
            (bench_sgd.Case("", SGD_SHAPES, mode, dtype=dtype), moved, name)
            for dtype in bench_cross_entropy.DTYPES
            for mode, moved, name in (("plain", 3, "add_"), ("nesterov", 5, "add_, neg_"))
        ),
        *(
            (
                bench_sgd_options.Rounding("", SGD_SHAPES, "momentum", option, dtype="bfloat16"),
                moved,
                name,
            )
            for option, moved, name in (
                ("stochastic_rounding", 5, "add_, neg_"),
                ("master_weights", 10, "copy_, neg_"),
            )
        ),
    ],
    ids=str,
)
def test_the_floor_of_sgd_moves_the_bytes_that_are_updated(
    case: bench_sgd.Case, moved: int, name: str, session: suite.Session
) -> None:
    work = case.work(replace(session, device="cpu"))
    (step,) = work.implementations[OURS]()
    parameters = bench_sgd.parameters_of(step.__self__)
    gradients = [parameter.grad for parameter in parameters]
    before = [parameter.clone() for parameter in parameters]
    with Traffic() as traffic:
        (call,) = work.floors[name]
        call()
    assert traffic.bytes == case.bytes_moved == moved * 1024 * case.torch_dtype.itemsize
    assert traffic.places[0] == [parameters[0].data_ptr(), gradients[0].data_ptr()]
    if name != "copy_, neg_":
        assert all(map(torch.equal, parameters, before))
    expected = case.parameters(case.torch_dtype, "cpu")
    for tensors, originals in (
        (before, expected),
        (gradients, [parameter.grad for parameter in expected]),
    ):
        assert all(map(torch.equal, tensors, originals))
    for tensors in (parameters, gradients):
        starts = [tensor.data_ptr() for tensor in tensors]
        ends = [tensor.data_ptr() + tensor.nbytes for tensor in tensors]
        assert all(0 <= start - end < 64 for start, end in zip(starts[1:], ends, strict=False))
        assert all((start - starts[0]) % bench_sgd.ALIGNMENT == 0 for start in starts)
        assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(SGD_SHAPES)


def slightly_wrong_loss(
    right: Callable[..., torch.Tensor], *arguments: Any, **options: Any
) -> torch.Tensor:
    loss = right(*arguments, **options)
    return loss + 1e-4 * (loss - loss.detach())  # the value is right, the gradient is not


class SlightlyWrongSGD(torch.optim.SGD):
    def __init__(self, parameters: Any, lr: float, **settings: Any) -> None:
        for option in bench_sgd_options.OPTIONS:
            settings.pop(option, None)
        super().__init__(parameters, lr=lr * 1.01, **settings)


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize("script", TINY)
def test_wrong_results_are_not_timed(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fusedstep = cli.require_fusedstep()
    for loss in ("cross_entropy", "mse_loss"):
        wrong = partial(slightly_wrong_loss, getattr(F, loss))
        monkeypatch.setattr(fusedstep.functional, loss, wrong)
    monkeypatch.setattr(fusedstep, "SGD", SlightlyWrongSGD)
    monkeypatch.setattr(suite, "measure", lambda *arguments: pytest.fail("it was timed"))
    with pytest.raises(SystemExit) as exit:
        run(script, f"{TINY[script]} --quick")
    error = capsys.readouterr().err
    assert exit.value.code == 1
    assert error.startswith("error: 2 of 2 cases failed, first ") and error.count("\n") == 1
    assert "not timed" in error


@pytest.mark.parametrize("wrong", [float("nan"), 1.1])
def test_require_close_names_what_is_wrong(wrong: float) -> None:
    expected = torch.ones(3, dtype=torch.float64)
    correctness.require_close("the sum", expected.float(), expected, rtol=0, atol=0)
    with pytest.raises(correctness.WrongResult, match="the sum"):
        correctness.require_close("the sum", wrong * expected, expected, rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((2.0, "2.00 s"), (0.99999, "1.00 s"), (0.9994, "999 ms"), (0.0999, "99.9 ms")),
        *((1.234e-5, "12.3 µs"), (1e-3, "1.00 ms"), (5e-9, "5.00 ns"), (0.0, "0.00 s")),
    ],
)
def test_seconds_have_three_digits_and_their_unit(value: float, text: str) -> None:
    assert report.seconds(value) == text


def test_errors_are_compared_by_their_norm() -> None:
    expected = torch.ones(100, dtype=torch.float64)
    actual = expected.float()
    actual[0] += 0.09
    correctness.require_close_in_norm("the sum", actual, expected, 0.01)
    for wrong in (0.2, float("nan")):
        actual[0] = 1 + wrong
        with pytest.raises(correctness.WrongResult, match="the sum"):
            correctness.require_close_in_norm("the sum", actual, expected, 0.01)


# The check of a GPU, tried out on the CPU


class Overwriting(torch.autograd.Function):
    """A loss that leaves its gradient where the logits were."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        copy = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(copy, y)
        (gradient,) = torch.autograd.grad(loss, copy)
        x.untyped_storage().copy_(gradient.untyped_storage())
        ctx.gradient = gradient
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.gradient * grad_output, None


def refuse_everything(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no such\narchitecture")


@pytest.mark.usefixtures("small_copy", "short_blocks")
def test_the_check_names_what_it_measures_and_what_it_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    others = {
        "native": peers.Other(lambda: F.cross_entropy),
        "quack": peers.Other(lambda: F.cross_entropy, plain_matrices_only=True),
        "Liger": peers.Other(lambda: Overwriting.apply, overwrites_logits=True),
        "wrong": peers.Other(lambda: partial(slightly_wrong_loss, F.cross_entropy)),
        "broken": peers.Other(lambda: refuse_everything),
        "missing": peers.Other(lambda: __import__("no_such_peer")),
    }
    monkeypatch.setattr(peers, "LOSSES", others)
    monkeypatch.setattr(bench_cross_entropy, "LOSSES", others)
    monkeypatch.setitem(peers.TOLERANCE, torch.float32, 1e-5)
    path = tmp_path / "check.json"
    names = ",".join([*others, "for-loop", "fused"])
    run("gpu_check", f"{TINY_CHECK} --against {names} --json {path}")
    output = capsys.readouterr().out
    assert "missing: absent: ModuleNotFoundError: No module named 'no_such_peer'" in output
    assert output.index("SGD.step()") < output.index("Goals")

    results = Results.load(path)
    assert results.implementations["native"] == f"torch {torch.__version__}"
    assert results.failures == {} and results.left_out == []
    rows = {(row.case.partition(":")[0], row.dtype): row for row in results.rows[:4]}
    assert [(row.case.partition(":")[0], row.dtype) for row in results.rows] == [
        (case, dtype)
        for case in ("3x5", "2x3x4", "lenet", "lenet")
        for dtype in ("bfloat16", "float32")
    ]
    matrix, image = rows["3x5", "float32"], rows["2x3x4", "float32"]
    assert set(matrix.implementations) == {OURS, "native", "quack", "Liger"}
    assert matrix.missing["broken"] == "failed: RuntimeError: no such architecture"
    assert matrix.missing["wrong"].startswith("wrong: ")
    assert image.missing["quack"] == "not covered"
    assert (matrix.bytes_moved, image.bytes_moved) == (2 * 15 * 4, 2 * 24 * 4)
    assert (gpu_check.kind(matrix), gpu_check.kind(image)) == ("CNN", "other")
    plain, momentum = (results.rows[index] for index in (5, 6))
    assert plain.bytes_moved == 3 * 4 * 81_194 and momentum.bytes_moved == 5 * 2 * 81_194
    assert gpu_check.kind(plain) == "lenet" and plain.others == ["for-loop", "fused"]


def test_a_large_copy_counts_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {OURS: [4.0] * 3, LARGE_COPY: [1.0] * 3}
    monkeypatch.setattr(suite, "measure", lambda *arguments: timing.Measurement(times))
    work = suite.Work(
        "native", {OURS: lambda: [lambda: None]}, {LARGE_COPY: []}, None, 4 * suite.COPY_BYTES
    )
    sessions = suite.Session(cli.require_fusedstep(), "cpu", 1, {})
    row = sessions.row(bench_cross_entropy.sized("3x5"), work)
    # twice the bytes that the copy reads and writes, in four times its time
    assert gpu_check.copy_share(row) == 0.5
    assert row.share is not None and row.share.median == 0.5


@pytest.mark.usefixtures("small_copy", "short_blocks")
def test_wrong_results_are_named_and_the_check_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong_loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return 1.1 * F.cross_entropy(x, y)

    monkeypatch.setattr(cli.require_fusedstep().functional, "cross_entropy", wrong_loss)
    with pytest.raises(SystemExit) as exit:
        run("gpu_check", TINY_CHECK)
    output = capsys.readouterr()
    assert exit.value.code == 1
    assert output.err.startswith("error: 4 of 8 cases failed")
    assert output.out.count("wrong: WrongResult: not timed, the gradient of") == 4
    assert "lenet" in output.out


def test_every_part_of_the_batch_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    class LastRow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            gradient = gradient.clone()
            gradient[-1] *= 1.01
            return gradient

    monkeypatch.setattr(bench_cross_entropy, "REFERENCE_ELEMENTS", 11)
    case = bench_cross_entropy.sized("5x4x2")
    reference = case.operands("cpu")
    case.check(OURS, F.cross_entropy, reference)
    with pytest.raises(correctness.WrongResult, match="the gradient"):
        case.check("other", lambda x, y: F.cross_entropy(LastRow.apply(x), y), reference)
    with pytest.raises(correctness.WrongResult, match="the loss"):
        case.check("other", lambda x, y: F.cross_entropy(x, y) + 0.1, reference)


@pytest.mark.usefixtures("small_copy", "short_blocks")
def test_without_time_nothing_is_compiled_and_then_nothing_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], session: suite.Session
) -> None:
    late = replace(session, implementations={"compile": "torch"}, compile_until=-math.inf)
    for case in (
        bench_cross_entropy.sized("3x5"),
        bench_pointwise_loss.Case("mse_loss", (7,)),
        bench_linear_cross_entropy.Case(4, 3, 5),
        bench_sgd.Case("", [(3,)], "plain"),
    ):
        assert case.measured(late).missing == {"compile": "no time"}
    path = tmp_path / "check.json"
    run("gpu_check", f"{TINY_CHECK} --minutes 0 --json {path}")
    output = capsys.readouterr().out
    assert "no time was left for" in output and "not measured" in output
    results = Results.load(path)
    assert len(results.left_out) == 8 and results.rows == []


def test_a_case_shrinks_to_the_memory() -> None:
    case = bench_cross_entropy.sized("2048x1000")
    row_bytes = 4000 * gpu_check.LOGITS_IN_MEMORY
    assert gpu_check.fitted(case, 10**12) == case
    assert gpu_check.fitted(case, 100 * row_bytes + 1).shape == (100, 1000)
    assert str(gpu_check.fitted(case, 0)) == "1x1000"


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((8192, 4096), "vocabulary"),
        ((1, 4095), "other"),
        ((4096, 1000), "CNN"),
        ((4097, 10), "other"),
        ((16, 21, 512, 512), "other"),
    ],
)
def test_goals_are_by_kinds_of_logits(shape: tuple[int, ...], kind: str) -> None:
    row = fake_row(bench_cross_entropy.sized("x".join(map(str, shape))))
    assert gpu_check.kind(row) == kind


def section(name: str, ts: float, dur: float, cat: str = "user_annotation") -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}


def test_launches_are_counted_by_section() -> None:
    events = [
        section("forward", 1000, 500),
        section("backward", 2000, 500),
        section("forward", 1100, 90, cat="gpu_user_annotation"),
        section("idle", 3000, 500),
        section("aten::add", 1150, 9, cat="cpu_op"),
        section("cudaLaunchKernel", 1150, 9, cat="cuda_runtime"),
        *(section(f"loss_kernel_{i}", 1160 + i, 9, cat="kernel") for i in range(2)),
        section("Memset (Device)", 1200, 1, cat="gpu_memset"),
        section("gradient_kernel", 2100, 9, cat="kernel"),
        section("Memcpy DtoH", 2200, 9, cat="gpu_memcpy"),
        section("unnamed_kernel", 1700, 9, cat="kernel"),
        {"ph": "M", "name": "process_name"},
    ]
    assert launches.by_section(events, ["forward", "backward", "idle"]) == {
        "forward": Launches(kernels=2, copies=1),
        "backward": Launches(kernels=1, copies=1),
        "idle": Launches(kernels=0, copies=0),
    }


def test_a_profiler_that_sees_no_gpu_counts_nothing() -> None:
    calls: list[str] = []
    parts = {"first": lambda: calls.append("a"), "second": lambda: calls.append("b")}
    assert launches.count(parts, "cpu") == {}
    assert calls == list("abab")


def test_backward_is_called_apart_from_forward() -> None:
    operands = bench_cross_entropy.sized("3x5").operands("cpu")
    parts = bench_cross_entropy.halves("native", F.cross_entropy, operands)
    for _ in range(2):
        parts["native forward"]()
        assert operands.x.grad is None
        parts["native backward"]()
        _, gradient = operands.loss_and_gradient(F.cross_entropy)
        assert torch.equal(operands.x.grad, gradient)


def fake_row(case: suite.Case, **changes: Any) -> Row:
    """One that meets every goal; `copy` and `faster` set how much longer others take."""
    copy, faster = changes.pop("copy", 0.95), changes.pop("faster", {})
    is_loss = case.operation == "cross_entropy"
    others = peers.LOSSES if is_loss else peers.OPTIMIZERS
    parts = [f"{OURS} {half}" for half in ("forward", "backward")] if is_loss else [OURS]
    times = {OURS: 1.0, LARGE_COPY: copy} | dict.fromkeys(others, 123.456) | faster
    row = Row(
        operation=case.operation,
        case=str(case),
        dtype=case.dtype,
        threads=1,
        native="native" if is_loss else "foreach",
        floors=[LARGE_COPY],
        samples={name: [0.012345 * time] * 3 for name, time in times.items()},
        bytes_moved=2**30,
        peak_bytes={OURS: 2**29, "native": 2**30},
        launched={part: Launches(1, 0) for part in parts},
        replayed=True,
    )
    return replace(row, **changes)


def test_the_tables_fit_in_12000_characters() -> None:
    rows = [fake_row(case) for case in gpu_check.Options(device="cpu").cases]
    assert len(rows) == 11 * 2 + 4 * 2 * 2
    with report.console.capture() as capture:
        gpu_check.show(rows, [goal.verdict(rows) for goal in gpu_check.GOALS])
    shown = capture.get()
    assert len(shown) < 12_000
    assert "2048x262144" in shown and "91.6 GB/s" in shown
    assert shown.count(" met ") == len(gpu_check.GOALS)


def verdicts(*rows: Row) -> dict[str, goals.Verdict]:
    return {goal.text: goal.verdict(rows) for goal in gpu_check.GOALS}


def test_a_goal_is_judged_by_its_worst_case() -> None:
    wide = replace(bench_cross_entropy.sized("8x32000"), dtype="bfloat16")
    cnn = bench_cross_entropy.sized("64x10")
    step = bench_sgd.Case("cifar", [(3,)], "plain")
    rows = [
        fake_row(wide),
        fake_row(wide, copy=0.5, dtype="float32"),
        fake_row(cnn, faster={"native": 2.0}),
        fake_row(cnn, launched={"fusedstep forward": Launches(1, 1)}, replayed=False),
        fake_row(step, faster={"fused": 2.9}),
    ]
    found = verdicts(*rows)
    share = found["vocabulary: share of copy bandwidth"]
    assert (share.figure, share.case, share.met) == (0.5, "8x32000", False)
    assert found["vocabulary: quack / fusedstep"].met
    assert found["CNN: launches forward"].figure == 2 and not found["CNN: launches forward"].met
    assert found["CNN: launches backward"].met
    assert found["CNN: fusedstep / native"].figure == 0.5
    assert not found["CNN: fusedstep / native"].met
    assert found["SGD: launches a step"].met
    assert found["SGD, from 25M floats: share of copy bandwidth"].met is None
    assert not found["SGD, CIFAR CNN: fused=True / fusedstep"].met
    assert not found["replayed in a CUDA graph"].met


def test_what_was_not_measured_is_not_met() -> None:
    assert {verdict.met for verdict in verdicts().values()} == {None}
    case = bench_cross_entropy.sized("64x10")
    on_cpu = fake_row(case, launched={}, replayed=None, samples={OURS: [1.0]}, floors=[])
    assert {verdict.met for verdict in verdicts(on_cpu).values()} == {None}


@pytest.mark.usefixtures("small_copy", "short_blocks")
def test_the_check_looks_into_what_runs_on_a_card(device: str, tmp_path: Path) -> None:
    path = tmp_path / "check.json"
    arguments = "--sizes 64x10,4x5000 --sets lenet --against native,fused --quick"
    run("gpu_check", f"{UNHURRIED} {arguments} --device {device} --json {path}")
    results = Results.load(path)
    assert results.failures == {} and results.left_out == []
    for row in results.rows:
        if device == "cpu":
            assert row.replayed is None and row.launched == {}
        else:
            assert row.replayed and row.launched
        if gpu_check.kind(row) == "vocabulary":
            assert row.peak_bytes[OURS] < row.peak_bytes["native"]


def test_training_runs_on_the_device(device: str) -> None:
    result = training.train(config(device=device))
    assert all(epoch.loss_difference < 1e-2 for epoch in result.epochs)


# Reports


def made_up(ratio: float = 2.0, spread: float = 0.01, seed: int = 0) -> Results:
    """Results of which torch's default takes `ratio` as long as fusedstep, but for one lost row."""
    random = torch.Generator().manual_seed(seed)

    def samples(**times: float) -> dict[str, list[float]]:
        noise = 1 + spread * torch.randn(21, generator=random)
        return {name: (1e-3 * time * noise).tolist() for name, time in times.items()}

    def row(operation: str, case: str, native: str = "native", **more: Any) -> Row:
        found = samples(fusedstep=1.0, floor=0.8) | samples(**{native: ratio})
        return Row(operation, case, "float32", 1, native, ["floor"], found, **more)

    points = [suite.Point("a plot", "rows N", x) for x in (1, 10, 100)]
    lost = row("pointwise_loss", "mse_loss, 9")
    lost.samples["compile"] = [0.5 * value for value in lost.samples[OURS]]
    rows = [
        row("cross_entropy", "64x10", bytes_moved=5120, peak_bytes={OURS: 2560, "native": 7680}),
        lost,
        row("sgd", "cifar: 10 tensors, plain", "for-loop", missing={"compile": "no time"}),
        row("train_step", "LeNet, batch 4, plain", shares={OURS: 0.1, "native": 0.2}),
        row("train_step", "LeNet, batch 16, plain", shares={OURS: 0.1, "native": 0.2}),
        row("training", "LeNet, batch 4, 2 steps", losses={OURS: [2.0, 1.0], "native": [2.0, 1.1]}),
        *(row("cross_entropy", f"{point.x:g}x10", point=point) for point in points),
        row("sgd", "flat, plain", "for-loop", point=suite.Point("SGD, flat", "threads", 2)),
        Row(
            "bandwidth",
            "1 MiB",
            "float32",
            1,
            "",
            list(tables.ARRAYS_MOVED),
            samples(copy=1.0, exp=2.0, add_=1.5),
            bytes_moved=2**20,
            point=suite.Point("1 thread", "bytes an array", 2**20),
        ),
    ]
    environment = report.environment("cpu") | {"command": "python benchmarks/run.py <&>"}
    found = {"native": "torch 2", "Liger": "absent: it needs CUDA"}
    return Results(environment, found, rows, {"sgd: large": "no memory"}, ["sgd: larger"])


def test_results_survive_their_file(tmp_path: Path) -> None:
    results = made_up()
    launched = {"fusedstep forward": Launches(1, 2)}
    results.rows[0] = replace(results.rows[0], launched=launched, replayed=True)
    results.save(tmp_path / "results.json")
    again = Results.load(tmp_path / "results.json")
    assert again.environment == results.environment and again.failures == results.failures
    for ours, theirs in zip(again.rows, results.rows, strict=True):
        assert replace(ours, samples={}) == replace(theirs, samples={})
        for name, seconds in theirs.samples.items():
            assert ours.samples[name] == pytest.approx(seconds, rel=1e-4)


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": []}', '{"rows": [{"case": 1}]}'])
def test_what_is_not_results_gets_one_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    status, line = refusal("run", f"--results {path} --out {tmp_path}", capsys)
    assert status == 2 and "holds no results" in line


def test_a_report_stands_alone_and_shows_losses_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = made_up()
    results.save(tmp_path / "results.json")
    arguments = f"--results {tmp_path / 'results.json'} --out {tmp_path / 'out'}"
    with pytest.raises(SystemExit) as exit:  # a case has failed
        run("run", f"{arguments} --compare {tmp_path / 'results.json'}")
    assert exit.value.code == 1
    html = (tmp_path / "out" / "report.html").read_text()
    for reference in ("http:", "https:", "<script", "<link", "@import", "url("):
        assert reference not in html
    assert html.count("data:image/svg+xml;base64,") == html.count("<img ") > 6
    titles = [
        *("Changes", "Where fusedstep is slower", "In short", "How to read this"),
        *("Cross-entropy, forward and backward", "A step of SGD", "Whole training steps"),
        *("Scaling with size", "Scaling with threads", "The machine&#39;s bandwidth"),
        *("Training runs", "What was measured where"),
    ]
    places = [html.index(f"<h2>{title}</h2>") for title in titles]
    assert places == sorted(places)
    for part in (
        *("mse_loss, 9", "torch.compile", "0.50 (0.50 – 0.50)", "absent: it needs CUDA"),
        *("sgd: large: no memory", "sgd: larger", "&lt;&amp;&gt;", torch.__version__),
        *("1 of 10", "80% of the floor", "20%", "there is no crossover", "no time"),
    ):
        assert part in html, part
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.index("mse_loss, 9") < text.index("## In short")
    drawn = sorted(path.stem for path in (tmp_path / "out" / "plots").iterdir())
    assert all(f"](plots/{name}.svg)" in text for name in drawn) and "overview" in drawn
    assert "| cifar: 10 tensors, plain |" in text
    assert "report: " in capsys.readouterr().out


def test_a_crossover_is_called_out() -> None:
    results = made_up(ratio=0.9)
    text = page.crossovers(page.by_plot(results.compared))
    assert "rows N = 100 (0.90)" in text


def test_changes_beyond_the_noise_are_flagged() -> None:
    old = made_up(2.0)
    slower, same, faster = (
        compare.changes(made_up(ratio, seed=1), old) for ratio in (1.9, 2.0, 2.1)
    )
    assert {change.verdict for change in slower} == {compare.SLOWER}
    assert {change.verdict for change in same} == {compare.NOISE}
    assert {change.verdict for change in faster} == {compare.FASTER}
    assert all(change.low < change.ratio < change.high for change in same)
    assert slower[0].ratio == pytest.approx(2.0 / 1.9, rel=0.02)
    noisy = compare.changes(made_up(1.9, spread=0.5, seed=1), made_up(2.0, spread=0.5))
    assert {change.verdict for change in noisy} == {compare.NOISE}
    assert len(slower) == len(old.compared)


def test_only_rows_of_both_runs_are_compared() -> None:
    old, new = made_up(), made_up()
    new.rows[0] = replace(new.rows[0], dtype="bfloat16")
    assert len(compare.changes(new, old)) == len(old.compared) - 1


@pytest.mark.usefixtures("short_blocks")
def test_everything_runs_by_one_command(tmp_path: Path) -> None:
    run(
        "run",
        f"{UNHURRIED} --quick --ops cross_entropy,sgd,train_step --sizes 3x5 --sets lenet "
        f"--models lenet --batch-sizes 2 --against native,for-loop,fused --out {tmp_path / 'out'}",
    )
    results = Results.load(tmp_path / "out" / "results.json")
    assert [row.operation for row in results.rows] == [
        *("cross_entropy", "sgd", "sgd", "sgd", "train_step", "train_step", "training")
    ]
    (run_,) = (row for row in results.rows if row.losses)
    assert tables.loss_difference(run_) < 1e-4 and len(run_.losses[OURS]) == 100
    step = results.rows[4]
    assert 0 < step.shares["native"] < 1 and step.floor == bench_train_step.NETWORK_ALONE
    assert (tmp_path / "out" / "report.html").exists()


def test_a_run_leaves_out_what_it_has_no_time_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_all.Options(quick=True).seconds == 900 and run_all.Options().seconds == math.inf
    run("run", f"--ops sgd --sets lenet --minutes 0 --out {tmp_path}")
    results = Results.load(tmp_path / "results.json")
    assert results.rows == [] and len(results.left_out) == 3
    assert "left out for lack of time: 3 cases" in capsys.readouterr().out
    assert "No time was left for sgd: lenet" in (tmp_path / "report.html").read_text()


def test_processes_agree_on_how_long_a_block_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    measured = timing.measure(
        {"x": machine.candidate("x", 1.0)}, "cpu", 20, 12.0, agreed=lambda seconds: 3 * seconds
    )
    assert measured.seconds["x"] == [3.0] * timing.LEAST_ROUNDS


def test_page_faults_are_those_of_the_call() -> None:
    def call() -> None:
        torch.zeros(2**24 + 2**22)  # from 32 MiB on glibc maps memory anew at every call

    few = memory.footprint(lambda: None, "cpu").page_faults
    assert few is not None and few < 100
    many = memory.footprint(call, "cpu").page_faults
    assert many is not None and many > few


def test_the_estimate_of_the_time_left_knows_sizes() -> None:
    def sgd(floats: int, **more: Any) -> bench_sgd.Case:
        return bench_sgd.Case("", [(floats,)], "plain", **more)

    point = suite.Point("a plot", "parameters", 1)
    for less, more in (
        (sgd(1000, point=point), sgd(1000)),
        (sgd(1000), sgd(10**8)),
        *(
            (kind("cifar", 4, last), kind("cifar", 64, last))
            for kind, last in (
                (bench_train_step.Case, "plain"),
                (bench_data_parallel.Case, "momentum"),
            )
        ),
        (bench_train_step.Case("lenet", 4, "plain"), bench_train_step.Case("cifar", 4, "plain")),
        (bench_train_step.Training("cifar", 1), bench_train_step.Training("cifar", 2)),
    ):
        assert 0 < less.expected_seconds < more.expected_seconds


def test_a_quick_run_has_time_for_everything() -> None:
    options = run_all.Options(quick=True)
    expected = sum(case.expected_seconds for case in options.cases)
    assert expected < run_all.BEGINNING * options.seconds
    sizes = {(case.model, case.batch_size) for case in options.cases if hasattr(case, "batch_size")}
    assert {(name, size) for name in NETWORKS for size in (1, 4, 16, 64, 256)} < sizes
    assert {"resnet18", "transformer"} < {name for name, _ in sizes}


def test_every_operation_has_cases() -> None:
    for quick in (True, False):
        for operation in run_all.OPERATIONS:
            assert run_all.Options(quick=quick, ops=operation).cases


def test_timed_steps_leave_the_network_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained on one batch it would end with a loss of 0 and subnormal momentum, which is slow."""
    trainers = []
    trainer = bench_train_step.Case.trainer

    def noted(*arguments: Any, **options: Any) -> Any:
        trainers.append(trainer(*arguments, **options))
        return trainers[-1]

    case = bench_train_step.Case("lenet", 1, "momentum")
    monkeypatch.setattr(bench_train_step.Case, "trainer", noted)
    work = case.work(suite.Session(cli.require_fusedstep(), "cpu", 1, {}))
    timed = trainers[-len(case.implementations) :]
    before = [[p.detach().clone() for p in one.model.parameters()] for one in timed]
    for make in work.implementations.values():
        for call in make():
            for _ in range(3):
                call()
    for one, weights in zip(timed, before, strict=True):
        assert all(map(torch.equal, one.model.parameters(), weights))
        buffers = [state["momentum_buffer"] for state in one.optimizer.state.values()]
        assert len(buffers) == len(weights) and any(buffer.any() for buffer in buffers)


@pytest.mark.parametrize("operation", ["train_step", "data_parallel"])
@pytest.mark.parametrize("model", bench_train_step.MODELS)
def test_only_the_chosen_network_is_measured(operation: str, model: str) -> None:
    cases = run_all.Options(ops=operation, models=model).cases
    assert {case.model for case in cases} == {model}


def test_each_implementation_can_be_named_in_a_list() -> None:
    assert list(cli.items("--against", ",".join(peers.ALL), peers.ALL)) == list(peers.ALL)


# Networks of the whole step


@pytest.mark.parametrize(
    ("name", "parameters"), [("resnet18", 11_689_512), ("transformer", 19_559_936)]
)
def test_a_larger_network_has_its_size_and_all_gradients(name: str, parameters: int) -> None:
    model = bench_train_step.MODELS[name]
    torch.manual_seed(0)
    network = model.build()
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    inputs, labels = next(iter(model.stream(2)))
    outputs = network(inputs)
    assert outputs.shape == (len(labels), 32_000 if name == "transformer" else 1000)
    F.cross_entropy(outputs, labels).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_a_transformer_does_not_look_ahead() -> None:
    torch.manual_seed(0)
    network = bench_train_step.Transformer().eval()
    tokens, _ = bench_train_step.sequences(1)
    changed = tokens.clone()
    changed[0, 40] += 1
    with torch.no_grad():
        before, after = network(tokens), network(changed % 32_000)
    torch.testing.assert_close(before[:40], after[:40])
    assert not torch.equal(before[40:], after[40:])


# Goals


def test_goals_of_the_cpu_are_judged_beside_their_floors() -> None:
    def row(operation: str, case: str, ours: float, floor: str, **times: float) -> Row:
        samples = {name: [1e-6 * time] * 3 for name, time in {OURS: ours, **times}.items()}
        return Row(operation, case, "float32", 1, next(iter(times)), [floor], samples)

    rows = [
        row("cross_entropy", size, 2.0, "exp", native=18.0, exp=1.0, **{"round trip": 1.9})
        for size in goals.SIZES
    ]
    rows[-1].samples["native"] = [2.5e-6] * 3
    rows.append(replace(rows[0], dtype="bfloat16", samples={OURS: [9.0], "native": [1.0]}))
    rows.append(row("sgd", "cifar: 10 tensors, plain", 30.0, "add_", fused=90.0, add_=19.0))
    rows.append(
        row("train_step", "CIFAR CNN, batch 4, plain", 10.0, "alone", native=11.0, alone=9.5)
    )
    found = {goal.text: goal.verdict(rows) for goal in goals.ON_CPU}
    mean, least, tiny, large, plain, momentum, over, *_ = found.values()
    assert mean.figure == pytest.approx((9**8 * 1.25) ** (1 / 9)) and not mean.met
    assert mean.at_floor == pytest.approx((18**8 * 2.5) ** (1 / 9))
    assert least.figure == pytest.approx(1.25) and least.at_floor == pytest.approx(2.5)
    assert least.case == goals.SIZES[-1] and not least.met
    assert tiny.figure == pytest.approx(2 / 1.9) and tiny.met
    assert large.figure == pytest.approx(2.0) and not large.met
    assert plain.figure == pytest.approx(3.0) and plain.met
    assert momentum.met is None and momentum.figure is None
    assert over.figure == pytest.approx(11.0) and not over.met and over.unit == " µs"
    step = found["training step, CIFAR CNN, batch 4, plain: torch / fusedstep"]
    assert step.figure == pytest.approx(1.1) and step.at_floor == pytest.approx(11 / 9.5)
    assert goals.ON_CPU[0].verdict(rows[:8]).met is None  # one of the sizes is missing
    shown = goals.table("Goals", list(found.values()))
    assert shown.rows[6][2] == "11.00 µs" and shown.slower == {0, 1, 3, 6}


# The README


def test_pages_have_the_figures_of_committed_results() -> None:
    found = set()
    for path in readme.PAGES:
        text = path.read_text()
        found |= set(re.findall(r"<!-- measured: (\w+) from", text))
        assert readme.rendered(text) == text, f"`make readme` rewrites {path.name}"
        for file, plot in readme.pictures(text).items():
            assert unescape(file.read_text()).count(plot.data) == 1, "`make readme` redraws it"
    assert found == set(readme.PARTS)


def test_a_picture_bears_all_its_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = made_up()
    results.save(tmp_path / "results.json")
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "PAGES", [tmp_path / "page.md"])
    monkeypatch.setitem(readme.PLOTS, "sgd_plot", ["a plot", "no such plot"])
    mark = "<!-- measured: {} from results.json -->\n<!-- end -->"
    marks = [mark.format(name) for name in ("cross_entropy_plot", "sgd_plot")]
    (tmp_path / "page.md").write_text("\n\n".join(marks))
    readme.rewrite()
    text = (tmp_path / "page.md").read_text()
    assert "Not measured in results.json" in text and "a plot.](sgd_plot.svg)" in text
    drawn = (tmp_path / "sgd_plot.svg").read_text()
    assert not (tmp_path / "cross_entropy_plot.svg").exists()
    points = [row for row in results.rows if row.point and row.point.plot == "a plot"]
    assert len(points) == 3
    for row in points:
        assert f"{report.seconds(row.time(OURS).median)} at {row.point.x:g}" in drawn
    (plot,) = readme.pictures(text).values()
    assert plot.svg == drawn and plot.data in drawn


def test_a_part_of_the_readme_is_written_between_its_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up().save(tmp_path / "results.json")
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    parts = [
        f"<!-- measured: {name} from results.json -->\nold figures\n<!-- end -->"
        for name in ("source", "overview", "slower", "cross_entropy", "sgd", "goals")
    ]
    text = readme.rendered("\n\n".join(["before", *parts, "after"]))
    assert text.startswith("before") and text.endswith("after") and "old figures" not in text
    assert "| 64x10 | 2.0" in text and "python benchmarks/run.py <&>" in text
    assert tables.losses_table(made_up().compared).note in text
    assert readme.rendered(text) == text
    with pytest.raises(cli.Refusal, match="no part 'speed'"):
        readme.rendered("<!-- measured: speed from results.json -->\n<!-- end -->")
