"""Builds the native checks: each room's kernels with one of the targets, under a sanitizer."""

from __future__ import annotations

import functools
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from emulator.build import HERE as EMULATOR
from emulator.build import ROOT, Ninja

HERE = Path(__file__).resolve().parent
OUT = ROOT / "build" / "native"
CSRC = ROOT / "csrc"

# The rooms whose kernels a target calls; cuda_plan calls none, only functions of headers.
TARGETS = {
    "cross_entropy": ["cross_entropy"],
    "pointwise_loss": ["pointwise_loss"],
    "sgd": ["optim"],
    "optim": ["optim"],
    "cuda_plan": [],
}
# cuda_plan includes the emulator's CUDA, which needs std::source_location: g++, or clang from 16.
FUZZED = [target for target, rooms in TARGETS.items() if rooms]

COMMON = [
    "-std=c++20",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
    "-Wno-missing-field-initializers",
    f"-I{CSRC}",
    f"-I{EMULATOR / 'include'}",
    "-pthread",
]


@dataclass(frozen=True)
class Flavour:
    """A compiler and its flags; what it needs beside the kernels to make a program."""

    name: str
    compiler: str
    flags: tuple[str, ...]
    driver: str | None = "random_inputs.cpp"


ADDRESS = Flavour(
    "address",
    "g++",
    ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
)
# Accesses of more than 16 bytes, and masked ones, escape the thread sanitizer: the baseline level
# has neither.
THREAD = Flavour("thread", "g++", ("-O1", "-g1", "-fsanitize=thread", "-DNATIVE_THREADS=3"))
PLAIN = Flavour("plain", "g++", ("-O2", "-g1"))
MEMORY = Flavour("memory", "g++", ("-O2", "-g1", "-DNATIVE_MEMORY_ONLY"))
FUZZER = Flavour(
    "fuzzer",
    "clang++",
    ("-O1", "-g1", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"),
    driver=None,
)


def need(tool: str, why: str) -> None:
    """Raises SystemExit where the tool is not installed: what was not run must not look passed."""
    if shutil.which(tool) is None:
        raise SystemExit(f"{why} needs {tool}, which is not installed")


@functools.cache
def at_fixed_addresses() -> tuple[str, ...]:
    """What to put in front of the command of a program under a sanitizer, where it is allowed.

    Those of g++ 12 and 13 may not start at random addresses of more than 28 bits
    (`sysctl vm.mmap_rnd_bits`): "unexpected memory mapping".
    """
    prefix = ("setarch", "--addr-no-randomize")
    try:
        allowed = subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    except OSError:
        allowed = False
    return prefix if allowed else ()


def version(tool: str) -> str:
    """The first line of what `tool --version` prints."""
    done = subprocess.run([tool, "--version"], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()[0]


def kernels(room: str) -> list[Path]:
    """The room's torch-free CPU sources."""
    return sorted((CSRC / room).glob("cpu_*.cpp"))


def build_target(target: str, flavour: Flavour) -> Path:
    """The program of one target.

    Raises:
        RuntimeError: the build failed; the message is what the compiler said.
    """
    need(flavour.compiler, f"the {flavour.name} build")
    folder = OUT / flavour.name / target
    ninja = Ninja(folder, flavour.compiler)
    sources = [HERE / f"fuzz_{target}.cpp"]
    if flavour.driver:
        sources.append(HERE / flavour.driver)
    # The harness goes without a sanitizer where what is checked is not in it.
    harness = [
        flag for flag in flavour.flags if not (TARGETS[target] and flag.startswith("-fsanitize"))
    ]
    ninja.compile(sources, [*COMMON, *harness, "-O2"])
    shared = [CSRC / "core" / "cpu_level.cpp"]
    levels = [source for room in TARGETS[target] for source in kernels(room)]
    ninja.compile([*shared, *levels], [*COMMON, *flavour.flags])
    program = folder / target
    ninja.link(program, [*flavour.flags, "-pthread"])
    return program
