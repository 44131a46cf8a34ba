"""Optimizers: subclasses of torch's own whose step is one call into the compiled core."""

from fusedstep.optim.sgd import SGD

__all__ = ["SGD"]
