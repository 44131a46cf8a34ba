"""What setup.py, the installed package and its command say about the build."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedstep
from fusedstep import _build_info
from test_layering import ROOT, cpp_files, speaks_torch

CXX = os.environ.get("CXX", "g++")
KERNELS = [f for f in cpp_files(ROOT) if f.suffix == ".cpp" and not speaks_torch(f, ROOT)]
REBUILD = "pip install --no-build-isolation"


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the installed package that a test may break."""
    original = Path(fusedstep.__file__).parent
    return shutil.copytree(
        original, tmp_path / "fusedstep", ignore=shutil.ignore_patterns("__pycache__")
    )


def import_error(package: Path) -> str:
    """The last line, the error's own, of importing this copy of the package."""
    result = python("-c", "import fusedstep", PYTHONPATH=str(package.parent))
    assert result.returncode != 0
    return result.stderr.strip().splitlines()[-1]


def release(patch: str) -> str:
    """The version of the torch running here with another patch release."""
    return ".".join([*torch.__version__.split(".")[:2], patch])


def test_version_is_the_projects() -> None:
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    assert fusedstep.__version__ == declared[1]


def test_info_names_the_build() -> None:
    facts = json.loads(python("-m", "fusedstep", "info", "--json").stdout)
    assert facts["fusedstep"] == fusedstep.__version__
    assert facts["built for torch"] == _build_info.torch_version
    assert facts["running torch"] == torch.__version__
    assert facts["CPU level"] in ("default", "avx2", "avx512")
    lines = python("-m", "fusedstep", "info").stdout.splitlines()
    assert len(lines) == len(facts)
    for line, (name, value) in zip(lines, facts.items(), strict=True):
        assert line.split(name)[1].strip() == ("no" if value is None else value)


def test_info_follows_the_level_asked_for() -> None:
    info = python("-m", "fusedstep", "info", "--json", ATEN_CPU_CAPABILITY="default")
    assert json.loads(info.stdout)["CPU level"] == "default"


def test_an_unknown_command_is_refused_in_one_line() -> None:
    result = python("-m", "fusedstep", "inform")
    assert result.returncode == 2
    assert "invalid choice: 'inform'" in result.stderr
    assert "Traceback" not in result.stderr


def test_another_torch_is_refused_by_name(package: Path) -> None:
    (package / "_build_info.py").write_text("torch_version = '1.13.1+cu117'\n")
    error = import_error(package)
    assert error.startswith("ImportError: ")
    for part in ("torch 1.13.1+cu117", f"torch {torch.__version__}", REBUILD):
        assert part in error


def test_another_patch_release_of_torch_is_accepted(package: Path) -> None:
    facts = (package / "_build_info.py").read_text().replace(torch.__version__, release("99+any"))
    (package / "_build_info.py").write_text(facts)
    info = python("-m", "fusedstep", "info", "--json", PYTHONPATH=str(package.parent))
    assert json.loads(info.stdout)["built for torch"] == release("99+any")


def test_a_missing_symbol_of_torch_is_told_as_another_torch(package: Path) -> None:
    (core,) = package.glob("_C*.so")
    source = package / "core.cpp"
    source.write_text('extern "C" { void gone(); void* PyInit__C() { gone(); return nullptr; } }\n')
    subprocess.run([CXX, "-shared", "-fPIC", str(source), "-o", str(core)], check=True)
    error = import_error(package)
    assert error.startswith("ImportError: fusedstep was built for torch ")
    assert REBUILD in error


def test_an_unbuilt_package_says_how_to_build_it(package: Path) -> None:
    (package / "_build_info.py").unlink()
    error = import_error(package)
    assert error.startswith("ImportError: fusedstep is not built")
    assert REBUILD in error


def test_setup_without_torch_stops_with_one_sentence() -> None:
    without_torch = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path('setup.py')"
    result = subprocess.run(
        [sys.executable, "-c", without_torch], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 1
    (sentence,) = result.stderr.splitlines()
    assert "install torch, then `pip install --no-build-isolation .`" in sentence


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda f: f.relative_to(ROOT / "csrc").as_posix())
def test_kernels_compile_without_torch(kernel: Path) -> None:
    command = [CXX, "-std=c++20", "-fsyntax-only", "-w", "-Icsrc", str(kernel)]
    subprocess.run(command, cwd=ROOT, check=True)


def test_there_are_kernels_without_torch() -> None:
    assert {"core", "cross_entropy", "sgd"} <= {kernel.parent.name for kernel in KERNELS}
