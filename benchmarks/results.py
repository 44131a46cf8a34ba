"""The results of a run of benchmarks, and the JSON file that keeps them.

environment      where it ran, by which command and when; report.environment() has its keys
implementations  of each that was compared, the package's version or why it is absent
rows             suite.Row, with every sample
failures         for each case that failed, why
left_out         the cases that there was no time for
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cli import Refusal
from launches import Launches
from suite import Point, Row

DIGITS = 5  # of a sample: timers and noise have fewer
OFTEN_EMPTY = (
    *("missing", "peak_bytes", "allocations", "page_faults", "shares", "losses", "launched"),
)


@dataclass(frozen=True)
class Results:
    environment: Mapping[str, Any]
    implementations: Mapping[str, str]
    rows: list[Row] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def compared(self) -> list[Row]:
        """Those in which fusedstep is compared with others, a plot's with them."""
        return [row for row in self.rows if row.others]

    def of(self, operation: str) -> list[Row]:
        """The rows of an operation, but for a plot's."""
        return [row for row in self.rows if row.operation == operation and row.point is None]

    def save(self, path: Path, **more: object) -> None:
        """One line for each row, so that a change is a change of lines."""
        parts = {
            "environment": self.environment,
            "implementations": self.implementations,
            "failures": self.failures,
            "left_out": self.left_out,
            **more,
        }
        lines = [f"{json.dumps(name)}: {json.dumps(part)}" for name, part in parts.items()]
        rows = ",\n".join(json.dumps(_brief(asdict(row))) for row in self.rows)
        path.write_text("{\n" + ",\n".join([*lines, f'"rows": [\n{rows}\n]']) + "\n}\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        try:
            document = json.loads(path.read_text())
            rows = [_row(row) for row in document["rows"]]
            return cls(
                document["environment"],
                document["implementations"],
                rows,
                document["failures"],
                document["left_out"],
            )
        except OSError as error:
            raise Refusal(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise Refusal(f"{path} holds no results of run.py: {error!r}") from None


def _row(fields: dict[str, Any]) -> Row:
    if fields.get("point"):
        fields["point"] = Point(**fields["point"])
    launched = fields.get("launched", {})
    fields["launched"] = {part: Launches(**counts) for part, counts in launched.items()}
    return Row(**fields)


def _brief(fields: dict[str, Any]) -> dict[str, Any]:
    """Without what is empty, samples rounded."""
    for kind in ("samples", "losses"):
        fields[kind] = {
            name: [float(f"{value:.{DIGITS}g}") for value in values]
            for name, values in fields[kind].items()
        }
    return {
        name: value
        for name, value in fields.items()
        if value is not None and not (name in OFTEN_EMPTY and not value)
    }
