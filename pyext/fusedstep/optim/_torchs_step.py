"""What the kernels do not cover is updated by torch's own ``step``, on a shadow optimizer."""

import inspect
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fusedstep import _C
from fusedstep.optim._extensions import extensions_of

__all__ = ["TorchsStep"]

_HALVES = (torch.bfloat16, torch.float16)


class TorchsStep:
    """Updates parameters by the ``step`` that torch gave a class.

    Torch's function is called on a shadow: an object of torch's class that has the optimizer's
    state and, of its groups, only these parameters. So neither hooks nor a subclass's own ``step``
    run again, and torch makes the state that it lacks. Torch's foreach and fused implementations
    are not used on the CPU, where fused ones are wrong for some layouts.
    """

    def __init__(self, rule: Any, torchs: type[Optimizer]) -> None:
        self.rule = rule
        self.torchs = torchs
        self.step = inspect.unwrap(torchs.step)  # without hooks and torch's compiler

    def __call__(
        self,
        optimizer: Optimizer,
        left: list[tuple[dict[str, Any], list[Tensor]]],
        grad_scale: float = 1.0,
    ) -> None:
        """Update these parameters of these groups, whose gradients are multiplied by grad_scale."""
        ordinary: list[dict[str, Any]] = []
        with_master: list[dict[str, Any]] = []
        masters: dict[Tensor, Tensor] = {}
        has_masters = extensions_of(optimizer).master_weights
        for group, params in left:
            for param in params:
                for key in self.rule.states_of(group):
                    if optimizer.state.get(param, {}).get(key) is None:
                        _C.refuse_capture(param.device, key)
            halves = [p for p in params if has_masters and p.dtype in _HALVES]
            masters |= {p: self._master(optimizer, p, grad_scale) for p in halves}
            others = [p for p in params if p not in masters]
            for param in others:
                _unscale(param, grad_scale)
            ordinary += _shadow_groups(group, others)
            with_master += _shadow_groups(group, [masters[p] for p in halves])
        self._step(optimizer, ordinary, optimizer.state)
        if masters:
            self._step_masters(optimizer, with_master, masters)

    def _step(self, optimizer: Optimizer, groups: list[dict[str, Any]], state: Any) -> None:
        shadow: Any = object.__new__(self.torchs)
        shadow.__dict__ |= {
            "defaults": optimizer.defaults,
            "param_groups": groups,
            "state": state,
        }
        with torch.set_grad_enabled(bool(optimizer.defaults["differentiable"])):
            self.step(shadow)

    def _step_masters(
        self, optimizer: Optimizer, groups: list[dict[str, Any]], masters: dict[Tensor, Tensor]
    ) -> None:
        state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        for param, master in masters.items():
            found = optimizer.state[param]
            for key in self.rule.states:
                if found.get(key) is not None:
                    if found[key].dtype != master.dtype:
                        _C.refuse_capture(param.device, key)
                    state[master][key] = found[key].to(master.dtype)
        self._step(optimizer, groups, state)
        with torch.no_grad():
            for param, master in masters.items():
                optimizer.state[param] |= {**state[master], "master_param": master}
                master.grad = None
                param.copy_(master)

    def _master(self, optimizer: Optimizer, param: Tensor, grad_scale: float) -> Tensor:
        """The float32 weights behind a 16-bit parameter, with a float32 gradient.

        ``param.grad`` gets the same unscaled gradient, rounded to its own dtype.
        """
        grad = param.grad
        assert grad is not None
        with torch.no_grad():
            master: Tensor | None = optimizer.state[param].get("master_param")
            if master is None or master.dtype != torch.float32:
                _C.refuse_capture(param.device, "master_param")
                master = (param if master is None else master).to(torch.float32)
            changed = master.to(param.dtype) != param
            # In place, where the capture of a CUDA graph finds it again.
            master.copy_(torch.where(changed, param, master))
            wide = grad.to(master.dtype)
            if grad_scale != 1.0:
                grad.copy_(wide.div_(grad_scale))
            master.grad = wide
        return master


def _unscale(param: Tensor, grad_scale: float) -> None:
    if grad_scale != 1.0:
        assert param.grad is not None
        with torch.no_grad():
            param.grad.div_(grad_scale)


def _shadow_groups(group: dict[str, Any], params: list[Tensor]) -> Iterator[dict[str, Any]]:
    """The group with these parameters alone, those on the CPU apart."""
    on_cpu = [p for p in params if p.device.type == "cpu"]
    elsewhere = [p for p in params if p.device.type != "cpu"]
    if on_cpu:
        yield {**group, "params": on_cpu, "foreach": False, "fused": False}
    if elsewhere:
        yield {**group, "params": elsewhere}
