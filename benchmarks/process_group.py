"""The default process group of a benchmark, which is destroyed together with its threads."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

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
    there holds, for some time after a collective, its tensor. If it is the last to do so, it waits
    for the GIL to free the Python object. While the interpreter ends, that terminates the process
    ("terminate called without an active exception"); while a network that is freed waits for the
    thread, both wait forever.
    """
    dist.init_process_group(backend, init_method, rank=rank, world_size=world_size)
    try:
        yield
    finally:
        gc.collect()  # networks in reference cycles
        dist.destroy_process_group()
