"""Hugging Face Accelerate."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from clients.training import (
    NATIVE,
    OUR_LOSS,
    OURS,
    SGD_OPTIONS,
    Kit,
    task,
    trained_by_hand,
    weights,
)
from numerics import identical


@pytest.fixture(autouse=True)
def new_process() -> Iterator[None]:
    """Accelerate keeps one state for a process."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


class Run:
    """A prepared training loop, as Accelerate's documentation writes it."""

    def __init__(self, kit: Kit, net: nn.Module, device: str, **options: Any) -> None:
        self.accelerator = Accelerator(cpu=device == "cpu", **options)
        net = copy.deepcopy(net)
        optimizer = kit.sgd(net.parameters(), **SGD_OPTIONS)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
        self.criterion = kit.criterion(label_smoothing=0.1)
        self.net, self.optimizer, self.scheduler = self.accelerator.prepare(
            net, optimizer, scheduler
        )

    def train(
        self, x: Tensor, t: Tensor, clip: float | None = None, epochs: int = 2
    ) -> list[Tensor]:
        data = self.accelerator.prepare(DataLoader(TensorDataset(x, t), batch_size=8))
        for _ in range(epochs):
            for inputs, target in data:
                with self.accelerator.accumulate(self.net):
                    loss = self.criterion(self.net(inputs), target)
                    self.accelerator.backward(loss)
                    if clip is not None and self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.net.parameters(), clip)
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
        return weights(self.accelerator.unwrap_model(self.net))


def trained(kit: Kit, net: nn.Module, x: Tensor, t: Tensor, device: str, **options: Any) -> Any:
    clip = options.pop("clip", None)
    ended = Run(kit, net, device, **options).train(x, t, clip)
    AcceleratorState._reset_state()
    GradientState._reset_state()
    return ended


@pytest.mark.parametrize("clip", [None, 0.5])
def test_as_the_loop_by_hand(clip: float | None, device: str) -> None:
    net, x, t = task()
    run = Run(OURS, net, device)
    run.scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer.optimizer, 10**6)
    batches = [*DataLoader(TensorDataset(x, t), batch_size=8)] * 2
    ended = run.train(x, t, clip)
    identical(ended, trained_by_hand(OURS, net, batches, clip))
    torch.testing.assert_close(ended, trained_by_hand(NATIVE, net, batches, clip))


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2, "clip": 0.5}, {"mixed_precision": "bf16"}],
    ids=str,
)
def test_options_of_the_accelerator(options: dict[str, Any], device: str) -> None:
    """Our SGD ends at the bits of torch's, our loss beside it near those of torch's."""
    net, x, t = task()
    ours, our_loss, native = (
        trained(kit, net, x, t, device, **options) for kit in (OURS, OUR_LOSS, NATIVE)
    )
    identical(ours, our_loss)
    # A gradient that autocast rounds to 16 bits may go to either neighbour.
    near = {"rtol": 0.02, "atol": 2e-3} if "mixed_precision" in options else {}
    torch.testing.assert_close(ours, native, **near)


def test_loss_scale(card: str) -> None:
    """float16 with Accelerate's GradScaler, which needs a card."""
    net, x, t = task()
    ours, native = (trained(kit, net, x, t, card, mixed_precision="fp16") for kit in (OURS, NATIVE))
    torch.testing.assert_close(ours, native, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize(("first", "second"), [(OURS, NATIVE), (NATIVE, OURS)])
def test_a_checkpoint_is_continued_by_the_other(
    first: Kit, second: Kit, device: str, tmp_path: Path
) -> None:
    net, x, t = task()
    start = Run(first, net, device)
    start.train(x, t, epochs=1)
    start.accelerator.save_state(str(tmp_path))
    continued = Run(second, net, device)
    continued.accelerator.load_state(str(tmp_path))
    whole = Run(second, net, device)
    torch.testing.assert_close(continued.train(x, t, epochs=1), whole.train(x, t))
