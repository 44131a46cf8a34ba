"""Processes that run one check together, as the ranks of a process group.

They are started once and serve every check of a session. Each check gets a process group of its
own, over a file. A check that fails on one rank, or ends its process, fails the test at once and
ends the processes, the others of which may wait for that rank; the next check gets new ones. No
clock decides: one that hangs on every rank ends with torch's own limit for a collective.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

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
            seed = torch.initial_seed()  # the test's own, whatever the processes have drawn before
            job = (world, str(Path(folder) / "store"), seed, check, args)
            for pipe in self._pipes[:world]:
                with suppress(OSError):  # it died; so will its answer say
                    pipe.send(job)
            failures = self._failures(self._pipes[:world])
        if failures:
            self.stop()
            each = (f"rank {rank}: {failure}" for rank, failure in failures.items())
            pytest.fail("\n".join(each), pytrace=False)

    @staticmethod
    def _failures(pipes: list[Connection]) -> dict[int, str]:
        """Of the ranks that failed first, by rank; empty once all have passed."""
        waiting: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(pipes)}
        failures: dict[int, str] = {}
        while waiting and not failures:
            for pipe in wait(list(waiting)):
                rank = waiting.pop(pipe)
                try:
                    answer: str | None = pipes[rank].recv()
                except (EOFError, OSError):
                    answer = "the process died"
                if answer is not None:
                    failures[rank] = answer
        return dict(sorted(failures.items()))

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
            world, store, seed, check, args = pipe.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(seed)
            dist.init_process_group(
                "nccl" if cards >= world else "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=world,
            )
            check(device, *args)
            dist.barrier()
            gc.collect()  # a network in DDP that is freed after its group may wait forever
            dist.destroy_process_group()
            pipe.send(None)
        except BaseException:
            # The group stays as it is until the process is killed: its end would make other ranks
            # fail, and their answers might be read first.
            print(traceback.format_exc(), file=sys.stderr)
            pipe.send(traceback.format_exc())
