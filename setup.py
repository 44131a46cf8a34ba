"""Builds fusedstep against the torch that is installed in this environment.

CUDA kernels are built if torch has CUDA and there is an nvcc; no GPU is needed.
`FUSEDSTEP_CUDA=0|1` decides it instead, `TORCH_CUDA_ARCH_LIST` names the architectures, `MAX_JOBS`
limits the processes.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension
except ImportError:
    sys.exit(
        "fusedstep is compiled against the torch it will run with, and this build environment has "
        "none: install torch, then `pip install --no-build-isolation .`"
    )

ROOT = Path(__file__).parent
CSRC = Path("csrc")

# Contraction off: a fused multiply-add happens where the source says so, and nowhere else.
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-fopenmp",  # compiled in, not linked: the runtime is the one torch has loaded
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-unused-parameter",  # torch's headers, and the next
    "-Wno-maybe-uninitialized",
    "-Wno-unknown-pragmas",
    "-Wno-missing-field-initializers",
    "-g0",
]
NVCC_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fmad=false",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fvisibility=hidden,-fno-math-errno,-fno-trapping-math,-ffp-contract=off",
]


def why_no_cuda(asked: str, torch_cuda: str | None, nvcc: str | None) -> str | None:
    """Why this build goes without CUDA; None where it has it.

    Args:
        asked: `FUSEDSTEP_CUDA`, "" where it is not set.
        torch_cuda: the CUDA release that torch was built for.
        nvcc: the CUDA release of the nvcc that would compile.

    Raises:
        SystemExit: CUDA was asked for and is impossible, or nvcc is not the one for this torch.
    """
    if asked not in ("", "0", "1"):
        sys.exit(f"FUSEDSTEP_CUDA={asked}: 1 builds with CUDA, 0 without, unset where possible")
    if asked == "0":
        return "FUSEDSTEP_CUDA=0"
    if torch_cuda is None:
        missing = f"torch {torch.__version__} has no CUDA; install a torch that is built for it"
    elif nvcc is None:
        missing = (
            f"there is no nvcc; install the CUDA {torch_cuda} toolkit and put its nvcc on PATH "
            "or its folder into CUDA_HOME"
        )
    elif nvcc.split(".")[0] != torch_cuda.split(".")[0]:
        sys.exit(
            f"nvcc is of CUDA {nvcc}, but torch {torch.__version__} is built for CUDA "
            f"{torch_cuda}: set CUDA_HOME to a CUDA {torch_cuda.split('.')[0]} toolkit, or build "
            "without CUDA by FUSEDSTEP_CUDA=0"
        )
    else:
        return None
    if asked == "1":
        sys.exit(f"FUSEDSTEP_CUDA=1 asks for CUDA, but {missing}")
    return missing


LEAST_ARCHITECTURE = 7, 5  # kLeastComputeCapability of csrc/core/cuda_launch.h


def default_architectures(list_gpu_arch: str) -> list[str]:
    """The first architecture of each major release from 7.5 on, the newest also as PTX.

    Machine code runs on the later releases of its major (8.0's on 8.6 and 8.9 too); PTX is compiled
    by the driver for the cards that come after.

    Args:
        list_gpu_arch: what `nvcc --list-gpu-arch` prints.
    """
    first: dict[int, int] = {}
    for number in re.findall(r"\bcompute_(\d+)\b", list_gpu_arch):
        major, minor = divmod(int(number), 10)
        if (major, minor) >= LEAST_ARCHITECTURE:
            first[major] = min(minor, first.get(major, minor))
    names = [f"{major}.{minor}" for major, minor in sorted(first.items())]
    return [*names[:-1], f"{names[-1]}+PTX"]


def asked_architectures(arch_list: str) -> list[str]:
    """The architectures that `TORCH_CUDA_ARCH_LIST` names."""
    names = re.split(r"[;,\s]+", arch_list.strip(";, "))
    for name in names:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            sys.exit(
                f"TORCH_CUDA_ARCH_LIST={arch_list}: {name} is not an architecture such as 9.0 or "
                "9.0+PTX"
            )
        major, minor = re.findall(r"\d+", name)[:2]
        if (int(major), int(minor)) < LEAST_ARCHITECTURE:
            least = ".".join(map(str, LEAST_ARCHITECTURE))
            sys.exit(
                f"TORCH_CUDA_ARCH_LIST={arch_list}: the kernels are written for {least} and newer; "
                f"leave {name} out"
            )
    return names


def code_flags(architectures: list[str]) -> list[str]:
    """nvcc's flags for these architectures."""
    flags = []
    for name in architectures:
        number = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def run_nvcc(*arguments: str) -> str:
    """What the nvcc of CUDA_HOME prints; nothing where it is missing.

    Raises:
        SystemExit: it failed; its own words are in the message.
    """
    nvcc = Path(CUDA_HOME or "", "bin", "nvcc")
    if CUDA_HOME is None or not nvcc.is_file():
        return ""
    command = [str(nvcc), *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0:
        sys.exit(f"{shlex.join(command)} failed: {' '.join(result.stdout.split())}")
    return result.stdout


release = re.search(r"release (\d+\.\d+)", run_nvcc("--version"))
NVCC = release[1] if release else None
WITHOUT_CUDA = why_no_cuda(os.environ.get("FUSEDSTEP_CUDA", ""), torch.version.cuda, NVCC)
ARCHITECTURES = (
    []
    if WITHOUT_CUDA
    else asked_architectures(os.environ["TORCH_CUDA_ARCH_LIST"])
    if os.environ.get("TORCH_CUDA_ARCH_LIST")
    else default_architectures(run_nvcc("--list-gpu-arch"))
)


def build_info() -> str:
    """Source of fusedstep/_build_info.py: what this binary was built for."""
    facts = {
        "torch_version": torch.__version__,
        "cuda": None if WITHOUT_CUDA else NVCC,
        "cuda_architectures": tuple(ARCHITECTURES),
        "why_no_cuda": WITHOUT_CUDA,
        "compiler": os.environ.get("CXX", "c++"),
        "machine": platform.machine(),
    }
    lines = [f"{name} = {value!r}" for name, value in facts.items()]
    return "\n".join(
        ['"""What this build of fusedstep was made for. Written by setup.py."""', *lines, ""]
    )


def require_compiler() -> None:
    """Stop where there is no C++ compiler."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(shlex.split(compiler)[0]) is None:
        sys.exit(
            f"fusedstep needs a C++20 compiler and {compiler} is not on PATH: install g++, or "
            "name another compiler in CXX"
        )


def require_headers() -> None:
    """Stop where this Python has no C headers: distributions package them apart."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        sys.exit(
            f"fusedstep needs the headers of Python and there is no {header}: install python3-dev "
            "(Debian, Ubuntu) or python3-devel (Fedora)"
        )


class BuildFusedstep(BuildExtension):
    """Compiles the extension and records beside it what it was built for."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # Objects are kept, each torch's apart: only what changed is compiled. The library is always
        # linked anew, for that of every torch has the same path.
        self.build_temp = f"build/temp-{torch.__version__}"
        self.force = True

    def run(self) -> None:
        require_compiler()
        require_headers()
        if WITHOUT_CUDA:
            print(f"fusedstep: building without CUDA: {WITHOUT_CUDA}")
        else:
            print(f"fusedstep: building with CUDA {NVCC} for {', '.join(ARCHITECTURES)}")
        super().run()
        package = Path(self.get_ext_fullpath("fusedstep._C")).parent
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_info.py").write_text(build_info())


def extension() -> CppExtension:
    """fusedstep._C, with the CUDA sources where CUDA is built."""
    if shutil.which("ninja") is None:
        print("fusedstep: ninja is not installed; building one file at a time")
    sources = sorted(str(path) for path in CSRC.rglob("*.cpp"))
    include_dirs = [str(ROOT / CSRC)]
    if WITHOUT_CUDA:
        return CppExtension(
            name="fusedstep._C",
            sources=sources,
            include_dirs=include_dirs,
            extra_compile_args={"cxx": CXX_FLAGS},
        )
    sources += sorted(str(path) for path in CSRC.rglob("*.cu"))
    # CUDA_HOME may hold no more than a wrapper of nvcc: nvcc itself knows where its headers are. It
    # fails without a compiler of its host.
    require_compiler()
    dry_run = run_nvcc("-dryrun", "-c", "-x", "cu", os.devnull)
    include_dirs += dict.fromkeys(re.findall(r'"-I([^"]+)"', dry_run))
    # The files are compiled side by side; processes left over compile one file's architectures.
    threads = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1) // len(sources)
    return CppExtension(
        name="fusedstep._C",
        sources=sources,
        include_dirs=include_dirs,
        libraries=["c10_cuda"],  # which brings the CUDA runtime that torch uses
        extra_compile_args={
            "cxx": [*CXX_FLAGS, "-DFUSEDSTEP_CUDA"],
            "nvcc": [*NVCC_FLAGS, f"--threads={max(1, threads)}", *code_flags(ARCHITECTURES)],
        },
    )


if __name__ == "__main__":
    setup(
        ext_modules=[extension()],
        cmdclass={"build_ext": BuildFusedstep},
    )
