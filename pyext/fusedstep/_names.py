"""Functions of ours under the names of torch's that they replace."""

import inspect
from types import FunctionType
from typing import Any

__all__ = ["under_torchs_name"]


def under_torchs_name(ours: FunctionType, torchs: Any, owner: type | None = None) -> FunctionType:
    """Return a copy of our function that says of itself what torch's does, but for its docstring.

    Its name, module, signature and annotations are those of ``torchs``; a method is named as one of
    ``owner``, also where torch's is inherited. So a pickle that refers to it can be loaded where
    fusedstep is not installed, and gets torch's.
    """
    twin = FunctionType(
        ours.__code__, ours.__globals__, torchs.__name__, ours.__defaults__, ours.__closure__
    )
    twin.__dict__.update(ours.__dict__)
    twin.__kwdefaults__ = ours.__kwdefaults__
    twin.__annotations__ = dict(torchs.__annotations__)
    twin.__doc__ = ours.__doc__
    twin.__module__ = (owner or torchs).__module__
    if owner is None:
        twin.__qualname__ = torchs.__qualname__
    else:
        twin.__qualname__ = f"{owner.__qualname__}.{torchs.__name__}"
    if "__wrapped__" in vars(ours):  # whose signature would be taken
        vars(twin)["__signature__"] = inspect.signature(torchs)
    return twin
