"""Makes torch's own names use fusedstep.

Replaced are the functions of :mod:`torch.nn.functional`, which the modules of :mod:`torch.nn` call,
and the methods of :class:`torch.optim.SGD`. The classes stay torch's: objects made before, during
and after the patch are of the same class, and so are their pickles.
"""

from __future__ import annotations

import multiprocessing.spawn
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from fusedstep import functional, optim
from fusedstep._names import under_torchs_name

__all__ = ["patch", "patched", "replaced", "unpatch"]


class _Replacement(NamedTuple):
    owner: Any
    owner_name: str
    name: str
    ours: Any


_MISSING = object()

in_spawned: list[Callable[[], None]] = []  # called where multiprocessing spawns a process


class _PathOf:
    """Sets ``sys.path`` where it is unpickled: a spawned process does so later by itself."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.path = data["sys_path"]

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"import sys; sys.path[:] = {self.path!r}",)


class _PatchedProcess:
    """Patches the process in which it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _start_process, tuple(in_spawned)


def _start_process(*calls: Callable[[], None]) -> None:
    patch()
    in_spawned.extend(calls)
    for call in calls:
        call()


_get_preparation_data = multiprocessing.spawn.get_preparation_data


def _patched_preparation_data(name: str) -> dict[str, Any]:
    """Add to what a spawned process is told first: be patched, as a forked process is."""
    data = _get_preparation_data(name)
    return {**data, "path of fusedstep": _PathOf(data), "fusedstep": _PatchedProcess()}


_REPLACEMENTS = [
    *(
        _Replacement(torch.nn.functional, "torch.nn.functional", name, stand_in)
        for name, stand_in in functional.stand_ins.items()
    ),
    *(
        _Replacement(
            torch.optim.SGD,
            "torch.optim.SGD",
            name,
            under_torchs_name(
                vars(optim.SGD)[name], getattr(torch.optim.SGD, name), torch.optim.SGD
            ),
        )
        for name in ("step", "zero_grad")
    ),
    _Replacement(
        multiprocessing.spawn,
        "multiprocessing.spawn",
        "get_preparation_data",
        _patched_preparation_data,
    ),
]

_lock = threading.Lock()  # over what follows
_on = False  # patch() without unpatch()
_blocks = 0  # patched() entered and not left
_before: list[Any] | None = None  # what the replacements replaced, while they do


def replaced() -> tuple[str, ...]:
    """The public names of torch that are patched at the moment."""
    if _before is None:
        return ()
    return tuple(
        f"{owner_name}.{name}"
        for owner, owner_name, name, ours in _REPLACEMENTS
        if owner is not multiprocessing.spawn and vars(owner).get(name) is ours
    )


def _update() -> None:
    """Replace, or put back, as `_on` and `_blocks` say; under the lock."""
    global _before
    wanted = _on or _blocks > 0
    if wanted and _before is None:
        _prepare_torch()
        _before = [vars(r.owner).get(r.name, _MISSING) for r in _REPLACEMENTS]
        for owner, _, name, ours in _REPLACEMENTS:
            setattr(owner, name, ours)
    elif not wanted and _before is not None:
        for (owner, _, name, ours), before in zip(_REPLACEMENTS, _before, strict=True):
            if vars(owner).get(name) is not ours:
                continue  # replaced since by somebody else, who may call ours
            if before is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        _before = None


def _prepare_torch() -> None:
    """Let torch do what it does once in a process, before its functions are replaced.

    When the first optimizer of a class is made, torch wraps the class's ``step``, for hooks. When
    the first optimizer of all is made, torch loads its compiler, which makes a table of torch's
    functions.
    """
    torch.optim.SGD([torch.empty(0, device="cpu")])


def patch() -> None:
    """Make torch's own losses and SGD use fusedstep's kernels, until :func:`unpatch`.

    From then on :func:`torch.nn.functional.cross_entropy`, ``l1_loss``, ``mse_loss``,
    ``smooth_l1_loss``, ``huber_loss`` and ``binary_cross_entropy_with_logits`` are those of
    :mod:`fusedstep.functional`. :class:`torch.nn.CrossEntropyLoss` and the other modules call
    these, so they compute what :mod:`fusedstep.nn` does. Every :class:`torch.optim.SGD` steps as
    :class:`fusedstep.SGD` does. The classes stay torch's own. So this also applies to objects,
    subclasses and imported classes from before the call, ``isinstance`` gives the same answers, and
    a pickle or a checkpoint can be loaded where fusedstep is not installed.

    Two things that a program took from torch before the call stay torch's: a function imported by
    name (``from torch.nn.functional import cross_entropy``), and the ``step`` of an optimizer to
    which an LR scheduler was attached. If it takes them while torch is patched, they stay
    fusedstep's after :func:`unpatch`.

    Calling it again changes nothing. It applies to all threads, to processes that are forked, and
    to those that :mod:`multiprocessing` spawns. It does not change code that ``torch.compile`` has
    compiled before. ``torch.jit.script`` compiles torch's own functions; ``torch.jit.trace`` and
    ``torch.export`` record them.
    """
    global _on
    with _lock:
        _on = True
        _update()


def unpatch() -> None:
    """Undo :func:`patch`.

    Inside a :func:`patched` block this happens at the end of the block. If torch is not patched, it
    does nothing.
    """
    global _on
    with _lock:
        _on = False
        _update()


@contextmanager
def patched() -> Iterator[None]:
    """Do what :func:`patch` does, inside a ``with`` block or, as ``@patched()``, a function.

    Blocks may be nested, and may overlap in several threads: torch stays patched, in every thread,
    until the last block is left.
    """
    global _blocks
    with _lock:
        _blocks += 1
        _update()
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            _update()
