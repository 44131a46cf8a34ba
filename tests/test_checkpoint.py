"""train_cnn.py's checkpoints: an interrupted and resumed run gives the same bits as a whole one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoint
import cli
import training

SCRIPT = Path(checkpoint.__file__).with_name("train_cnn.py")


@pytest.fixture(autouse=True)
def default_device() -> None:
    """Scripts choose their device themselves."""


def config(path: Path, **settings: object) -> training.Config:
    defaults = {"model": "lenet", "samples": 12, "epochs": 2, "momentum": 0.9, "weight_decay": 0.01}
    return training.Config(**{**defaults, "checkpoint": path, **settings})


def train(config: training.Config, **callbacks: Callable[..., object]) -> training.Result:
    return training.train(config, **callbacks, keep_in=config.checkpoint, resume=config.resume)


def weights_and_momentum(path: Path) -> list[torch.Tensor]:
    kept = torch.load(path, weights_only=True)
    tensors = [t for model in kept["models"].values() for t in model.values()]
    for optimizer in kept["optimizers"].values():
        tensors += [state["momentum_buffer"] for state in optimizer["state"].values()]
    return tensors


def assert_same_bits(one: Path, other: Path) -> None:
    pairs = zip(weights_and_momentum(one), weights_and_momentum(other), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """A shell starts what is to run in the background with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run.pt"
    train(config(path))
    assert len(weights_and_momentum(path)) == 2 * 2 * 10
    return path


@pytest.mark.parametrize("at", range(1, 7))
def test_ctrl_c_at_any_step_resumes_to_the_same_bits(
    at: int, uninterrupted: Path, tmp_path: Path
) -> None:
    """Two epochs of three batches; the signal comes while a step is taken."""
    path = tmp_path / "run.pt"

    def interrupt(done: int, total: int) -> None:
        assert total == 6
        if done == at:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(checkpoint.Interrupted, match="--resume"):
        train(config(path), on_step=interrupt)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    torch.rand(7)  # a process that resumes has drawn other numbers
    taken: list[int] = []
    result = train(config(path, resume=True), on_step=lambda done, total: taken.append(done))
    assert taken == list(range(at + 1, 7))
    assert [epoch.number for epoch in result.epochs] == [1, 2]
    assert [len(epoch.loading) for epoch in result.epochs] == [3, 3]
    assert_same_bits(path, uninterrupted)
    expected = torch.load(uninterrupted, weights_only=True)["state"]["epochs"]
    assert [epoch.losses for epoch in result.epochs] == [epoch["losses"] for epoch in expected]


def test_a_killed_process_resumes_from_its_last_epoch(uninterrupted: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"

    class Killed(BaseException):
        pass

    def kill(done: int, total: int) -> None:
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        train(config(path), on_step=kill)
    train(config(path, resume=True))
    assert_same_bits(path, uninterrupted)


def test_a_finished_run_resumes_to_more_epochs(uninterrupted: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    train(config(path, epochs=1))
    train(config(path, epochs=1, resume=True))
    train(config(path, epochs=2, resume=True))
    assert_same_bits(path, uninterrupted)


def command(checkpoint: Path, *, epochs: int) -> list[str]:
    options = f"--model lenet --samples 100 --epochs {epochs} --momentum 0.9 --batch-size 2"
    files = ["--plot", str(checkpoint.with_suffix(".png")), "--checkpoint", str(checkpoint)]
    return [sys.executable, "-u", str(SCRIPT), *options.split(), *files, "--resume"]


def test_ctrl_c_in_the_script_resumes_to_the_same_bits(tmp_path: Path, seed: int) -> None:
    """Wherever the signal finds the script: in Python, in a kernel, in between two epochs."""
    path, whole = tmp_path / "run.pt", tmp_path / "whole.pt"
    begun = 0
    for wait in (0.0, seed % 100 / 500):
        process = subprocess.Popen(
            command(path, epochs=10**6),  # it does not end by itself
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        for line in process.stdout:  # the training has begun once an epoch is shown
            if re.match(rf"\s*{begun + 1} ", line):
                break
        time.sleep(wait)  # for another place to stop at; any is right
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
        assert process.returncode == 130, errors
        begun = int(re.findall(r"interrupted in epoch (\d+); --resume goes on", errors)[0])
    for file in (path, whole):
        done = subprocess.run(command(file, epochs=begun), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert_same_bits(path, whole)


# ------------------------------------------------------------------ the file


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    checkpoint.save(path, {"a": torch.ones(3)})

    class Unwritable:
        def __reduce__(self) -> Any:
            raise OSError(28, "No space left on device")

    with pytest.raises(cli.Refusal, match="No space left"):
        checkpoint.save(path, {"a": torch.zeros(10**6), "b": Unwritable()})
    assert checkpoint.load(path, "cpu")["a"].tolist() == [1, 1, 1]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04"])
def test_what_is_no_checkpoint_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    path.write_bytes(content)
    with pytest.raises(cli.Refusal, match="is no checkpoint"):
        train(config(path, resume=True))
    torch.save({"another": torch.ones(2)}, path)
    with pytest.raises(cli.Refusal, match="is no checkpoint of"):
        train(config(path, resume=True))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"a": Trap()}, tmp_path / "run.pt")
    with pytest.raises(cli.Refusal, match="is no checkpoint"):
        checkpoint.load(tmp_path / "run.pt", "cpu")
    assert not (tmp_path / "sprung").exists()


def test_another_option_is_refused(uninterrupted: Path) -> None:
    with pytest.raises(cli.Refusal, match=r"run with --lr 0.001, not 0.5"):
        train(config(uninterrupted, resume=True, lr=0.5))
    with pytest.raises(cli.Refusal, match="needs a --checkpoint"):
        training.Config(resume=True)


def test_a_second_interrupt_does_not_wait() -> None:
    with checkpoint.noted_interrupt() as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
