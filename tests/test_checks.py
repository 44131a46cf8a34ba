"""What `--record` keeps of a run, for the pages."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import checks
from conftest import Recorder


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(checks, "CHECKS", tmp_path / "checks.json")
    return tmp_path / "checks.json"


def run(status: pytest.ExitCode, *reports: dict[str, Any]) -> None:
    arguments = SimpleNamespace(args=("tests/test_a.py", "--record", "-k", "b or c"))
    recorder = Recorder(SimpleNamespace(invocation_params=arguments))
    usual = {"nodeid": "tests/test_a.py::test_b", "when": "call", "passed": True, "duration": 1.2}
    for report in reports:
        made = SimpleNamespace(**{**usual, "user_properties": [], **report})
        recorder.pytest_runtest_logreport(made)
    recorder.pytest_sessionfinish(SimpleNamespace(), status)


def test_tests_that_passed_are_counted(kept: Path) -> None:
    run(pytest.ExitCode.OK, {}, {"passed": False}, {"when": "teardown"}, {})
    entry = json.loads(kept.read_text())["tests/test_a.py"]
    assert entry["found"] == {"": {"passed": 2, "seconds": 2}}
    assert entry["command"] == "pytest tests/test_a.py -k 'b or c'"


def test_a_test_may_say_what_it_counted(kept: Path) -> None:
    checks.record("other", "make other", {"x": {"inputs": 3}})
    counted = [("examples", 7)]
    run(pytest.ExitCode.OK, {}, {"when": "teardown", "user_properties": counted}, {})
    entries = json.loads(kept.read_text())
    assert entries["tests/test_a.py"]["found"] == {"test_b": {"examples": 7}}
    assert entries["other"]["found"] == {"x": {"inputs": 3}}


def test_what_failed_or_ran_on_nothing_is_not_recorded(kept: Path) -> None:
    run(pytest.ExitCode.TESTS_FAILED, {})
    run(pytest.ExitCode.OK, {"passed": False})
    assert not kept.exists()
    with pytest.raises(ValueError, match="ran on nothing"):
        checks.record("fuzz", "make fuzz", {})
