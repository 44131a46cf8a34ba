"""A training step on several processes: fusedstep's loss and optimizer under DDP against torch's.

Two processes on this machine, one thread each, hold the same network in DistributedDataParallel;
each sees a part of the batch, and gradients are averaged over gloo. Candidates, rounds and the
check are those of bench_train_step.py: on every process, the weights after the first steps are
compared with torch's in float64. The time of a block of calls is that of the slowest process. The
floor is the network alone, with the averaging of its gradients: forward, and backward from a
gradient of the logits that exists already.
"""

import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessException, spawn
from torch.nn.parallel import DistributedDataParallel
from typer import Option

import bench_train_step
import cli
import driver
import suite
from bench_train_step import MOMENTA
from process_group import end_process, process_group
from suite import Row, Session

PROCESSES = 2
BATCH_SIZES = {
    "cifar": (4, 64),
    "cifar-one-head": (4,),
    "lenet": (4,),
    "resnet18": (8,),
    "transformer": (1,),
}
"""Of each process, by network."""
QUICK_MODELS = "cifar,lenet,resnet18"


@dataclass(frozen=True)
class Case(bench_train_step.Case):
    """`batch_size` is that of each process."""

    operation: ClassVar = "data_parallel"
    seconds: ClassVar = 8.0  # most of it to start the processes

    def start(self, device: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
        """The same weights on every process, and its part of the same batch."""
        whole = replace(self, batch_size=PROCESSES * self.batch_size)
        model, *batch = super(Case, whole).start(device, dtype)
        inputs, labels = (tensor.chunk(PROCESSES)[dist.get_rank()] for tensor in batch)
        return model, inputs, labels

    def wrapped(self, model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model)

    def measured(self, session: Session) -> Row:
        settings = (session.rounds, session.implementations, session.seconds_per_case)
        with TemporaryDirectory() as folder:
            try:
                spawn(_serve, (Path(folder), self, *settings), PROCESSES)
            except ProcessException as error:  # with the traceback of the process in its message
                raise RuntimeError(str(error).strip().splitlines()[-1]) from None
            row: Row = pickle.loads((Path(folder) / "row").read_bytes())
        return row


def _serve(
    rank: int,
    folder: Path,
    case: Case,
    rounds: int,
    implementations: Mapping[str, str],
    seconds: float,
) -> None:
    """What one process does; the first writes the row into `folder`.

    What it raises, spawn() takes to the parent process, however this one ends.
    """
    torch.set_num_threads(case.threads)
    meeting = (folder / "meeting").as_uri()
    fusedstep = cli.require_fusedstep()
    session = Session(fusedstep, "cpu", rounds, implementations, seconds, agreed=_of_the_slowest)
    with process_group("gloo", meeting, rank=rank, world_size=PROCESSES):
        # Without the share of loss and update: measured apart, they would leave out the all-reduce.
        row = suite.Comparison.measured(case, session)
    if rank == 0:
        (folder / "row").write_bytes(pickle.dumps(row))
    end_process()


def _of_the_slowest(seconds: float) -> float:
    most = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.item()


@dataclass(frozen=True, kw_only=True)
class Options(cli.BenchmarkOptions):
    """Time the training step of two processes under DDP, fusedstep against torch's defaults."""

    models: Annotated[
        str | None, Option(help=f"Of {', '.join(BATCH_SIZES)}.", show_default="all")
    ] = None
    modes: Annotated[str, Option(help="Updates, comma-separated.")] = "momentum"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device != "cpu":
            raise cli.Refusal("the processes share this machine's CPU: --device cpu")

    @property
    def cases(self) -> list[suite.Case]:
        models = self.models or (QUICK_MODELS if self.quick else ",".join(BATCH_SIZES))
        return [
            Case(name, size, mode, threads=self.threads)
            for name, sizes in cli.items("--models", models, BATCH_SIZES).items()
            for size in sizes
            for mode in cli.items("--modes", self.modes, MOMENTA)
        ]


if __name__ == "__main__":
    cli.run(Options, driver.main, sys.argv[1:])
