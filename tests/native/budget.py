"""Instructions that kernels and calls take, counted by callgrind, against a recorded budget.

Counts do not depend on the load of the machine, so a small rise is a fact. They do depend on the
compiler, the C library, torch and Python: a budget holds for those it was recorded with.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emulator.build import ROOT
from native import build

BUDGET = build.HERE / "budget.json"
OUT = build.OUT / "budget"
RISE = 0.03  # a count may rise by so much
LEVELS = ("default", "avx2")  # valgrind has no AVX-512

# name: (instructions, what they are divided by: elements, or calls)
Counts = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Change:
    """A count beside the one that was recorded; None: there is none."""

    name: str
    before: int | None
    after: int | None

    @property
    def ratio(self) -> float:
        if not self.before or self.after is None:
            return 1.0
        return self.after / self.before

    @property
    def is_over(self) -> bool:
        """Whether the check fails: a rise, or a measurement that the budget does not have or that
        is not made any more."""
        return self.before is None or self.after is None or self.ratio > 1 + RISE


def changes(recorded: Mapping[str, Sequence[int]], measured: Counts) -> list[Change]:
    """Every count of either, in the order in which they are measured."""
    names = [*measured, *(name for name in recorded if name not in measured)]
    return [
        Change(
            name,
            recorded[name][0] if name in recorded else None,
            measured[name][0] if name in measured else None,
        )
        for name in names
    ]


def read_counts(folder: Path) -> Counts:
    """The measurements that callgrind has left in a folder, in their order.

    Raises:
        RuntimeError: there are none.
    """
    counts: Counts = {}
    files = sorted(folder.glob("counts.*"), key=lambda file: int(file.suffix[1:]))
    for file in files:
        text = file.read_text()
        name = re.search(r"^desc: Trigger: Client Request: (.+)\|(\d+)$", text, re.MULTILINE)
        total = re.search(r"^totals: (\d+)", text, re.MULTILINE)
        if name and total:
            counts[name[1]] = (int(total[1]), int(name[2]))
    if not counts:
        raise RuntimeError(f"callgrind has counted nothing in {folder}")
    return counts


def count(level: str, command: Sequence[str | Path], folder: Path) -> Counts:
    """Run a program that counts under callgrind, at an instruction-set level."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("counts*"):
        old.unlink()
    callgrind = ["valgrind", "--quiet", "--tool=callgrind", "--instr-atstart=no"]
    # The hashes of strings and the addresses of memory stay the same from run to run.
    environment = os.environ | {
        "ATEN_CPU_CAPABILITY": level,
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [*callgrind, f"--callgrind-out-file={folder / 'counts'}", *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command} failed under callgrind:\n{done.stdout}")
    return read_counts(folder)


def compile_with(sources: Sequence[Path], flags: Sequence[str], binary: Path) -> Path:
    binary.parent.mkdir(parents=True, exist_ok=True)
    command = ["g++", "-std=c++20", "-O2", f"-I{build.CSRC}", *flags]
    subprocess.run([*command, *sources, "-o", binary], check=True)
    return binary


def extension_objects() -> list[Path]:
    """The kernels as they were compiled for the extension.

    Raises:
        RuntimeError: the extension was not built here.
    """
    import torch

    folder = ROOT / "build" / f"temp-{torch.__version__}" / "csrc"
    rooms = dict.fromkeys(room for rooms in build.TARGETS.values() for room in rooms)
    sources = [build.CSRC / "core" / "cpu_level.cpp", *(s for r in rooms for s in build.kernels(r))]
    objects = [folder / source.relative_to(build.CSRC).with_suffix(".o") for source in sources]
    missing = [str(file) for file in objects if not file.is_file()]
    if missing:
        raise RuntimeError(f"build the extension in place first (make build): no {missing[0]}")
    return objects


def facts() -> dict[str, dict[str, str]]:
    """What each part's counts depend on beside the sources."""
    import torch

    from fusedstep._build_info import compiler

    kernels = {
        "compiler": build.version(compiler),
        "machine": platform.machine(),
        "C library": " ".join(platform.libc_ver()),
        "valgrind": build.version("valgrind"),
    }
    calls = kernels | {"torch": torch.__version__, "Python": platform.python_version()}
    return {"kernels": kernels, "calls": calls}


def measure() -> dict[str, Counts]:
    """All counts: of the kernels at each level, and of calls."""
    counter = build.HERE / "counter.cpp"
    kernels = compile_with(
        [build.HERE / "count_kernels.cpp", counter, *extension_objects()], [], OUT / "count_kernels"
    )
    shared = compile_with([counter], ["-shared", "-fPIC"], OUT / "counter.so")
    counts: Counts = {}
    for level in LEVELS:
        for name, value in count(level, [kernels], OUT / level).items():
            counts[f"{level}: {name}"] = value
    calls = count("avx2", [sys.executable, build.HERE / "count_calls.py", shared], OUT / "calls")
    return {"kernels": counts, "calls": calls}


def report(part: str, recorded: Mapping[str, Any], here: Mapping[str, str], counts: Counts) -> bool:
    """Say how a part's counts compare with the budget; whether they are within it."""
    unit = "element" if part == "kernels" else "call"
    differing = [name for name in here if recorded["facts"].get(name) != here[name]]
    if differing:
        for name in differing:
            was = recorded["facts"].get(name)
            print(f"{part}: NOT COMPARED: recorded with {name} {was}, this is {here[name]}")
        return True
    within = True
    for change in changes(recorded["counts"], counts):
        each = "" if change.after is None else f"{change.after / counts[change.name][1]:.2f}"
        line = f"{change.name}: {each} instructions per {unit}"
        if change.before is None:
            line += ", not in the budget: renew it (make budget ARGS=--update)"
        elif change.after is None:
            line += ", not measured any more: renew the budget (make budget ARGS=--update)"
        elif change.is_over:
            line += f", {change.ratio - 1:+.1%}: OVER BUDGET, {change.before} -> {change.after}"
        elif change.ratio < 1 - RISE:
            line += f", {change.ratio - 1:+.1%}: renew the budget (make budget ARGS=--update)"
        print(line)
        within = within and not change.is_over
    return within


def main(update: bool) -> None:
    """Measure and compare, or record.

    Raises:
        SystemExit: a count has risen by more than 3 %, or measurements and budget differ in kind.
    """
    build.need("valgrind", "the instruction budget")
    build.need("g++", "the instruction budget")
    here, measured = facts(), measure()
    if update:
        parts = {part: {"facts": here[part], "counts": measured[part]} for part in measured}
        text = json.dumps(parts, indent=1)
        # A count and its divisor on one line.
        BUDGET.write_text(re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text) + "\n")
        print(f"{BUDGET.relative_to(ROOT)}: {sum(map(len, measured.values()))} counts")
        return
    recorded = json.loads(BUDGET.read_text())
    within = [report(part, recorded[part], here[part], measured[part]) for part in measured]
    if not all(within):
        sys.exit("The instruction budget is exceeded: see OVER BUDGET and `renew` above.")
