"""Notes which of torch's optimizers and losses a process used that fusedstep does not replace."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from fusedstep import _compiler, _patch

__all__ = ["forget", "note", "used"]

_used: dict[str, None] = {}  # in the order of their first use
_noting = False
_lock = threading.Lock()


def used() -> tuple[str, ...]:
    """Their names, in the order in which they were first used since :func:`note`."""
    return tuple(_used)


def forget() -> None:
    """Note from now on."""
    _used.clear()


def note() -> None:
    """Begin to note, until the process ends."""
    global _noting
    with _lock:
        if _noting:
            return
        _noting = True
    functional = torch.nn.functional
    for name, loss in list(vars(functional).items()):
        is_loss = name.endswith("_loss") or "cross_entropy" in name or name == "kl_div"
        if is_loss and not name.startswith("_") and name not in _patch.LOSSES:
            noted = _noted_loss(name, loss)
            setattr(functional, name, noted)
            _compiler.keep_torchs({noted: loss})
    Optimizer.__init__ = _noted_init(Optimizer.__init__)  # type: ignore[method-assign]


def _note(name: str) -> None:
    _used[name] = None


# torch.compile calls it while it traces, and leaves it out of the program.
_note._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _noted_loss(name: str, loss: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(loss)
    def noted(*args: Any, **kwargs: Any) -> Any:
        _note(name)
        return loss(*args, **kwargs)

    # torch.jit.script() compiles what these say in the place of this function.
    vars(noted).update(__script_if_tracing_wrapper=False, __original_fn=loss)
    return noted


def _noted_init(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def noted(self: Optimizer, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)

        def first_step(optimizer: Optimizer, *_: Any) -> None:
            hook.remove()
            _note_optimizer(type(optimizer))

        hook = self.register_step_post_hook(first_step)

    return noted


def _note_optimizer(kind: type[Optimizer]) -> None:
    owner = next(cls for cls in kind.__mro__ if "step" in vars(cls))
    if not owner.__module__.startswith(("torch.optim.", "fusedstep.")):
        _note(f"{owner.__name__} of {owner.__module__}")
    elif owner.__module__.startswith("torch.optim.") and owner not in _patch.OPTIMIZERS:
        _note(owner.__name__)
