"""The part of a PyTorch training step that lies around the network, fused: loss and SGD update.

The losses and ``SGD`` are drop-ins for torch's classes of the same names; ``FocalLoss`` is one that
torch does not have. :func:`patch` makes torch's own names use them; :func:`stats` says what ran.
"""

from fusedstep._compatibility import check_torch as _check_torch

__version__ = "0.1.0"

_check_torch()

from fusedstep import fakes as _fakes  # noqa: E402, F401
from fusedstep import functional, nn, optim  # noqa: E402
from fusedstep._patch import patch, patched, unpatch  # noqa: E402
from fusedstep._stats import Calls, Stats, reset_stats, stats  # noqa: E402
from fusedstep.nn import (  # noqa: E402
    BCEWithLogitsLoss,
    CrossEntropyLoss,
    FocalLoss,
    HuberLoss,
    L1Loss,
    MSELoss,
    SmoothL1Loss,
)
from fusedstep.optim import *  # noqa: E402, F403

__all__ = [
    "BCEWithLogitsLoss",
    "Calls",
    "CrossEntropyLoss",
    "FocalLoss",
    "HuberLoss",
    "L1Loss",
    "MSELoss",
    "SmoothL1Loss",
    "Stats",
    "functional",
    "nn",
    "optim",
    "patch",
    "patched",
    "reset_stats",
    "stats",
    "unpatch",
]
__all__ += optim.__all__
