"""Ranks that are not patched, beside others that are, are named by a warning."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fusedstep
from fusedstep import _ranks
from ranks import Ranks

pytestmark = pytest.mark.usefixtures("cpu_only")  # about processes


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    processes = Ranks("cpu")
    yield processes
    processes.stop()


def steps(count: int, kind: Any = torch.optim.SGD) -> list[str]:
    """What so many steps warn about."""
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = kind([p], lr=0.1)
    p.grad = torch.ones(3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(count):
            optimizer.step()
    return [str(warning.message) for warning in caught if warning.category is RuntimeWarning]


def begins(message: str) -> str:
    return message.partition(":")[0]


def check_patch_in(_: torch.device, patched: list[int], by: int | None, said: str) -> None:
    """Some ranks call patch() in a group that there is already; one of them tells of the others."""
    if dist.get_rank() in patched:
        fusedstep.patch()
    try:
        dist.barrier()
        kind = torch.optim.Adam if dist.get_rank() == 1 else torch.optim.SGD  # of any class
        told = steps(_ranks._STEPS[-1] - 1, kind)
        assert told == [], told
        told = steps(10, kind)
        assert [begins(message) for message in told] == [said] * (by == dist.get_rank())
        dist.barrier()
    finally:
        fusedstep.unpatch()


@pytest.mark.parametrize(
    ("patched", "by", "said"),
    [
        ([0, 1, 2], None, ""),
        ([], None, ""),
        ([0], 0, "of 3 ranks, rank 0 is patched by fusedstep, but ranks 1, 2 are not"),
        ([1, 2], 1, "of 3 ranks, rank 1 is patched by fusedstep, but rank 0 is not"),
    ],
    ids=str,
)
def test_ranks_that_are_not_patched_are_named(
    ranks: Ranks, patched: list[int], by: int | None, said: str
) -> None:
    ranks(3, check_patch_in, patched, by, said)


def check_group_while_patched(_: torch.device, store: str) -> None:
    """The group is made by torch's function, while it is patched in some ranks, and by ours."""
    rank, patched = dist.get_rank(), {0, 2}
    dist.destroy_process_group()
    torchs = dist.init_process_group
    for number in range(2):
        if rank in patched:
            fusedstep.patch()
        init = dist.init_process_group if number == 0 else torchs
        assert (init is torchs) == (number == 1 or rank not in patched)
        init("gloo", init_method=f"file://{store}{number}", rank=rank, world_size=3)
        dist.barrier()
        told = [begins(message) for message in steps(4)]
        said = ["of 3 ranks, rank 0 is patched by fusedstep, but rank 1 is not"]
        # A function that was taken from torch before the patch signs nothing, and asks for nothing.
        assert told == said * (rank == 0 and number == 0)
        dist.barrier()
        fusedstep.unpatch()
        assert dist.init_process_group is torchs
        dist.destroy_process_group()
    torchs("gloo", init_method=f"file://{store}2", rank=rank, world_size=3)


def test_groups_that_are_made_while_torch_is_patched(ranks: Ranks, tmp_path: Path) -> None:
    ranks(3, check_group_while_patched, str(tmp_path / "store"))
