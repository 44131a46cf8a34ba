"""Which names are patched, how often each kernel ran, and what was left to torch and why."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.util import Finalize, register_after_fork

from fusedstep import _C, _patch, _ranks, _torchs_own, functional

__all__ = ["Calls", "Stats", "reset_stats", "stats"]

_OPERATORS = {*functional.__all__, *_C.optimizers} - {
    "check_targets"
}  # those that count their calls


@dataclass(frozen=True)
class Calls:
    """The calls of one operator on one kind of device.

    Attributes:
        operator: Its name in :mod:`fusedstep.functional` (``smooth_l1_loss`` with a ``beta`` of 0
            is ``l1_loss``); or ``"SGD"``, a call of which is the update of one parameter.
        device: Such as ``"cpu"`` or ``"cuda"``.
        fused: How many our kernels computed.
        fallbacks: How many were left to torch's own operator, by reason.
    """

    operator: str
    device: str
    fused: int
    fallbacks: Mapping[str, int]

    @property
    def fell_back(self) -> int:
        """How many were left to torch's own operator."""
        return sum(self.fallbacks.values())


@dataclass(frozen=True)
class Stats:
    """What :func:`stats` returns; ``print()`` shows it as a table.

    Attributes:
        calls: Those of every operator on every kind of device where it was called.
        replaced: The names of torch that are patched at the moment.
    """

    calls: tuple[Calls, ...]
    replaced: tuple[str, ...]

    def __getitem__(self, operator: str) -> Calls:
        """The calls of an operator, on all devices together.

        Raises:
            KeyError: There is no such operator.
        """
        if operator not in _OPERATORS:
            raise KeyError(operator)
        ours = [c for c in self.calls if c.operator == operator]
        fallbacks: dict[str, int] = {}
        for calls in ours:
            for reason, times in calls.fallbacks.items():
                fallbacks[reason] = fallbacks.get(reason, 0) + times
        devices = ", ".join(c.device for c in ours)
        return Calls(operator, devices, sum(c.fused for c in ours), fallbacks)

    @property
    def fused(self) -> int:
        """How many calls our kernels computed."""
        return sum(c.fused for c in self.calls)

    @property
    def fell_back(self) -> int:
        """How many calls were left to torch's own operators."""
        return sum(c.fell_back for c in self.calls)

    def __str__(self) -> str:
        rows = [("operator", "device", "fused", "torch's", "why")]
        for calls in self.calls:
            reasons = sorted(calls.fallbacks.items(), key=lambda item: -item[1])
            first, *more = [(str(n), reason) for reason, n in reasons] or [("0", "")]
            rows.append((calls.operator, calls.device, str(calls.fused), *first))
            rows += [("", "", "", *line) for line in more]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for operator, device, fused, left, why in rows:
            line = (
                f"{operator:{widths[0]}}  {device:{widths[1]}}  {fused:>{widths[2]}}  "
                f"{left:>{widths[3]}}  {why}"
            )
            lines.append(line.rstrip())
        return "\n".join([*lines, _patched(self)])


def _patched(summary: Stats) -> str:
    return f"patched: {', '.join(summary.replaced) or 'nothing'}"


def stats() -> Stats:
    """Return what is patched, and what became of the calls of this process since the last reset.

    Every run of a kernel is counted, whether Python called it, or :class:`torch.optim.SGD` while it
    is patched, or a program that ``torch.compile`` has made. A fallback is counted with its reason
    when it is decided: in a compiled program that is each time it is traced, not when it runs. Not
    counted are calls that raise an error, ``torch.optim.SGD`` in a program that was compiled before
    it was patched, and calls of other processes.
    """
    calls = tuple(Calls(*counts) for counts in _C.call_counts())
    return Stats(calls, _patch.replaced())


def reset_stats() -> None:
    """Count from zero again."""
    _C.reset_call_counts()


_printing: Finalize | None = None  # what prints the summary at the end of this process
_is_child = False  # which tells nothing where it has nothing to tell


def print_at_exit() -> None:
    """Print the summary to stderr when this process exits, and when its forked children do."""
    _begin(is_child=False)


def print_at_exit_of_child() -> None:
    """Print the summary when this process, which a run has started, ends."""
    _begin(is_child=True)


def _begin(is_child: bool) -> None:
    """Print once, whoever asks; where a run is within a run, as the inner one."""
    global _is_child
    begun = _printing is not None
    _is_child = is_child and (_is_child or not begun)
    _torchs_own.note()
    if not begun:
        register_after_fork(_print, lambda _: _begin_child())
    # What is begun in a process that a fork server makes, it drops, and begins anew.
    if _printing is None or not _printing.still_active():
        _finish_by_printing()


def _begin_child() -> None:
    """In a fork, which has its parent's counts."""
    global _is_child
    _is_child = True
    reset_stats()
    _torchs_own.forget()
    _finish_by_printing()


def _finish_by_printing() -> None:
    # multiprocessing's own way to end, which its children take too: they run no exit handlers.
    global _printing
    _printing = Finalize(None, _print, exitpriority=0)


def _print() -> None:
    summary, used = stats(), _torchs_own.used()
    silent = _is_child or "torch.distributed.launcher" in sys.modules  # torchrun starts ranks only
    if silent and not summary.calls and not used:
        return
    rank = _ranks.this_rank()
    who = f"process {os.getpid()}" + (f", rank {rank[0]} of {rank[1]}" if rank else "")
    # At once, so that the lines of several processes do not mix.
    sys.stderr.write(f"fusedstep in {who}:\n{_report(summary, used)}\n")


def _report(summary: Stats, used: Sequence[str]) -> str:
    """The table, and what the process used that has no place in it."""
    names = " and ".join(filter(None, [", ".join(used[:-1]), *used[-1:]]))
    if summary.calls:
        return str(summary) + (f"\nnot replaced: {names}" if used else "")
    instead = f": this script used {names}, which fusedstep does not replace" if used else ""
    return f"none of its kernels ran{instead}\n{_patched(summary)}"
