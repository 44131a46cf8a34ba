"""Optimizers: subclasses of torch's own whose step is one call into the compiled core."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable
from numbers import Integral
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled
from torch._C._dynamo.eval_frame import (
    _FrameAction,
    _FrameExecStrategy,
    set_code_exec_strategy,
)
from torch.optim.optimizer import (
    Optimizer,
    ParamsT,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)
from torch.optim.sgd import sgd
from torch.utils.hooks import RemovableHandle

from fusedstep import _C

__all__ = ["SGD"]

_Step = TypeVar("_Step", bound=Callable[..., Any])

_HALVES = (torch.bfloat16, torch.float16)
_TO_NEAREST = _C.Rounding(master_weights=False, seed=None)
_HYPERPARAMETERS = {
    "lr": "learning rate",
    "momentum": "momentum value",
    "dampening": "dampening value",
    "weight_decay": "weight_decay value",
}


def _outside_graphs(function: _Step) -> _Step:
    """Let torch.compile run a function, and all that it calls, as it is.

    What :func:`torch.compiler.disable` does, at no cost for each call.
    """
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    outside = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
    set_code_exec_strategy(function.__code__, outside)
    return function


def _profile_hook_step(step: _Step) -> _Step:
    """Do what :meth:`Optimizer.profile_hook_step` does, at no cost if nobody watches the step.

    That is, if there are no hooks, no profiler and no arguments, only the update runs.
    """
    profiled = Optimizer.profile_hook_step(step)

    @_outside_graphs
    @functools.wraps(step)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        self = args[0]
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or _profiler_enabled()
        ):
            # The step of a subclass that calls this one has been wrapped by torch.
            owner = next(cls for cls in type(self).__mro__ if "step" in vars(cls))
            return (profiled if owner in (SGD, torch.optim.SGD) else step)(*args, **kwargs)
        if (
            len(args) > 1
            or kwargs
            or "grad_scale" in self.__dict__
            or "found_inf" in self.__dict__
            or self.defaults["differentiable"]
        ):
            return step(*args, **kwargs)
        rounding = self.__dict__.get("_rounding", _TO_NEAREST)
        _C.sgd_step(self, None, None, rounding, _step_by_torch)
        return None

    wrapper.hooked = True  # type: ignore[attr-defined]  # tells Optimizer not to wrap it again
    return wrapper  # type: ignore[return-value]


def _require_finite(group: dict[str, Any]) -> None:
    for key, name in _HYPERPARAMETERS.items():
        value = group[key]
        if not math.isfinite(value.item() if isinstance(value, Tensor) else value):
            raise ValueError(f"Invalid {name}: {value}")


def _rounding_of(optimizer: torch.optim.SGD) -> _C.Rounding:
    rounding: _C.Rounding = vars(optimizer).get("_rounding", _TO_NEAREST)
    return rounding


def _master_of(param: Tensor, optimizer: torch.optim.SGD) -> Tensor:
    """The float32 weights behind a 16-bit parameter; the parameter itself where it has none."""
    if not _rounding_of(optimizer).master_weights or param.dtype not in _HALVES:
        return param
    with torch.no_grad():
        master: Tensor | None = optimizer.state[param].get("master_param")
        if master is None or master.dtype != torch.float32:
            _C.sgd_refuse_capture(param.device, "master_param")
            master = (param if master is None else master).to(torch.float32)
        changed = master.to(param.dtype) != param
        # In place, where the capture of a CUDA graph finds it again.
        return master.copy_(torch.where(changed, param, master))


def _unscaled_grad(param: Tensor, grad_scale: float, master: Tensor) -> Tensor:
    """The gradient divided by the scale, in the master weight's dtype if there is a master weight.

    ``param.grad`` gets the same, rounded to its own dtype. Without a master weight ``master`` is
    ``param``.
    """
    grad = param.grad
    assert grad is not None
    with torch.no_grad():
        wide = grad if master is param else grad.to(master.dtype)
        if grad_scale != 1.0:
            wide.div_(grad_scale)
            if wide is not grad:
                grad.copy_(wide)
    return wide


def _step_by_torch(
    optimizer: torch.optim.SGD,
    left: list[tuple[dict[str, Any], list[Tensor]]],
    grad_scale: float = 1.0,
) -> None:
    """Update, group by group, those parameters that the kernels do not cover."""
    for group, params in left:
        masters = [_master_of(p, optimizer) for p in params]
        grads = [_unscaled_grad(p, grad_scale, m) for p, m in zip(params, masters, strict=True)]
        has_momentum = group["momentum"] != 0
        buffers: list[Tensor | None] = [None] * len(params)
        if has_momentum:
            found = [optimizer.state[p].get("momentum_buffer") for p in params]
            buffers = [
                b if b is None or m is p else b.to(m.dtype)
                for p, m, b in zip(params, masters, found, strict=True)
            ]
            for param, before, buffer in zip(params, found, buffers, strict=True):
                if buffer is None or buffer is not before:
                    _C.sgd_refuse_capture(param.device, "momentum_buffer")
        with torch.set_grad_enabled(optimizer.defaults["differentiable"]):
            sgd(
                masters,
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
                optimizer.state[param]["momentum_buffer"] = buffer
        for param, master in zip(params, masters, strict=True):
            if master is not param:
                optimizer.state[param]["master_param"] = master
                with torch.no_grad():
                    param.copy_(master)


class _StepInBackward:
    """Hook that updates a parameter as soon as its gradient is complete, and drops the gradient.

    It refers to its optimizer weakly: the garbage collector does not see what a parameter's hooks
    hold, so that a cycle through them would never be freed.
    """

    def __init__(self, optimizer: SGD) -> None:
        self.optimizer = weakref.ref(optimizer)

    def __call__(self, param: Tensor) -> None:
        optimizer = self.optimizer()
        if optimizer is not None and param.grad is not None:
            rounding = _rounding_of(optimizer)
            _C.sgd_step_in_backward(optimizer, param, rounding, _step_by_torch)


def _optimizer_in_backward(param: Tensor) -> SGD | None:
    """The optimizer with ``in_backward`` that updates this parameter, if there is one."""
    hooks = param._post_accumulate_grad_hooks or {}
    owners = (hook.optimizer() for hook in hooks.values() if isinstance(hook, _StepInBackward))
    return next((owner for owner in owners if owner is not None), None)


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
    Sutskever et al. (2013) that torch documents. float32 and float64 parameters become the same,
    bit for bit, as with ``torch.optim.SGD(foreach=False)``. bfloat16 and float16 parameters are
    computed in float32 and rounded once, and so are their momentum buffers. The number of threads
    does not change the result.

    Constructor, parameter groups, ``state_dict``, hooks and the protocol of
    :class:`torch.amp.GradScaler` are torch's, and each loads the other's checkpoints. ``foreach``
    and ``fused`` are accepted and stored: every step that the kernels cover is fused. With
    ``fused=True`` GradScaler hands its scale and its overflow flag to ``step``, as it does to
    torch's; otherwise it unscales the gradients before the step and skips one that overflowed.

    Covered are dense float32, float64, bfloat16 and float16 parameters of any shape on the CPU and
    on CUDA, in any mix, with gradients and momentum buffers of the same dtype and device. Of a
    :class:`torch.distributed.tensor.DTensor` each rank updates its part, if the gradient has the
    parameter's placements; its state consists of DTensors with the same placements. All other
    parameters (on other devices, with sparse gradients, of complex numbers, strided views, other
    tensor subclasses, those with ``Partial`` gradients), and all with ``differentiable=True``, are
    updated in the same call by torch's own functions.

    On CUDA a step is one kernel for each device, however many parameters there are. It runs on the
    current stream, does not wait for the device and can be captured in a CUDA graph. Take a step
    before the capture: one that makes momentum buffers or master weights cannot be captured,
    because every replay would make them anew. A tensor ``lr`` on the parameter's device is read
    there when the kernel runs. So it is not checked, and a captured step sees its changes. The
    scale and the overflow flag that GradScaler hands over are read in the same way; a first step
    that overflows leaves momentum buffers of zeros. With ``dampening`` a parameter's first
    step with momentum waits for that flag.

    Raises:
        ValueError: A hyperparameter is out of range or not finite, in the constructor, in
            ``add_param_group`` or in ``step``; or there are no parameters.
        RuntimeError: The shape or dtype of a gradient or of a momentum buffer does not fit its
            parameter, a hyperparameter overflows the parameter's dtype, or a CUDA graph is being
            captured and the step makes a momentum buffer or a master weight.

    An error in ``step`` leaves parameters, gradients and state as they were. If the error is raised
    by torch's own functions, which run before the kernels, this holds for the parameters that the
    kernels cover.

    Torch does not have the arguments below. They are not in ``defaults``, in the parameter groups
    or in a checkpoint, and none of them changes what float32 and float64 parameters become.

    Args:
        master_weights: Whether to keep a float32 copy, the master weight, of each bfloat16 and
            float16 parameter. It is in the parameter's state as ``master_param``, beside a float32
            ``momentum_buffer``. The update computes in float32 and rounds the result to the
            parameter, in one pass: master weights and momentum are those of a float32 run on the
            same gradients. An element of a parameter that differs from its rounded master weight
            must have been written since the last step, by ``load_state_dict`` of the model or by
            hand; it replaces the master weight. With ``fused=True``
            :class:`torch.amp.GradScaler`'s scale is divided out in float32, and float16 gradients
            are accepted, which it refuses otherwise. Torch's SGD can load such a checkpoint: it
            rounds the momentum to the parameter's dtype and ignores the master weights. When a
            checkpoint of torch's is loaded here, the master weights begin as copies of the
            parameters.
        stochastic_rounding: Whether to round bfloat16 parameters up or down at random, so that
            small updates are not lost but add up on average. The probability of rounding to one of
            the two neighbouring values grows linearly with the distance from the other. Momentum is
            rounded to nearest. The random numbers depend on ``seed``, on the parameter's place
            among all parameters, on its number of steps (``step`` in its state) and on the
            element's offset in memory. So results are the same, bit for bit, on the CPU and on
            CUDA, for any number of threads and in a resumed run, and replicas stay equal. Each
            part of a DTensor has its own random numbers; ranks that hold the same part draw the
            same ones. Refused are float16 parameters, parameters that the kernels do not cover, and
            capture in a CUDA graph, whose replays would all draw the same numbers. With
            ``fused=True``, a step that GradScaler's flag skips on CUDA counts as a step.
        seed: The seed of stochastic rounding; an integer in [0, 2**64).
        in_backward: Whether ``backward`` itself updates each parameter as soon as its gradient is
            complete, and then sets the gradient to None, so that only one gradient is in memory at
            a time. The result is that of ``step``, bit for bit, with the hyperparameters of that
            moment. Keep calling ``step``: schedulers, hooks and closures need it, and it updates
            parameters that still have a gradient. Each ``backward`` is an update. So gradients
            cannot be accumulated over several calls, clipped by their norm or scaled by GradScaler
            (``step`` raises), and a second backward through the old weights is torch's error. An
            error in the middle of ``backward`` leaves the parameters that it had not reached as
            they were. Reentrant activation checkpoints run a backward for each segment, so a
            parameter of two segments is updated twice. Parameters of ``fully_shard`` are updated
            when their gradient has been reduced; ``DistributedDataParallel`` reduces too late and
            is refused with a RuntimeError, and so is every other hook on the accumulation of a
            gradient, which would get none. This lasts as long as the optimizer, for parameters that
            are in a group of it, or until :meth:`remove_backward_hooks`; copies of the optimizer
            update their own copies of the parameters.
    """

    master_weights: bool = False
    stochastic_rounding: bool = False
    seed: int = 0
    in_backward: bool = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        in_backward: bool = False,
    ) -> None:
        if master_weights and stochastic_rounding:
            raise ValueError(
                "master_weights and stochastic_rounding exclude each other: "
                "master weights keep what rounding drops"
            )
        if differentiable and (master_weights or stochastic_rounding):
            raise ValueError(
                "master_weights and stochastic_rounding cannot be differentiated: "
                "they do not go with differentiable=True"
            )
        if differentiable and in_backward:
            raise ValueError("in_backward does not go with differentiable=True")
        if not (isinstance(seed, Integral) and 0 <= seed < 2**64):
            raise ValueError(f"Invalid seed: {seed}, not an integer in [0, 2^64)")
        self._extend(master_weights, stochastic_rounding, seed)
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        if in_backward:
            self._begin_in_backward()

    def _extend(self, master_weights: bool, stochastic_rounding: bool, seed: int) -> None:
        """Set what torch's SGD does not have. It is no part of ``defaults`` or of a checkpoint."""
        self.master_weights = master_weights
        self.stochastic_rounding = stochastic_rounding
        self.seed = seed
        self._hooks: list[RemovableHandle] = []
        self._rounding = _C.Rounding(
            master_weights=master_weights, seed=seed if stochastic_rounding else None
        )

    def __getstate__(self) -> dict[str, Any]:
        ours = (self.master_weights, self.stochastic_rounding, self.seed, self.in_backward)
        return {**super().__getstate__(), "_extensions": ours}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        in_backward = self.in_backward
        if extensions := state.pop("_extensions", None):
            *others, in_backward = extensions
            self._extend(*others)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if in_backward:
            self._begin_in_backward()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` of this class or of torch's returned.

        Torch casts floating-point state to the dtype of its parameter. With ``master_weights`` the
        float32 weights and momentum of 16-bit parameters stay as they were saved.
        """
        if not self.master_weights:
            super().load_state_dict(state_dict)
            return
        loaded: dict[str, Any] = {}
        capture = self.register_load_state_dict_pre_hook(lambda _, given: loaded.update(given))
        restore = self.register_load_state_dict_post_hook(
            lambda _: self._restore_float32(loaded), prepend=True
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            capture.remove()
            restore.remove()

    def _restore_float32(self, loaded: dict[str, Any]) -> None:
        ids = (param_id for group in loaded["param_groups"] for param_id in group["params"])
        params = (param for group in self.param_groups for param in group["params"])
        for param_id, param in zip(ids, params, strict=True):
            if param.dtype not in _HALVES:
                continue
            for key in ("momentum_buffer", "master_param"):
                value = loaded["state"].get(param_id, {}).get(key)
                if isinstance(value, Tensor) and value.dtype == torch.float32:
                    self.state[param][key] = value.to(param.device)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as :meth:`torch.optim.Optimizer.add_param_group` does."""
        if isinstance(param_group, dict):
            _require_finite({**self.defaults, **param_group})
        super().add_param_group(param_group)
        if self.in_backward:
            try:
                self._register_hooks(self.param_groups[-1:])
            except RuntimeError:
                self.param_groups.pop()
                raise

    def _begin_in_backward(self) -> None:
        self._register_hooks(self.param_groups)
        self.in_backward = True
        self._step_supports_amp_scaling = True  # GradScaler comes to step(), to be refused there

    def _register_hooks(self, groups: list[dict[str, Any]]) -> None:
        """Register the hook on each parameter of these that can have a gradient, once."""
        owners = {p: _optimizer_in_backward(p) for group in groups for p in group["params"]}
        if any(owner is not None and owner is not self for owner in owners.values()):
            raise RuntimeError(
                "a parameter is updated in backward by another optimizer; "
                "that one's remove_backward_hooks() releases it"
            )
        for param, owner in owners.items():
            if owner is None and param.is_leaf and param.requires_grad:
                hook = param.register_post_accumulate_grad_hook(_StepInBackward(self))
                self._hooks.append(hook)

    def remove_backward_hooks(self) -> None:
        """Leave all updates to :meth:`step`, and the parameters to other optimizers."""
        self.in_backward = False
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    # The two methods below are also those of torch's SGD while it is patched, and of what kept them
    # from then: they read nothing of an optimizer that torch's does not have.

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
        if grad_scale is not None and isinstance(self, SGD) and self.in_backward:
            raise RuntimeError(
                "in_backward does not go with GradScaler: backward has updated the parameters "
                "by gradients that were still scaled"
            )
        found_inf: Tensor | None = self.__dict__.get("found_inf")
        if not self.defaults["differentiable"]:
            _C.sgd_step(self, grad_scale, found_inf, _rounding_of(self), _step_by_torch)
            return loss
        for group in self.param_groups:
            _require_finite(group)
        left = [
            (group, [p for p in group["params"] if p.grad is not None])
            for group in self.param_groups
        ]
        if found_inf is None or not found_inf:
            _step_by_torch(self, left, 1.0 if grad_scale is None else float(grad_scale))
            for _, params in left:
                for param in params:
                    _C.count_fallback("SGD", param.device, "differentiable=True")
        return loss

    @_outside_graphs
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set every gradient to None, or to zero where ``set_to_none`` is False."""
        if set_to_none and not _profiler_enabled():
            _C.sgd_zero_grad(self.param_groups)
        else:
            Optimizer.zero_grad(self, set_to_none)
