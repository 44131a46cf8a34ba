"""What a run of the tests covered, to compare before and after sources or tests are moved.

    pytest --inventory before.json
    python tests/inventory.py before.json after.json

The comparison lists the test functions of which fewer cases passed and the kernels that ran less
often, and fails where there are any. ``--renamed OLD=NEW`` (a test function or a part of its name,
or of a kernel's) says what an old name became.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest


class Inventory:
    """Writes, by test function, how many of its cases passed, and by kernel its launches."""

    def __init__(self, file: Path, launches: Counter[str]) -> None:
        self.file = file
        self.launches = launches
        self.passed: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.passed[report.nodeid.partition("[")[0]] += 1

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        kept = {"passed": self.passed, "launches": self.launches}
        self.file.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


def fewer(before: dict[str, int], after: dict[str, int], renamed: dict[str, str]) -> list[str]:
    """A line for each name that counts less after than before."""
    expected: Counter[str] = Counter()
    for name, count in before.items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        expected[name] += count
    return [
        f"{name}: {count} before, {after.get(name, 0)} after"
        for name, count in sorted(expected.items())
        if after.get(name, 0) < count
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--renamed", action="append", default=[], metavar="OLD=NEW")
    given = parser.parse_args()
    renamed = dict(pair.split("=", 1) for pair in given.renamed)
    before, after = (json.loads(file.read_text()) for file in (given.before, given.after))
    lines: list[Any] = []
    for kind in ("passed", "launches"):
        totals = [sum(run[kind].values()) for run in (before, after)]
        print(f"{kind}: {totals[0]} before, {totals[1]} after")
        lines += fewer(before[kind], after[kind], renamed)
    print(*lines, sep="\n")
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
