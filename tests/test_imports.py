"""What acts when a module has been imported."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fusedstep._imports import when_imported

pytestmark = pytest.mark.usefixtures("cpu_only")  # about no device
numbers = itertools.count()


class Imported:
    """A module of an own name on the path, and how often the action for it was called."""

    def __init__(self, folder: Path) -> None:
        self.name = f"imported_{next(numbers)}"
        self.file = folder / f"{self.name}.py"
        self.calls: list[str] = []
        self.write("value = 1")

    def write(self, text: str) -> None:
        self.file.write_text(text)
        importlib.invalidate_caches()

    def action(self) -> None:
        self.calls.append(sys.modules[self.name].value)

    def load(self) -> ModuleType:
        return importlib.import_module(self.name)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Imported]:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # modules are written anew at once
    monkeypatch.setattr(sys, "meta_path", sys.meta_path[:])
    made = Imported(tmp_path)
    yield made
    sys.modules.pop(made.name, None)


def test_acts_once_at_the_end_of_the_import(module: Imported) -> None:
    before = sys.meta_path[:]
    when_imported(module.name, module.action)
    when_imported(module.name, module.action)
    assert module.calls == [] and len(sys.meta_path) == len(before) + 1
    loaded = module.load()
    assert module.calls == [1] and sys.meta_path == before
    assert type(loaded.__loader__) is importlib.machinery.SourceFileLoader
    assert "exec_module" not in vars(loaded.__loader__)
    importlib.reload(loaded)
    assert module.calls == [1]


def test_acts_at_once_where_it_is_imported(module: Imported) -> None:
    module.load()
    when_imported(module.name, module.action)
    assert module.calls == [1]


def test_a_search_is_no_import(module: Imported) -> None:
    when_imported(module.name, module.action)
    assert importlib.util.find_spec(module.name) is not None
    assert module.calls == [] and module.name not in sys.modules
    module.load()
    assert module.calls == [1]


def test_an_import_that_fails_may_be_tried_again(module: Imported) -> None:
    when_imported(module.name, module.action)
    module.write("value = 1 / 0")
    with pytest.raises(ZeroDivisionError):
        module.load()
    assert module.calls == [] and module.name not in sys.modules
    module.write("value = 2")
    module.load()
    assert module.calls == [2]


def test_a_module_that_is_not_there(module: Imported) -> None:
    module.file.unlink()
    when_imported(module.name, module.action)
    importlib.invalidate_caches()
    assert importlib.util.find_spec(module.name) is None
    with pytest.raises(ModuleNotFoundError):
        module.load()
    when_imported("fusedstep_blocked", module.action)
    sys.modules["fusedstep_blocked"] = None  # type: ignore[assignment]
    try:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("fusedstep_blocked")
        when_imported("fusedstep_blocked", module.action)
    finally:
        del sys.modules["fusedstep_blocked"]
    assert module.calls == []


def test_no_thread_sees_the_module_before_the_action(module: Imported) -> None:
    """Also those that ask for it while it is executed."""
    module.write("import events\nevents.begun.set()\nevents.ready.wait()\nvalue = 1")
    begun, ready = threading.Event(), threading.Event()
    sys.modules["events"] = events = ModuleType("events")
    vars(events).update(begun=begun, ready=ready)
    when_imported(module.name, module.action)
    seen: list[int] = []

    def work() -> None:
        module.load()
        seen.append(len(module.calls))

    threads = [threading.Thread(target=work) for _ in range(4)]
    try:
        for thread in threads:
            thread.start()
        begun.wait()
        ready.set()
        for thread in threads:
            thread.join()
    finally:
        del sys.modules["events"]
    assert seen == [1] * 4


class Asking:
    """A finder that asks all others by itself, as other libraries' import hooks do."""

    def __init__(self, name: str) -> None:
        self.name, self.asking, self.executed = name, False, 0

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name or self.asking:
            return None
        self.asking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.asking = False
        assert spec is not None and spec.loader is not None
        spec.loader = Chained(spec.loader, self)  # type: ignore[assignment]
        return spec


class Chained:
    def __init__(self, inner: Any, finder: Asking) -> None:
        self.inner, self.finder = inner, finder

    def create_module(self, spec: Any) -> Any:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        self.finder.executed += 1


@pytest.mark.parametrize("first", [True, False], ids=["in front", "behind"])
def test_beside_other_import_hooks(first: bool, module: Imported) -> None:
    when_imported(module.name, module.action)
    other = Asking(module.name)
    sys.meta_path.insert(0 if first else 1, other)
    module.load()
    assert module.calls == [1] and other.executed == 1


def test_lazily_executed(module: Imported) -> None:
    """As importlib.util.LazyLoader does: at the first look at an attribute."""
    when_imported(module.name, module.action)
    spec = importlib.util.find_spec(module.name)
    assert spec is not None and spec.loader is not None
    spec.loader = importlib.util.LazyLoader(spec.loader)
    sys.modules[module.name] = lazy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lazy)
    assert module.calls == []
    assert lazy.value == 1
    assert module.calls == [1]
