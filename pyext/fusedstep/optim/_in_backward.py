"""Updates of a parameter by a hook on it, as soon as its gradient is complete."""

import weakref
from typing import Protocol

from torch import Tensor

__all__ = ["StepInBackward", "owner_in_backward"]


class _UpdatesInBackward(Protocol):
    def _step_in_backward(self, param: Tensor) -> None: ...


class StepInBackward:
    """Hook that updates a parameter as soon as its gradient is complete, and drops the gradient.

    It refers to its optimizer weakly: the garbage collector does not see what a parameter's hooks
    hold, so that a cycle through them would never be freed.
    """

    def __init__(self, optimizer: _UpdatesInBackward) -> None:
        self.optimizer = weakref.ref(optimizer)

    def __call__(self, param: Tensor) -> None:
        optimizer = self.optimizer()
        if optimizer is not None and param.grad is not None:
            optimizer._step_in_backward(param)


def owner_in_backward(param: Tensor) -> _UpdatesInBackward | None:
    """The optimizer with ``in_backward`` that updates this parameter, if there is one."""
    hooks = param._post_accumulate_grad_hooks or {}
    owners = (hook.optimizer() for hook in hooks.values() if isinstance(hook, StepInBackward))
    return next((owner for owner in owners if owner is not None), None)
