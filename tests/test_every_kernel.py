"""What compute-sanitizer watches in `make gpu-check` is every kernel."""

from __future__ import annotations

import pytest

from conftest import Launches
from cuda_kernels import built_kernels, emulated_kernel_names, short_name
from gpu import every_kernel


def test_the_driver_runs() -> None:
    every_kernel.run("cpu")


def test_the_driver_runs_every_kernel(
    request: pytest.FixtureRequest, device: str, launches: Launches
) -> None:
    with launches() as launched:
        every_kernel.run(device)
    if request.config.getoption("--device") == "cuda":
        built = {name for name, _ in built_kernels()}
    else:
        built = emulated_kernel_names()
    assert built
    assert built - {short_name(name) for name in launched} == set()
