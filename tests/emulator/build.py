"""Builds what runs on the emulator: the fusedstep package with its CUDA code, or a program.

python tests/emulator/build.py                           the package, into build/emulator
python tests/emulator/build.py -o a.out main.cpp k.cu    a program, without torch
"""

from __future__ import annotations

import argparse
import fcntl
import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUT = ROOT / "build" / "emulator"

CXX = os.environ.get("CXX", "g++")
COMMON = [
    "-std=c++20",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
    "-Wno-missing-field-initializers",
    "-DFUSEDSTEP_CUDA",
    "-DFUSEDSTEP_EMULATED_CUDA",
    f"-I{HERE / 'include'}",
    f"-I{ROOT / 'csrc'}",
]
# The runtime behind the sanitizers is access.cpp. Accesses stay as they are written: none is made
# wider, and types may alias as they do for nvcc.
KERNEL = [
    *COMMON,
    "-x c++",
    "-O1",
    "-g1",
    "-fno-strict-aliasing",
    "-fno-store-merging",
    "-fsanitize=thread,alignment,bounds",
    "--param tsan-instrument-func-entry-exit=0",
]
HOST = [*COMMON, "-O1", "-fvisibility=hidden"]
RUNTIME = [*COMMON, "-O2", "-fvisibility=hidden"]
RUNTIME_SOURCES = [
    HERE / name for name in ("access.cpp", "fiber.cpp", "host.cpp", "machine.cpp", "memory.cpp")
]


def torch_flags() -> tuple[list[str], list[str]]:
    """What it takes to compile and to link a torch extension module."""
    from torch.utils import cpp_extension

    include = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    compile_flags = [
        *(f"-isystem {path}" for path in include),
        "-DTORCH_EXTENSION_NAME=_C",
        "-DTORCH_API_INCLUDE_EXTENSION_H",
        "-Wno-unused-parameter",
        "-fopenmp",
        "-g0",
    ]
    libraries = cpp_extension.library_paths()
    link_flags = [
        *(f"-L{path} -Wl,-rpath,{path}" for path in libraries),
        "-lc10 -ltorch_cpu -ltorch -ltorch_python",
    ]
    return compile_flags, link_flags


class Ninja:
    """A build of one binary, described as ninja wants it."""

    def __init__(self, folder: Path, compiler: str = CXX) -> None:
        self.folder = folder
        self.lines = [
            "rule compile",
            f"  command = {compiler} -MMD -MF $out.d $flags -c $in -o $out",
            "  description = compile $in",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {compiler} $in $flags -o $out",
            "  description = link $out",
        ]
        self.objects: list[Path] = []

    def compile(self, sources: Iterable[Path], flags: Sequence[str]) -> None:
        for source in sources:
            object_file = (
                self.folder / "objects" / f"{os.path.relpath(source, ROOT)}.o".replace("../", "")
            )
            self.lines += [f"build {object_file}: compile {source}", f"  flags = {' '.join(flags)}"]
            self.objects.append(object_file)

    def link(self, binary: Path, flags: Sequence[str]) -> None:
        """Bring the binary up to date, while no other process does.

        Raises:
            RuntimeError: the build failed; the message is what the compiler said.
        """
        objects = " ".join(map(str, self.objects))
        self.lines += [f"build {binary}: link {objects}", f"  flags = {' '.join(flags)}", ""]
        self.folder.mkdir(parents=True, exist_ok=True)
        jobs = os.environ.get("MAX_JOBS")
        command = ["ninja", "-k", "0", "-C", str(self.folder), *(["-j", jobs] if jobs else [])]
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (self.folder / "build.ninja").write_text("\n".join(self.lines))
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        if done.returncode != 0:
            raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stdout}")


def build_package() -> Path:
    """The folder to put on ``sys.path``: its fusedstep runs CUDA code on the emulator."""
    import torch

    package = OUT / "fusedstep"
    package.mkdir(parents=True, exist_ok=True)
    sources = ROOT / "pyext" / "fusedstep"
    for source in sources.rglob("*.py"):
        link = package / source.relative_to(sources)
        link.parent.mkdir(parents=True, exist_ok=True)
        if source.name != "_build_info.py" and not link.exists():
            with suppress(FileExistsError):  # of another process that does the same
                link.symlink_to(os.path.relpath(source, link.parent))
    facts = {
        "torch_version": torch.__version__,
        "cuda": "emulated",
        "compiler": CXX,
        "machine": platform.machine(),
    }
    # Other processes may be importing it: they find the whole of one file.
    beside = package / f"_build_info.{os.getpid()}"
    beside.write_text("".join(f"{name} = {value!r}\n" for name, value in facts.items()))
    beside.replace(package / "_build_info.py")

    torch_compile, torch_link = torch_flags()
    csrc = ROOT / "csrc"
    ninja = Ninja(OUT / "extension")
    ninja.compile(sorted(csrc.rglob("*.cu")), KERNEL)
    ninja.compile(sorted(csrc.rglob("*.cpp")), [*HOST, *torch_compile])
    ninja.compile([HERE / "torch_allocator.cpp"], [*HOST, *torch_compile])
    ninja.compile(RUNTIME_SOURCES, RUNTIME)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    ninja.link(package / f"_C{suffix}", ["-shared", *torch_link, "-ldl"])
    return OUT


def build_program(sources: Sequence[Path], binary: Path, link_flags: Sequence[str] = ()) -> None:
    """A program or, with -shared, a library of kernels and plain C++; torch has no part in it."""
    folder = OUT / "programs" / binary.name
    ninja = Ninja(folder)
    ninja.compile([s.resolve() for s in sources if s.suffix == ".cu"], KERNEL)
    ninja.compile([s.resolve() for s in sources if s.suffix != ".cu"], HOST)
    ninja.compile(RUNTIME_SOURCES, RUNTIME)
    ninja.link(binary.resolve(), [*link_flags, "-rdynamic", "-ldl"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", dest="binary", type=Path)
    parser.add_argument("sources", nargs="*", type=Path)
    arguments = parser.parse_args()
    if bool(arguments.binary) != bool(arguments.sources):
        parser.error("a program needs both its sources and -o")
    try:
        if arguments.binary:
            build_program(arguments.sources, arguments.binary)
        else:
            print(build_package())
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
