"""The numbers of the page's drawings; ``drawings.html`` makes inline SVG of them.

Lengths across are shares of the width, so that text keeps its size on any screen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..calibrate.stats import Array
from .raster import data_uri, opacity_png
from .read import LayerNumbers
from .tree import forks, leaf_order, outlines

TREE_PX = 120
"""Height of a merge tree."""
CURVE_PX = 44
"""Height of a layer's sensitivity."""
MOST_LABELS = 16
"""Experts whose numbers fit below a map on a telephone."""


@dataclass(frozen=True)
class Scale:
    """A range of values, from ``low`` to ``high``."""

    low: float
    high: float

    def share(self, value: float) -> float:
        """Where a value lies: 0 at ``low``, 1 at ``high``."""
        span = self.high - self.low
        # All values are equal: any place on the line is as good.
        return (value - self.low) / span if span else 0.0


def scale_of(values: Sequence[float], *also: float) -> Scale:
    """The range of some numbers, at least one."""
    every = [*values, *also]
    return Scale(min(every), max(every))


def off_diagonal(matrix_EE: Array) -> Array:
    """What is not on the diagonal, flat; protected pairs (infinite) left out."""
    values: Array = matrix_EE[~np.eye(len(matrix_EE), dtype=bool)]
    finite: Array = values[np.isfinite(values)]
    return finite


def heat_map(
    matrix_YX: Array,
    scale: Scale,
    *,
    near_is_low: bool,
    outlined: Sequence[tuple[int, int, int, int]] = (),
    label: str,
) -> Markup:
    """A matrix as cells; the nearer, the stronger. Its diagonal is left empty."""
    share_YX = (matrix_YX - scale.low) / ((scale.high - scale.low) or 1.0)
    # The weakest cell still differs from the empty diagonal.
    share_YX = 0.04 + 0.96 * (1.0 - share_YX if near_is_low else share_YX)
    np.fill_diagonal(share_YX, 0.0)
    uri = data_uri(opacity_png(share_YX))
    return _draw("heat_map", len(matrix_YX), label, uri, outlined)


def cluster_map(layer: LayerNumbers, scale: Scale) -> Markup:
    """Distances between a layer's experts, in the order of its merge tree."""
    assert layer.distance_EE is not None
    order = list(leaf_order(layer.merges, layer.experts))
    clusters = [cluster for cluster in layer.clusters or () if len(cluster) > 1]
    said = "; ".join(", ".join(map(str, cluster)) for cluster in clusters)
    return heat_map(
        layer.distance_EE[np.ix_(order, order)],
        scale,
        near_is_low=True,
        outlined=outlines(order, clusters),
        label=f"Distances between the experts of layer {layer.layer}. "
        f"Clusters: {said or 'none'}.",
    )


def merge_tree(layer: LayerNumbers, scale: Scale, threshold: float | None) -> Markup:
    """The merges of a layer, those of the plan in color, and the threshold."""
    order = leaf_order(layer.merges, layer.experts)

    def y(height: float | None) -> float:
        # Leaves stand at the bottom, with 6 % below the lowest merge.
        share = 0.0 if height is None else 0.06 + 0.94 * scale.share(height)
        # SVG's y grows downwards; 7 px above and 1 px below are for the strokes.
        return round((TREE_PX - 8) * (1.0 - share) + 7, 2)

    paths: dict[bool, list[str]] = {True: [], False: []}
    for fork in forks(layer.merges, order, layer.clusters):
        paths[fork.within].append(
            # + 0.5: a leaf stands over the middle of its column in the map below.
            f"M{fork.left + 0.5:g} {y(fork.left_base)}V{y(fork.height)}"
            f"H{fork.right + 0.5:g}V{y(fork.right_base)}"
        )
    return _draw(
        "merge_tree",
        TREE_PX,
        layer.experts,
        f"Merge tree of layer {layer.layer}: {len(paths[True])} of "
        f"{len(layer.merges)} merges carried out.",
        "".join(paths[False]),
        "".join(paths[True]),
        None if threshold is None else y(threshold),
    )


def leaves(layer: LayerNumbers) -> Markup:
    """Below a map: which experts stay (filled) and go (open), with their numbers."""
    order = leaf_order(layer.merges, layer.experts)
    kept = set(layer.keep)
    marks = [
        (expert, expert in kept, 100 * (at + 0.5) / layer.experts)
        for at, expert in enumerate(order)
    ]
    return _draw("leaves", marks, layer.experts <= MOST_LABELS)


def strip(
    layer: LayerNumbers, value_E: Array, scale: Scale, even: float, unit: str
) -> Markup:
    """One dot per expert along a line; filled stays, open goes; a tick at ``even``."""
    kept = set(layer.keep)
    # Those that go are drawn last: there are fewer, and they are what one looks for.
    experts = sorted(range(layer.experts), key=lambda expert: expert not in kept)
    dots = []
    for expert in experts:
        kind, fate = ("kept", "kept") if expert in kept else ("gone", "removed")
        said = f"expert {expert}: {value_E[expert]:.4g} {unit}, {fate}"
        # Radius in px, the place across in per cent of the width.
        dots.append((kind, _inset(scale.share(float(value_E[expert]))), 5, said))
    said = _said(layer, value_E, unit)
    return _draw("strip", said, dots, _inset(scale.share(even)))


def _said(layer: LayerNumbers, value_E: Array, unit: str) -> str:
    """A strip in words."""
    kept = value_E[list(layer.keep)]
    gone = np.delete(value_E, list(layer.keep))
    parts = [
        f"{name} {found.min():.3g} to {found.max():.3g}"
        for name, found in (("kept", kept), ("removed", gone))
        if len(found)
    ]
    return f"Layer {layer.layer}, {unit}: {', '.join(parts)}."


def curve(
    points_P2: Array, across: int, height: Scale, at: int, value: float | None
) -> Markup:
    """A line through points, and a dot where something was chosen.

    Args:
        points_P2: Places and values.
        across: The last place of the drawing.
        height: The range of values.
        at: The place that was chosen.
        value: Its value; None: no dot.
    """

    def y(one: float) -> float:
        # 4 px above and below are for the dot.
        return round(4 + (CURVE_PX - 8) * (1.0 - height.share(one)), 2)

    line = " ".join(
        f"{_inset(place / max(1, across)):.3f},{y(found)}"
        for place, found in points_P2.tolist()
    )
    said = "; ".join(f"{place:g}: {found:+.4g}" for place, found in points_P2.tolist())
    dot = None if value is None else (_inset(at / max(1, across)), y(value))
    label = f"Rise of the loss by experts removed: {said}. The plan removes {at}."
    return _draw("curve", CURVE_PX, label, line, dot)


def three_marks(values: Sequence[float | None], scale: Scale, label: str) -> Markup:
    """Before, trimmed, slimmed on one line."""
    kinds = ("before", "trimmed", "slimmed")
    dots = [
        (kind, _inset(scale.share(value)), 6 if kind == "before" else 4.5, None)
        for kind, value in zip(kinds, values, strict=True)
        if value is not None
    ]
    return _draw("strip", label, dots, None)


def one_mark(value: float, scale: Scale, label: str, kind: str = "kept") -> Markup:
    """A single dot on a line."""
    return _draw("strip", label, [(kind, _inset(scale.share(value)), 5, None)], None)


@cache
def _drawings() -> Any:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    source = (resources.files(__package__) / "drawings.html").read_text("utf-8")
    return environment.from_string(source).module


def _draw(name: str, *values: object) -> Markup:
    """A drawing of the template; every text in it is escaped."""
    return Markup(getattr(_drawings(), name)(*values))


def _inset(share: float) -> float:
    """Percent of the width, with room for half a dot at both ends."""
    return 2.0 + 96.0 * share
