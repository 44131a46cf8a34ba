"""The list of operators, ``operators.txt``: folders of csrc and the files of tests of each."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def listed(root: Path = ROOT) -> dict[str, list[str]]:
    """By folder of csrc its files of tests, the one that must launch kernels first.

    Raises:
        ValueError: A line names no tests, or the list is empty.
    """
    lines = (root / "tests" / "operators.txt").read_text().splitlines()
    rows = [line.split() for line in lines if line.strip() and not line.startswith("#")]
    if not rows or not all(len(row) > 1 for row in rows):
        raise ValueError("tests/operators.txt: each line is a folder of csrc and its tests")
    return {folder: tests for folder, *tests in rows}
