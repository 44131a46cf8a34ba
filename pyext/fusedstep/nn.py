"""Loss modules: subclasses of torch's own, and one that torch does not have.

All of them call :mod:`fusedstep.functional`.
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.modules.loss import _WeightedLoss

from fusedstep import functional as F

__all__ = [
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "FocalLoss",
    "HuberLoss",
    "L1Loss",
    "MSELoss",
    "SmoothL1Loss",
]


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """Drop-in for :class:`torch.nn.CrossEntropyLoss`.

    Computed by :func:`fusedstep.functional.cross_entropy`, which says what is covered.
    Constructor, buffers, ``state_dict`` and ``repr`` are torch's.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits ``input`` against ``target``."""
        return F.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class FocalLoss(_WeightedLoss):
    """Focal loss of logits and class indices, by :func:`fusedstep.functional.focal_loss`.

    Torch has no such module; this one follows its conventions: ``weight`` is a buffer, the other
    arguments are attributes.

    Args:
        weight: One factor per class, of shape ``(C)``.
        gamma: The exponent of ``1 - p``, finite and not negative.
        ignore_index: A class index whose rows add nothing.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
    """

    __constants__: ClassVar[list[str]] = ["ignore_index", "gamma", "reduction"]

    def __init__(
        self,
        weight: Tensor | None = None,
        gamma: float = 2.0,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, reduction=reduction)
        self.gamma = gamma
        self.ignore_index = ignore_index

    def extra_repr(self) -> str:
        """Return gamma, and every other argument that is not the default."""
        shown = [f"gamma={self.gamma}"]
        if self.ignore_index != -100:
            shown.append(f"ignore_index={self.ignore_index}")
        if self.reduction != "mean":
            shown.append(f"reduction={self.reduction!r}")
        return ", ".join(shown)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits ``input`` against class indices ``target``."""
        return F.focal_loss(
            input,
            target,
            self.gamma,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )


class L1Loss(torch.nn.L1Loss):
    """Drop-in for :class:`torch.nn.L1Loss`, computed by :func:`fusedstep.functional.l1_loss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of ``input`` against ``target``."""
        return F.l1_loss(input, target, reduction=self.reduction)


class MSELoss(torch.nn.MSELoss):
    """Drop-in for :class:`torch.nn.MSELoss`, computed by :func:`fusedstep.functional.mse_loss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of ``input`` against ``target``."""
        return F.mse_loss(input, target, reduction=self.reduction)


class SmoothL1Loss(torch.nn.SmoothL1Loss):
    """Drop-in for :class:`torch.nn.SmoothL1Loss`.

    Computed by :func:`fusedstep.functional.smooth_l1_loss`.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of ``input`` against ``target``."""
        return F.smooth_l1_loss(input, target, reduction=self.reduction, beta=self.beta)


class HuberLoss(torch.nn.HuberLoss):
    """Drop-in for :class:`torch.nn.HuberLoss`, by :func:`fusedstep.functional.huber_loss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of ``input`` against ``target``."""
        return F.huber_loss(input, target, reduction=self.reduction, delta=self.delta)


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    """Drop-in for :class:`torch.nn.BCEWithLogitsLoss`.

    Computed by :func:`fusedstep.functional.binary_cross_entropy_with_logits`. Constructor, buffers,
    ``state_dict`` and ``repr`` are torch's.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits ``input`` against ``target``."""
        return F.binary_cross_entropy_with_logits(
            input, target, self.weight, pos_weight=self.pos_weight, reduction=self.reduction
        )
