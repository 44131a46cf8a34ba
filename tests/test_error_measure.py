"""Our errors are no larger than torch's: a share of the table in docs/numerics.md, and the page."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import error_measure
from error_measure import DTYPES, OPERATIONS, Operation, Row

pytestmark = pytest.mark.usefixtures("cpu_only")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_no_error_is_larger_than_torchs(operation: Operation, dtype: torch.dtype) -> None:
    for size in operation.sizes[:2]:
        rows = list(error_measure.rows_of(operation, size, dtype, numbers=400_000))
        assert rows
        for row in rows:
            assert row.is_within_luck, row


def test_an_error_is_seen() -> None:
    """Of a result that is off by one unit in its last place, twice."""
    exact = {"x": (torch.ones(4).numpy().astype("longdouble"),) * 2}
    off = torch.tensor([1.0, 1 + 2**-23, 1 - 2**-24, 1.0])
    (errors,) = error_measure.errors({"x": off}, exact, torch.float32).values()
    assert errors.tolist() == [0, 1, 0.5, 0]
    for ours in ((0.5, 0.2, 1.0, 1.0), (0.2, 0.2, 1.5, 1.0), (0.21, 0.2, 1.0, 1.0)):
        worse = Row("op", "x", "float32", "4", *ours, count=10_000)
        assert not worse.is_not_worse and not worse.is_within_luck
    assert Row("op", "x", "float32", "4", 0.21, 0.2, 1.0, 1.0, count=100).is_within_luck


def test_the_summary_counts_rows() -> None:
    figures = ((0.2, 0.2, 1.0, 1.0), (0.3, 0.2, 1.0, 1.0), (0.1, 0.2, 1.5, 1.0))
    rows = [Row("op", "x", "float32", "4", *of, count=100) for of in figures]
    assert error_measure.summary(rows[:1]).endswith(
        "the 1 rows 1 are no larger than torch's in either figure."
    )
    text = error_measure.summary(rows)
    assert "3 rows 1 are" in text and "1.50 times torch's" in text and "most 1.50 times." in text


def test_the_table_goes_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{error_measure.BEGIN}\nold\n{error_measure.END}\nafter\n")
    error_measure.write(page, "new")
    expected = f"before\n{error_measure.BEGIN}\nnew\n{error_measure.END}\nafter\n"
    assert page.read_text() == expected
