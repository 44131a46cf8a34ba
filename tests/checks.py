"""checks.json: what the long checks found when they were last run with --record.

Pages quote it (`make readme`). An entry is a check's command, the day it was run, and counts of
whatever it counts, by what it was run on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import date
from pathlib import Path

CHECKS = Path(__file__).resolve().parent / "checks.json"


def record(check: str, command: str, found: Mapping[str, Mapping[str, int]]) -> None:
    """Replaces the check's entry; a check that found nothing at all has none.

    Raises:
        ValueError: `found` is empty.
    """
    if not found:
        raise ValueError(f"{check} ran on nothing: not recorded")
    entries = json.loads(CHECKS.read_text()) if CHECKS.exists() else {}
    entries[check] = {"command": command, "date": date.today().isoformat(), "found": found}
    CHECKS.write_text(json.dumps(dict(sorted(entries.items())), indent=1) + "\n")
