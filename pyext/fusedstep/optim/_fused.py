"""What all optimizers share: the wrapper around a fused step, and what they add to torch's."""

import functools
import math
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
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)
from torch.utils.hooks import RemovableHandle

from fusedstep import _C
from fusedstep.optim._extensions import ATTRIBUTE, OF_TORCH, extend, extensions_of
from fusedstep.optim._in_backward import StepInBackward, owner_in_backward
from fusedstep.optim._torchs_step import TorchsStep

__all__ = ["Fused", "fused_step", "zero_grad"]

_Function = TypeVar("_Function", bound=Callable[..., Any])

_HALVES = (torch.bfloat16, torch.float16)


def _outside_graphs(function: _Function) -> _Function:
    """Let torch.compile run a function, and all that it calls, as it is.

    What :func:`torch.compiler.disable` does, at no cost for each call.
    """
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    outside = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
    set_code_exec_strategy(function.__code__, outside)
    return function


def _require_finite(rule: Any, group: dict[str, Any]) -> None:
    for key, called in rule.numbers.items():
        value = group[key]
        if not math.isfinite(value.item() if isinstance(value, Tensor) else value):
            raise ValueError(f"Invalid {called}: {value}")


def fused_step(torchs: type[Optimizer]) -> Callable[..., Any]:
    """The ``step`` of a class of fusedstep's, and that of torch's class while it is patched.

    It reads nothing of an optimizer that torch's does not have. It does what
    :meth:`Optimizer.profile_hook_step` does, at no cost if nobody watches the step: if there are no
    hooks, no profiler and no arguments, only the update runs.

    Args:
        torchs: Torch's class that defines ``step``; its name is that of a rule of the kernels.
    """
    rule = _C.optimizers[torchs.__name__]
    step_by_torch = TorchsStep(rule, torchs)
    run = rule.step

    def step(self: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
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
        if grad_scale is not None and isinstance(self, Fused) and self.in_backward:
            raise RuntimeError(
                "in_backward does not go with GradScaler: backward has updated the parameters "
                "by gradients that were still scaled"
            )
        found_inf: Tensor | None = self.__dict__.get("found_inf")
        if not self.defaults["differentiable"]:
            run(self, grad_scale, found_inf, extensions_of(self), step_by_torch)
            return loss
        if isinstance(self, Fused):
            for group in self.param_groups:
                _require_finite(rule, group)
        left = [
            (group, [p for p in group["params"] if p.grad is not None])
            for group in self.param_groups
        ]
        if found_inf is None or not found_inf:
            step_by_torch(self, left, 1.0 if grad_scale is None else float(grad_scale))
            for _, params in left:
                for param in params:
                    _C.count_fallback(rule.name, param.device, "differentiable=True")
        return loss

    step.__module__ = "fusedstep.optim"
    step.__qualname__ = f"{torchs.__name__}.step"
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
            # The step of a subclass that calls this one has been wrapped by torch. What wraps this
            # one by functools.wraps() has its attributes.
            owner = next(cls for cls in type(self).__mro__ if "step" in vars(cls))
            is_own = getattr(vars(owner)["step"], "step_by_torch", None) is step_by_torch
            return (profiled if is_own or owner is torchs else step)(*args, **kwargs)
        if (
            len(args) > 1
            or kwargs
            or "grad_scale" in self.__dict__
            or "found_inf" in self.__dict__
            or self.defaults["differentiable"]
        ):
            return step(*args, **kwargs)
        run(self, None, None, self.__dict__.get(ATTRIBUTE, OF_TORCH), step_by_torch)
        return None

    wrapper.hooked = True  # type: ignore[attr-defined]  # tells Optimizer not to wrap it again
    wrapper.step_by_torch = step_by_torch  # type: ignore[attr-defined]
    return wrapper


@_outside_graphs
def zero_grad(self: Optimizer, set_to_none: bool = True) -> None:
    """Set every gradient to None, or to zero where ``set_to_none`` is False."""
    if set_to_none and not _profiler_enabled():
        _C.zero_grad(self.param_groups)
    else:
        Optimizer.zero_grad(self, set_to_none)


zero_grad.__module__ = "fusedstep.optim"


class Fused(Optimizer):
    """What an optimizer of fusedstep's has that torch's has not; a base beside torch's class.

    A subclass assigns ``step`` from :func:`fused_step` and passes the arguments below to
    :meth:`_extend` before torch's constructor runs, then calls :meth:`_begin`. None of them is in
    ``defaults``, in the parameter groups or in a checkpoint.
    """

    master_weights: bool = False
    stochastic_rounding: bool = False
    seed: int = 0
    in_backward: bool = False

    _rule: Any  # of the kernels

    def _extend(
        self,
        master_weights: bool,
        stochastic_rounding: bool,
        seed: int,
        in_backward: bool,
        differentiable: bool,
    ) -> None:
        """Check what torch's class does not have, and set it."""
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
        self.master_weights = master_weights
        self.stochastic_rounding = stochastic_rounding
        self.seed = int(seed)
        self._hooks: list[RemovableHandle] = []
        extend(
            self,
            _C.Extensions(
                master_weights=master_weights,
                seed=self.seed if stochastic_rounding else None,
                require_finite=True,
            ),
        )

    def _begin(self, in_backward: bool) -> None:
        """Let backward update the parameters, if that was asked for."""
        if in_backward:
            self._register_hooks(self.param_groups)
            self.in_backward = True
            self._step_supports_amp_scaling = True  # GradScaler comes to step(), to be refused

    def __getstate__(self) -> dict[str, Any]:
        ours = (self.master_weights, self.stochastic_rounding, self.seed, self.in_backward)
        return {**super().__getstate__(), "_extensions": ours}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        in_backward = self.in_backward
        if extensions := state.pop("_extensions", None):
            master_weights, stochastic_rounding, seed, in_backward = extensions
            self._extend(master_weights, stochastic_rounding, seed, False, False)
        super().__setstate__(state)
        self._begin(in_backward)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` of this class or of torch's returned.

        The tensors are copied: two optimizers that have loaded the same ``state_dict`` share none,
        as torch's do. Torch casts floating-point state to the dtype of its parameter. With
        ``master_weights`` the float32 weights and states of 16-bit parameters stay as they were
        saved.
        """
        loaded: dict[str, Any] = {}
        capture = self.register_load_state_dict_pre_hook(lambda _, given: loaded.update(given))
        restore = self.register_load_state_dict_post_hook(
            lambda _: self._copy_loaded(loaded), prepend=True
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            capture.remove()
            restore.remove()

    def _copy_loaded(self, loaded: dict[str, Any]) -> None:
        ids = (param_id for group in loaded["param_groups"] for param_id in group["params"])
        params = (param for group in self.param_groups for param in group["params"])
        for param_id, param in zip(ids, params, strict=True):
            given = loaded["state"].get(param_id, {})
            if not isinstance(given, dict):
                continue
            for key, value in given.items():
                if not isinstance(value, Tensor):
                    continue
                is_kept = self.master_weights and param.dtype in _HALVES
                if is_kept and value.dtype == torch.float32 and key in self._float32_states():
                    self.state[param][key] = value.to(param.device, copy=True)
                elif self.state[param].get(key) is value:
                    self.state[param][key] = value.clone()

    def _float32_states(self) -> tuple[str, ...]:
        """Those of a 16-bit parameter with a master weight."""
        return (*self._rule.states, "master_param")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as :meth:`torch.optim.Optimizer.add_param_group` does."""
        if isinstance(param_group, dict):
            _require_finite(self._rule, {**self.defaults, **param_group})
        super().add_param_group(param_group)
        if self.in_backward:
            try:
                self._register_hooks(self.param_groups[-1:])
            except RuntimeError:
                self.param_groups.pop()
                raise

    def _register_hooks(self, groups: list[dict[str, Any]]) -> None:
        """Register the hook on each parameter of these that can have a gradient, once."""
        owners = {p: owner_in_backward(p) for group in groups for p in group["params"]}
        if any(owner is not None and owner is not self for owner in owners.values()):
            raise RuntimeError(
                "a parameter is updated in backward by another optimizer; "
                "that one's remove_backward_hooks() releases it"
            )
        for param, owner in owners.items():
            if owner is None and param.is_leaf and param.requires_grad:
                hook = param.register_post_accumulate_grad_hook(StepInBackward(self))
                self._hooks.append(hook)

    def _step_in_backward(self, param: Tensor) -> None:
        step_by_torch = type(self)._torchs_step()
        self._rule.step_in_backward(self, param, extensions_of(self), step_by_torch)

    @classmethod
    def _torchs_step(cls) -> TorchsStep:
        steps = (vars(base)["step"] for base in cls.__mro__ if "step" in vars(base))
        found: TorchsStep = next(s.step_by_torch for s in steps if hasattr(s, "step_by_torch"))
        return found

    def remove_backward_hooks(self) -> None:
        """Leave all updates to :meth:`step`, and the parameters to other optimizers."""
        self.in_backward = False
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
