"""Loss modules: subclasses of torch's own, computed by :mod:`fusedstep.functional`."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedstep import functional as F

__all__ = ["CrossEntropyLoss"]


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
