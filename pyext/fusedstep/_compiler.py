"""Keeps torch's functions in the compiler's tables while others have their names.

The compiler is loaded when the first optimizer is made, or later. Then it looks up torch's
functions by name and makes a table of how to trace each: those of the table go into a graph as they
are, all others are traced into.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fusedstep._imports import when_imported

__all__ = ["keep_torchs"]

_torchs: dict[Callable[..., Any], Callable[..., Any]] = {}


def keep_torchs(by_replacement: Mapping[Callable[..., Any], Callable[..., Any]]) -> None:
    """Have the compiler know these functions of torch, and not those that replace them."""
    _torchs.update(by_replacement)
    when_imported("torch._dynamo", _restore)


def _restore() -> None:
    try:
        # torch has no public name for the table; it is made once, at the first call.
        from torch._dynamo.trace_rules import get_torch_obj_rule_map
    except ImportError:
        return
    rules = get_torch_obj_rule_map()
    for replacement, torchs in _torchs.items():
        if replacement in rules:
            rules[torchs] = rules.pop(replacement)
