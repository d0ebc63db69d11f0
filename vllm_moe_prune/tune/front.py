"""The front of size against perplexity, as points and as a picture."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..calibrate.perplexity import perplexity_of
from ..errors import OutputError, require_extra
from ..report.figures import save_figure
from .judged import Judged, Tuned

FORMATS = (".png", ".svg")


def front(judged: Iterable[Judged]) -> list[Judged]:
    """Those that no other one beats in both size and loss, smallest first."""
    found: list[Judged] = []
    # By size: what follows is on the front only if it loses less than the last one.
    for one in sorted(judged, key=lambda one: (one.file_bytes, one.loss.mean)):
        if not found or one.loss.mean < found[-1].loss.mean:
            found.append(one)
    return found


def check_plot(path: Path) -> None:
    """Refuse a picture that could not be drawn, before the search.

    Raises:
        OutputError: The format is unknown.
        MissingExtra: matplotlib is missing.
    """
    if path.suffix.lower() not in FORMATS:
        raise OutputError(f"{path}: pictures are {' or '.join(FORMATS)} files.")
    require_extra("plot", ("matplotlib",), "pictures")


def plot_front(tuned: Sequence[Tuned], path: Path) -> None:
    """Draw all finalists of a search; the front over its sizes as a line."""
    # Not pyplot, which keeps figures in global state.
    from matplotlib.figure import Figure

    # Losses on fewer windows, or estimated ones, do not compare.
    finite = [
        one
        for found in tuned
        for one in found.judged
        if one.final and math.isfinite(one.loss.mean)
    ]
    intact = tuned[0].intact
    line = front([*finite, intact])
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    mib = 1 << 20
    axes.plot(
        [one.file_bytes / mib for one in line],
        [perplexity_of(one.loss.mean) for one in line],
        color="#3b6ea5",
        linewidth=1.5,
        label="front",
    )
    axes.scatter(
        [one.file_bytes / mib for one in finite],
        [perplexity_of(one.loss.mean) for one in finite],
        color="#9aa7b4",
        label="finalists",
    )
    marked = [(intact, "#222222", "intact")]
    marked += [(one.best, "#c2410c", f"{one.size}: {one.best.name}") for one in tuned]
    for one, color, label in marked:
        point = (one.file_bytes / mib, perplexity_of(one.loss.mean))
        axes.scatter(*point, color=color, zorder=3)
        axes.annotate(label, point, (6, 6), textcoords="offset points", color=color)
    axes.set_xlabel("size of the files (MiB)")
    axes.set_ylabel("held-out perplexity")
    axes.set_yscale("log")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend()
    save_figure(figure, path, dpi=150)
