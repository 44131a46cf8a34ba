"""The CUDA kernels in the built extension, as cuobjdump describes them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from fusedstep import _C

OUTER_NAMESPACES = re.compile(r"\bfusedstep::|\(anonymous namespace\)::")
ARCHITECTURE = re.compile(r"arch = (sm_\w+)$|\tcode for (sm_\w+)$")
FUNCTION = re.compile(r"\s+Function (?:: )?([^\s:]+):?$")
RESOURCE = re.compile(r"\b(REG|STACK|LOCAL):(\d+)")
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")


@dataclass
class Kernel:
    """One kernel in one architecture's machine code."""

    resources: dict[str, int] = field(default_factory=dict)
    instructions: Counter[str] = field(default_factory=Counter)

    def count(self, opcode: str) -> int:
        """How many of its instructions are this one, given as a pattern."""
        return sum(n for name, n in self.instructions.items() if re.fullmatch(opcode, name))


# By name and architecture: ("scale_kernel<float>", "sm_90").
Kernels: TypeAlias = dict[tuple[str, str], Kernel]


def short_name(demangled: str) -> str:
    """A kernel's name with its template arguments, from its room's namespace on."""
    name = OUTER_NAMESPACES.sub("", demangled).removeprefix("void ").replace("> >", ">>")
    return re.sub(r"\([^()]*\)$", "", name)


def read_dump(lines: Iterable[str], kernels: Kernels) -> None:
    """Adds what `cuobjdump --dump-resource-usage` or `--dump-sass` says, under mangled names."""
    architecture, kernel = "", Kernel()
    for line in lines:
        if found := INSTRUCTION.match(line):
            kernel.instructions[found[1]] += 1
        elif found := ARCHITECTURE.match(line.rstrip("\n")):
            architecture = found[1] or found[2]
        elif found := FUNCTION.match(line):
            kernel = kernels.setdefault((found[1], architecture), Kernel())
        elif resources := RESOURCE.findall(line):
            kernel.resources |= {name: int(value) for name, value in resources}


def cuobjdump() -> str:
    """The tool: the toolkit's, or the one that comes with torch's triton."""
    packages = Path(sysconfig.get_path("purelib"))
    bundled = packages / "triton" / "backends" / "nvidia" / "bin"
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    path = os.pathsep.join([os.environ.get("PATH", ""), str(home), str(bundled)])
    tool = shutil.which("cuobjdump", path=path)
    assert tool is not None, "cuobjdump is neither on PATH nor in the toolkit nor with triton"
    return tool


def built_kernels() -> Kernels:
    """The kernels of this build."""
    mangled: Kernels = {}
    for dump in ("--dump-resource-usage", "--dump-sass"):
        command = [cuobjdump(), dump, _C.__file__]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            read_dump(process.stdout, mangled)
        assert process.returncode == 0
    names = "\n".join(name for name, _ in mangled)
    demangled = subprocess.run(
        ["c++filt"], input=names, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return {
        (short_name(name), architecture): kernel
        for name, ((_, architecture), kernel) in zip(demangled, mangled.items(), strict=True)
    }


def emulated_kernel_names() -> set[str]:
    """The names of the kernels in the emulated build, where they are functions like any other."""
    command = ["nm", "--demangle", _C.__file__]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        short_name(name) for name in re.findall(r" [tT] (.*_kernel<.*\))$", symbols, re.MULTILINE)
    }
