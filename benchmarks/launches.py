"""Counts the kernels that a call launches on the GPU, from a trace of torch's profiler.

Count after everything has been timed: once the profiler has run, later launches may be slower.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

CLOCK_SLACK_SECONDS = 1e-3  # by which the trace's times of host and GPU may differ
KINDS = {"kernel": "kernels", "gpu_memcpy": "copies", "gpu_memset": "copies"}


@dataclass(frozen=True)
class Launches:
    kernels: int
    copies: int
    """Copies and fills that the driver does without a kernel of torch's or ours."""


def count(calls: Mapping[str, Callable[[], object]], device: str) -> dict[str, Launches]:
    """What each call launches, or nothing where the profiler does not see the GPU.

    They run in their order, twice: what only a first call does (loading code, making state) is not
    counted.
    """
    for call in calls.values():
        call()
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with profile(activities=activities) as profiler:
        for name, call in calls.items():
            with record_function(name):
                time.sleep(CLOCK_SLACK_SECONDS)
                call()
                if device == "cuda":
                    torch.cuda.synchronize()
                time.sleep(CLOCK_SLACK_SECONDS)
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return by_section(events, calls)


def by_section(events: Sequence[Mapping[str, Any]], names: Iterable[str]) -> dict[str, Launches]:
    """The launches within the sections that record_function() named, by a trace's events."""
    launched = [(event["cat"], event["ts"]) for event in events if event.get("cat") in KINDS]
    if not launched:
        return {}
    sections = {event["name"]: event for event in events if event.get("cat") == "user_annotation"}

    def within(name: str) -> Launches:
        begin = sections[name]["ts"]
        end = begin + sections[name]["dur"]
        kinds = [KINDS[kind] for kind, when in launched if begin <= when <= end]
        return Launches(kinds.count("kernels"), kinds.count("copies"))

    return {name: within(name) for name in names}
