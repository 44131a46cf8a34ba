"""Checkpoints of a run, which a crash or Ctrl-C never leaves half written or in mid-step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from cli import Refusal


class Interrupted(Refusal):
    exit_code = 130


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes beside `path` and renames, so that a reader, a crash or a full disk finds the old
    checkpoint or the new one."""
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise Refusal(f"cannot write {path}: {error.strerror}") from None
    finally:
        beside.unlink(missing_ok=True)


def load(path: Path, device: str) -> dict[str, Any]:
    """Tensors and plain numbers; code that a file may hold is refused, not run."""
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises whatever its reader, unpickler or zip code meets
        reason = str(error).partition("\n")[0]
        raise Refusal(f"{path} is no checkpoint: {reason}") from None
    return state


@contextmanager
def noted_interrupt() -> Iterator[Callable[[], bool]]:
    """Inside, a first Ctrl-C is noted only, and the yielded function says whether there was one: a
    run can end between two steps. A second interrupts at once. Of the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    noted = False
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal noted
        noted = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)
