"""Acts when a module has been imported.

The standard library alone is needed: ``_bootstrap`` runs this file in Pythons that have no torch.
"""

from __future__ import annotations

import sys
from _thread import get_ident  # `threading` need not be imported for it

TYPE_CHECKING = False  # what `typing` calls so, without the time that its import takes
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

__all__ = ["when_imported"]


class _Finder:
    """Finds a module as the finders behind it do, and has its loader call ``action`` in the end.

    It leaves ``sys.meta_path`` once the module has been executed. A search without an import, and
    an import that fails, leave it there.
    """

    def __init__(self, name: str, action: Callable[[], object]) -> None:
        self.name, self.action = name, action
        self.searching: set[int] = set()  # threads

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name:
            return None
        thread = get_ident()
        if thread in self.searching:  # a finder behind, which asks all finders by itself
            return self._search(path, target)
        self.searching.add(thread)
        try:
            spec = self._search(path, target)
        finally:
            self.searching.discard(thread)
        if spec is not None:
            self._extend(spec.loader)
        return spec

    def _search(self, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        finders = sys.meta_path
        # Those in front have been asked, or one of them is asking.
        behind = finders[finders.index(self) + 1 :] if self in finders else finders
        for finder in behind:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(self.name, path, target) if find else None
            if spec is not None:
                return spec
        return None

    def _extend(self, loader: object) -> None:
        """Let this loader, which was made for this search, act once it has executed the module."""
        execute = getattr(loader, "exec_module", None)
        if execute is None or isinstance(loader, type):
            return

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if module.__name__ == self.name:
                vars(loader).pop("exec_module", None)
                # A new list: another thread may be walking along the old one.
                sys.meta_path = [finder for finder in sys.meta_path if finder is not self]
                self.action()

        if hasattr(loader, "__dict__"):  # else nobody can act
            vars(loader)["exec_module"] = exec_module


def when_imported(name: str, action: Callable[[], object]) -> None:
    """Call ``action`` as soon as a module has been imported; at once where it has been already.

    Args:
        name: The module's full name.
        action: Called by the thread that imports, before its ``import`` ends. What it raises is an
            error of that import. Given again for the same name before that, it is called once.
    """
    if sys.modules.get(name) is not None:
        __import__(name)  # waits for a thread that is importing it
        action()
        return
    for finder in sys.meta_path:
        if isinstance(finder, _Finder) and (finder.name, finder.action) == (name, action):
            return
    sys.meta_path.insert(0, _Finder(name, action))
