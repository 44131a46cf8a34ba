"""Images of ten classes as (channels, 32, 32) tensors in [0, 1], split into training and test."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from cli import Refusal, require_module

Images = Subset[tuple[Tensor, ...]]

DIGITS_TEST_IMAGES = 360


def digits(channels: int) -> tuple[Images, Images]:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 with values 0 to 16; nothing is downloaded."""
    bunch = load_digits()
    images = torch.from_numpy(bunch.images / 16).float()[:, None]
    images = F.interpolate(images, size=32, mode="bilinear").repeat(1, channels, 1, 1)
    labels = torch.from_numpy(bunch.target).long()
    training, test = train_test_split(
        range(len(labels)), test_size=DIGITS_TEST_IMAGES, stratify=labels, random_state=0
    )
    everything = TensorDataset(images, labels)
    return Subset(everything, training), Subset(everything, test)


def cifar10(channels: int, root: Path) -> tuple[Images, Images]:
    """CIFAR-10 as torchvision reads it from `root`; in grey for a network of one channel."""
    remedy = "CIFAR-10 is read through torchvision; --data digits needs nothing more"
    datasets = require_module("torchvision.datasets", remedy)
    transforms = require_module("torchvision.transforms", remedy)
    steps = [transforms.ToTensor()]
    if channels == 1:
        steps.insert(0, transforms.Grayscale())
    try:
        training, test = (
            datasets.CIFAR10(root, train=half, transform=transforms.Compose(steps))
            for half in (True, False)
        )
    except RuntimeError:
        download = f"torchvision.datasets.CIFAR10({str(root)!r}, download=True)"
        raise Refusal(f"no CIFAR-10 in {root}: --data-root names it, {download} gets it") from None
    return Subset(training, range(len(training))), Subset(test, range(len(test)))
