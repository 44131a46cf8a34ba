"""What profilers see of a loss: its event, name and shapes, linked to its backward pass."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as native
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.autograd.profiler_util import FunctionEvent

import fusedstep
import fusedstep.functional as F
from numerics import BF16, F16, F32, F64, REDUCTIONS

CLASSES = torch.tensor([0, 2, 1, 2])
PROBABILITIES = torch.rand(4, 3)
POINTWISE = {  # and the node that torch's own loss has; L1 has none of its own
    "l1_loss": "L1LossBackward0",
    "mse_loss": "MseLossBackward0",
    "smooth_l1_loss": "SmoothL1LossBackward0",
    "huber_loss": "HuberLossBackward0",
    "binary_cross_entropy_with_logits": "BinaryCrossEntropyWithLogitsBackward0",
}
NODES = {
    **dict.fromkeys(
        ("cross_entropy", "cross_entropy_with_lse", "focal_loss"), "CrossEntropyBackward0"
    ),
    **POINTWISE,
}


def loss_of(name: str, functions: Any, x: Tensor, **options: Any) -> Tensor:
    target = PROBABILITIES.to(x.device, x.dtype) if name in POINTWISE else CLASSES.to(x.device)
    result = getattr(functions, name)(x, target, **options)
    return result[0] if isinstance(result, tuple) else result


@contextlib.contextmanager
def profiled(**options: Any) -> Iterator[torch.profiler.profile]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, **options) as profile:
        yield profile


def only(profile: torch.profiler.profile, name: str) -> FunctionEvent:
    (event,) = [event for event in profile.events() if event.name == name]
    return event


def logits(device: str, dtype: torch.dtype = F32, needs_grad: bool = True) -> Tensor:
    return torch.randn(4, 3, device=device).to(dtype).requires_grad_(needs_grad)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize("name", NODES)
def test_forward_and_backward_have_one_number(
    name: str, dtype: torch.dtype, reduction: str, device: str
) -> None:
    x = logits(device, dtype)
    with profiled() as profile:
        loss_of(name, F, x * 2, reduction=reduction).sum().backward()
    forward, backward = only(profile, f"fusedstep::{name}"), only(profile, NODES[name])
    assert forward.sequence_nr == backward.sequence_nr != -1


@pytest.mark.parametrize("patched", [False, True], ids=["imported", "patched"])
def test_a_trace_links_every_loss_to_its_backward_pass(
    patched: bool, tmp_path: Path, device: str
) -> None:
    """Also where two of them go back together, and where hooks compute while tensors are saved."""
    functions = native if patched else F
    names = [name for name in NODES if hasattr(functions, name)]
    x = logits(device)
    hooks = saved_tensors_hooks(lambda t: t * 1, lambda t: t)
    with fusedstep.patched() if patched else contextlib.nullcontext(), profiled() as profile:
        total = torch.stack([loss_of(name, functions, x * 2) for name in names]).sum()
        total.backward()
        with hooks:
            (loss_of("mse_loss", functions, x) * 3).backward()
    path = tmp_path / "trace.json"
    profile.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    begun = {event["ts"]: event["name"] for event in events if event["ph"] == "X"}
    links: dict[int, list[str]] = {}
    for event in events:
        if event.get("cat") == "fwdbwd":
            name = begun[event["ts"]].removeprefix("autograd::engine::evaluate_function: ")
            links.setdefault(event["id"], []).append(name)
    found = [link for link in links.values() if link[0].startswith("fusedstep::")]
    expected = [[f"fusedstep::{name}", NODES[name]] for name in [*names, "mse_loss"]]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("name", NODES)
def test_a_loss_without_a_graph_is_linked_to_nothing(name: str, device: str) -> None:
    for needs_grad, enabled in ((False, True), (True, False)):
        with profiled() as profile, torch.set_grad_enabled(enabled):
            loss_of(name, F, logits(device, needs_grad=needs_grad))
        assert only(profile, f"fusedstep::{name}").sequence_nr == -1


@pytest.mark.parametrize("name", NODES)
def test_shapes_are_recorded(name: str, device: str) -> None:
    with profiled(record_shapes=True) as profile:
        loss_of(name, F, logits(device))
    target = [4, 3] if name in POINTWISE else [4]
    assert only(profile, f"fusedstep::{name}").input_shapes[:2] == [[4, 3], target]


@pytest.mark.parametrize("name", NODES)
def test_a_compiled_loss_runs_under_a_profiler(name: str, device: str) -> None:
    x = logits(device)
    compiled = torch.compile(lambda x: loss_of(name, F, x * 2), backend="aot_eager")
    expected = torch.autograd.grad(loss_of(name, F, x * 2), x)
    compiled(x)
    with profiled() as profile:
        actual = torch.autograd.grad(compiled(x), x)
    torch.testing.assert_close(actual, expected)
    assert any("fusedstep::" in event.name for event in profile.events())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", NODES)
def test_nodes_have_the_names_of_torchs(name: str, reduction: str, device: str) -> None:
    """Where torch's loss is one node; ours is another type all the same."""
    x = logits(device)
    node = loss_of(name, F, x, reduction=reduction).grad_fn
    assert node is not None and node.name() == NODES[name] == type(node).__name__
    assert repr(node).startswith(f"<{NODES[name]} object")
    if name in POINTWISE and name != "l1_loss":
        theirs = loss_of(name, native, x, reduction=reduction).grad_fn
        assert theirs is not None and theirs.name() == node.name()
        assert type(theirs) is not type(node)
