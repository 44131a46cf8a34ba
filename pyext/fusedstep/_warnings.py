"""Where the warnings of torch's functions say that they come from."""

import sys
import warnings
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar

__all__ = ["warning_at_the_users_line"]

_Result = TypeVar("_Result")


class _AtTheUsersLine:
    """In the place of the module ``warnings``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(warnings, name)

    @staticmethod
    def warn(message: Any, category: Any = None, stacklevel: int = 1, source: Any = None) -> None:
        frame, level = sys._getframe(1), 2
        while frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "fusedstep"):
            if frame.f_back is None:  # called from no program of Python: the line that torch names
                level = stacklevel + 1
                break
            frame, level = frame.f_back, level + 1
        warnings.warn(message, category, level, source)


def warning_at_the_users_line(torchs: Callable[..., _Result]) -> Callable[..., _Result]:
    """Return torch's function, whose warnings name the program's line, not the one that calls it.

    Torch names the caller of its function. That is a line of ours or, for a module, of torch's: the
    same one for every call, of which Python shows the first warning alone. Ours name the nearest
    line that belongs neither to torch nor to us.
    """
    if not isinstance(torchs, FunctionType):
        return torchs
    twin = FunctionType(
        torchs.__code__,
        {**torchs.__globals__, "warnings": _AtTheUsersLine()},  # as they are now: made for one call
        torchs.__name__,
        torchs.__defaults__,
        torchs.__closure__,
    )
    twin.__kwdefaults__ = torchs.__kwdefaults__
    return twin
