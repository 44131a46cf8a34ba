"""What has changed between two runs, row by row, and whether the change exceeds the noise.

Compared are ratios: fusedstep's time over that of torch's default, both from the same run. So the
speed of the machine, which differs from run to run, cancels. The interval is a bootstrap: the
rounds of both runs are drawn again and again, with replacement, and 95 % of the resulting changes
lie within it. It does not include what differs between runs but not between rounds, such as where
memory happens to lie.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

import report
import tables
from page import Section
from report import Table
from results import Results
from suite import OURS, Row
from timing import Measurement

RESAMPLES = 2000
INTERVAL = (0.025, 0.975)
SLOWER, FASTER, NOISE = VERDICTS = ("slower", "faster", "within the noise")


@dataclass(frozen=True)
class Change:
    row: Row
    seconds: tuple[float, float]
    """fusedstep's, before and now."""
    ratio: float
    """Now over before, of fusedstep's time over that of torch's default."""
    low: float
    high: float

    @property
    def verdict(self) -> str:
        if self.high < 1:
            return FASTER
        return SLOWER if self.low > 1 else NOISE


def change(new: Row, old: Row) -> Change:
    random = np.random.default_rng(0)

    def medians(row: Row) -> tuple[float, np.ndarray[tuple[int], np.dtype[np.float64]]]:
        ratios = np.array(Measurement(row.samples).ratios(OURS, row.native))
        drawn = random.choice(ratios, (RESAMPLES, len(ratios)))
        return float(np.median(ratios)), np.median(drawn, axis=1)

    (now, nows), (before, befores) = medians(new), medians(old)
    low, high = np.quantile(nows / befores, INTERVAL).tolist()
    seconds = (old.time(OURS).median, new.time(OURS).median)
    return Change(new, seconds, now / before, low, high)


def changes(new: Results, old: Results) -> list[Change]:
    """Of the rows that both have, those that got slower first, the most slowed before others."""
    before = {row.key: row for row in old.compared}
    found = [change(row, before[row.key]) for row in new.compared if row.key in before]
    return sorted(found, key=lambda change: (VERDICTS.index(change.verdict), -change.ratio))


COLUMNS: Mapping[str, Callable[[Change], str]] = {
    "case": lambda change: f"{tables.title_of(change.row)}: {tables.name_of(change.row)}",
    "before": lambda change: report.seconds(change.seconds[0]),
    "now": lambda change: report.seconds(change.seconds[1]),
    "fusedstep / torch's default, now / before": lambda change: (
        f"{change.ratio:.3f} ({change.low:.3f} – {change.high:.3f})"
    ),
    "verdict": lambda change: change.verdict,
}


def section(new: Results, old: Results) -> Section:
    found = changes(new, old)
    counts: Sequence[str] = [
        f"{sum(change.verdict == verdict for change in found)} {verdict}" for verdict in VERDICTS
    ]
    text = (
        f"Of {len(found)} rows that both runs have: {', '.join(counts)}. Compared is fusedstep's "
        "time over that of torch's default in the same run, with the 95 % interval of a bootstrap "
        f"over the rounds. Before: {old.environment['date']}; now: {new.environment['date']}."
    )
    return Section("Changes", [text], tables=[Table.of("Changes", COLUMNS, found)])
