"""What decided: sensitivity and the split of the budget, refit gain, coverage.

Plain values for the templates; what was not measured is None.
"""

from typing import Any

import numpy as np

from ..calibrate.stats import Array
from . import svg
from .read import LayerNumbers, Numbers
from .record import LayerRefit


def sensitivity(numbers: Numbers) -> dict[str, Any] | None:
    """Each layer's measured curve, and what of it the plan takes."""
    rows = [
        (layer, rises_P2)
        for layer in numbers.moe_layers
        if (rises_P2 := rise(layer)) is not None
    ]
    if not rows:
        return None
    # One scale for all layers: the split compares them.
    height = svg.scale_of([float(y) for _, found in rows for y in found[:, 1]], 0.0)
    return {
        "scale": height,
        "rows": [
            {
                "layer": layer.layer,
                "drawing": svg.curve(rises_P2, layer.experts, height, *chosen(layer)),
                "removed": removed_of(layer),
                "experts": layer.experts,
                "loss": chosen(layer)[1],
            }
            for layer, rises_P2 in rows
        ],
    }


def removed_of(layer: LayerNumbers) -> int:
    """How many experts the plan takes from a layer."""
    return layer.experts - len(layer.keep)


def rise(layer: LayerNumbers) -> Array | None:
    """Points (experts removed from this layer alone, rise of the loss in nats)."""
    points_P2 = layer.sensitivity_P2
    if points_P2 is None:
        return None
    found: Array = points_P2 - np.array([0.0, points_P2[0, 1]])
    return found


def chosen(layer: LayerNumbers) -> tuple[int, float | None]:
    """What the plan takes from a layer, and its rise; None beyond the last point."""
    points_P2, removed = rise(layer), removed_of(layer)
    if points_P2 is None or removed > points_P2[-1, 0]:
        return removed, None
    return removed, float(np.interp(removed, points_P2[:, 0], points_P2[:, 1]))


def coverage(numbers: Numbers) -> dict[str, Any] | None:
    """What of each source's routing the experts that stay had."""
    sources = list(
        dict.fromkeys(name for one in numbers.layers for name in one.coverage)
    )
    if not sources:
        return None
    rows = [layer for layer in numbers.moe_layers if layer.coverage]
    return {
        "sources": sources,
        "rows": [
            (layer.layer, [layer.coverage.get(name) for name in sources])
            for layer in rows
        ],
        "least": [
            min(layer.coverage[name] for layer in rows if name in layer.coverage)
            for name in sources
        ],
    }


def refits(numbers: Numbers) -> dict[str, Any] | None:
    """What refitting gained on the windows of each source that were kept apart."""
    rows = [layer.refit for layer in numbers.layers if layer.refit]
    if not rows:
        return None
    errors = [
        error
        for refit in rows
        for source in refit.sources
        for error in (source.before, source.after)
    ]
    scale = svg.scale_of(errors or [0.0], 0.0)
    return {"scale": scale, "rows": [_refit_row(refit, scale) for refit in rows]}


def _refit_row(refit: LayerRefit, scale: svg.Scale) -> dict[str, Any]:
    return {
        "layer": refit.layer,
        "ridge": refit.ridge,
        "sources": [
            {
                "source": one.source,
                "before": one.before,
                "after": one.after,
                "drawing": svg.three_marks(
                    (one.before, None, one.after),
                    scale,
                    f"Layer {refit.layer}, {one.source}: {one.before:.4g} before, "
                    f"{one.after:.4g} after",
                ),
            }
            for one in refit.sources
        ],
    }
