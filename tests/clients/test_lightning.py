"""Lightning's Trainer, with torchmetrics beside it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from clients.training import (
    CLASSES,
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

pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning, about workers and loggers


class Classifier(pl.LightningModule):
    def __init__(self, net: nn.Module, kit: Kit, halve: bool = False) -> None:
        super().__init__()
        self.net, self.kit, self.halve = copy.deepcopy(net), kit, halve
        self.criterion = kit.criterion(label_smoothing=0.1)
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(CLASSES)
        self.mean_loss = torchmetrics.MeanMetric()

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, t = batch
        logits = self.net(x)
        loss: Tensor = self.criterion(logits, t)
        self.accuracy.update(logits, t)
        self.mean_loss.update(loss)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.kit.sgd(self.net.parameters(), **SGD_OPTIONS)
        if not self.halve:
            return optimizer
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def loader(x: Tensor, t: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x, t), batch_size=8)


def trainer(device: str, folder: Path, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **{"max_epochs": 2, "enable_checkpointing": False, **options},
    )


@pytest.mark.parametrize("clip", [None, 0.5])
def test_as_the_loop_by_hand(clip: float | None, device: str, tmp_path: Path) -> None:
    net, x, t = task()
    model = Classifier(net, OURS)
    trainer(device, tmp_path, gradient_clip_val=clip).fit(model, loader(x, t))
    batches = [*loader(x, t)] * 2
    ended = weights(model.net)
    identical(ended, trained_by_hand(OURS, net, batches, clip))
    torch.testing.assert_close(ended, trained_by_hand(NATIVE, net, batches, clip))


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
        {"precision": "bf16-mixed"},
        {"precision": "64-true"},
        {"detect_anomaly": True, "profiler": "simple"},
    ],
    ids=str,
)
def test_options_of_the_trainer(options: dict[str, Any], device: str, tmp_path: Path) -> None:
    """Our SGD ends at the bits of torch's, our loss beside it near those of torch's."""
    net, x, t = task()
    ended, metrics = {}, {}
    for kit in (OURS, OUR_LOSS, NATIVE):
        model = Classifier(net, kit, halve=True)
        trainer(device, tmp_path, **options).fit(model, loader(x, t))
        ended[kit] = weights(model.net)
        metrics[kit] = model.accuracy.compute(), model.mean_loss.compute()
    identical(ended[OURS], ended[OUR_LOSS])
    identical(metrics[OURS], metrics[OUR_LOSS])
    # A gradient that autocast rounds to 16 bits may go to either neighbour.
    near = {"rtol": 0.02, "atol": 2e-3} if "bf16" in options.get("precision", "") else {}
    torch.testing.assert_close(ended[OURS], ended[NATIVE], **near)
    torch.testing.assert_close(metrics[OURS][1], metrics[NATIVE][1], **near)


@pytest.mark.parametrize(("first", "second"), [(OURS, NATIVE), (NATIVE, OURS)])
def test_a_checkpoint_is_continued_by_the_other(
    first: Kit, second: Kit, device: str, tmp_path: Path
) -> None:
    net, x, t = task()
    start = trainer(device, tmp_path, max_epochs=1)
    start.fit(Classifier(net, first), loader(x, t))
    start.save_checkpoint(tmp_path / "half.ckpt")
    continued = Classifier(net, second)
    trainer(device, tmp_path).fit(
        continued, loader(x, t), ckpt_path=tmp_path / "half.ckpt", weights_only=False
    )
    whole = Classifier(net, second)
    trainer(device, tmp_path).fit(whole, loader(x, t))
    torch.testing.assert_close(weights(continued.net), weights(whole.net))
