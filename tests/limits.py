"""Counts that may fall but not rise, kept in ``tests/golden``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).with_name("golden")
Counts = Mapping[str, Mapping[str, Any]]


def above_limits(counts: Counts, file: str, *, update: bool) -> dict[str, Any]:
    """What exceeds its limit in any count: what was found, and the limits.

    Args:
        counts: Of each thing, by name.
        file: In ``tests/golden``; has the limits of the same things.
        update: Accept what was found as the limits: ``--update-golden``.
    """
    golden = GOLDEN / file
    if update:
        golden.write_text(json.dumps(counts, indent=1) + "\n", "utf-8")
    limits = json.loads(golden.read_text("utf-8"))
    assert counts.keys() == limits.keys()
    return {
        name: (counted, limits[name])
        for name, counted in counts.items()
        if any(counted[what] > limits[name][what] for what in counted)
    }
