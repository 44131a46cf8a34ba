"""The native checks find what they are for: planted faults, and counts over their budget. The
checks themselves are `make sanitize`, `make fuzz` and `make budget`."""

from __future__ import annotations

import functools
import json
import re
import subprocess
from pathlib import Path

import pytest

from emulator.build import Ninja
from native import budget, build
from native.__main__ import read_statistics

# What is said of each planted fault.
FAULTS = {
    "read_behind": "SEGV on unknown address|use-after-poison",
    "read_in_front": "SEGV on unknown address|use-after-poison",
    "read_in_front_of_negative_strides": "SEGV on unknown address|use-after-poison",
    "read_slack_behind": "use-after-poison",
    "read_slack_in_front": "use-after-poison",
    "write_slack_behind": "use-after-poison",
    "write_slack_in_front": "use-after-poison|FAILED: written in front of a buffer",
    "write_gap": "FAILED: written between the elements of an output",
    "write_input": "FAILED: an input was written",
    "wrong_in_the_fifth_place": "FAILED: a wrong number",
    "wrong_by_two_places": "FAILED: a wrong number",
    "beyond_both_neighbours": "FAILED: a wrong number",
    "below_both_neighbours": "FAILED: a wrong number",
    "finite_for_nan": "FAILED: a wrong number",
    "finite_for_infinity": "FAILED: a wrong number",
    "nan_for_finite": "FAILED: a wrong number",
    "wrong_beside_an_overflow": "FAILED: a wrong number",
    "zero_for_small": "FAILED: a wrong number",
    "wrong_sign_of_infinity": "FAILED: a wrong number",
    "wrong_sign_behind_infinity": "FAILED: a wrong number",
}
# Without a sanitizer: accesses it cannot see, as those of masked instructions, meet the pages.
UNSEEN = {
    "read_behind": "",
    "read_in_front": "",
    "read_in_front_of_negative_strides": "",
    "write_slack_behind": "FAILED: written behind a buffer",
    "write_slack_in_front": "FAILED: written in front of a buffer",
}


@functools.cache
def program(flavour: build.Flavour) -> Path:
    """The program of planted faults, under a sanitizer."""
    folder = build.OUT / flavour.name / "faults"
    ninja = Ninja(folder, flavour.compiler)
    sources = [build.HERE / "faults.cpp", build.CSRC / "core" / "cpu_level.cpp"]
    ninja.compile(sources, [*build.COMMON, *flavour.flags])
    ninja.link(folder / "faults", [*flavour.flags, "-pthread"])
    return folder / "faults"


def run(flavour: build.Flavour, fault: str) -> subprocess.CompletedProcess[str]:
    command = [*build.at_fixed_addresses(), program(flavour), fault]
    return subprocess.run(command, capture_output=True, text=True)


def test_no_fault_is_found_where_there_is_none() -> None:
    for flavour in (build.ADDRESS, build.THREAD, build.PLAIN):
        done = run(flavour, "none")
        assert (done.returncode, done.stdout) == (0, "28\n"), done.stderr


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found(fault: str) -> None:
    done = run(build.ADDRESS, fault)
    assert done.returncode != 0 and re.search(FAULTS[fault], done.stderr), done.stderr


@pytest.mark.parametrize("fault", UNSEEN)
def test_fault_is_found_without_a_sanitizer(fault: str) -> None:
    done = run(build.PLAIN, fault)
    assert done.returncode != 0 and UNSEEN[fault] in done.stderr, done.stderr


def test_race_is_found() -> None:
    done = run(build.THREAD, "race")
    assert done.returncode != 0 and "data race" in done.stderr, done.stderr


def test_every_kernel_has_a_target() -> None:
    """A room's kernels are in one target at least, and every target is there."""
    rooms = {room for rooms in build.TARGETS.values() for room in rooms}
    assert rooms == {file.parent.name for file in build.CSRC.glob("*/cpu_select.cpp")}
    sources = {file.stem for file in build.HERE.glob("fuzz_*.cpp")}
    assert sources == {f"fuzz_{target}" for target in build.TARGETS}


def test_statistics_are_read_from_libfuzzers_log() -> None:
    log = (
        "#2\tINITED cov: 80 ft: 81 corp: 1/1b exec/s: 0\n"
        "#917\tDONE   cov: 120 ft: 300 corp: 17/900b lim: 256 exec/s: 10\n"
        "stat::number_of_executed_units: 917\nstat::peak_rss_mb: 90\n"
    )
    assert read_statistics(log) == {"inputs": 917, "edges": 120, "inputs kept": 17}


# ---- The budget ----


def test_counts_are_read_in_their_order(tmp_path: Path) -> None:
    for number, (name, instructions) in {10: ("b|4", 8), 2: ("a x|1", 3)}.items():
        text = f"desc: Trigger: Client Request: {name}\nfn=(1)\ntotals: {instructions}\n"
        (tmp_path / f"counts.{number}").write_text(text)
    (tmp_path / "counts.11").write_text("desc: Trigger: Program termination\ntotals: 5\n")
    counts = budget.read_counts(tmp_path)
    assert list(counts.items()) == [("a x", (3, 1)), ("b", (8, 4))]


def test_an_empty_folder_is_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="counted nothing"):
        budget.read_counts(tmp_path)


@pytest.mark.parametrize(
    ("before", "after", "within", "said"),
    [
        (1000, 1000, True, "a: 10.00 instructions per element\n"),
        (1000, 1030, True, "a: 10.30"),
        (1000, 1031, False, "+3.1%: OVER BUDGET, 1000 -> 1031"),
        (1000, 900, True, "-10.0%: renew"),
        (1000, None, False, "not measured any more: renew"),
        (None, 1000, False, "not in the budget: renew"),
    ],
)
def test_a_count_is_held_against_its_budget(
    before: int | None,
    after: int | None,
    within: bool,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here = {"compiler": "g++ 12"}
    recorded = {"facts": here, "counts": {} if before is None else {"a": [before, 100]}}
    counts = {} if after is None else {"a": (after, 100)}
    assert budget.report("kernels", recorded, here, counts) is within
    assert said in capsys.readouterr().out


def test_counts_of_another_compiler_are_not_compared(capsys: pytest.CaptureFixture[str]) -> None:
    recorded = {"facts": {"compiler": "g++ 12"}, "counts": {"a": [1, 1]}}
    assert budget.report("kernels", recorded, {"compiler": "g++ 13"}, {"a": (2, 1)})
    assert "NOT COMPARED: recorded with compiler g++ 12, this is g++ 13" in capsys.readouterr().out


def test_the_recorded_budget_is_whole() -> None:
    recorded = json.loads(budget.BUDGET.read_text())
    assert set(recorded) == {"kernels", "calls"}
    for part in recorded.values():
        assert all(part["facts"].values())
        assert all(count > 0 and divisor > 0 for count, divisor in part["counts"].values())
