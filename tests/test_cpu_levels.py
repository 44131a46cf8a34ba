"""The kernel tests again at every instruction-set level of this machine.

The level is chosen once per process, so each one is a pytest of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CORE = HERE.parent / "csrc" / "core"


def instruction_sets(level: str) -> set[str]:
    """That kernels of a level are compiled for."""
    (targets,) = re.findall(r'GCC target\("(.+)"\)', (CORE / f"level_{level}.h").read_text())
    return {name for name in targets.split(",") if "=" not in name}


LEVELS = {level: instruction_sets(level) for level in ("avx2", "avx512")} | {"default": set()}


def machine_has(level: str) -> bool:
    try:
        flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text()))
    except OSError:
        flags = set()
    return LEVELS[level] <= flags


def run(level: str, *arguments: str) -> str:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": level}
    for name in [name for name in environment if name.startswith("PYTEST")]:
        del environment[name]
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    "module",
    ["test_cross_entropy.py", "test_pointwise_loss.py", "test_optimizers.py", "test_sgd.py"],
)
@pytest.mark.parametrize("level", LEVELS)
def test_kernels_at_level(level: str, module: str, pytestconfig: pytest.Config) -> None:
    if not machine_has(level):
        pytest.skip(f"this machine has no {level}")
    active = run(level, "-c", "import fusedstep; print(fusedstep._C.cpu_capability())")
    assert active.strip() == level
    seed = pytestconfig.getoption("--seed")
    quiet = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist")
    output = run(level, "-m", "pytest", *quiet, "-m", "level", f"--seed={seed}", str(HERE / module))
    passed = re.search(r"(\d+) passed", output)
    assert passed and int(passed[1]) > 50, output[-2000:]


@pytest.mark.parametrize("level", ["avx2", "avx512"])
def test_every_instruction_set_of_a_level_is_asked_for(level: str) -> None:
    source = (CORE / "cpu_level.cpp").read_text()
    asked = re.findall(r'__builtin_cpu_supports\("(\w+)"\)|!supports_(\w+)\(\)', source)
    assert LEVELS[level] <= {builtin or own for builtin, own in asked}


def test_an_unknown_level_is_no_catastrophe() -> None:
    name = run("nonsense", "-c", "import fusedstep; print(fusedstep._C.cpu_capability())")
    assert name.strip() in LEVELS
