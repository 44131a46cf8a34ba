"""Processes that run one check together, as the ranks of a process group.

They are started once and serve every check of a session. Each check gets a process group of its
own, over a file. Answers have a time limit: a check that fails or hangs on one rank fails the test
and ends the processes; the next check gets new ones.
"""

from __future__ import annotations

import datetime
import gc
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

COLLECTIVE_SECONDS = 40
ANSWER_SECONDS = 90

Check = Callable[..., None]


class Ranks:
    """Calls ``check(device, *args)`` on every rank of a group."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def __call__(self, world: int, check: Check, *args: Any) -> None:
        """Run the check on ``world`` ranks; fails the test where it raises on one of them."""
        self._start(world, check.__module__)
        with tempfile.TemporaryDirectory() as folder:
            job = (world, str(Path(folder) / "store"), check, args)
            for pipe in self._pipes[:world]:
                pipe.send(job)
            until = time.monotonic() + ANSWER_SECONDS
            answers = [self._answer(pipe, until) for pipe in self._pipes[:world]]
        if any(answers):
            self.stop()
            each = (f"rank {rank}: {answer}" for rank, answer in enumerate(answers) if answer)
            pytest.fail("\n".join(each), pytrace=False)

    @staticmethod
    def _answer(pipe: Connection, until: float) -> str | None:
        try:
            if not pipe.poll(max(0.0, until - time.monotonic())):
                return f"no answer within {ANSWER_SECONDS} seconds"
            answer: str | None = pipe.recv()
        except (EOFError, OSError):
            return "the process died"
        return answer

    def _start(self, world: int, module: str) -> None:
        context = multiprocessing.get_context("forkserver")
        # What the check's module imports is imported once, not by every process.
        context.set_forkserver_preload([module])
        path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        for rank in range(len(self._processes), world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs, self.device), daemon=True)
            with mock.patch.dict(os.environ, path):
                process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes.clear()
        self._pipes.clear()


def _serve(rank: int, pipe: Connection, device_type: str) -> None:
    torch.set_num_threads(1)
    device = torch.device(device_type)
    cards = 0
    if device_type == "cuda":
        cards = torch.cuda.device_count()
        device = torch.device("cuda", rank % cards)
        torch.cuda.set_device(device)
        torch.backends.cudnn.deterministic = True
    while True:
        try:
            world, store, check, args = pipe.recv()
        except EOFError:
            return
        try:
            dist.init_process_group(
                "nccl" if cards >= world else "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=world,
                timeout=datetime.timedelta(seconds=COLLECTIVE_SECONDS),
            )
            try:
                check(device, *args)
                dist.barrier()
            finally:
                gc.collect()  # a network in DDP that is freed after its group may wait forever
                dist.destroy_process_group()
            pipe.send(None)
        except BaseException:
            print(traceback.format_exc(), file=sys.stderr)
            pipe.send(traceback.format_exc())
