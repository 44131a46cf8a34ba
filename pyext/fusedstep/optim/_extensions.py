"""What fusedstep's own optimizers add to torch's, as the kernels see it."""

from torch.optim import Optimizer

from fusedstep import _C

__all__ = ["ATTRIBUTE", "OF_TORCH", "extend", "extensions_of"]

ATTRIBUTE = "_fusedstep_extensions"
OF_TORCH = _C.Extensions()


def extend(optimizer: Optimizer, extensions: _C.Extensions) -> None:
    """Give an optimizer of fusedstep's what torch's does not have."""
    vars(optimizer)[ATTRIBUTE] = extensions


def extensions_of(optimizer: Optimizer) -> _C.Extensions:
    """What :func:`extend` gave; none for an optimizer of torch's, which may be patched."""
    extensions: _C.Extensions = vars(optimizer).get(ATTRIBUTE, OF_TORCH)
    return extensions
