"""Patches the Python that starts here, as soon as it imports torch.

``python -m fusedstep run`` puts this folder in front of ``PYTHONPATH``, so that every Python that
it starts runs this file before all else. A Python that never imports torch does no more than read
it. It may be of any version from 3.7 on, and need not have fusedstep.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import SourceFileLoader

_FOLDER = os.path.dirname(__file__)


def _customize_next() -> None:
    """Run the sitecustomize that Python would have run without this one."""
    sys.path[:] = [path for path in sys.path if path != _FOLDER]
    this = sys.modules.pop("sitecustomize")
    try:
        __import__("sitecustomize")  # the user's own, or the distribution's
    except ImportError as error:
        if error.name != "sitecustomize":
            raise
        sys.modules["sitecustomize"] = this


def _import_fusedstep() -> None:
    """Import fusedstep behind torch. At the end of that import `_patch` is called.

    Where an import of fusedstep is what imports torch, nothing is left to do here.
    """
    try:
        import fusedstep  # noqa: F401
    except Exception as error:
        _say_why_not(error)


def _patch() -> None:
    try:
        from fusedstep import _run

        _run.join()
    except Exception as error:
        _say_why_not(error)


def _say_why_not(error: Exception) -> None:
    import warnings

    message = f"fusedstep does not patch torch in a process of this run ({sys.executable}): {error}"
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:  # where warnings are errors: none that should end an import of torch
        sys.stderr.write(f"{message}\n")


def _begin() -> None:
    name, file = "fusedstep._imports", os.path.join(os.path.dirname(_FOLDER), "_imports.py")
    imports = type(sys)(name)
    SourceFileLoader(name, file).exec_module(imports)
    imports.when_imported("fusedstep", _patch)
    imports.when_imported("torch", _import_fusedstep)


try:
    _customize_next()
finally:
    _begin()
