"""Size against perplexity on the demo Mixtral, from committed results.

    bench/plot_quality.py docs/images/size-perplexity

Reads bench/results/quality-mixtral.json and trim_and_slim.json and writes OUT-light.svg
and OUT-dark.svg. Zeros count as ``--storage bitmask`` stores them; perplexity is
divided by that of the dense model in the same file.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent / "results"
EXPERT_WEIGHTS = 4 * 16 * 3 * 128 * 128  # layers, experts, matrices, columns, rows
MASK_BYTES = 1 / 8 + 8 / 128  # of each stored weight: its bit, and its row's offset
BASES = ("25% of the experts", "50% of the experts")
TOTALS = ("40% in total", "50% in total", "65% in total")
THEMES = {
    "light": {"ink": "#1f2328", "grid": "#d0d7de", "back": "#ffffff"},
    "dark": {"ink": "#e6edf3", "grid": "#3d444d", "back": "#0d1117"},
}


@dataclass(frozen=True)
class Series:
    """A method at several sizes; ``rows`` are (group, name) of the results."""

    label: str
    rows: list[tuple[str, str]]
    color: str
    marker: str
    published: bool = False


SERIES = (
    Series("tune", [(group, "tune") for group in TOTALS], "#2f81f7", "o"),
    Series(
        "REAP, budget: sensitivity",
        [(group, "reap, sensitivity") for group in BASES],
        *("#3fb950", "s"),
    ),
    Series("SparseGPT", [(group, "sparsegpt") for group in TOTALS], "#8957e5", "^"),
    Series(
        "AWQ; AWQ and Layer Drop (turbo)",
        [("trim", "AWQ"), ("trim", "Layer Drop 1 of 4 + AWQ (T+S)")],
        *("#d29922", "D"),
    ),
    Series(
        "REAP, equal layers",
        [(group, "reap, per-layer") for group in BASES],
        *("#3fb950", "s", True),
    ),
    Series(
        "Expert Drop, equal layers (paper)",
        [(group, "Expert Drop, per-layer") for group in BASES],
        *("#768390", "v", True),
    ),
    Series(
        "STUN and Wanda (paper)",
        [
            *[(group, "STUN 20%, wanda") for group in TOTALS[:2]],
            (TOTALS[2], "STUN 25%, wanda"),
        ],
        *("#f85149", "X", True),
    ),
)


def main() -> None:
    """Write both pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    points = read_points()
    # Text stays text, and the same results give the same file.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "moe-prune"})
    for name, theme in THEMES.items():
        figure = draw(points, **theme)
        path = options.out.with_name(f"{options.out.name}-{name}.svg")
        figure.savefig(path, metadata={"Date": None}, facecolor=theme["back"])
        print(path)


def read_points() -> dict[tuple[str, str], tuple[float, float]]:
    """(group, name) -> (size in % of the dense files, perplexity over the dense)."""
    quality = json.loads((RESULTS / "quality-mixtral.json").read_text("utf-8"))["rows"]
    dense = quality[0]
    found = {
        (row["group"], row["name"]): (
            100 * stored_bytes(row, dense) / dense["bytes"],
            row["mean"]["all"] / dense["mean"]["all"],
        )
        for row in quality
    }
    trimmed = json.loads((RESULTS / "trim_and_slim.json").read_text("utf-8"))
    base = trimmed[0]
    return found | {
        ("trim", row["name"]): (
            100 * row["weight_bytes"] / base["weight_bytes"],
            row["perplexity"] / base["perplexity"],
        )
        for row in trimmed
    }


def stored_bytes(row: dict[str, Any], dense: dict[str, Any]) -> float:
    """Size of the files, without the zeros where that is smaller."""
    rest = dense["bytes"] - 2 * EXPERT_WEIGHTS
    kept = (row["bytes"] - rest) / 2
    nonzero = (1 - row["sparsity"]) * EXPERT_WEIGHTS
    return float(min(row["bytes"], rest + 2 * nonzero + MASK_BYTES * kept))


def draw(
    points: dict[tuple[str, str], tuple[float, float]], ink: str, grid: str, back: str
) -> Figure:
    """One picture in the colors of a theme."""
    figure = Figure(figsize=(7.6, 4.2), layout="constrained")
    axes = figure.add_subplot(facecolor=back)
    for series in SERIES:
        xs, ys = zip(*(points[row] for row in series.rows), strict=True)
        axes.plot(
            *(xs, ys),
            color=series.color,
            marker=series.marker,
            linestyle="--" if series.published else "-",
            linewidth=1.5,
            label=series.label,
        )
    axes.plot(100, 1, color=ink, marker="o", linestyle="none", label="dense")
    axes.set_yscale("log")
    ticks = (1, 1.2, 1.5, 2, 3)
    axes.set_yticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set_xlabel("size of the files, % of the dense model", color=ink)
    axes.set_ylabel("held-out perplexity over the dense model's", color=ink)
    axes.tick_params(colors=ink, which="both")
    axes.grid(visible=True, color=grid, linewidth=0.6)
    for spine in axes.spines.values():
        spine.set_color(grid)
    legend = axes.legend(fontsize="small", facecolor=back, edgecolor=grid)
    for text in legend.get_texts():
        text.set_color(ink)
    return figure


if __name__ == "__main__":
    main()
