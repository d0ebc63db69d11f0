"""The named sources of the calibration text, in words."""

from collections.abc import Mapping
from typing import Any

from ..decide.cut_plan import Measurement


def sources_text(
    measured: Measurement, calibration: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """For each source how many windows it gave, and how much of it is covered.

    Args:
        measured: What the plan says.
        calibration: What provenance says, whatever its form.
    """
    listed = calibration.get("sources")
    parts = listed if isinstance(listed, list) else []
    given = {str(one.get("name")): one for one in parts if isinstance(one, dict)}
    facts = []
    for name in {**given, **measured.coverage}:
        said = []
        if name in given:
            source, count = (given[name].get(key) for key in ("source", "samples"))
            said.append(f"{source}, {count} windows")
        if name in measured.blend:
            said.append(f"{measured.blend[name]:.1%} of the blend")
        if name in measured.coverage:
            said.append(f"coverage {measured.coverage[name]:.1%}")
        facts.append((f"Source {name}", ", ".join(said)))
    return facts
