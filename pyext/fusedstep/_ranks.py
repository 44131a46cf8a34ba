"""Finds the ranks of a process group that are not patched as this one is.

Every patched rank signs the group's store. Some optimizer steps later the first of them looks for
the others' signatures: by then every rank has taken part in a reduction of gradients, and so has
been able to sign. Nothing waits for a rank, and no collective is called.
"""

from __future__ import annotations

import functools
import os
import warnings
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

__all__ = ["begin", "init_process_group", "replaced", "this_rank"]

_STEPS = 2, 4  # after which the others are looked for; who is missing twice is named
_NAMED = 8  # ranks in a warning, at most

_check: _Check | None = None  # of the last group
_last: tuple[int, int] | None = None  # the rank and the size of the last group of this process


def _key(rank: int) -> str:
    return f"fusedstep/patched/{rank}"


def this_rank() -> tuple[int, int] | None:
    """The rank of this process and how many there are, also once its group has been destroyed."""
    if _last is not None:
        return _last
    try:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return None


class _Check:
    """Counts the steps of this process's optimizers, and looks for the other ranks."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.steps = 0
        self.hook: RemovableHandle = register_optimizer_step_post_hook(self)

    def __call__(self, *_: Any) -> None:
        if torch.compiler.is_compiling():  # traced, which is no step
            return
        self.steps += 1
        if self.steps not in _STEPS:
            return
        missing = self.missing() if is_patched() else []
        if missing and self.steps < _STEPS[-1]:
            return
        self.hook.remove()
        if missing:
            self.warn(missing)

    def missing(self) -> list[int]:
        """The ranks without a signature; none where a lower rank can name them, or none can."""
        try:
            store = _default_store()
            if (dist.get_rank(), dist.get_world_size()) != (self.rank, self.world):
                return []
            if any(store.check([_key(rank)]) for rank in range(self.rank)):
                return []
            if store.check([_key(rank) for rank in range(self.world)]):
                return []
            return [rank for rank in range(self.world) if not store.check([_key(rank)])]
        except Exception:  # a store that cannot check, or a group that has been destroyed
            return []

    def warn(self, missing: list[int]) -> None:
        names = ", ".join(map(str, missing[:_NAMED])) + ", ..." * (len(missing) > _NAMED)
        are = f"rank {names} is" if len(missing) == 1 else f"ranks {names} are"
        warnings.warn(
            f"of {self.world} ranks, rank {self.rank} is patched by fusedstep, but {are} not: "
            "their losses and updates are rounded in other places, so that replicas of one model "
            "may drift apart. Run every rank by `python -m fusedstep run`, or call "
            "fusedstep.patch() in each.",
            RuntimeWarning,
            stacklevel=2,
        )


def _default_store() -> Any:
    """The store by which the ranks found each other, for which torch has no public name.

    It is asked for anew each time: who kept it would keep the server of a group that has ended.
    """
    return dist.distributed_c10d._get_default_store()


def begin() -> None:
    """Sign the store of the default process group, if there is one, and look for the others."""
    global _last, _check
    try:
        if not dist.is_initialized():
            return
        rank, world = _last = dist.get_rank(), dist.get_world_size()
        if world < 2 or dist.get_backend() == "fake":
            return
        store = _default_store()
        if store.check([_key(rank)]):
            return
        store.set(_key(rank), "1")
    except Exception:  # a backend without a store, or a store that cannot check
        return
    if _check is not None:
        _check.hook.remove()
    _check = _Check(rank, world)


def is_patched() -> bool:
    return dist.init_process_group is init_process_group


replaced: tuple[ModuleType, ...] = ()

if dist.is_available():
    _init_process_group = dist.init_process_group

    @functools.wraps(_init_process_group)
    def init_process_group(*args: Any, **kwargs: Any) -> None:
        """Do what torch's function does, and :func:`begin`."""
        _init_process_group(*args, **kwargs)
        if is_patched():
            begin()

    # Where this function replaces torch's, which has both names.
    replaced = (dist, dist.distributed_c10d)
