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
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "build" / "gpu-check" / "site"
EVERY_KERNEL = str(ROOT / "tests" / "gpu" / "every_kernel.py")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")

# Seconds. Processes take turns on a card, and a sanitizer's kernels take long ones: sanitizers run
# beside each other alone, and last, with what is left.
WHOLE = 530
BUILD = 150
BENCHMARKS_AT_LEAST = 60
SANITIZERS_AT_LEAST = 110
TO_END = 15  # for what runs out of time to say how far it came
LAST_CASE = 20  # how long after their time the benchmarks may end

# Tests of what a card has no part in; and of packages that are wanted in certain versions.
WITHOUT_CARD = (
    "test_benchmarks.py",
    "test_build.py",
    "test_checkpoint.py",
    "test_cpu_levels.py",
    "test_documentation.py",
    "test_emulator.py",
    "test_error_measure.py",
    "test_faults.py",
    "test_gpu_check.py",
    "test_launch_plans.py",
    "test_layering.py",
    "test_native.py",
    "clients",
)

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


Wait = Callable[["subprocess.Popen[bytes]", float], bool]


def ends_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Waits for the end of a process, but no longer; whether it has ended."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def telling_line(log: str) -> str:
    """What a log says of how it went, in one line."""
    for pattern in TELLING:
        if found := list(re.finditer(f"^{pattern}$", log, re.MULTILINE)):
            last = found[-1]
            return (last[1] if last.re.groups else last[0]).strip()
    return "no output"


def run(part: Part, out: Path, in_time: Wait = ends_within) -> Outcome:
    """Runs a part to its end, or to the end of its time with everything that it started.

    `in_time` waits as ends_within() does; it is the only clock that decides.
    """
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
        if in_time(process, part.seconds):
            how = f"exit status {process.returncode}: " if process.returncode else ""
        else:
            how = f"stopped after {part.seconds:.0f} s: "
            os.killpg(process.pid, signal.SIGINT)  # on which pytest prints what has failed so far
            in_time(process, TO_END)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    note = how + telling_line(path.read_text(errors="replace"))
    outcome = Outcome(part.name, not how, time.monotonic() - begin, note)
    print(row(outcome), flush=True)
    return outcome


def row(outcome: Outcome) -> str:
    """An outcome as a line of the table."""
    word = "passed" if outcome.passed else "FAILED"
    return f"{outcome.name:12} {word} {outcome.seconds:6.0f} s  {outcome.note}"


def build(architectures: Sequence[str]) -> Part:
    """Compiles this checkout for the cards here, and says what was built."""
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
    pip += ["--no-index", "--disable-pip-version-check", "--upgrade", "--target", str(SITE), "-v"]
    info = [sys.executable, "-m", "fusedstep", "info"]
    wanted = {"FUSEDSTEP_CUDA": "1", "TORCH_CUDA_ARCH_LIST": ";".join(architectures)}
    both = f"{shlex.join([*pip, '.'])} && {shlex.join(info)}"
    return Part("build", ["sh", "-c", both], BUILD, wanted)


def tests(seconds: float) -> Part:
    """The suite, with CUDA for its device. What cannot be imported stops nothing else."""
    command = [sys.executable, "-m", "pytest", "tests", "--device", "cuda", "-q"]
    command += ["--continue-on-collection-errors"]
    command += [f"--ignore=tests/{name}" for name in WITHOUT_CARD]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "auto", "--maxprocesses", "12", "--dist", "worksteal"]
    return Part("tests", command, seconds)


def sanitizer(tool: str, seconds: float) -> Part:
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
    return Part(tool, [*command, sys.executable, EVERY_KERNEL], seconds, separate)


def benchmarks(out: Path, seconds: float) -> Part:
    """Bandwidth, launches and ratios."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py")]
    command += ["--minutes", f"{(seconds - LAST_CASE) / 60:.2f}"]
    return Part("benchmarks", [*command, "--json", str(out / "benchmarks.json")], seconds)


def join_logs(out: Path, names: Sequence[str], joined: str) -> None:
    """Makes one log of several."""
    with (out / f"{joined}.log").open("w") as log:
        for path in (out / f"{name}.log" for name in names):
            if path.exists():
                log.write(f"{path.stem}\n{path.read_text(errors='replace')}\n")
                path.unlink()


def check(out: Path, architectures: Sequence[str], in_time: Wait = ends_within) -> int:
    """Runs every part, each within its time as run() has it; the exit status."""
    until = time.monotonic() + WHOLE

    def left_before(*later: float) -> float:
        """Until what is still to come begins: that and what runs out of time before it."""
        return until - time.monotonic() - sum(seconds + TO_END for seconds in (0, *later))

    outcomes = [run(build(architectures), out, in_time)]
    if outcomes[0].passed:
        seconds = left_before(BENCHMARKS_AT_LEAST, SANITIZERS_AT_LEAST)
        outcomes.append(run(tests(seconds), out, in_time))
        seconds = left_before(SANITIZERS_AT_LEAST)
        outcomes.append(run(benchmarks(out, seconds), out, in_time))
        print("", (out / "benchmarks.log").read_text(errors="replace"), sep="\n")
        seconds = left_before()
        with ThreadPoolExecutor(len(SANITIZERS)) as pool:
            parts = [sanitizer(tool, seconds) for tool in SANITIZERS]
            outcomes += pool.map(lambda part: run(part, out, in_time), parts)
        join_logs(out, SANITIZERS, "sanitizers")
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
    # A job in a shell's background ignores interrupts, and its parts would not say what has failed.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out = Path(sys.argv[1]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    cards = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    sys.exit(check(out, [f"{major}.{minor}" for major, minor in sorted(set(cards))]))


if __name__ == "__main__":
    main()
