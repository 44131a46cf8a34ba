"""``python -m fusedstep run``: an unchanged script with torch's names patched.

So are they in every Python that the script starts: the folder ``_bootstrap`` comes first in the
environment's ``PYTHONPATH``, and its ``sitecustomize`` calls :func:`join`.
"""

from __future__ import annotations

import io
import os
import pkgutil
import runpy
import sys
from importlib.machinery import SourceFileLoader
from runpy import _run_module_as_main  # type: ignore[attr-defined]  # what `python -m` calls
from types import ModuleType, TracebackType

from fusedstep import _patch, _stats

__all__ = ["join", "run"]

_BOOTSTRAP = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_bootstrap")
_STATS = "FUSEDSTEP_RUN_STATS"  # set in the environment of a run with --stats

_FRAMES_BEFORE_THE_SCRIPT = {
    __file__,
    os.path.join(os.path.dirname(__file__), "__main__.py"),
    runpy.__file__,
    "<frozen runpy>",
}


_PATH_BEGINS_WITH_SCRIPT = not getattr(sys.flags, "safe_path", False)  # python 3.11's -P


def run(target: str, arguments: list[str], *, is_module: bool, with_stats: bool) -> None:
    """Do what ``python target arguments...`` does, or ``python -m``, while torch is patched.

    Args:
        target: A script, a directory or a zip file with a ``__main__.py``; or a module's name.
        arguments: What ``sys.argv`` holds after the script.
        is_module: Whether ``target`` is a module's name.
        with_stats: Print :func:`fusedstep.stats` to stderr when the process exits. So do the
            processes that it starts, if they have something to tell.
    """
    _reach_children(with_stats)
    _patch.patch()
    if with_stats:
        _stats.print_at_exit()
        _patch.also_in_spawned(_stats.print_at_exit_of_child)
    sys.excepthook = _show_exception
    sys.argv = [target, *arguments]
    sys.modules["__main__"] = main = ModuleType("__main__")  # until the process exits
    if is_module:
        _run_module_as_main(target)
        return
    if _PATH_BEGINS_WITH_SCRIPT:
        del sys.path[0]  # the working directory, which `python -m` puts there
    if pkgutil.get_importer(target) is None:
        _run_script(target, main)
    else:
        sys.path.insert(0, os.path.abspath(target))
        _run_module_as_main("__main__", alter_argv=False)


def _reach_children(with_stats: bool) -> None:
    """Have every Python that inherits this environment :func:`join`."""
    before = os.environ.get("PYTHONPATH")
    paths = [path for path in before.split(os.pathsep) if path != _BOOTSTRAP] if before else []
    os.environ["PYTHONPATH"] = os.pathsep.join([_BOOTSTRAP, *paths])
    os.environ.pop(_STATS, None)
    if with_stats:
        os.environ[_STATS] = "1"


def join() -> None:
    """Do in this process, which a run has started, what the run does in its own."""
    _patch.patch()
    if _STATS in os.environ:
        _stats.print_at_exit_of_child()
        _patch.also_in_spawned(_stats.print_at_exit_of_child)


def _run_script(script: str, main: ModuleType) -> None:
    """Run a file as the module ``__main__``."""
    path = os.path.abspath(script)
    try:
        with io.open_code(path) as file:
            source = file.read()
    except OSError as error:
        why = f"[Errno {error.errno}] {error.strerror}"
        print(f"{sys.orig_argv[0]}: can't open file {path!r}: {why}", file=sys.stderr)
        sys.exit(2)
    if _PATH_BEGINS_WITH_SCRIPT:
        sys.path.insert(0, os.path.dirname(os.path.realpath(path)))
    main.__file__ = path
    main.__loader__ = SourceFileLoader("__main__", path)
    exec(compile(source, path, "exec", dont_inherit=True), vars(main))


def _show_exception(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Show a traceback as python does: it begins in the script."""
    traceback = _from_the_script(traceback)
    sys.__excepthook__(kind, error.with_traceback(traceback), traceback)


def _from_the_script(traceback: TracebackType | None) -> TracebackType | None:
    """The part of a traceback that begins in the script; None if nothing of it had run."""
    while traceback and traceback.tb_frame.f_code.co_filename in _FRAMES_BEFORE_THE_SCRIPT:
        traceback = traceback.tb_next
    return traceback
