"""CUDA kernels on the CPU: what tests ask of a library that holds the emulator's runtime."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Emulator:
    """The emulated device inside a library, which may be loaded already."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.emulator_seed.argtypes = [ctypes.c_uint64]
        self.library.emulator_capture.argtypes = [ctypes.c_uint64]
        self.library.emulator_launch_count.restype = ctypes.c_size_t
        self.library.emulator_launched_kernel.argtypes = [ctypes.c_size_t]
        self.library.emulator_launched_kernel.restype = ctypes.c_char_p

    def seed(self, value: int) -> None:
        """Draw the order in which blocks and threads take their turns from here on."""
        self.library.emulator_seed(value)

    @contextmanager
    def capture(self, graph: int) -> Iterator[None]:
        """What runs inside sees a stream that is being captured into a graph of this number."""
        self.library.emulator_capture(graph)
        try:
            yield
        finally:
            self.library.emulator_capture(0)

    def launch_count(self) -> int:
        """The launches of this process until now."""
        return int(self.library.emulator_launch_count())

    def launched_since(self, before: int) -> list[str]:
        """The kernels launched after the first so many, as `void room::kernel<type>(Args)`."""
        launched = self.library.emulator_launched_kernel
        return [launched(launch).decode() for launch in range(before, self.launch_count())]

    @contextmanager
    def launches(self) -> Iterator[list[str]]:
        """The kernels launched inside, as launched_since() names them; filled in at the end."""
        kernels: list[str] = []
        before = self.launch_count()
        yield kernels
        kernels += self.launched_since(before)
