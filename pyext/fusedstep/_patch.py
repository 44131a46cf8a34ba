"""Makes torch's own names use fusedstep.

Replaced are the functions of :mod:`torch.nn.functional`, which the modules of :mod:`torch.nn` call,
and the methods of the classes in ``OPTIMIZERS``. The classes stay torch's: objects made before,
during and after the patch are of the same class, and so are their pickles.
"""

from __future__ import annotations

import multiprocessing.spawn
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from fusedstep import _compiler, _ranks, functional, optim
from fusedstep._names import under_torchs_name

__all__ = ["LOSSES", "OPTIMIZERS", "also_in_spawned", "patch", "patched", "replaced", "unpatch"]

LOSSES = functional.stand_ins  # by their names in torch.nn.functional
OPTIMIZERS: dict[type[Optimizer], type[Optimizer]] = {
    getattr(torch.optim, name): getattr(optim, name)
    for name in optim.__all__
    if hasattr(torch.optim, name)
}
_METHODS = "step", "zero_grad"  # of an optimizer


class _Replacement(NamedTuple):
    owner: Any
    name: str
    ours: Any
    shown_as: str | None = None  # the name of it that `replaced()` tells


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
    for call in calls:
        also_in_spawned(call)
        call()


def also_in_spawned(call: Callable[[], None]) -> None:
    """Have a process that multiprocessing spawns make this call, and those which it spawns."""
    if call not in in_spawned:
        in_spawned.append(call)


_get_preparation_data = multiprocessing.spawn.get_preparation_data


def _patched_preparation_data(name: str) -> dict[str, Any]:
    """Add to what a spawned process is told first: be patched, as a forked process is."""
    data = _get_preparation_data(name)
    return {**data, "path of fusedstep": _PathOf(data), "fusedstep": _PatchedProcess()}


_REPLACEMENTS = [
    *(
        _Replacement(torch.nn.functional, name, ours, f"torch.nn.functional.{name}")
        for name, ours in LOSSES.items()
    ),
    *(
        _Replacement(
            torchs,
            name,
            under_torchs_name(vars(ours)[name], getattr(torchs, name), torchs),
            f"torch.optim.{torchs.__name__}.{name}",
        )
        for torchs, ours in OPTIMIZERS.items()
        for name in _METHODS
    ),
    _Replacement(multiprocessing.spawn, "get_preparation_data", _patched_preparation_data),
    *(
        _Replacement(module, "init_process_group", _ranks.init_process_group)
        for module in _ranks.replaced
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
        r.shown_as for r in _REPLACEMENTS if r.shown_as and vars(r.owner).get(r.name) is r.ours
    )


def _update() -> None:
    """Replace, or put back, as `_on` and `_blocks` say; under the lock."""
    global _before
    wanted = _on or _blocks > 0
    if wanted and _before is None:
        for optimizer in OPTIMIZERS:
            _wrap_step(optimizer)
        _before = [vars(r.owner).get(r.name, _MISSING) for r in _REPLACEMENTS]
        for r in _REPLACEMENTS:
            setattr(r.owner, r.name, r.ours)
        _compiler.keep_torchs(
            {
                r.ours: before
                for r, before in zip(_REPLACEMENTS, _before, strict=True)
                if before is not _MISSING
            }
        )
        _ranks.begin()
    elif not wanted and _before is not None:
        for r, before in zip(_REPLACEMENTS, _before, strict=True):
            if vars(r.owner).get(r.name) is not r.ours:
                continue  # replaced since by somebody else, who may call ours
            if before is _MISSING:
                delattr(r.owner, r.name)
            else:
                setattr(r.owner, r.name, before)
        _before = None


def _wrap_step(optimizer: type[Optimizer]) -> None:
    """Wrap a class's ``step``, for hooks, as torch does when the first such optimizer is made.

    Torch would wrap ours, and leave its own as it is. Making an optimizer loads torch's compiler,
    which takes longer than torch itself.
    """
    step: Any = optimizer.step
    if not getattr(step, "hooked", False):
        wrapped: Any = Optimizer.profile_hook_step(step)
        wrapped.hooked = True
        optimizer.step = wrapped  # type: ignore[method-assign]


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
    to those that :mod:`multiprocessing` spawns; ``python -m fusedstep run`` reaches other processes
    too. Where it is called in some ranks of a process group only, the lowest of them warns after a
    few steps of an optimizer and names the others. It does not change code that ``torch.compile``
    has compiled before. ``torch.jit.script`` compiles torch's own functions; ``torch.jit.trace``
    and ``torch.export`` record them.
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
