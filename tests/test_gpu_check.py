"""The parts of `make gpu-check` that need no GPU, with stand-ins for those that do."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing.connection import Listener
from pathlib import Path

import pytest

from gpu import check
from gpu.check import Outcome, Part
from test_layering import ROOT

CHECK = [sys.executable, str(ROOT / "tests" / "gpu" / "check.py")]


def says(name: str, code: str, seconds: float = 60) -> Part:
    return Part(name, [sys.executable, "-c", code], seconds)


def to_its_end(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """There is time for everything, however busy the machine is."""
    process.wait()
    return True


def run(part: Part, out: Path) -> Outcome:
    return check.run(part, out, to_its_end)


def time_that_is_over_at(event: Path, ends_when_told: bool) -> check.Wait:
    """The time of a part is over when it has made a file. Then it gets the time that it needs to
    end, unless it does not listen."""
    is_over = False

    def in_time(process: subprocess.Popen[bytes], seconds: float) -> bool:
        nonlocal is_over
        if is_over:
            assert seconds == check.TO_END
            return ends_when_told and to_its_end(process, seconds)
        is_over = True
        while not event.exists():
            assert process.poll() is None, "it has ended before it made the file"
            time.sleep(0.01)
        return False

    return in_time


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([*CHECK, str(tmp_path)], env=hidden, capture_output=True, text=True)
    assert result.returncode == 2
    assert "needs a CUDA GPU" in result.stdout
    assert len(result.stdout.splitlines()) == 1
    assert not result.stderr


def test_a_part_that_ends_is_told_by_its_status_and_its_log(tmp_path: Path) -> None:
    good = run(says("good", "print('3 passed in 0.10s')"), tmp_path)
    assert (good.passed, good.note) == (True, "3 passed in 0.10s")
    bad = run(says("bad", "import sys; print('first'); sys.exit('it broke')"), tmp_path)
    assert (bad.passed, bad.note) == (False, "exit status 1: it broke")
    assert (tmp_path / "bad.log").read_text() == "first\nit broke\n"


def test_a_part_that_is_not_there_fails(tmp_path: Path) -> None:
    outcome = run(Part("absent", [str(tmp_path / "no-such-program")], 60), tmp_path)
    assert not outcome.passed
    assert "no-such-program" in outcome.note


def test_time_is_measured(tmp_path: Path) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        assert not check.ends_within(process, 0.0)
        process.communicate()
        assert check.ends_within(process, 0.0)


def test_a_part_that_runs_too_long_ends_with_all_it_started(tmp_path: Path) -> None:
    """Also if it does not listen."""
    begun = tmp_path / "begun"
    with Listener() as listener:
        child = (
            "from multiprocessing.connection import Client; from pathlib import Path; "
            f"parent = Client({listener.address!r}); Path({str(begun)!r}).touch(); "
            "parent.send(parent.recv())"
        )
        code = (
            "import signal, subprocess, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
            f"print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
        )
        part = says("slow", code, seconds=0.7)
        outcome = check.run(part, tmp_path, time_that_is_over_at(begun, ends_when_told=False))
        assert not outcome.passed
        assert outcome.note == "stopped after 1 s: begun"
        with listener.accept() as connection:
            with suppress(OSError):
                connection.send("are you there?")
            with pytest.raises((EOFError, OSError)):  # there is nobody
                connection.recv()


SLOW_TESTS = """
import pathlib, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process may ignore it
def test_first():
    assert 1 == 2
def test_second():
    pathlib.Path(BEGUN).touch()
    while True:
        time.sleep(1)
"""


def test_tests_that_run_too_long_say_what_has_failed(tmp_path: Path) -> None:
    file, begun = tmp_path / "test_slow.py", tmp_path / "begun"
    file.write_text(SLOW_TESTS.replace("BEGUN", repr(str(begun))))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir"]
    part = Part("tests", [*command, str(tmp_path), "-c", os.devnull, str(file)], 5)
    outcome = check.run(part, tmp_path, time_that_is_over_at(begun, ends_when_told=True))
    assert not outcome.passed
    assert outcome.note.startswith("stopped after 5 s: 1 failed in ")
    assert "assert 1 == 2" in (tmp_path / "tests.log").read_text()


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("collected\n=== 1 failed, 9 passed in 3.21s ===\n", "1 failed, 9 passed in 3.21s"),
        ("9 passed, 2 skipped in 61.00s (0:01:01)\n", "9 passed, 2 skipped in 61.00s (0:01:01)"),
        ("========= ERROR SUMMARY: 0 errors\n", "ERROR SUMMARY: 0 errors"),
        (
            "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n",
            "RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)",
        ),
        (
            "========= Error: Device not supported. Details\n========= ERROR SUMMARY: 1 error\n",
            "========= Error: Device not supported. Details",
        ),
        ("one\ntwo\n\n", "two"),
        ("", "no output"),
    ],
)
def test_the_telling_line_of_a_log(log: str, line: str) -> None:
    assert check.telling_line(log) == line


def test_a_refused_sanitizer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = tmp_path / "compute-sanitizer"
    stub.write_text('#!/bin/sh\necho "========= Error: Device not supported"\nexit 1\n')
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    part = check.sanitizer("memcheck", 60)
    assert part.command[0] == str(stub)
    outcome = run(part, tmp_path)
    assert outcome.note == "exit status 1: ========= Error: Device not supported"


def test_initcheck_watches_every_kernel() -> None:
    assert "--kernel-name" in check.sanitizer("racecheck", 60).command
    assert "--kernel-name" not in check.sanitizer("initcheck", 60).command


def test_what_is_left_out_of_the_tests_exists() -> None:
    assert all((ROOT / "tests" / name).exists() for name in check.WITHOUT_CARD)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that need no GPU, of which the tests and one sanitizer fail."""
    monkeypatch.setattr(check, "build", lambda cards: says("build", f"print({list(cards)!r})"))
    failing = "raise SystemExit('1 failed in 1s')"
    monkeypatch.setattr(check, "tests", lambda seconds: says("tests", failing, seconds))
    monkeypatch.setattr(
        check,
        "sanitizer",
        lambda tool, seconds: says(tool, f"raise SystemExit({tool == 'initcheck'})", seconds),
    )
    monkeypatch.setattr(
        check, "benchmarks", lambda out, seconds: says("benchmarks", "print('the table')", seconds)
    )


@pytest.mark.usefixtures("stand_ins")
def test_a_failing_part_stops_no_other_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check.check(tmp_path, ["8.0", "9.0"], to_its_end) == 1
    parts = ["build", "tests", "benchmarks", *check.SANITIZERS]
    logs = {path.stem for path in tmp_path.glob("*.log")}
    assert logs == {"build", "tests", "benchmarks", "sanitizers"}
    assert (tmp_path / "sanitizers.log").read_text().split() == list(check.SANITIZERS)
    summary = (tmp_path / "summary.txt").read_text()
    printed = capsys.readouterr().out
    assert printed.endswith(summary)
    assert "the table" in printed
    *rows, last = summary.splitlines()
    assert [row.split()[0] for row in rows] == parts
    assert [row.split()[0] for row in rows if "FAILED" in row] == ["tests", "initcheck"]
    assert "['8.0', '9.0']" in rows[0]
    assert last == f"failed: tests, initcheck; logs are in {tmp_path}"


@pytest.mark.usefixtures("stand_ins")
def test_all_parts_passing_is_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "tests", lambda seconds: says("tests", "", seconds))
    monkeypatch.setattr(check, "sanitizer", lambda tool, seconds: says(tool, "", seconds))
    assert check.check(tmp_path, ["9.0"], to_its_end) == 0
    assert "everything passed" in (tmp_path / "summary.txt").read_text()


@pytest.mark.usefixtures("stand_ins")
def test_nothing_runs_on_a_build_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "build", lambda cards: says("build", "raise SystemExit('no nvcc')"))
    assert check.check(tmp_path, ["9.0"], to_its_end) == 1
    assert [path.name for path in tmp_path.glob("*.log")] == ["build.log"]
    assert "exit status 1: no nvcc" in (tmp_path / "summary.txt").read_text()


def test_the_parts_fit_into_nine_minutes() -> None:
    parts = (check.BUILD, check.BENCHMARKS_AT_LEAST, check.SANITIZERS_AT_LEAST)
    tests = check.WHOLE - check.TO_END - sum(seconds + check.TO_END for seconds in parts)
    assert tests >= 120
    assert check.WHOLE < 540
