"""Devices, seeds and thread counts that every test shares."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))


def devices() -> list[str]:
    """The CPU always; CUDA where a card is present and this build has kernels for it."""
    import fusedstep  # noqa: F401  (registers the operator asked about)

    has_cuda_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(
        "fusedstep::cross_entropy_forward", "CUDA"
    )
    return ["cpu", "cuda"] if has_cuda_kernel and torch.cuda.is_available() else ["cpu"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="draw other random inputs in every test")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "level: kernel test that must also pass at every CPU instruction-set level"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", devices())


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Every test draws its own inputs, the same in each run; pytest shows the seed on failure."""
    base = request.config.getoption("--seed")
    value = zlib.crc32(f"{base}:{request.node.nodeid.rpartition('/')[2]}".encode())
    torch.manual_seed(value)
    print(f"torch.manual_seed({value}), from --seed {base}")
    return value


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread, so that parallel test workers share the cores; tests of threading set more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
