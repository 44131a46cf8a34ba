"""Builds fusedstep against the torch that is installed in this environment."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
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
    "-Wno-unused-parameter",  # torch's headers
    "-Wno-unknown-pragmas",
    "-Wno-missing-field-initializers",
    "-g0",
]


def build_info() -> str:
    """Source of fusedstep/_build_info.py: what this binary was built for."""
    facts = {
        "torch_version": torch.__version__,
        "cuda": None,
        "compiler": os.environ.get("CXX", "c++"),
        "machine": platform.machine(),
    }
    lines = [f"{name} = {value!r}" for name, value in facts.items()]
    return "\n".join(
        ['"""What this build of fusedstep was made for. Written by setup.py."""', *lines, ""]
    )


class BuildFusedstep(BuildExtension):
    """Compiles the extension and records beside it what it was built for."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = "build/temp"  # kept from build to build: only what changed is compiled

    def run(self) -> None:
        super().run()
        package = Path(self.get_ext_fullpath("fusedstep._C")).parent
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_info.py").write_text(build_info())


def extension() -> CppExtension:
    if shutil.which("ninja") is None:
        print("fusedstep: ninja is not installed; building one file at a time")
    return CppExtension(
        name="fusedstep._C",
        sources=sorted(str(path) for path in CSRC.rglob("*.cpp")),
        include_dirs=[str(ROOT / CSRC)],
        extra_compile_args={"cxx": CXX_FLAGS},
    )


setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildFusedstep},
)
