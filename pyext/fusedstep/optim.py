"""Optimizers: subclasses of torch's own, one call into the compiled core per step."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled
from torch._compile import _disable_dynamo
from torch.compiler import is_dynamo_compiling
from torch.optim.optimizer import (
    Optimizer,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)
from torch.optim.sgd import sgd

from fusedstep import _C

__all__ = ["SGD"]

_Step = TypeVar("_Step", bound=Callable[..., Any])

_HYPERPARAMETERS = {
    "lr": "learning rate",
    "momentum": "momentum value",
    "dampening": "dampening value",
    "weight_decay": "weight_decay value",
}


# torch's step without the hooks that Optimizer wraps around it when the first instance is made.
_torch_step: Callable[..., Any] = torch.optim.SGD.step
if getattr(_torch_step, "hooked", False):
    _torch_step = _torch_step.__wrapped__  # type: ignore[attr-defined]


def _profile_hook_step(step: _Step) -> _Step:
    """Do what :meth:`Optimizer.profile_hook_step` does, and just the update where that is all.

    Under ``torch.compile`` torch's own step, which is made to be traced, takes the place of ours;
    but its fused one is not, and ours then runs outside the graph.
    """
    profiled = Optimizer.profile_hook_step(step)
    traced = Optimizer.profile_hook_step(_torch_step)
    untraced = _disable_dynamo(profiled)

    @functools.wraps(step)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        self = args[0]
        if is_dynamo_compiling():
            fused = any(group["fused"] for group in self.param_groups)
            return (untraced if fused or hasattr(self, "grad_scale") else traced)(*args, **kwargs)
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or _profiler_enabled()
        ):
            # The step of a subclass that calls this one has been wrapped by torch.
            return (profiled if type(self).step is wrapper else step)(*args, **kwargs)
        if (
            len(args) > 1
            or kwargs
            or "grad_scale" in self.__dict__
            or "found_inf" in self.__dict__
            or self.defaults["differentiable"]
        ):
            return step(*args, **kwargs)
        left = _C.sgd_step(self.param_groups, self.state, None, None)
        if left:
            self._step_by_torch(left)
        return None

    wrapper.hooked = True  # type: ignore[attr-defined]  # tells Optimizer not to wrap it again
    return wrapper  # type: ignore[return-value]


def _require_finite(group: dict[str, Any]) -> None:
    for key, name in _HYPERPARAMETERS.items():
        value = group[key]
        if not math.isfinite(value.item() if isinstance(value, Tensor) else value):
            raise ValueError(f"Invalid {name}: {value}")


class _IfStepIsOurs:
    """Whether ``step`` is :meth:`SGD.step`, maybe inside what an LR scheduler wraps around it.

    The step of a subclass knows nothing of GradScaler's scale. Without a setter: torch's
    constructor gives the attribute to instances with ``fused=True``.
    """

    def __get__(self, optimizer: Optimizer | None, owner: type[Optimizer]) -> bool:
        step: Any = owner.step if optimizer is None else optimizer.step
        step = getattr(step, "__func__", step)
        while step is not SGD.step and hasattr(step, "__wrapped__"):
            step = step.__wrapped__
        return step is SGD.step


class SGD(torch.optim.SGD):
    r"""Drop-in for :class:`torch.optim.SGD`: stochastic gradient descent, optionally with momentum.

    For a parameter :math:`p` with gradient :math:`g` and momentum buffer :math:`b`, a step is

    .. math::
        g &\leftarrow -g && \text{(maximize)} \\
        g &\leftarrow g + \lambda p && \text{(weight decay } \lambda) \\
        b &\leftarrow \mu b + (1 - \tau) g && \text{(momentum } \mu \text{, dampening } \tau) \\
        g &\leftarrow g + \mu b \text{ (nesterov) or } b && \\
        p &\leftarrow p - \gamma g && \text{(learning rate } \gamma)

    where the first step of a parameter takes :math:`b \leftarrow g`. The formula is the variant of
    Sutskever et al. (2013) that torch documents. float32 and float64 parameters end in the same
    bits as with ``torch.optim.SGD(foreach=False)``; bfloat16 and float16 ones are computed in
    float32 and rounded once, as their momentum buffers are. The number of threads changes nothing.

    Constructor, parameter groups, ``state_dict``, hooks and the protocol of
    :class:`torch.amp.GradScaler` are torch's, and a checkpoint moves both ways. ``foreach`` and
    ``fused`` are accepted and kept: on what the kernels cover, every step is fused.

    Covered are dense float32, float64, bfloat16 and float16 parameters of any shape on the CPU and
    on CUDA, in any mix, with gradients and momentum buffers of the same dtype and device.
    Parameters outside that (other devices, sparse gradients, complex numbers, strided views,
    tensor subclasses), or ``differentiable=True``, are updated in the same call by torch's own
    functions.

    On CUDA a step is one kernel for each device, however many parameters there are. It runs on the
    current stream, does not wait for the device and can be captured in a CUDA graph. A tensor
    ``lr`` on the parameter's device is read there, when the kernel runs: it is not checked, and a
    captured step follows its changes. So are the scale and the overflow flag of
    :class:`torch.amp.GradScaler`; a first step that overflows leaves momentum buffers of zeros.
    With ``dampening`` a parameter's first step with momentum waits for that flag.

    Raises:
        ValueError: A hyperparameter is out of range or not finite, in the constructor, in
            ``add_param_group`` or in ``step``; or there are no parameters.
        RuntimeError: The shape or dtype of a gradient or of a momentum buffer does not fit its
            parameter, or a hyperparameter overflows the parameter's dtype.

    An error in ``step`` leaves parameters, gradients and state as they were.
    """

    # Asks GradScaler to hand over its scale instead of unscaling gradients in a pass of its own.
    _step_supports_amp_scaling = _IfStepIsOurs()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as :meth:`torch.optim.Optimizer.add_param_group` does."""
        if isinstance(param_group, dict):
            _require_finite({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @_profile_hook_step
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: Reevaluates the model and returns the loss; called with gradients enabled.

        Returns:
            What ``closure`` returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale: Tensor | None = self.__dict__.get("grad_scale")
        found_inf: Tensor | None = self.__dict__.get("found_inf")
        if not self.defaults["differentiable"]:
            left = _C.sgd_step(self.param_groups, self.state, grad_scale, found_inf)
        else:
            for group in self.param_groups:
                _require_finite(group)
            left = [
                (group, [p for p in group["params"] if p.grad is not None])
                for group in self.param_groups
            ]
            for _, params in left:
                for param in params:
                    _C.count_fallback("SGD", param.device, "differentiable=True")
        if left and (found_inf is None or not found_inf):
            self._step_by_torch(left, 1.0 if grad_scale is None else float(grad_scale))
        return loss

    def _step_by_torch(
        self, left: list[tuple[dict[str, Any], list[Tensor]]], grad_scale: float = 1.0
    ) -> None:
        """Update, group by group, those parameters that the kernels do not cover."""
        for group, params in left:
            grads: list[Tensor] = [p.grad for p in params if p.grad is not None]
            if grad_scale != 1.0:
                with torch.no_grad():
                    for grad in grads:
                        grad.div_(grad_scale)
            has_momentum = group["momentum"] != 0
            buffers: list[Tensor | None] = [
                self.state[p].get("momentum_buffer") if has_momentum else None for p in params
            ]
            with torch.set_grad_enabled(self.defaults["differentiable"]):
                sgd(
                    params,
                    grads,
                    buffers,
                    has_sparse_grad=any(grad.is_sparse for grad in grads),
                    foreach=group["foreach"],
                    weight_decay=group["weight_decay"],
                    momentum=group["momentum"],
                    lr=group["lr"],
                    dampening=group["dampening"],
                    nesterov=group["nesterov"],
                    maximize=group["maximize"],
                )
            if has_momentum:
                for param, buffer in zip(params, buffers, strict=True):
                    self.state[param]["momentum_buffer"] = buffer

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set every gradient to None, or to zero where ``set_to_none`` is False."""
        if set_to_none and not is_dynamo_compiling() and not _profiler_enabled():
            _C.sgd_zero_grad(self.param_groups)
        else:
            Optimizer.zero_grad(self, set_to_none)  # of torch's SGD too: see _patch.py
