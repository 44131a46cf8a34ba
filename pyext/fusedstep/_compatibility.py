"""Loads the compiled core, or says in one sentence why it does not fit this torch."""

from __future__ import annotations

import importlib
import sys

import torch


def _release(version: str) -> tuple[str, ...]:
    """``"2.13.0+cpu"`` to ``("2", "13")``: torch keeps its C++ interface within a minor release."""
    return tuple(version.split("+")[0].split(".")[:2])


def check_torch() -> None:
    """Import ``fusedstep._C``.

    Raises:
        ImportError: fusedstep is not built, or was built for another torch or Python. The message
            says which, and has the command that builds it.
    """
    mend = "pip install --no-build-isolation --force-reinstall --no-deps <path to fusedstep>"
    try:
        build_info = importlib.import_module("fusedstep._build_info")
    except ImportError as error:
        raise ImportError(f"fusedstep is not built. Build it with: {mend}") from error
    built_for: str = build_info.torch_version
    mismatch = (
        f"fusedstep was built for torch {built_for}, but torch {torch.__version__} is installed. "
        f"Rebuild it with: {mend}"
    )
    if _release(built_for) != _release(torch.__version__):
        raise ImportError(mismatch)
    try:
        importlib.import_module("fusedstep._C")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "fusedstep._C":
            python = ".".join(map(str, sys.version_info[:2]))
            not_built = f"fusedstep is not built for Python {python}. Build it with: {mend}"
            raise ImportError(not_built) from error
        # Of another torch, or of a build of the same torch without CUDA or with another one.
        if any(sign in str(error) for sign in ("undefined symbol", "cannot open shared object")):
            raise ImportError(mismatch) from error
        raise
