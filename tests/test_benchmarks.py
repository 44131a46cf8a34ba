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
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import bench_cross_entropy
import bench_sgd
import bench_train_step
import cli
import correctness
import data
import report
import timing
import train_cnn
import training
from models import NETWORKS

BENCHMARKS = Path(cli.__file__).parent

SCRIPTS = {
    "train_cnn": (training.Config, train_cnn.main),
    "bench_cross_entropy": (bench_cross_entropy.Options, bench_cross_entropy.main),
    "bench_sgd": (bench_sgd.Options, bench_sgd.main),
    "bench_train_step": (bench_train_step.Options, bench_train_step.main),
}

# The smallest run of each benchmark.
TINY = {
    "bench_cross_entropy": "--sizes 1x10,3x5 --no-shapes",
    "bench_sgd": "--sets lenet --modes plain,momentum",
    "bench_train_step": "--models lenet --batch-sizes 1 --modes plain",
}


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
        ("bench_sgd", "--sets vgg", "vgg"),
        ("bench_sgd", "--modes adam", "adam"),
        ("bench_train_step", "--models vgg", "vgg"),
        ("bench_train_step", "--batch-sizes 1,-4", "1,-4"),
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
def test_without_fusedstep_there_is_one_line(
    script: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "fusedstep", None)
    status, line = refusal(script, "", capsys)
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
    cost = timing.BLOCK_SECONDS / 100
    measured = timing.measure({"short": machine.candidate("short", cost)}, "cpu", rounds=1)
    assert measured.time("short").median == pytest.approx(cost)
    warm_up = 3 * (1 + 2 + 4 + 8 + 16 + 32 + 64 + 128)
    assert len(machine.calls) == warm_up + 128


def test_several_calls_of_a_candidate_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    timing.measure({"x": [machine.candidate(name, 1.0) for name in "012"]}, "cpu", rounds=6)
    assert "".join(machine.calls) == "012" * 3


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_waited_for() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    _, seconds = timing.timed(lambda: [x @ x for _ in range(20)], "cuda")
    assert seconds > 0
    assert torch.cuda.current_stream().query()


# Benchmarks


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "BLOCK_SECONDS", 1e-5)


ROW_KEYS = {
    "bench_cross_entropy": {
        *("case", "dtype", "native", "ours", "speedup", "floor_name", "floor", "over_floor")
    },
    "bench_sgd": {
        *("set", "tensors", "floats", "mode", "native", "ours", "speedup", "floor", "bandwidth")
    },
    "bench_train_step": {"model", "batch_size", "mode", "native", "ours", "speedup"},
}


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("script", TINY)
def test_a_benchmark_reports_a_table_and_json(
    script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.json"
    run(script, f"{TINY[script]} --quick --json {path}")
    assert "geometric mean" in capsys.readouterr().out
    document = json.loads(path.read_text())
    assert set(document) == {"environment", "rows", "summary"}
    assert set(document["environment"]) == {
        *("torch", "fusedstep", "python", "cpu", "capability", "cores", "threads", "gpu"),
        *("command", "date"),
    }
    assert document["environment"]["torch"] == torch.__version__
    assert document["environment"]["threads"] == 1
    assert len(document["rows"]) == (1 if script == "bench_train_step" else 2)
    for row in document["rows"]:
        assert set(row) == ROW_KEYS[script]
        assert set(row["ours"]) == {"median", "low", "high"}
        assert row["ours"]["low"] <= row["ours"]["median"] <= row["ours"]["high"]
    assert all(isinstance(value, float) for value in document["summary"].values())


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("case", bench_cross_entropy.SHAPES, ids=lambda case: case.name)
def test_every_shape_is_measured(case: bench_cross_entropy.Case) -> None:
    _, classes, *positions = case.shape
    small = replace(case, shape=(2, classes, *(3 for _ in positions)))
    x = small.operands(torch.float32, "cpu").x
    assert x.is_contiguous() != case.channels_last
    options = bench_cross_entropy.Options(quick=True)
    row = bench_cross_entropy.bench(small, "float32", options, F.cross_entropy)
    assert row.case == case.name


@pytest.mark.parametrize(("size", "floor"), [("255x1000", "round trip"), ("256x1000", "exp")])
@pytest.mark.usefixtures("short_blocks")
def test_the_floor_follows_the_size(size: str, floor: str) -> None:
    options = bench_cross_entropy.Options(quick=True)
    case = bench_cross_entropy.case(size)
    assert bench_cross_entropy.bench(case, "float32", options, F.cross_entropy).floor_name == floor


@pytest.mark.parametrize(
    ("name", "tensors", "floats"),
    [
        ("cifar", 10, 145_578),
        ("lenet", 10, 81_194),
        ("resnet18", 62, 11_689_512),
        ("many", 1000, 1_000_000),
        ("flat", 1, 13_000_000),
    ],
)
def test_a_parameter_set_has_its_size(name: str, tensors: int, floats: int) -> None:
    shapes = bench_sgd.SETS[name]()
    assert len(shapes) == tensors
    assert sum(math.prod(shape) for shape in shapes) == floats


def slightly_wrong_loss(*arguments: Any, **options: Any) -> torch.Tensor:
    loss = F.cross_entropy(*arguments, **options)
    return loss + 1e-4 * (loss - loss.detach())  # the value is right, the gradient is not


class SlightlyWrongSGD(torch.optim.SGD):
    def __init__(self, parameters: Any, lr: float, **settings: Any) -> None:
        super().__init__(parameters, lr=lr * 1.01, **settings)


@pytest.mark.parametrize("script", TINY)
def test_wrong_results_are_not_timed(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fusedstep = cli.require_fusedstep()
    monkeypatch.setattr(fusedstep.functional, "cross_entropy", slightly_wrong_loss)
    monkeypatch.setattr(fusedstep, "SGD", SlightlyWrongSGD)
    for module in (bench_cross_entropy, bench_sgd, bench_train_step):
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
