"""What a call allocates: the most memory that it holds at once, and how often it allocates.

On the CPU both are counted from the allocations and releases that torch's profiler sees; on CUDA
they are the caching allocator's own statistics. Page faults are counted by the system: a call has
them if the memory of the call before it was returned to the system.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library is silent

MEMORY_EVENT = "[memory]"
LOSS_ELEMENTS = 32_768
COUNTED_CALLS = 2  # for page faults


@dataclass(frozen=True)
class Footprint:
    peak_bytes: int
    """The most held at once beyond what was allocated before the call."""
    allocations: int
    page_faults: int | None = None
    """On the CPU: of two calls the fewer."""


def footprint(call: Callable[[], object], device: str) -> Footprint:
    """Of a `call` that has been made before and frees what it made."""
    return _on_cuda(call) if device == "cuda" else _on_cpu(call)


def _on_cuda(call: Callable[[], object]) -> Footprint:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    count = torch.cuda.memory_stats().get("allocation.all.allocated", 0)
    call()
    return Footprint(
        torch.cuda.max_memory_allocated() - before,
        torch.cuda.memory_stats().get("allocation.all.allocated", 0) - count,
    )


def _on_cpu(call: Callable[[], object]) -> Footprint:
    elsewhere = _gradient()  # noqa: F841  (held: see there)
    first, later = _allocated(call), _allocated(call)
    return Footprint(
        max(accumulate(first), default=0),
        sum(nbytes > 0 for nbytes in later),
        min(_page_faults(call) for _ in range(COUNTED_CALLS)),
    )


def _page_faults(call: Callable[[], object]) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _gradient() -> torch.Tensor:
    """One whose memory fusedstep, which keeps that of a freed gradient for the next, has to give
    away: what the first call after this holds is what that call allocates."""
    import fusedstep

    x = torch.zeros(LOSS_ELEMENTS, requires_grad=True)
    fusedstep.functional.mse_loss(x, x.detach()).backward()
    assert x.grad is not None
    return x.grad


def _allocated(call: Callable[[], object]) -> list[int]:
    """The bytes of each allocation, negative for a release, in their order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    changes = [
        (event.start_ns(), event.nbytes()) for event in events if event.name() == MEMORY_EVENT
    ]
    return [nbytes for _, nbytes in sorted(changes, key=lambda change: change[0])]
