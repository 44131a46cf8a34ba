"""The benchmarks' own behaviour: what they train, check, measure and report; never how fast."""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import bench_cross_entropy
import bench_pointwise_loss
import bench_sgd
import bench_sgd_mixed_precision
import bench_train_step
import cli
import correctness
import data
import gpu_cases
import gpu_check
import launches
import report
import timing
import train_cnn
import training
from launches import Launches
from models import NETWORKS

BENCHMARKS = Path(cli.__file__).parent

SCRIPTS = {
    "train_cnn": (training.Config, train_cnn.main),
    "bench_cross_entropy": (bench_cross_entropy.Options, bench_cross_entropy.main),
    "bench_pointwise_loss": (bench_pointwise_loss.Options, bench_pointwise_loss.main),
    "bench_sgd": (bench_sgd.Options, bench_sgd.main),
    "bench_sgd_mixed_precision": (
        bench_sgd_mixed_precision.Options,
        bench_sgd_mixed_precision.main,
    ),
    "bench_train_step": (bench_train_step.Options, bench_train_step.main),
    "gpu_check": (gpu_check.Options, gpu_check.main),
}

# The smallest run of each benchmark.
TINY = {
    "bench_cross_entropy": "--sizes 1x10,3x5 --no-shapes",
    "bench_pointwise_loss": "--sizes 7,3x5 --losses mse_loss",
    "bench_sgd": "--sets lenet --modes plain,momentum",
    "bench_train_step": "--models lenet --batch-sizes 1 --modes plain",
}
TINY_CHECK = (
    "--device cpu --quick --sizes 3x5,2x3x4 --sets lenet --losses native,quack --optimizers fused"
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
        ("bench_train_step", "--models vgg", "vgg"),
        ("bench_train_step", "--batch-sizes 1,-4", "1,-4"),
        ("gpu_check", "--device cpu --sizes 64", "64"),
        ("gpu_check", "--device cpu --sizes 0x10", "0x10"),
        ("gpu_check", "--device cpu --sets vgg", "vgg"),
        ("gpu_check", "--device cpu --losses apex", "apex"),
        ("gpu_check", "--device cpu --optimizers adam", "adam"),
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
    assert process.stderr == "error: --threads must be 1 to 1024, not 0\n"


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
    assert "".join(machine.calls) == "012" * 4


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


def test_peak_memory_is_what_a_call_holds_beyond_its_operands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = [100]
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held[-1])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: max(held))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: held.__setitem__(0, 100))
    assert timing.peak_bytes(lambda: held.extend([130, 110]), "cuda") == 30
    assert timing.peak_bytes(lambda: None, "cpu") is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_waited_for() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    _, seconds = timing.timed(lambda: [x @ x for _ in range(20)], "cuda")
    assert seconds > 0
    assert torch.cuda.current_stream().query()


# Benchmarks


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "BLOCK_SECONDS", {"cpu": 1e-5, "cuda": 1e-5})


ROW_KEYS = {
    "bench_cross_entropy": {
        *("case", "dtype", "native", "ours", "speedup", "floor_name", "floor", "over_floor"),
        *("copy_bandwidth", "peak_bytes"),
    },
    "bench_pointwise_loss": {
        *("loss", "size", "dtype", "native", "ours", "speedup", "floor_name", "floor"),
        *("over_floor", "peak_bytes"),
    },
    "bench_sgd": {
        *("set", "tensors", "floats", "mode", "native", "ours", "speedup", "floor", "bandwidth")
    },
    "bench_train_step": {"model", "batch_size", "mode", "native", "ours", "speedup"},
}


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("script", TINY)
def test_a_benchmark_reports_a_table_and_json(
    script: str, device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.json"
    run(script, f"{TINY[script]} --device {device} --quick --json {path}")
    assert "geometric mean" in capsys.readouterr().out
    document = json.loads(path.read_text())
    assert set(document) == {"environment", "rows", "summary"}
    assert set(document["environment"]) == {
        *("torch", "fusedstep", "python", "cpu", "capability", "cores", "threads", "gpu"),
        *("command", "date"),
    }
    assert document["environment"]["torch"] == torch.__version__
    assert document["environment"]["threads"] == 1
    assert (document["environment"]["gpu"] is None) == (device == "cpu")
    assert len(document["rows"]) == (1 if script == "bench_train_step" else 2)
    for row in document["rows"]:
        assert set(row) == ROW_KEYS[script]
        assert set(row["ours"]) == {"median", "low", "high"}
        assert row["ours"]["low"] <= row["ours"]["median"] <= row["ours"]["high"]
    assert all(isinstance(value, float) for value in document["summary"].values())


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("case", bench_cross_entropy.SHAPES, ids=lambda case: case.name)
def test_every_shape_is_measured(case: bench_cross_entropy.Case, device: str) -> None:
    _, classes, *positions = case.shape
    small = replace(case, shape=(2, classes, *(3 for _ in positions)))
    x = small.operands(torch.float32, device).x
    assert x.is_contiguous() != case.channels_last
    options = bench_cross_entropy.Options(device=device, quick=True)
    row = bench_cross_entropy.bench(small, "float32", options, F.cross_entropy)
    assert row.case == case.name
    assert (row.peak_bytes is None) == (row.copy_bandwidth is None) == (device == "cpu")


@pytest.mark.parametrize(("size", "floor"), [("255x1000", "round trip"), ("256x1000", "exp")])
@pytest.mark.usefixtures("short_blocks")
def test_the_floor_follows_the_size(size: str, floor: str) -> None:
    options = bench_cross_entropy.Options(quick=True)
    case = bench_cross_entropy.case(size)
    assert bench_cross_entropy.bench(case, "float32", options, F.cross_entropy).floor_name == floor


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("dtype", bench_pointwise_loss.DTYPES)
@pytest.mark.parametrize("loss", bench_pointwise_loss.LOSSES)
def test_every_pointwise_loss_is_measured(loss: str, dtype: str, device: str) -> None:
    options = bench_pointwise_loss.Options(device=device, quick=True)
    case = bench_pointwise_loss.Case(loss, (2, 3, 5), dtype)
    ours = getattr(cli.require_fusedstep().functional, loss)
    row = bench_pointwise_loss.bench(case, options, ours)
    assert (row.loss, row.size, row.dtype) == (loss, "2x3x5", dtype)
    assert (row.peak_bytes is None) == (device == "cpu")


@pytest.mark.parametrize(("size", "floor"), [(255_999, "round trip"), (256_000, "add")])
@pytest.mark.usefixtures("short_blocks")
def test_the_floor_of_a_pointwise_loss_follows_the_size(size: int, floor: str) -> None:
    options = bench_pointwise_loss.Options(quick=True)
    case = bench_pointwise_loss.Case("mse_loss", (size,), "float32")
    assert bench_pointwise_loss.bench(case, options, F.mse_loss).floor_name == floor


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
    shapes = bench_sgd.SETS[name]()
    assert len(shapes) == tensors
    assert sum(math.prod(shape) for shape in shapes) == floats


def slightly_wrong_loss(
    right: Callable[..., torch.Tensor], *arguments: Any, **options: Any
) -> torch.Tensor:
    loss = right(*arguments, **options)
    return loss + 1e-4 * (loss - loss.detach())  # the value is right, the gradient is not


class SlightlyWrongSGD(torch.optim.SGD):
    def __init__(self, parameters: Any, lr: float, **settings: Any) -> None:
        super().__init__(parameters, lr=lr * 1.01, **settings)


@pytest.mark.parametrize("script", TINY)
def test_wrong_results_are_not_timed(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fusedstep = cli.require_fusedstep()
    for loss in ("cross_entropy", "mse_loss"):
        wrong = partial(slightly_wrong_loss, getattr(F, loss))
        monkeypatch.setattr(fusedstep.functional, loss, wrong)
    monkeypatch.setattr(fusedstep, "SGD", SlightlyWrongSGD)
    for module in (bench_cross_entropy, bench_pointwise_loss, bench_sgd, bench_train_step):
        monkeypatch.setattr(module, "measure", lambda *arguments: pytest.fail("it was timed"))
    status, line = refusal(script, TINY[script], capsys)
    assert status == 1
    assert "not timed" in line


@pytest.mark.parametrize("wrong", [float("nan"), 1.1])
def test_require_close_names_what_is_wrong(wrong: float) -> None:
    expected = torch.ones(3, dtype=torch.float64)
    correctness.require_close("the sum", expected.float(), expected, rtol=0, atol=0)
    with pytest.raises(correctness.WrongResult, match="the sum"):
        correctness.require_close("the sum", wrong * expected, expected, rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.0, "2.00 s"), (0.99999, "999.99 ms"), (1.234e-5, "12.34 µs"), (5e-9, "5.00 ns")],
)
def test_seconds_carry_their_unit(value: float, text: str) -> None:
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


@pytest.fixture
def small_copy(monkeypatch: pytest.MonkeyPatch, short_blocks: None) -> None:
    monkeypatch.setattr(gpu_cases, "COPY_BYTES", 2**12)


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


@pytest.mark.usefixtures("small_copy")
def test_the_check_names_what_it_measures_and_what_it_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    others = {
        "native": gpu_cases.OtherLoss(lambda: F.cross_entropy),
        "quack": gpu_cases.OtherLoss(lambda: F.cross_entropy, matrices_only=True),
        "Liger": gpu_cases.OtherLoss(lambda: Overwriting.apply, overwrites_logits=True),
        "compile": gpu_cases.OtherLoss(lambda: partial(slightly_wrong_loss, F.cross_entropy)),
        "broken": gpu_cases.OtherLoss(lambda: refuse_everything),
        "missing": gpu_cases.OtherLoss(lambda: __import__("no_such_peer")),
    }
    monkeypatch.setattr(gpu_cases, "LOSSES", others)
    monkeypatch.setattr(gpu_check, "LOSSES", others)
    monkeypatch.setitem(gpu_cases.OTHERS_TOLERANCE, torch.float32, 1e-5)
    path = tmp_path / "check.json"
    run("gpu_check", f"{TINY_CHECK} --losses {','.join(others)} --json {path}")
    output = capsys.readouterr().out
    assert "missing: absent: ModuleNotFoundError: No module named 'no_such_peer'" in output
    assert output.index("copy bandwidth") < output.index("SGD.step()") < output.index("Goals")

    document = json.loads(path.read_text())
    assert document["implementations"]["native"] == f"torch {torch.__version__}"
    assert document["failures"] == {} and document["left_out"] == []
    rows = {(row["case"], row["dtype"]): row for row in document["rows"]}
    assert list(rows) == [
        (case, dtype)
        for case in ("3x5", "2x3x4", "lenet, plain", "lenet, momentum")
        for dtype in ("bfloat16", "float32")
    ]
    matrix, image = rows["3x5", "float32"], rows["2x3x4", "float32"]
    assert set(matrix["ratio"]) == {"native", "quack", "Liger"}
    assert set(matrix["seconds"]) == {"fusedstep", "native", "quack", "Liger"}
    assert matrix["missing"]["broken"] == "failed: RuntimeError: no such architecture"
    assert matrix["missing"]["compile"].startswith("wrong: ")
    assert image["missing"]["quack"] == "not covered"
    assert (matrix["bytes_moved"], image["bytes_moved"]) == (2 * 15 * 4, 2 * 24 * 4)
    assert (matrix["kind"], image["kind"]) == ("CNN", "other")
    assert rows["lenet, plain", "float32"]["bytes_moved"] == 3 * 4 * 81_194
    assert rows["lenet, momentum", "bfloat16"]["bytes_moved"] == 5 * 2 * 81_194
    for row in rows.values():
        took = row["seconds"]["fusedstep"]["median"]
        share = row["bytes_moved"] / took / row["copy_bandwidth"]
        assert row["share"]["median"] == pytest.approx(share, rel=10)
        assert row["share"]["low"] <= row["share"]["median"] <= row["share"]["high"]


@pytest.mark.usefixtures("small_copy")
def test_the_share_of_copy_bandwidth_is_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"fusedstep": [4.0] * 3, "copy": [1.0] * 3}
    monkeypatch.setattr(gpu_cases, "measure", lambda *arguments: timing.Measurement(times))
    case = gpu_cases.StepCase("lenet", "plain", "float32")
    row = session().row(case, 4 * 2**12, [lambda: None], {})
    assert row.share.median == 0.5  # twice the bytes of the copy in four times its time
    assert row.copy_bandwidth == 2 * 2**12


def session(seconds: float = 60.0, **losses: Any) -> gpu_cases.Session:
    fusedstep = cli.require_fusedstep()
    return gpu_cases.Session(fusedstep, losses, {}, "cpu", 1, seconds)


@pytest.mark.usefixtures("small_copy")
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
    assert output.err == "error: 4 of 8 cases failed\n"
    assert output.out.count("wrong: WrongResult: not timed, the gradient of") == 4
    assert "lenet, momentum" in output.out


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

    monkeypatch.setattr(gpu_cases, "REFERENCE_ELEMENTS", 11)
    case = gpu_cases.LossCase((5, 4, 2), "float32")
    (reference,) = bench_cross_entropy.operand_sets(case._case, torch.float32, "cpu")
    case._check(F.cross_entropy, reference, exact=True)
    with pytest.raises(correctness.WrongResult, match="the gradient"):
        case._check(lambda x, y: F.cross_entropy(LastRow.apply(x), y), reference, exact=False)
    with pytest.raises(correctness.WrongResult, match="the loss"):
        case._check(lambda x, y: F.cross_entropy(x, y) + 0.1, reference, exact=False)


@pytest.mark.usefixtures("small_copy")
def test_without_time_nothing_is_compiled_and_then_nothing_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = gpu_cases.OtherLoss(lambda: F.cross_entropy, compiles=True)
    monkeypatch.setitem(gpu_cases.LOSSES, "quack", compiled)
    row = gpu_cases.LossCase((3, 5), "float32").measured(session(0.0, quack=F.cross_entropy))
    assert row.missing == {"quack": "no time"}
    path = tmp_path / "check.json"
    run("gpu_check", f"{TINY_CHECK} --minutes 0 --json {path}")
    output = capsys.readouterr().out
    assert "no time was left for" in output and "not measured" in output
    document = json.loads(path.read_text())
    assert len(document["left_out"]) == 8 and document["rows"] == []


def test_a_case_shrinks_to_the_memory() -> None:
    case = gpu_cases.LossCase((2048, 1000), "float32")
    row_bytes = 4000 * gpu_cases.LOGITS_IN_MEMORY
    assert case.fitted(10**12) == case
    assert case.fitted(100 * row_bytes + 1).shape == (100, 1000)
    assert case.fitted(0).shape == (1, 1000)


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
    assert gpu_cases.LossCase(shape, "float32").kind == kind


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
    case = gpu_cases.LossCase((3, 5), "float32")
    (operands,) = bench_cross_entropy.operand_sets(case._case, torch.float32, "cpu")
    parts = gpu_cases.halves("native", F.cross_entropy, operands)
    for _ in range(2):
        parts["native forward"]()
        assert operands.x.grad is None
        parts["native backward"]()
        _, gradient = operands.loss_and_gradient(F.cross_entropy)
        assert torch.equal(operands.x.grad, gradient)


def fake_row(case: gpu_cases.LossCase | gpu_cases.StepCase, **changes: Any) -> gpu_cases.Row:
    spread = timing.Spread(0.012345, 0.01, 0.02)
    is_loss = isinstance(case, gpu_cases.LossCase)
    others = gpu_cases.LOSSES if is_loss else gpu_cases.OPTIMIZERS
    parts = [f"fusedstep {half}" for half in ("forward", "backward")] if is_loss else ["fusedstep"]
    row = gpu_cases.Row(
        operation=case.operation,
        kind=case.kind,
        case=case.name,
        dtype=case.dtype,
        bytes_moved=2**30,
        seconds={"fusedstep": spread},
        ratio={name: timing.Spread(123.456, 1.0, 2.0) for name in others},
        missing={},
        copy_bandwidth=4e12,
        share=timing.Spread(0.95, 0.94, 0.96),
        peak_bytes={"fusedstep": 2**29, "native": 2**30},
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
    assert "2048x262144" in shown and "4.00 TB/s" in shown
    assert shown.count(" met ") == len(gpu_check.GOALS)


def verdicts(*rows: gpu_cases.Row) -> dict[str, gpu_check.Verdict]:
    return {goal.text: goal.verdict(rows) for goal in gpu_check.GOALS}


def test_a_goal_is_judged_by_its_worst_case() -> None:
    wide = gpu_cases.LossCase((8, 32000), "bfloat16")
    cnn = gpu_cases.LossCase((64, 10), "float32")
    step = gpu_cases.StepCase("cifar", "plain", "float32")
    rows = [
        fake_row(wide),
        fake_row(wide, share=timing.Spread(0.5, 0.5, 0.5), dtype="float32"),
        fake_row(cnn, ratio={"native": timing.Spread(2.0, 2.0, 2.0)}),
        fake_row(cnn, launched={"fusedstep forward": Launches(1, 1)}, replayed=False),
        fake_row(step, ratio={"fused": timing.Spread(2.9, 2.0, 3.0)}),
    ]
    found = verdicts(*rows)
    share = found["vocabulary: share of copy bandwidth"]
    assert (share.worst, share.case, share.met) == (0.5, "8x32000, float32", False)
    assert found["vocabulary: quack / fusedstep"].met
    assert found["CNN: launches forward"].worst == 2 and not found["CNN: launches forward"].met
    assert found["CNN: launches backward"].met
    assert found["CNN: fusedstep / native"].worst == 0.5
    assert not found["CNN: fusedstep / native"].met
    assert found["SGD: launches a step"].met
    assert found["SGD, from 25M floats: share of copy bandwidth"].met is None
    assert not found["SGD, CIFAR CNN: fused=True / fusedstep"].met
    assert not found["replayed in a CUDA graph"].met


def test_what_was_not_measured_is_not_met() -> None:
    assert {verdict.met for verdict in verdicts().values()} == {None}
    on_cpu = fake_row(gpu_cases.LossCase((64, 10), "float32"), launched={}, replayed=None, ratio={})
    assert {verdict.met for verdict in verdicts(on_cpu).values()} == {None}


@pytest.mark.usefixtures("small_copy")
def test_the_check_looks_into_what_runs_on_a_card(device: str, tmp_path: Path) -> None:
    path = tmp_path / "check.json"
    arguments = "--sizes 64x10,4x5000 --sets lenet --losses native --optimizers fused --quick"
    run("gpu_check", f"{arguments} --device {device} --json {path}")
    document = json.loads(path.read_text())
    assert document["failures"] == {} and document["left_out"] == []
    for row in document["rows"]:
        if device == "cpu":
            assert row["replayed"] is None and row["launched"] == {}
            assert set(row["peak_bytes"].values()) <= {None}
        else:
            assert row["replayed"] and row["launched"]
            if row["kind"] == "vocabulary":
                assert row["peak_bytes"]["fusedstep"] < row["peak_bytes"]["native"]


def test_training_runs_on_the_device(device: str) -> None:
    result = training.train(config(device=device))
    assert all(epoch.loss_difference < 1e-2 for epoch in result.epochs)
