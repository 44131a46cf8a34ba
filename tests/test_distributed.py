"""Training on several processes: DDP, FSDP2, distributed checkpoints, and sharded logits.

Each check runs on every rank of a gloo group (nccl where there is a GPU for each rank). Where torch
does the same arithmetic, parameters have to be the same bits. Where sums are taken in another order
or over other shards, they have to agree within a stated tolerance.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import fusedstep
import fusedstep.functional as F
import reference
from fusedstep.distributed import vocab_parallel_cross_entropy
from numerics import BF16, DTYPES, F32, F64, REDUCTIONS, error, identical, slack
from ranks import Ranks


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    processes = Ranks("cuda" if request.config.getoption("--device") == "cuda" else "cpu")
    yield processes
    processes.stop()


MOMENTUM: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
OPTIONS: list[dict[str, Any]] = [
    {"lr": 0.1},
    MOMENTUM,
    {**MOMENTUM, "nesterov": True},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "maximize": True},
]


def native_sgd(params: Iterable[Any], **options: Any) -> torch.optim.SGD:
    """The reference: torch's fused and foreach steps round differently, or are wrong on the CPU."""
    return torch.optim.SGD(params, foreach=False, **options)


class OnlyKernels(fusedstep.SGD):
    """Fails where torch's own functions have updated a parameter."""

    def step(self, closure: Any = None) -> Any:
        before = fusedstep.stats()["SGD"].fallbacks
        loss = super().step(closure)
        assert fusedstep.stats()["SGD"].fallbacks == before
        return loss


SGDS: tuple[Callable[..., torch.optim.SGD], ...] = (native_sgd, OnlyKernels)
CLASSES = 10


def network(device: torch.device, dtype: torch.dtype = F32) -> nn.Sequential:
    """The same on every rank; without batch statistics, which would be those of a rank."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(180, 33), nn.Linear(33, 10))
    return nn.Sequential(*layers).to(device, dtype)


def batch(
    step: int, device: torch.device, rows: int = 6, dtype: torch.dtype = F32, ignored: float = 0.3
) -> tuple[Tensor, Tensor]:
    """Of this rank at this step."""
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    images = torch.randn(rows, 1, 8, 8, generator=generator).to(device, dtype)
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = -100
    return images, labels.to(device)


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    optimizer.zero_grad()
    loss(model(data[0]), data[1]).backward()
    optimizer.step()


def same_on_every_rank(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        of_rank_0 = tensor.detach().clone()
        dist.broadcast(of_rank_0, 0)
        identical(tensor.detach(), of_rank_0)


def same_parameters(actual: nn.Module, expected: nn.Module, **tolerances: float) -> None:
    for ours, theirs in zip(actual.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **(tolerances or {"rtol": 0, "atol": 0}))


# ------------------------------------------------------------------ DDP


def ddp(model: nn.Module, device: torch.device, **options: Any) -> DistributedDataParallel:
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, **options)


def check_ddp(device: torch.device) -> None:
    """Bit for bit torch's SGD; with our loss too, as close as the losses are."""
    for static_graph, views, options, dtype in (
        (False, False, OPTIONS[1], F32),
        (False, True, OPTIONS[2], F32),
        (True, True, OPTIONS[3], F32),
        (True, False, OPTIONS[0], F64),
        (False, True, OPTIONS[1], BF16),
    ):
        ended = []
        for make, loss in (
            (native_sgd, nn.CrossEntropyLoss()),
            (OnlyKernels, nn.CrossEntropyLoss()),
            (OnlyKernels, fusedstep.CrossEntropyLoss()),
        ):
            model = ddp(
                network(device, dtype),
                device,
                static_graph=static_graph,
                gradient_as_bucket_view=views,
            )
            optimizer = make(model.parameters(), **options)
            for index in range(4):
                step(model, optimizer, loss, batch(index, device, dtype=dtype))
            if views:  # of one bucket, not memory of their own
                assert len({p.grad.untyped_storage().data_ptr() for p in model.parameters()}) == 1
            same_on_every_rank(model.parameters())
            ended.append(model)
        if dtype is not BF16:
            same_parameters(ended[1], ended[0])
        near = {F32: 1e-5, F64: 1e-12, BF16: 3e-2}[dtype]
        same_parameters(ended[2], ended[0], rtol=near, atol=near)


def check_ddp_is_one_process(device: torch.device) -> None:
    """Ranks with equally many rows that count train as one process does on all of them."""
    world = dist.get_world_size()
    alone = network(device, F64)
    together = ddp(network(device, F64), device, gradient_as_bucket_view=True)
    of_one = native_sgd(alone.parameters(), **MOMENTUM)
    of_all = OnlyKernels(together.parameters(), **MOMENTUM)
    for index in range(4):
        data = batch(index, device, dtype=F64, ignored=0)
        step(together, of_all, fusedstep.CrossEntropyLoss(), data)
        whole = []
        for tensor in data:
            parts = [torch.empty_like(tensor) for _ in range(world)]
            dist.all_gather(parts, tensor)
            whole.append(torch.cat(parts))
        step(alone, of_one, nn.CrossEntropyLoss(), (whole[0], whole[1]))
    same_parameters(together, alone, rtol=1e-12, atol=1e-12)


class TwoHeads(nn.Module):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(16, 17, device=device)
        self.heads = nn.ModuleList(nn.Linear(17, CLASSES, device=device) for _ in range(2))
        self.head = 0

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.heads[self.head](self.body(images))
        return logits


def check_ddp_with_unused_parameters(device: torch.device) -> None:
    """A head's first gradient comes late, and stays away again."""
    ended = []
    for make in SGDS:
        model = ddp(TwoHeads(device), device, find_unused_parameters=True)
        optimizer = make(model.parameters(), **MOMENTUM)
        for index, head in enumerate((0, 0, 1, 1, 0)):
            model.module.head = head
            torch.manual_seed(10 * index + dist.get_rank())
            data = torch.randn(5, 16, device=device), torch.randint(CLASSES, (5,), device=device)
            step(model, optimizer, nn.CrossEntropyLoss(), data)
        ended.append(model)
    same_parameters(ended[1], ended[0])


def check_ddp_accumulation(device: torch.device) -> None:
    """`no_sync`, for all micro-batches but the last, with the loss divided by their number."""
    ended = []
    for make in SGDS:
        model = ddp(network(device), device, gradient_as_bucket_view=True)
        optimizer = make(model.parameters(), **MOMENTUM)
        for index in range(6):
            last = index % 3 == 2
            images, labels = batch(index, device)
            with contextlib.nullcontext() if last else model.no_sync():
                (nn.CrossEntropyLoss()(model(images), labels) / 3).backward()
            if last:
                optimizer.step()
                optimizer.zero_grad()
        ended.append(model)
    same_parameters(ended[1], ended[0])


def check_join(device: torch.device) -> None:
    """Ranks run out of batches one after another; one of them has none at all."""
    ended = []
    for make in SGDS:
        model = ddp(network(device), device)
        optimizer = make(model.parameters(), **MOMENTUM)
        with model.join():
            for index in range(2 * dist.get_rank()):
                step(model, optimizer, nn.CrossEntropyLoss(), batch(index, device, ignored=0))
        same_on_every_rank(model.parameters())
        ended.append(model)
    same_parameters(ended[1], ended[0])


def check_empty_and_ignored_batches(device: torch.device) -> None:
    """A rank without rows, and one whose rows are all ignored, under reduction "sum"."""
    world, rank = dist.get_world_size(), dist.get_rank()
    alone = network(device, F64)
    together = ddp(network(device, F64), device)
    of_one = native_sgd(alone.parameters(), lr=0.01)
    of_all = OnlyKernels(together.parameters(), lr=0.01)
    for index in range(3):
        images, labels = batch(index, device, rows=0 if rank == 0 else 5, dtype=F64)
        if rank == 1:
            labels.fill_(-100)
        step(together, of_all, fusedstep.CrossEntropyLoss(reduction="sum"), (images, labels))
        gathered: list[Any] = [None] * world
        dist.all_gather_object(gathered, (images.cpu(), labels.cpu()))
        whole = [torch.cat(parts).to(device) for parts in zip(*gathered, strict=True)]
        of_one.zero_grad()
        (nn.CrossEntropyLoss(reduction="sum")(alone(whole[0]), whole[1]) / world).backward()
        of_one.step()
    same_parameters(together, alone, rtol=1e-12, atol=1e-12)


def check_zero_redundancy(device: torch.device) -> None:
    """Each rank updates its share; consolidated, the state is that of torch's SGD."""
    for views, joined in ((False, False), (True, False), (False, True)):
        ended, states = [], []
        for optimizer_class in (torch.optim.SGD, OnlyKernels):
            model = ddp(network(device), device)
            optimizer = ZeroRedundancyOptimizer(
                model.parameters(),
                optimizer_class,
                parameters_as_bucket_view=views,
                foreach=False,
                **MOMENTUM,
            )
            assert type(optimizer.optim) is optimizer_class
            uneven = Join([model, optimizer]) if joined else contextlib.nullcontext()
            with uneven:
                for index in range(3 + (dist.get_rank() if joined else 0)):
                    step(model, optimizer, nn.CrossEntropyLoss(), batch(index, device, ignored=0))
            same_on_every_rank(model.parameters())
            optimizer.consolidate_state_dict(to=0)
            ended.append(model)
            states.append(optimizer.state_dict() if dist.get_rank() == 0 else None)
        same_parameters(ended[1], ended[0])
        if states[0] and states[1]:
            for index, state in states[0]["state"].items():
                identical(states[1]["state"][index], state)


def check_model_averaging(device: torch.device) -> None:
    """Local steps, averaged over the ranks every second one."""
    ended = []
    for make in SGDS:
        model = network(device)
        optimizer = PostLocalSGDOptimizer(
            make(model.parameters(), **MOMENTUM), PeriodicModelAverager(period=2, warmup_steps=0)
        )
        for index in range(5):
            step(model, optimizer, nn.CrossEntropyLoss(), batch(index, device))
        same_on_every_rank(model.parameters())  # step 4, counted from 0, averages
        ended.append(model)
    same_parameters(ended[1], ended[0])


def check_update_in_backward_is_refused(device: torch.device) -> None:
    """The reducer would hand out gradients that have been dropped."""
    for wrapped_first in (False, True):
        model = network(device)
        kept = [p.detach().clone() for p in model.parameters()]
        wrapped = ddp(model, device) if wrapped_first else None
        optimizer = OnlyKernels(model.parameters(), lr=0.1, in_backward=True)
        wrapped = wrapped or ddp(model, device)
        images, labels = batch(0, device)
        with pytest.raises(RuntimeError, match="DistributedDataParallel"):
            nn.CrossEntropyLoss()(wrapped(images), labels).backward()
        identical([p.detach() for p in model.parameters()], kept)
        assert not optimizer.state


def check_scaler_of_shards(device: torch.device) -> None:
    """ShardedGradScaler asks all ranks: where one overflows none steps, and they keep one scale."""
    ended = []
    for make in (native_sgd, fusedstep.SGD):
        shard = torch.randn(33, generator=torch.Generator().manual_seed(dist.get_rank()))
        param = nn.Parameter(shard.to(device))
        optimizer = make([param], **MOMENTUM)
        scaler = ShardedGradScaler(device.type, init_scale=1024.0, growth_interval=2)
        steps = []
        for index in range(5):
            optimizer.zero_grad()
            overflows = index in (0, 3) and dist.get_rank() == 1
            scaler.scale((param * (torch.inf if overflows else index)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            steps.append((param.detach().clone(), scaler.get_scale()))
        ended.append(steps)
    identical(*ended)


@pytest.mark.parametrize(
    ("world", "check"),
    [
        (2, check_ddp),
        (3, check_ddp_is_one_process),
        (2, check_ddp_with_unused_parameters),
        (2, check_ddp_accumulation),
        (3, check_join),
        (3, check_empty_and_ignored_batches),
        (2, check_zero_redundancy),
        (2, check_model_averaging),
        (2, check_update_in_backward_is_refused),
        (2, check_scaler_of_shards),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_data_parallel(ranks: Ranks, world: int, check: Callable[[torch.device], None]) -> None:
    ranks(world, check)


# ------------------------------------------------------------------ FSDP2


def sharded(
    device: torch.device, policy: MixedPrecisionPolicy | None = None, dtype: torch.dtype = F32
) -> nn.Sequential:
    model = network(device, dtype)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    options: dict[str, Any] = {"mesh": mesh} | ({"mp_policy": policy} if policy else {})
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def same_shards(actual: Tensor, expected: Tensor) -> None:
    assert isinstance(actual, DTensor) and isinstance(expected, DTensor)
    assert actual.placements == expected.placements and actual.stride() == expected.stride()
    identical(actual.to_local(), expected.to_local())


def same_sharded_training(
    models: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    """Parameters and momentum buffers: the same DTensors bit for bit."""
    for theirs, ours in zip(*(model.parameters() for model in models), strict=True):
        same_shards(ours.detach(), theirs.detach())
        states = [o.state[p] for o, p in zip(optimizers, (theirs, ours), strict=True)]
        assert states[0].keys() == states[1].keys()
        if "momentum_buffer" in states[0]:
            same_shards(states[1]["momentum_buffer"], states[0]["momentum_buffer"])


def check_fsdp(device: torch.device) -> None:
    """Uneven shards, empty ones, clipping and mixed precision; state as torch makes it."""
    mixed = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=F32)
    for options, policy in zip(OPTIONS, (None, mixed, None, mixed), strict=True):
        models, optimizers = [], []
        for make in SGDS:
            model = sharded(device, policy=policy)
            optimizer = make(model.parameters(), **options)
            for index in range(2):
                optimizer.zero_grad()
                images, labels = batch(index, device)
                nn.CrossEntropyLoss()(model(images).float(), labels).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                versions = [p._version for p in model.parameters()]
                optimizer.step()
                after = [p._version for p in model.parameters()]
                assert all(b > a for a, b in zip(versions, after, strict=True))
            models.append(model)
            optimizers.append(optimizer)
        same_sharded_training(models, optimizers)
    shards = [p.to_local().shape[0] for p in models[1].parameters()]
    assert dist.get_world_size() < 4 or dist.get_rank() < 3 or 0 in shards


def check_fsdp_is_one_process(device: torch.device) -> None:
    world = dist.get_world_size()
    alone, together = network(device), sharded(device)
    of_one = native_sgd(alone.parameters(), **MOMENTUM)
    of_all = OnlyKernels(together.parameters(), **MOMENTUM)
    for index in range(3):
        images, labels = batch(index, device, ignored=0)
        step(together, of_all, fusedstep.CrossEntropyLoss(), (images, labels))
        gathered: list[Any] = [None] * world
        dist.all_gather_object(gathered, (images.cpu(), labels.cpu()))
        whole = [torch.cat(parts).to(device) for parts in zip(*gathered, strict=True)]
        step(alone, of_one, nn.CrossEntropyLoss(), (whole[0], whole[1]))
    for ours, theirs in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.full_tensor(), theirs, rtol=1e-5, atol=1e-5)


def check_fsdp_in_backward(device: torch.device) -> None:
    """Each shard is updated when its gradient is reduced, bit for bit as by a step after it."""
    for options in OPTIONS:
        models, optimizers = [], []
        for in_backward in (False, True):
            model = sharded(device)
            optimizer = fusedstep.SGD(model.parameters(), **options, in_backward=in_backward)
            for index in range(3):
                optimizer.zero_grad()
                images, labels = batch(index, device)
                fusedstep.CrossEntropyLoss()(model(images), labels).backward()
                assert all((p.grad is None) == in_backward for p in model.parameters())
                optimizer.step()
            models.append(model)
            optimizers.append(optimizer)
        same_sharded_training(models, optimizers)


def check_fsdp_with_scaler(device: torch.device) -> None:
    """An overflow on one rank at the first, a middle and the last step: no rank steps."""
    models, optimizers = [], []
    for make in SGDS:
        model = sharded(device)
        optimizer = make(model.parameters(), **MOMENTUM)
        scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, growth_interval=1)
        for index in range(5):
            optimizer.zero_grad()
            images, labels = batch(index, device)
            scaler.scale(nn.CrossEntropyLoss()(model(images), labels)).backward()
            if index in (0, 2, 4) and dist.get_rank() == 1:
                next(model.parameters()).grad.to_local().fill_(torch.inf)
            scaler.step(optimizer)
            scaler.update()
        models.append(model)
        optimizers.append(optimizer)
    same_sharded_training(models, optimizers)
    assert scaler.get_scale() == 512.0


def check_meshes(device: torch.device) -> None:
    """FSDP2 with replicas, and over tensor parallel layers: placements of two dimensions."""
    for dims in (("replicate", "shard"), ("dp", "tp")):
        mesh = init_device_mesh(device.type, (2, 2), mesh_dim_names=dims)
        models, optimizers = [], []
        for make in SGDS:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(16, 34), nn.ReLU(), nn.Linear(34, 10)).to(device)
            if "tp" in dims:
                plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
                parallelize_module(model, mesh["tp"], plan)
                fully_shard(model, mesh=mesh["dp"])
            else:
                fully_shard(model, mesh=mesh)
            optimizer = make(model.parameters(), **MOMENTUM)
            for index in range(3):
                torch.manual_seed(10 * index + mesh.get_local_rank(dims[0]))
                data = torch.randn(5, 16), torch.randint(CLASSES, (5,))
                step(
                    model,
                    optimizer,
                    nn.CrossEntropyLoss(),
                    (data[0].to(device), data[1].to(device)),
                )
            assert all(p.device_mesh.ndim == 2 for p in model.parameters())
            models.append(model)
            optimizers.append(optimizer)
        same_sharded_training(models, optimizers)


def check_gradients_elsewhere(device: torch.device) -> None:
    """A gradient that is a sum over ranks is left to torch, beside others that are not."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    ended = []
    for make in (native_sgd, fusedstep.SGD):
        torch.manual_seed(0)
        whole, other = torch.randn(150, 3, device=device), torch.randn(101, device=device)
        params = [
            nn.Parameter(distribute_tensor(whole.clone(), mesh, [Replicate()])),
            nn.Parameter(distribute_tensor(whole.clone(), mesh, [Shard(0)])),
            nn.Parameter(other.clone()),
        ]
        optimizer = make(params, **MOMENTUM)
        for index in range(3):
            torch.manual_seed(10 * index + dist.get_rank())
            local = torch.randn(150, 3, device=device)
            params[0].grad = DTensor.from_local(local, mesh, [Partial()])
            params[1].grad = params[0].grad.redistribute(placements=[Shard(0)])
            torch.manual_seed(index)
            params[2].grad = torch.randn(101, device=device)
            optimizer.step()
        ended.append(params)
    for ours, theirs in zip(*ended, strict=True):
        if isinstance(ours, DTensor):
            same_shards(ours.detach(), theirs.detach())
        else:
            identical(ours, theirs)


def two_dimensions(device: torch.device) -> tuple[DeviceMesh, list[list[Placement]]]:
    """A mesh, and placements of two dimensions on it: those of one rank where that is all there is
    in a dimension of the mesh."""
    mesh = init_device_mesh(device.type, (dist.get_world_size() // 2, 2))
    kinds: list[list[Placement]] = [
        [Replicate(), Shard(0)],
        [Shard(0), Replicate()],
        [Shard(0), Shard(1)],
        [Replicate(), Shard(1)],
        [Replicate(), Replicate()],
    ]
    return mesh, kinds


SHAPES = ((101, 3), (1, 150), (4, 50))  # over ranks unevenly, also such that some hold nothing


def check_master_weights(device: torch.device) -> None:
    """Those of a float32 run in one process, laid out as the parameters."""
    mesh, kinds = two_dimensions(device)
    for placements, options in itertools.product(kinds, OPTIONS):
        torch.manual_seed(0)
        wholes = [torch.randn(shape, device=device).to(BF16) for shape in SHAPES]
        params = [nn.Parameter(distribute_tensor(w.clone(), mesh, placements)) for w in wholes]
        twins = [nn.Parameter(w.float()) for w in wholes]
        ours = OnlyKernels(params, **options, master_weights=True)
        theirs = native_sgd(twins, **options)
        for _ in range(3):
            for param, twin in zip(params, twins, strict=True):
                grad = torch.randn(twin.shape, device=device).to(BF16)
                param.grad = distribute_tensor(grad, mesh, placements)
                twin.grad = grad.float()
            ours.step()
            theirs.step()
        for param, twin in zip(params, twins, strict=True):
            expected = {"master_param": twin.detach(), **theirs.state[twin]}
            for name, state in ours.state[param].items():
                assert state.dtype == F32 and state.placements == param.placements
                torch.testing.assert_close(state.full_tensor(), expected[name])
            rounded = ours.state[param]["master_param"].to_local().to(BF16)
            identical(param.detach().to_local(), rounded)


def check_master_weights_by_torch(device: torch.device) -> None:
    """The same state where torch's functions take over, for a gradient that is a sum over ranks."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    torch.manual_seed(0)
    whole = torch.randn(150, 3, device=device).to(BF16)
    param = nn.Parameter(distribute_tensor(whole.clone(), mesh, [Replicate()]))
    twin = nn.Parameter(whole.float())
    ours = fusedstep.SGD([param], **MOMENTUM, master_weights=True)
    theirs = native_sgd([twin], **MOMENTUM)
    for index in range(4):
        grads = [torch.randn(150, 3, device=device).to(BF16) for _ in range(dist.get_world_size())]
        local = grads[dist.get_rank()]
        if index % 2:
            param.grad = DTensor.from_local(local, mesh, [Partial()])
            twin.grad = torch.stack(grads).float().sum(0)
        else:
            param.grad = distribute_tensor(grads[0], mesh, [Replicate()])
            twin.grad = grads[0].float()
        ours.step()
        theirs.step()
        for name, expected in {"master_param": twin.detach(), **theirs.state[twin]}.items():
            torch.testing.assert_close(ours.state[param][name].full_tensor(), expected)


def check_stochastic_rounding(device: torch.device) -> None:
    """The documented function of this rank's part: ranks with the same part draw the same."""
    mesh, kinds = two_dimensions(device)
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    for placements in kinds:
        part = 0
        for dim, placement in enumerate(placements):
            if not placement.is_replicate():
                part = part * mesh.size(dim) + coordinate[dim]
        torch.manual_seed(0)
        wholes = [torch.randn(shape, device=device).to(BF16) for shape in SHAPES]
        params = [nn.Parameter(distribute_tensor(w, mesh, placements)) for w in wholes]
        optimizer = OnlyKernels(params, lr=0.25, stochastic_rounding=True, seed=7)
        for index in range(3):
            expected = []
            for place, param in enumerate(params):
                grad = torch.randn(param.shape, device=device).to(BF16)
                param.grad = distribute_tensor(grad, mesh, placements)
                before, local = (x.to_local().double() for x in (param.detach(), param.grad))
                exact = (before - 0.25 * local).float()
                assert exact.is_contiguous()
                random = reference.random_bits(7, place + part * 2**32, index, range(exact.numel()))
                rounded = reference.stochastically_rounded(exact.flatten(), random)
                expected.append(rounded.view_as(exact))
            optimizer.step()
            identical([p.detach().to_local().cpu() for p in params], expected)


def check_draws_of_ranks(device: torch.device) -> None:
    """Parts of one parameter are rounded by numbers of their own: two sets of fair coins agree on
    half of them, within five standard deviations."""
    mesh = init_device_mesh(device.type, (2,))
    param = nn.Parameter(distribute_tensor(torch.ones(200_000, dtype=BF16), mesh, [Shard(0)]))
    param.grad = torch.full_like(param, -(2.0**-8))
    OnlyKernels([param], lr=1.0, stochastic_rounding=True).step()
    halves = param.full_tensor().detach().view(2, -1) > 1
    agree = (halves[0] == halves[1]).sum().item()
    assert abs(agree - 50_000) <= 5 * 25_000**0.5


def check_rounding_of_sums_is_refused(device: torch.device) -> None:
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    whole = torch.ones(150, device=device, dtype=BF16)
    param = nn.Parameter(distribute_tensor(whole, mesh, [Replicate()]))
    summand = nn.Parameter(DTensor.from_local(whole, mesh, [Partial()]))
    param.grad = DTensor.from_local(whole.clone(), mesh, [Partial()])
    summand.grad = DTensor.from_local(whole.clone(), mesh, [Partial()])
    for params, options, reason in (
        ([param], {"stochastic_rounding": True}, "a gradient placed unlike its parameter"),
        ([summand], {"stochastic_rounding": True}, "a DTensor of partial sums"),
        ([summand], {"master_weights": True}, "a DTensor of partial sums"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            fusedstep.SGD(params, lr=0.1, **options).step()
    assert (param.to_local() == 1).all() and (summand.to_local() == 1).all()


def check_rounded_fsdp(device: torch.device, folder: str) -> None:
    """bfloat16 models under FSDP2: a checkpoint goes on to the same bits."""
    for options in ({"master_weights": True}, {"stochastic_rounding": True, "seed": 3}):
        model = sharded(device, dtype=BF16)
        optimizer = OnlyKernels(model.parameters(), **MOMENTUM, **options)

        def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
            for index in steps:
                images, labels = batch(index, device, dtype=BF16, ignored=0)
                step(model, optimizer, fusedstep.CrossEntropyLoss(), (images, labels))

        train(model, optimizer, range(2))
        states = get_state_dict(model, optimizer)
        path = f"{folder}/{next(iter(options))}"
        dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=path)
        other = sharded(device, dtype=BF16)
        resumed = OnlyKernels(other.parameters(), lr=7.0, momentum=0.1, **options)
        states = get_state_dict(other, resumed)
        dcp.load({"model": states[0], "optimizer": states[1]}, checkpoint_id=path)
        set_state_dict(other, resumed, model_state_dict=states[0], optim_state_dict=states[1])
        for _ in range(2):
            for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
                same_shards(ours.detach(), theirs.detach())
                of_ours, of_theirs = resumed.state[ours], optimizer.state[theirs]
                assert of_ours.keys() == of_theirs.keys() and len(of_ours) == 2
                for name, value in of_theirs.items():
                    if isinstance(value, Tensor):
                        assert of_ours[name].dtype == value.dtype
                        same_shards(of_ours[name], value)
                    else:
                        assert of_ours[name] == value
            train(model, optimizer, [2])
            train(other, resumed, [2])


def test_checkpoints_of_rounded_parameters(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2, check_rounded_fsdp, str(tmp_path))


@pytest.mark.parametrize(
    ("world", "check"),
    [
        (2, check_master_weights),
        (4, check_master_weights),
        (2, check_master_weights_by_torch),
        (2, check_stochastic_rounding),
        (4, check_stochastic_rounding),
        (2, check_draws_of_ranks),
        (2, check_rounding_of_sums_is_refused),
        (4, check_fsdp),
        (3, check_fsdp_is_one_process),
        (2, check_fsdp_in_backward),
        (2, check_fsdp_with_scaler),
        (4, check_meshes),
        (2, check_gradients_elsewhere),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_sharded_parameters(ranks: Ranks, world: int, check: Callable[..., None]) -> None:
    ranks(world, check)


# ------------------------------------------------------------------ distributed checkpoints

SEEN_BY_ALL = 2  # steps before the checkpoint, on the same batch everywhere


def continue_training(
    model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, steps: Iterable[int]
) -> None:
    for index in steps:
        generator = torch.Generator().manual_seed(index)
        images = torch.randn(6, 1, 8, 8, generator=generator).to(device)
        labels = torch.randint(CLASSES, (6,), generator=generator).to(device)
        step(model, optimizer, nn.CrossEntropyLoss(), (images, labels))


def save_checkpoint(device: torch.device, folder: str, ours: bool) -> None:
    model = sharded(device)
    optimizer = (OnlyKernels if ours else native_sgd)(model.parameters(), **MOMENTUM)
    continue_training(model, optimizer, device, range(SEEN_BY_ALL))
    states = get_state_dict(model, optimizer)
    dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=folder)


def load_checkpoint(device: torch.device, folder: str, ours: bool) -> None:
    """Loads on other ranks than saved, goes on, and ends where one process ends that never stopped.

    The tolerance is that of gradients averaged over ranks, each the same.
    """
    model = sharded(device)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    optimizer = (OnlyKernels if ours else native_sgd)(model.parameters(), lr=0.3, momentum=0.1)
    states = get_state_dict(model, optimizer)
    dcp.load({"model": states[0], "optimizer": states[1]}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=states[0], optim_state_dict=states[1])
    assert {k: optimizer.param_groups[0][k] for k in MOMENTUM} == MOMENTUM
    for param in model.parameters():
        buffer = optimizer.state[param]["momentum_buffer"]
        assert isinstance(buffer, DTensor) and buffer.placements == param.placements

    continue_training(model, optimizer, device, range(SEEN_BY_ALL, SEEN_BY_ALL + 2))
    alone = network(device)
    of_one = native_sgd(alone.parameters(), **MOMENTUM)
    continue_training(alone, of_one, device, range(SEEN_BY_ALL + 2))
    for sharded_param, param in zip(model.parameters(), alone.parameters(), strict=True):
        close = {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(sharded_param.full_tensor(), param.detach(), **close)
        buffer = optimizer.state[sharded_param]["momentum_buffer"].full_tensor()
        torch.testing.assert_close(buffer, of_one.state[param]["momentum_buffer"], **close)


@pytest.mark.parametrize(
    ("saved_on", "saved_by_us", "loaded_on", "loaded_by_us"),
    [(4, True, 2, True), (2, True, 3, False), (4, False, 2, True)],
)
def test_checkpoint_is_resharded(
    ranks: Ranks,
    tmp_path: Path,
    saved_on: int,
    saved_by_us: bool,
    loaded_on: int,
    loaded_by_us: bool,
) -> None:
    ranks(saved_on, save_checkpoint, str(tmp_path), saved_by_us)
    ranks(loaded_on, load_checkpoint, str(tmp_path), loaded_by_us)


# ------------------------------------------------------------------ sharded logits


def draw_logits(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Logits and class indices; a quarter of the rows, and all of the first half, are ignored."""
    logits = (torch.randn(shape, generator=generator) * 3).to(dtype)
    row_shape = shape[:1] + shape[2:] if len(shape) > 1 else ()
    classes = shape[min(len(shape) - 1, 1)]
    target = torch.randint(classes, row_shape, generator=generator)
    if target.dim():
        target[torch.rand(row_shape, generator=generator) < 0.25] = -100
        target[: shape[0] // 2] = -100
    return logits, target


def of_rows(placements: Sequence[Placement], dims: int) -> list[Placement]:
    """Placements of the class indices of logits with these placements."""
    class_dim = 0 if dims == 1 else 1
    return [
        Shard(p.dim - (p.dim > class_dim))
        if isinstance(p, Shard) and p.dim != class_dim
        else Replicate()
        for p in placements
    ]


LOGITS = [
    (shape, placements)
    for shape, placements in itertools.product(
        [(13,), (9, 13), (3, 3), (4, 10, 3), (3, 5, 3, 2)],
        [
            (Shard(0),),
            (Shard(1),),
            (Shard(2),),
            (Replicate(),),
            (Partial(),),
            (Shard(0), Shard(1)),
            (Shard(1), Shard(0)),
            (Replicate(), Shard(1)),
            (Shard(2), Shard(1)),
            (Shard(1), Shard(1)),
            (Shard(0), Shard(0)),
        ],
    )
    if all(not isinstance(p, Shard) or p.dim < len(shape) for p in placements)
]


def check_logits(device: torch.device, dtype: torch.dtype) -> None:
    """Against float64 on the whole: loss, gradient, dtypes, placements; and never by torch."""
    world = dist.get_world_size()
    flat = init_device_mesh(device.type, (world,))
    square = init_device_mesh(device.type, (2, world // 2))
    rng = random.Random(str(dtype))
    generator = torch.Generator().manual_seed(0)
    for shape, placements in LOGITS if dtype is F32 else rng.sample(LOGITS, 15):
        mesh = flat if len(placements) == 1 else square
        dims, class_dim = len(shape), 0 if len(shape) == 1 else 1
        logits, target = draw_logits(shape, dtype, generator)
        weight = torch.rand(shape[class_dim], generator=generator).to(dtype)
        options: dict[str, Any] = {
            "reduction": rng.choice(REDUCTIONS),
            "weight": rng.choice((weight, None)),
            "label_smoothing": rng.choice((0.0, 0.0, 0.1)),
        }
        probabilities = rng.random() < 0.2
        if rng.random() < 0.5 and not probabilities:  # a class, which on other ranks is another
            options["ignore_index"] = 1
            target[target == -100] = 1
        if probabilities:
            target = logits.roll(1).float().softmax(class_dim).to(dtype)
        reduced = options["reduction"] != "none"
        target_shape = torch.Size(s for d, s in enumerate(shape) if d != class_dim)
        upstream = torch.randn(() if reduced else target_shape, generator=generator).to(dtype)

        # Classes innermost, as a language model makes them, and as the loss wants them.
        inner = [
            Shard({class_dim: dims - 1}.get(p.dim, p.dim - (p.dim > class_dim)))
            if isinstance(p, Shard)
            else p
            for p in placements
        ]
        value = logits.movedim(class_dim, -1).contiguous().to(device)
        if isinstance(placements[0], Partial):
            leaf = DTensor.from_local(value / world, mesh, placements)
        else:
            leaf = distribute_tensor(value, mesh, inner)
        x = leaf.requires_grad_().movedim(-1, class_dim)
        assert x.placements == placements

        rows = of_rows(placements, dims)
        target_placements = list(placements) if probabilities else rows
        if any(isinstance(p, Partial) for p in target_placements):
            target_placements = [Replicate()]
        y = target.to(device)
        if not probabilities and (target >= 0).all():
            y = y.byte()
        if any(isinstance(p, Shard) for p in target_placements) or rng.random() < 0.5:
            y = distribute_tensor(y, mesh, target_placements)
        w = None if options["weight"] is None else weight.to(device)
        loss = F.cross_entropy(x, y, w, **{k: v for k, v in options.items() if k != "weight"})
        g = upstream.to(device)
        spread = [Replicate()] * mesh.ndim if reduced else rows
        loss.backward(distribute_tensor(g, mesh, spread))

        expected = reference.cross_entropy(logits, target, grad_output=upstream, **options)
        assert isinstance(loss, DTensor) and loss.dtype is dtype
        partial = [Partial() if isinstance(p, Shard) else Replicate() for p in rows]
        assert list(loss.placements) == (partial if reduced else rows)
        grad = leaf.grad
        assert isinstance(grad, DTensor) and grad.dtype is dtype
        assert isinstance(placements[0], Partial) or grad.placements == leaf.placements
        # A loss over rows of several ranks is rounded on each, and once more.
        case = f"{shape} {placements} {options} {probabilities=}"
        off = error(loss.full_tensor().cpu(), expected.loss, expected.loss_scale, dtype)
        assert off <= 4 * slack(dtype), (case, off)
        actual = grad.full_tensor().movedim(-1, class_dim).cpu()
        off = error(actual, expected.grad, expected.grad_scale, dtype)
        assert off <= 4 * slack(dtype), (case, off)


@contextlib.contextmanager
def without_torchs_own() -> Iterator[None]:
    """Fails where torch's own cross-entropy would have to run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "cross_entropy", None)
        yield


def check_logits_without_torch(device: torch.device) -> None:
    for dtype in DTYPES:
        with without_torchs_own():
            check_logits(device, dtype)


def check_against_loss_parallel(device: torch.device) -> None:
    """The same numbers from fewer messages: one gather of three numbers per row, and no more."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    cases = itertools.product([(23, 41), (3, 17, 5)], REDUCTIONS, (False, True))
    for shape, reduction, weighted in cases:
        logits, target = draw_logits(shape, F32, generator)
        w = None
        if weighted:  # loss_parallel would look up the weight of class -100
            target.clamp_(min=0)
            w = torch.rand(shape[1], generator=generator).to(device)
            w = distribute_tensor(w, mesh, [Replicate()])
        y = distribute_tensor(target.to(device), mesh, [Replicate()])
        results = []
        for ours in (False, True):
            x = distribute_tensor(logits.to(device), mesh, [Shard(1)]).requires_grad_()
            seen = CommDebugMode()
            with contextlib.nullcontext() if ours else loss_parallel(), seen:
                function = F.cross_entropy if ours else torch.nn.functional.cross_entropy
                loss = function(x, y, w, reduction=reduction)
                loss.sum().backward()
            results.append((loss, x.grad, seen))
        torch.testing.assert_close(results[1][0].full_tensor(), results[0][0].full_tensor())
        assert results[1][0].placements == results[0][0].placements
        assert results[1][1].placements == results[0][1].placements
        torch.testing.assert_close(results[1][1].to_local(), results[0][1].to_local())
        counts = results[1][2].get_comm_counts()
        assert counts == {torch.ops.c10d_functional.all_gather_into_tensor: 1}
        assert results[0][2].get_total_counts() >= 3


def check_sharded_rows(device: torch.device) -> None:
    """Each rank holds its part of the loss of all rows, and knows the mean's divisor from one
    message: however many rows a rank has, and however many of them count."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    cases = itertools.product([(6, 1), (6, 3), (7, 3), (2, 1)], ("mean", "sum"), (False, True))
    for (rows, ignored), reduction, weighted in cases:
        logits = torch.randn(rows, 5, generator=generator)
        target = torch.randint(5, (rows,), generator=generator)
        target[:ignored] = -100
        w = torch.rand(5, generator=generator) if weighted else None
        expected = reference.cross_entropy(logits, target, weight=w, reduction=reduction)
        x = distribute_tensor(logits.to(device), mesh, [Shard(0)]).requires_grad_()
        y = distribute_tensor(target.to(device), mesh, [Shard(0)])
        forward, backward = CommDebugMode(), CommDebugMode()
        with forward:
            loss = F.cross_entropy(x, y, None if w is None else w.to(device), reduction=reduction)
        with backward:
            loss.backward()
        assert loss.placements == (Partial("sum"),)
        parts = [torch.zeros_like(loss.to_local()) for _ in range(mesh.size())]
        dist.all_gather(parts, loss.to_local().detach())
        assert loss.item() == parts[dist.get_rank()].item()
        close = {"rtol": 1e-5, "atol": 1e-6}
        for total in (loss.full_tensor(), torch.stack(parts).sum()):
            torch.testing.assert_close(total.detach().cpu().double(), expected.loss, **close)
        torch.testing.assert_close(x.grad.full_tensor().cpu().double(), expected.grad, **close)
        messages = {torch.ops.c10d_functional.all_reduce: 1} if reduction == "mean" else {}
        assert forward.get_comm_counts() == messages and backward.get_total_counts() == 0


def check_extreme_logits(device: torch.device) -> None:
    """A shard of nothing but padding (-inf), rows far from 0, and a row that has no sum."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 12, generator=generator)
    logits[:, 8:] = -torch.inf
    logits[1] += 1e4
    logits[2] -= 1e4
    logits[3] = -torch.inf
    target = torch.randint(8, (7,), generator=generator)
    expected = reference.cross_entropy(logits, target, reduction="none")
    x = distribute_tensor(logits.to(device), mesh, [Shard(1)]).requires_grad_()
    loss = F.cross_entropy(x, target.to(device), reduction="none")
    loss.sum().backward()
    torch.testing.assert_close(
        loss.full_tensor().cpu().double(), expected.loss, equal_nan=True, rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(
        x.grad.full_tensor().cpu().double(), expected.grad, equal_nan=True, rtol=1e-5, atol=1e-7
    )

    for placements, rows in (([Shard(1)], [Replicate()]), ([Shard(0)], [Shard(0)])):
        x = distribute_tensor(torch.randn(8, 12, device=device), mesh, placements).requires_grad_()
        y = distribute_tensor(torch.full((8,), -100, device=device), mesh, rows)
        loss = F.cross_entropy(x, y)
        loss.backward()
        assert loss.full_tensor().isnan()
        assert x.grad.to_local().count_nonzero() == 0

    # Rows of 3e38 have a mean, though float32 cannot hold their sum.
    logits = torch.zeros(4, 8, device=device)
    logits[:, 0] = 3e38
    target = torch.ones(4, dtype=torch.int64, device=device)
    target[3] = -100
    for weight in (None, torch.ones(8, device=device)):
        for placements, rows in (([Shard(1)], [Replicate()]), ([Shard(0)], [Shard(0)])):
            x = distribute_tensor(logits, mesh, placements).requires_grad_()
            loss = F.cross_entropy(x, distribute_tensor(target, mesh, rows), weight)
            loss.backward()
            mean = loss.full_tensor()
            torch.testing.assert_close(mean, torch.tensor(3e38, device=device))
            assert x.grad.full_tensor()[:3].ne(0).any() and x.grad.to_local().isfinite().all()
        part = logits.chunk(dist.get_world_size(), 1)[dist.get_rank()]
        mean = vocab_parallel_cross_entropy(part, target, weight, num_classes=8)
        torch.testing.assert_close(mean, torch.tensor(3e38, device=device))


def check_derivatives_of_ignored_rows(device: torch.device) -> None:
    """Exactly 0, the first and the second, whatever the rows hold; elsewhere as on the whole."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 12, generator=generator, dtype=F64).to(device)
    target = torch.randint(12, (8,), generator=generator).to(device)
    target[::2] = -100
    for bad in (math.nan, math.inf, -math.inf):
        for options in ({}, {"label_smoothing": 0.1, "weight": torch.ones(12, dtype=F64)}):
            options = {k: v.to(device) if k == "weight" else v for k, v in options.items()}
            found = []
            for placements in (None, [Shard(0)], [Shard(1)], [Replicate()]):
                x = logits.clone()
                if placements is not None:
                    x[::2] = bad
                    x = distribute_tensor(x, mesh, placements)
                x, y = x.requires_grad_(), target
                if placements == [Shard(0)]:
                    y = distribute_tensor(target, mesh, placements)
                loss = F.cross_entropy if placements else torch.nn.functional.cross_entropy
                (first,) = torch.autograd.grad(loss(x, y, **options), x, create_graph=True)
                (second,) = torch.autograd.grad(first.square().sum(), x)
                if placements is not None:
                    first, second = first.full_tensor(), second.full_tensor()
                found.append((first.detach(), second))
                assert not first[::2].any() and not second[::2].any()
            for grads in found[1:]:
                torch.testing.assert_close(grads, found[0])


def derivatives(
    loss: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, order: int = 3
) -> Iterator[Tensor]:
    """Of a loss along v: gradients by x of its first derivative, its second and so on; by g, too.

    g is what the loss is multiplied by.
    """
    g = torch.tensor(0.7, dtype=v.dtype, device=v.device, requires_grad=True)
    value = loss(x)
    value = g * (value.full_tensor() if isinstance(value, DTensor) else value)
    for _ in range(order):
        by_x, by_g = torch.autograd.grad(value, (x, g), create_graph=True)
        yield from (by_x, by_g)
        value = (by_x * v).sum()
        value = value.full_tensor() if isinstance(value, DTensor) else value


def check_higher_derivatives(device: torch.device) -> None:
    """Up to the third, against torch's on the whole."""
    world, rank = dist.get_world_size(), dist.get_rank()
    flat = init_device_mesh(device.type, (world,))
    square = init_device_mesh(device.type, (2, world // 2))
    generator = torch.Generator().manual_seed(0)
    native = torch.nn.functional.cross_entropy
    for shape, placements in (
        ((13,), (Shard(0),)),
        ((6, 13), (Shard(1),)),
        ((6, 3), (Shard(1),)),  # a rank without classes
        ((6, 13), (Shard(0),)),
        ((6, 13), (Replicate(),)),
        ((4, 7, 3), (Shard(0), Shard(1))),
        ((4, 7, 3), (Shard(1), Shard(2))),
        ((4, 7, 3), (Replicate(), Shard(1))),
    ):
        mesh = flat if len(placements) == 1 else square
        logits, target = (t.to(device) for t in draw_logits(shape, F64, generator))
        v, weight = (torch.randn(s, generator=generator, dtype=F64) for s in (shape, shape[:2][-1]))
        v, weight = v.to(device), weight.exp().to(device)
        for options in ({"weight": weight}, {"label_smoothing": 0.1, "reduction": "sum"}):
            whole = partial(native, target=target, **options)
            expected = list(derivatives(whole, logits.requires_grad_(), v))
            x = distribute_tensor(logits.detach(), mesh, placements).requires_grad_()
            y = distribute_tensor(target, mesh, of_rows(placements, len(shape)))
            spread = distribute_tensor(v, mesh, placements)
            found = derivatives(partial(F.cross_entropy, target=y, **options), x, spread)
            for ours, theirs in zip(found, expected, strict=True):
                if isinstance(ours, DTensor):
                    assert ours.placements == placements
                    ours = ours.full_tensor()
                torch.testing.assert_close(ours, theirs, msg=f"{shape} {placements} {options}")

    logits, target = (t.to(device) for t in draw_logits((6, 13), BF16, generator))
    wide = logits.double().requires_grad_()
    v = torch.randn(6, 13, generator=generator, dtype=F64).to(device)
    group = dist.group.WORLD
    chunk = [part.chunk(world, 1)[rank] for part in (wide.detach(), v)]
    for x, along in (chunk, [part.to(BF16) for part in chunk]):
        x = x.requires_grad_()
        loss = vocab_parallel_cross_entropy(x, target, group=group, num_classes=13)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        (second,) = torch.autograd.grad(gradient, x, along)
        (gradient,) = torch.autograd.grad(native(wide, target), wide, create_graph=True)
        (expected_second,) = torch.autograd.grad(gradient, wide, v)
        near = {"rtol": 0.05, "atol": 2e-3} if x.dtype is BF16 else {}
        torch.testing.assert_close(second.double(), expected_second.chunk(world, 1)[rank], **near)


def check_autocast(device: torch.device) -> None:
    """float32 losses from 16-bit logits, whose gradients stay 16-bit."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    logits, target = draw_logits((8, 12), BF16, torch.Generator().manual_seed(0))
    expected = reference.cross_entropy(logits, target)
    for placements, rows in (([Shard(1)], [Replicate()]), ([Shard(0)], [Shard(0)])):
        x = distribute_tensor(logits.to(device), mesh, placements).requires_grad_()
        y = distribute_tensor(target.to(device), mesh, rows)
        with torch.autocast(device.type, BF16):
            loss = fusedstep.CrossEntropyLoss()(x, y)
        loss.backward()
        assert loss.dtype is F32 and x.grad.dtype is BF16
        assert error(loss.full_tensor().cpu(), expected.loss, expected.loss_scale, F32) < 1e-6
        grad = x.grad.full_tensor().cpu()
        assert error(grad, expected.grad, expected.grad_scale, BF16) <= 2 * slack(BF16)


def check_left_to_torch(device: torch.device) -> None:
    """What the kernels do not cover is computed by torch on the same DTensors, or refused by it."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    torch.manual_seed(0)
    value, soft = torch.randn(6, 8, device=device), torch.rand(6, 8, device=device)
    results = []
    for function in (torch.nn.functional.cross_entropy, F.cross_entropy):
        x = distribute_tensor(value, mesh, [Replicate()]).requires_grad_()
        t = distribute_tensor(soft, mesh, [Replicate()]).requires_grad_()
        loss = function(x, t)
        loss.backward()
        results.append((loss.full_tensor(), x.grad.full_tensor(), t.grad.full_tensor()))
    identical(results[1], results[0])
    x = distribute_tensor(value, mesh, [Shard(0)])
    y = torch.zeros(6, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="input shards its rows, so that target must be a DTensor"):
        F.cross_entropy(x, y)
    other = init_device_mesh(device.type, (1, dist.get_world_size()))
    with pytest.raises(ValueError, match="target is on"):
        F.cross_entropy(x, distribute_tensor(y, other, [Replicate(), Replicate()]))
    for function in (F.cross_entropy, fusedstep.distributed.cross_entropy):
        with pytest.raises(ValueError, match="not a valid value for reduction"):
            function(x, y, weight=None, ignore_index=-100, reduction="avg", label_smoothing=0.0)
    shape, stride = torch.Size((6, 8)), (8, 1)
    uneven = value[:, : 3 if dist.get_rank() == 0 else 5]  # not as Shard cuts
    x = DTensor.from_local(uneven, mesh, [Shard(1)], shape=shape, stride=stride)
    with pytest.raises(ValueError, match="of 8 classes on 2 ranks, this one holds those from"):
        F.cross_entropy(x, y)


def check_out_of_range(device: torch.device) -> None:
    """An IndexError on every rank; on CUDA NaN, in that row alone."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for wrong in (8, -1, 2**40):
        x = distribute_tensor(torch.randn(5, 8, device=device), mesh, [Shard(1)]).requires_grad_()
        y = torch.tensor([0, -100, wrong, 7, 3], device=device)
        if device.type == "cpu":
            with pytest.raises(IndexError, match=f"target {wrong} at row 2 is out of bounds for 8"):
                F.cross_entropy(x, y)
            continue
        loss = F.cross_entropy(x, y, reduction="none")
        loss.sum().backward()
        bad = torch.tensor([False, False, True, False, False], device=device)
        identical(loss.full_tensor().isnan(), bad)
        identical(x.grad.full_tensor().isnan(), bad[:, None].expand(5, 8))


def check_vocab_parallel(device: torch.device) -> None:
    """Two groups of two ranks, each with rows of its own; plain tensors."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    half, place = divmod(dist.get_rank(), 2)
    group = halves[half]
    generator = torch.Generator().manual_seed(half)
    for shape, dtype, reduction, weighted in (
        ((8,), F32, "mean", False),
        ((9, 14), F64, "mean", True),
        ((9, 14), BF16, "sum", False),
        ((2, 7, 5), F32, "none", True),
        ((4, 1), F32, "mean", False),
    ):
        class_dim = min(len(shape) - 1, 1)
        classes = shape[class_dim]
        logits, target = draw_logits(shape, dtype, generator)
        weight = torch.rand(classes, generator=generator).to(dtype) if weighted else None
        options: dict[str, Any] = {"reduction": reduction, "weight": weight}
        expected = reference.cross_entropy(logits, target, grad_output=0.5, **options)
        chunk = -(-classes // 2)
        parts = [
            part.narrow(
                class_dim, min(place * chunk, classes), max(0, min(chunk, classes - place * chunk))
            )
            for part in (logits, expected.grad, expected.grad_scale)
        ]
        x = parts[0].to(device).requires_grad_()
        loss = vocab_parallel_cross_entropy(
            x,
            target.to(device),
            None if weight is None else weight.to(device),
            group=group,
            num_classes=classes if classes % 2 else None,
            reduction=reduction,
        )
        loss.backward(torch.full_like(loss, 0.5))
        assert loss.dtype is dtype
        assert error(loss.cpu(), expected.loss, expected.loss_scale, dtype) <= 2 * slack(dtype)
        assert error(x.grad.cpu(), parts[1], parts[2], dtype) <= 2 * slack(dtype)

    x = torch.randn(4, 5, device=device)
    y = torch.zeros(4, dtype=torch.int64, device=device)
    for wrong, match in (
        ({"num_classes": 12}, "holds those from"),
        ({"reduction": "avg"}, "not a valid value"),
        ({"weight": torch.ones(5, device=device)}, "do not fit"),
        ({"target": y[:3]}, "do not fit"),
        ({"target": y.float()}, "do not fit"),
    ):
        with pytest.raises(ValueError, match=match):
            vocab_parallel_cross_entropy(**{"input": x, "target": y, "group": group, **wrong})
    if device.type == "cpu":
        with pytest.raises(IndexError, match="target 10 at row 0 is out of bounds for 10 classes"):
            vocab_parallel_cross_entropy(x, y + 10, group=group)


class LanguageModel(nn.Module):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(44, 16, device=device)
        self.head = nn.Linear(16, 44, bias=False, device=device)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens)).transpose(1, 2)


def check_tensor_parallel_training(device: torch.device) -> None:
    """A head whose vocabulary is sharded, our loss without a context manager, and our SGD."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    alone, together = LanguageModel(device), LanguageModel(device)
    plan = {"head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)}
    parallelize_module(together, mesh, plan)
    of_one = native_sgd(alone.parameters(), **MOMENTUM)
    of_all = OnlyKernels(together.parameters(), **MOMENTUM)
    for index in range(3):
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(44, (3, 7), generator=generator).to(device)
        labels = torch.where(tokens.roll(-1, 1) % 5 == 0, -100, tokens.roll(-1, 1))
        step(alone, of_one, nn.CrossEntropyLoss(), (tokens, labels))
        step(together, of_all, fusedstep.CrossEntropyLoss(), (tokens, labels))
    for ours, theirs in zip(together.parameters(), alone.parameters(), strict=True):
        whole = ours.full_tensor() if isinstance(ours, DTensor) else ours
        torch.testing.assert_close(whole, theirs, rtol=1e-5, atol=1e-6)


def check_compiled(device: torch.device) -> None:
    """One graph, forward and backward, with DTensors and with plain shards."""
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh(device.type, (world,))
    logits, target = draw_logits((8, 12), F32, torch.Generator().manual_seed(0))
    expected = reference.cross_entropy(logits, target)
    close = {"rtol": 1e-5, "atol": 1e-6}

    def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.compile(function, backend="aot_eager", fullgraph=True)

    for placements, rows in (([Shard(1)], [Replicate()]), ([Shard(0)], [Shard(0)])):
        x = distribute_tensor(logits.to(device), mesh, placements).requires_grad_()
        y = distribute_tensor(target.to(device), mesh, rows)
        loss = compiled(F.cross_entropy)(x, y)
        loss.backward()
        torch.testing.assert_close(loss.full_tensor().cpu().double(), expected.loss, **close)
        assert x.grad.placements == x.placements
        torch.testing.assert_close(x.grad.full_tensor().cpu().double(), expected.grad, **close)

    x = distribute_tensor(logits.to(device), mesh, [Shard(0)])
    loss = compiled(F.mse_loss)(x, x * 2)  # by torch, which knows how to shard it
    torch.testing.assert_close(loss.full_tensor().cpu(), logits.square().mean())

    group = dist.group.WORLD
    x = logits.chunk(world, 1)[rank].to(device).requires_grad_()
    loss = compiled(lambda x, y: vocab_parallel_cross_entropy(x, y, group=group))(
        x, target.to(device)
    )
    loss.backward()
    torch.testing.assert_close(loss.detach().cpu().double(), expected.loss, **close)
    part = expected.grad.chunk(world, 1)[rank]
    torch.testing.assert_close(x.grad.cpu().double(), part, **close)


@pytest.mark.parametrize(
    ("world", "check"),
    [
        (4, check_logits_without_torch),
        (3, check_against_loss_parallel),
        (3, check_sharded_rows),
        (3, check_extreme_logits),
        (4, check_higher_derivatives),
        (2, check_derivatives_of_ignored_rows),
        (2, check_autocast),
        (2, check_left_to_torch),
        (2, check_out_of_range),
        (4, check_vocab_parallel),
        (2, check_tensor_parallel_training),
        (2, check_compiled),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_sharded_logits(ranks: Ranks, world: int, check: Callable[..., None]) -> None:
    ranks(world, check)


# ------------------------------------------------------------------ the ranks themselves


def check_with_a_fault(device: torch.device, fault: str) -> None:
    if dist.get_rank() == 1 and fault == "raises":
        raise ValueError("of rank 1")
    if dist.get_rank() == 1 and fault == "dies":
        os._exit(0)
    dist.barrier()


def test_a_check_that_fails_on_one_rank_fails(ranks: Ranks) -> None:
    """Though the other waits for it; and the next check has ranks again."""
    with pytest.raises(pytest.fail.Exception, match=r"^rank 1: Traceback(?s:.*)of rank 1$"):
        ranks(2, check_with_a_fault, "raises")
    with pytest.raises(pytest.fail.Exception):
        ranks(2, check_with_a_fault, "dies")
    ranks(2, check_with_a_fault, "none")


# ------------------------------------------------------------------ import


def test_import_does_not_load_dtensor(cpu_only: None) -> None:
    """Its modules take as long to import as fusedstep."""
    program = "import fusedstep, sys; sys.exit('torch.distributed.tensor' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
