"""The default process group of a benchmark, and the end of a process that was in one."""

import atexit
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import torch.distributed as dist

# Its functions have the default group, as it is when they are first imported, for an argument's
# default. DistributedDataParallel imports them, and would so keep the group until the process ends.
import torch.distributed.nn.functional  # noqa: F401


@contextmanager
def process_group(
    backend: str, init_method: str | None = None, *, rank: int = -1, world_size: int = -1
) -> Iterator[None]:
    """As torch.distributed's init_process_group(), and at the end destroy_process_group().

    Gloo's threads end with the last reference to the group, and a network in
    DistributedDataParallel has one: no such network may leave the block. A thread that is still
    there holds, for some time after a collective, its tensor, and waits for the GIL to free the
    Python object if it is the last to do so. While a network that is freed waits for the thread,
    both wait forever. What that does to a process that ends, end_process() says.
    """
    dist.init_process_group(backend, init_method, rank=rank, world_size=world_size)
    try:
        yield
    finally:
        gc.collect()  # networks in reference cycles
        dist.destroy_process_group()


def run_rank(main: Callable[[], object]) -> NoReturn:
    """Runs `main` as a script's last line would, and ends the process with the same status."""
    status = 0
    try:
        main()
    except SystemExit as request:
        status = _status(request.code)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    end_process(status)


def _status(code: object) -> int:
    """What sys.exit(code) makes of it."""
    if isinstance(code, int):
        return code
    if code is not None:
        print(code, file=sys.stderr)
    return 0 if code is None else 1


def end_process(status: int = 0) -> NoReturn:
    """Runs the exit functions, flushes the streams and ends the process, but not its interpreter.

    A thread of gloo's that frees the last collective's Python object while the interpreter ends,
    destroyed group or not, terminates the process by SIGABRT ("terminate called without an active
    exception"); on a busy machine that was 8 of 20 processes. Threads of Python's own are not
    waited for.
    """
    try:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
                stream.flush()
    finally:
        os._exit(status & 0xFF)
