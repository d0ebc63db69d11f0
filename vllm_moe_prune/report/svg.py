"""The drawings of the page as inline SVG, colored by the page's style sheet.

Lengths across are shares of the width, so that text keeps its size on any screen.
Everything that is not a number goes through ``Markup.format``, which escapes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from ..calibrate.stats import Array
from .raster import data_uri, opacity_png
from .read import LayerNumbers
from .tree import forks, leaf_order, outlines

TREE_PX = 120
"""Height of a merge tree."""
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
    share_YX = 0.04 + 0.96 * (1.0 - share_YX if near_is_low else share_YX)
    np.fill_diagonal(share_YX, 0.0)
    rects = Markup("").join(
        Markup('<rect class="cluster" x="{}" y="{}" width="{}" height="{}"/>').format(
            *rect
        )
        for rect in outlined
    )
    return Markup(
        '<svg class="map" viewBox="0 0 {size} {size}" role="img" aria-label="{label}">'
        '<image href="{uri}" width="{size}" height="{size}"/>{rects}</svg>'
    ).format(
        size=len(matrix_YX),
        label=label,
        uri=data_uri(opacity_png(share_YX)),
        rects=rects,
    )


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
        share = 0.0 if height is None else 0.06 + 0.94 * scale.share(height)
        return round((TREE_PX - 8) * (1.0 - share) + 7, 2)

    paths: dict[bool, list[str]] = {True: [], False: []}
    for fork in forks(layer.merges, order, layer.clusters):
        paths[fork.within].append(
            f"M{fork.left + 0.5:g} {y(fork.left_base)}V{y(fork.height)}"
            f"H{fork.right + 0.5:g}V{y(fork.right_base)}"
        )
    line = Markup("")
    if threshold is not None:
        line = Markup(
            '<line class="threshold" x1="0" x2="100%" y1="{0}" y2="{0}"/>'
        ).format(y(threshold))
    return Markup(
        '<svg class="tree" height="{height}" role="img" aria-label="{label}">'
        '<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" '
        'width="100%" height="{height}"><path class="later" d="{later}"/>'
        '<path class="within" d="{within}"/></svg>{line}</svg>'
    ).format(
        height=TREE_PX,
        width=layer.experts,
        label=f"Merge tree of layer {layer.layer}: {len(paths[True])} of "
        f"{len(layer.merges)} merges carried out.",
        later="".join(paths[False]),
        within="".join(paths[True]),
        line=line,
    )


def leaves(layer: LayerNumbers) -> Markup:
    """Below a map: which experts stay (filled) and go (open), with their numbers."""
    order = leaf_order(layer.merges, layer.experts)
    kept = set(layer.keep)
    labeled = layer.experts <= MOST_LABELS
    marks = Markup("").join(
        Markup('<circle class="{}" cx="{:.3f}%" cy="7" r="{}"/>{}').format(
            "kept" if expert in kept else "gone",
            100 * (at + 0.5) / layer.experts,
            4 if labeled else 1.8,
            Markup('<text x="{:.3f}%" y="25" class="{}">{}</text>').format(
                100 * (at + 0.5) / layer.experts,
                "id" if expert in kept else "id off",
                expert,
            )
            if labeled
            else "",
        )
        for at, expert in enumerate(order)
    )
    return Markup('<svg class="leaves" height="{}" aria-hidden="true">{}</svg>').format(
        30 if labeled else 14, marks
    )


def strip(
    layer: LayerNumbers, value_E: Array, scale: Scale, even: float, unit: str
) -> Markup:
    """One dot per expert along a line; filled stays, open goes; a tick at ``even``."""
    kept = set(layer.keep)
    # Those that go are drawn last: there are fewer, and they are what one looks for.
    experts = sorted(range(layer.experts), key=lambda expert: expert not in kept)
    dots = Markup("").join(
        Markup(
            '<circle class="{}" cx="{:.2f}%" cy="13" r="5"><title>{}</title></circle>'
        ).format(
            "kept" if expert in kept else "gone",
            _inset(scale.share(float(value_E[expert]))),
            f"expert {expert}: {value_E[expert]:.4g} {unit}, "
            f"{'kept' if expert in kept else 'removed'}",
        )
        for expert in experts
    )
    return Markup(
        '<svg class="strip" height="26" role="img" aria-label="{}">'
        '<line class="rail" x1="0" x2="100%" y1="13" y2="13"/>'
        '<line class="even" x1="{even:.2f}%" x2="{even:.2f}%" y1="2" y2="24"/>{}</svg>'
    ).format(_said(layer, value_E, unit), dots, even=_inset(scale.share(even)))


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


def three_marks(values: Sequence[float | None], scale: Scale, label: str) -> Markup:
    """Before, trimmed, slimmed on one line."""
    kinds = ("before", "trimmed", "slimmed")
    shown = [
        (kind, _inset(scale.share(value)))
        for kind, value in zip(kinds, values, strict=True)
        if value is not None
    ]
    marks = Markup("").join(
        Markup('<circle class="{}" cx="{:.2f}%" cy="13" r="{}"/>').format(
            kind, at, 6 if kind == "before" else 4.5
        )
        for kind, at in shown
    )
    return Markup(
        '<svg class="strip" height="26" role="img" aria-label="{}">'
        '<line class="rail" x1="0" x2="100%" y1="13" y2="13"/>{}</svg>'
    ).format(label, marks)


def one_mark(value: float, scale: Scale, label: str, kind: str = "kept") -> Markup:
    """A single dot on a line."""
    return Markup(
        '<svg class="strip" height="26" role="img" aria-label="{}">'
        '<line class="rail" x1="0" x2="100%" y1="13" y2="13"/>'
        '<circle class="{}" cx="{:.2f}%" cy="13" r="5"/></svg>'
    ).format(label, kind, _inset(scale.share(value)))


def _inset(share: float) -> float:
    """Percent of the width, with room for half a dot at both ends."""
    return 2.0 + 96.0 * share
