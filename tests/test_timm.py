"""The pieces of timm's training script: models, mixup, losses, schedulers, clipping, averages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fusedstep
from clients.training import NATIVE, OUR_LOSS, OURS, SGD_OPTIONS, Kit, weights
from numerics import identical

try:
    import timm
except ImportError:
    pytest.skip("timm is not installed; make cuda-test has it", allow_module_level=True)

from timm.data import Mixup
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, dispatch_clip_grad

CLASSES = 7


def trained(
    criterion: nn.Module, optimizer_of: Kit | None, device: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights of a small network, and their moving average; without a kit, timm makes the SGD."""
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=CLASSES).to(device)
    net.train()
    if optimizer_of is None:
        optimizer = create_optimizer_v2(net, opt="sgd", lr=0.1, momentum=0.9, weight_decay=1e-3)
    else:
        optimizer = optimizer_of.sgd(net.parameters(), **SGD_OPTIONS)
    scheduler = CosineLRScheduler(optimizer, t_initial=3, warmup_t=1, warmup_lr_init=0.01)
    average = ModelEmaV3(net, decay=0.9)
    mixup = Mixup(mixup_alpha=0.2, num_classes=CLASSES, label_smoothing=0.1)
    mixup.mixup_enabled = False  # it draws from numpy; smoothed one-hot targets remain
    for epoch in range(3):
        for _ in range(2):
            images = torch.randn(8, 3, 32, 32).to(device)
            images, target = mixup(images, torch.randint(CLASSES, (8,)).to(device))
            optimizer.zero_grad()
            criterion(net(images), target).backward()
            dispatch_clip_grad(net.parameters(), 1.0)
            optimizer.step()
            average.update(net)
        scheduler.step(epoch + 1)
    return weights(net), weights(average.module)


def test_train_loop_with_soft_targets(device: str) -> None:
    """Our SGD ends at the bits of torch's, our loss beside it near those of torch's."""
    ours, our_loss, native = (
        trained(kit.criterion(), kit, device) for kit in (OURS, OUR_LOSS, NATIVE)
    )
    identical(ours, our_loss)
    torch.testing.assert_close(ours, native, rtol=1e-3, atol=1e-4)


def test_patched(device: str) -> None:
    """timm's own loss, which calls torch's, and the SGD that timm makes."""
    native = trained(BinaryCrossEntropy(), None, device)
    fusedstep.reset_stats()
    with fusedstep.patched():
        ours = trained(BinaryCrossEntropy(), None, device)
    stats = fusedstep.stats()
    assert stats["binary_cross_entropy_with_logits"].fused == 6
    assert stats["SGD"].fused > 0 and stats.fell_back == 0
    torch.testing.assert_close(ours, native, rtol=1e-3, atol=1e-4)
