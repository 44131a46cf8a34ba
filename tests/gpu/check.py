"""Builds, tests, sanitizes and measures fusedstep on this machine's GPU: `make gpu-check`.

Needs a Python with torch built for CUDA, pytest and the benchmarks' packages, nvcc and a compiler,
but no network; nothing is installed outside build/. Each part has a time limit and writes a log
into the given folder. If a part fails or runs out of time, the table and the exit status say so,
and the other parts still run.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "build" / "gpu-check" / "site"
EVERY_KERNEL = str(ROOT / "tests" / "gpu" / "every_kernel.py")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")

# Seconds. Tests and sanitizers run side by side; the benchmarks, alone, get what is left.
WHOLE = 530
BUILD = 150
TESTS = 200
SANITIZER = 180
BENCHMARKS_AT_LEAST = 60
LAST_CASE = 20  # how long after their time the benchmarks may end

# The line of a part's log that says how it went, best first.
TELLING = (
    r".*Device not supported.*",  # compute-sanitizer, where the driver does not let it in
    r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)",
    r"=* ?(\d+ (?:passed|failed|error).*? in [\d.]+s.*?) ?=*",
    r".*\S.*",
)


@dataclass(frozen=True)
class Part:
    """A command and what it may take."""

    name: str
    command: Sequence[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a part ended."""

    name: str
    passed: bool
    seconds: float
    note: str


def telling_line(log: str) -> str:
    """What a log says of how it went, in one line."""
    for pattern in TELLING:
        if found := list(re.finditer(f"^{pattern}$", log, re.MULTILINE)):
            last = found[-1]
            return (last[1] if last.re.groups else last[0]).strip()
    return "no output"


def run(part: Part, out: Path) -> Outcome:
    """Runs a part to its end, or to the end of its time with everything that it started."""
    begin = time.monotonic()
    path = out / f"{part.name}.log"
    beside_python = str(Path(sys.executable).parent)  # ninja, for one
    environment = {
        "PATH": os.pathsep.join([os.environ.get("PATH", os.defpath), beside_python]),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(SITE), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
    } | part.environment
    with path.open("wb") as log:
        try:
            process = subprocess.Popen(
                part.command,
                cwd=ROOT,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return Outcome(part.name, False, 0.0, str(error))
        try:
            process.wait(part.seconds)
            how = f"exit status {process.returncode}: " if process.returncode else ""
        except subprocess.TimeoutExpired:
            how = f"stopped after {part.seconds:.0f} s: "
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    note = how + telling_line(path.read_text(errors="replace"))
    outcome = Outcome(part.name, process.returncode == 0, time.monotonic() - begin, note)
    print(row(outcome), flush=True)
    return outcome


def row(outcome: Outcome) -> str:
    """An outcome as a line of the table."""
    word = "passed" if outcome.passed else "FAILED"
    return f"{outcome.name:12} {word} {outcome.seconds:6.0f} s  {outcome.note}"


def build(architectures: Sequence[str]) -> Part:
    """Compiles this checkout for the cards here."""
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
    pip += ["--no-index", "--disable-pip-version-check", "--upgrade", "--target", str(SITE), "-v"]
    wanted = {"FUSEDSTEP_CUDA": "1", "TORCH_CUDA_ARCH_LIST": ";".join(architectures)}
    return Part("build", [*pip, "."], BUILD, wanted)


def tests() -> Part:
    """The whole suite, with CUDA for its device."""
    command = [sys.executable, "-m", "pytest", "--device", "cuda", "-q"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "auto", "--maxprocesses", "8", "--dist", "worksteal"]
    return Part("tests", command, TESTS)


def sanitizer(tool: str) -> Part:
    """One of compute-sanitizer's tools, over every kernel."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    path = os.pathsep.join([os.environ.get("PATH", ""), str(home)])
    program = shutil.which("compute-sanitizer", path=path) or "compute-sanitizer"
    # torch asks the driver for things that it knows may be missing: that is no error of ours.
    command = [program, "--tool", tool, "--error-exitcode", "1", "--report-api-errors", "no"]
    if tool != "initcheck":  # which must see what torch's kernels write
        command += ["--kernel-name", "kernel_substring=fusedstep"]
    # One allocation per tensor: past the end of a tensor lies nothing that belongs to another.
    separate = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Part(tool, [*command, sys.executable, EVERY_KERNEL], SANITIZER, separate)


def info() -> Part:
    """What was built, and for which cards."""
    return Part("info", [sys.executable, "-m", "fusedstep", "info"], 30)


def benchmarks(out: Path, seconds: float) -> Part:
    """Bandwidth, launches and ratios."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py")]
    command += ["--minutes", f"{(seconds - LAST_CASE) / 60:.2f}"]
    return Part("benchmarks", [*command, "--json", str(out / "benchmarks.json")], seconds)


def check(out: Path, architectures: Sequence[str]) -> int:
    """Runs every part; the exit status."""
    begin = time.monotonic()
    outcomes = [run(build(architectures), out)]
    if outcomes[0].passed:
        beside = [tests(), *map(sanitizer, SANITIZERS)]
        with ThreadPoolExecutor(len(beside)) as pool:
            outcomes += pool.map(lambda part: run(part, out), beside)
        outcomes.append(run(info(), out))
        left = max(WHOLE - (time.monotonic() - begin), BENCHMARKS_AT_LEAST)
        outcomes.append(run(benchmarks(out, left), out))
        for part in ("info", "benchmarks"):
            print("", (out / f"{part}.log").read_text(errors="replace"), sep="\n")
    failed = [outcome.name for outcome in outcomes if not outcome.passed]
    last = f"failed: {', '.join(failed)}" if failed else "everything passed"
    summary = "\n".join([*map(row, outcomes), f"{last}; logs are in {out}"])
    (out / "summary.txt").write_text(summary + "\n")
    print(summary)
    return 1 if failed else 0


def main() -> None:
    """Run the command line: the folder that the logs go to."""
    if len(sys.argv) != 2:
        sys.exit("usage: check.py FOLDER")
    try:
        import torch
    except ImportError:
        sys.exit(f"gpu-check needs torch, and {sys.executable} has none: make gpu-check PYTHON=...")
    if not torch.cuda.is_available():
        print(f"gpu-check needs a CUDA GPU, and torch {torch.__version__} sees none here.")
        sys.exit(2)
    out = Path(sys.argv[1]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    cards = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    sys.exit(check(out, [f"{major}.{minor}" for major, minor in sorted(set(cards))]))


if __name__ == "__main__":
    main()
