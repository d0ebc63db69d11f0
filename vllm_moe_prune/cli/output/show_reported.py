"""What ``report`` prints."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .draw import facts, print_json, table

if TYPE_CHECKING:
    from ...report.read import Kurtosis, Numbers


def show_report(
    numbers: "Numbers", page: Path, pictures: Sequence[Path], as_json: bool
) -> None:
    """What a report shows, in short, and where it is."""
    from ...report.as_data import as_data

    if as_json:
        files = {"html": str(page), "png": [str(path) for path in pictures]}
        print_json(as_data(numbers) | files)
        return
    table(
        f"{numbers.name}: {numbers.plan.recipe.name}",
        ("layer", "experts", "kept", "removed", "zeroed", "kurtosis"),
        [
            (
                layer.layer,
                layer.experts,
                len(layer.keep) if layer.action == "keep" else layer.action,
                f"{layer.removed:.1%}",
                f"{layer.zeroed:.1%}",
                _change(layer.kurtosis),
            )
            for layer in numbers.layers
        ],
    )
    facts(
        f"Wrote {page}",
        [
            ("pictures", len(pictures)),
            ("kurtosis of expert weights", _change(numbers.kurtosis)),
            *(("not measured", name) for name in numbers.missing),
        ],
    )


def _change(kurtosis: "Kurtosis") -> str:
    return " -> ".join(
        "?" if value is None else f"{value:.3f}"
        for value in (kurtosis.before, kurtosis.trimmed, kurtosis.slimmed)
    )
