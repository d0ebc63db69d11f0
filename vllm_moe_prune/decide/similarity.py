"""How differently two experts of a layer behave: STUN's similarity, Eq. 7.

The paper's similarity b_ij = -lambda1 ||W_i - W_j|| + lambda2 a_ij is used with the
opposite sign, as a distance: small means alike. Or how far apart their outputs are on
the same tokens. E experts.
"""

import numpy as np
from numpy.typing import NDArray

from ..calibrate.stats import LayerStats
from ..errors import PlanError
from ..recipes.schema import ExpertStage

Array = NDArray[np.float64]

MEASURE_ROUTER = "Run `vllm-moe-prune measure` on this checkpoint."
MEASURE_OUTPUTS = (
    "Run `vllm-moe-prune measure` with this recipe and --calibration, or set "
    "experts.cluster_by: behavior."
)
MEASURE_COACTIVATION = (
    "Run `vllm-moe-prune measure` with --calibration, or set "
    "experts.coactivation_weight: 0."
)


def expert_distance(stats: LayerStats, stage: ExpertStage, *, layer: int) -> Array:
    """Distance between the experts of one layer, symmetric with a zero diagonal.

    Args:
        stats: What was measured of the layer.
        stage: Lambda 1, lambda 2 and whether to divide by the router's norm.
        layer: Named in errors.

    Raises:
        PlanError: If a statistic with a weight is missing, or not finite.
    """
    if stage.cluster_by == "outputs":
        return _output_distance(stats, layer)
    terms_EE = []
    if stage.router_weight:
        terms_EE.append(stage.router_weight * _router_term(stats, stage, layer))
    if stage.coactivation_weight:
        terms_EE.append(stage.coactivation_weight * _coactivation_term(stats, layer))
    # Eq. 7 with the sign of a distance; one triangle, mirrored, so that ties stay ties.
    distance_EE: Array = np.triu(sum(terms_EE, np.float64(0.0)), 1)
    return distance_EE + distance_EE.T


def _router_term(stats: LayerStats, stage: ExpertStage, layer: int) -> Array:
    sqdist_EE = measured(
        stats.router_sqdist_EE, "router distances", MEASURE_ROUTER, layer=layer
    )
    # Distances by way of a Gram matrix can come out a rounding error below zero.
    term_EE: Array = np.sqrt(np.maximum(sqdist_EE, 0.0))
    if not stage.divide_by_router_norm:
        return term_EE
    norm = float(
        measured(stats.router_norm, "router norm", MEASURE_ROUTER, layer=layer)
    )
    # A router of zeros tells no two experts apart, whatever it is divided by.
    return term_EE / norm if norm else term_EE


def _coactivation_term(stats: LayerStats, layer: int) -> Array:
    counts_EE = measured(
        stats.coactivation_EE,
        "co-activation counts",
        MEASURE_COACTIVATION,
        layer=layer,
    )
    # Over all E * E entries, the zero diagonal included, as in the official code.
    mean = float(np.abs(counts_EE).mean())
    # Eq. 7 takes experts that are chosen together for alike, so distances fall.
    return -counts_EE / mean if mean else np.zeros_like(counts_EE)


def _output_distance(stats: LayerStats, layer: int) -> Array:
    """RMS distance of outputs over their RMS norm, so that layers can be compared."""
    sqdist_EE = measured(
        stats.output_sqdist_EE, "output distances", MEASURE_OUTPUTS, layer=layer
    )
    sqnorm_E = measured(
        stats.output_sqnorm_E, "output norms", MEASURE_OUTPUTS, layer=layer
    )
    # Outputs grow with depth; divided by their size, one threshold serves all layers.
    mean = float(sqnorm_E.mean())
    distance_EE: Array = np.sqrt(np.maximum(np.triu(sqdist_EE, 1), 0.0))
    if mean:
        distance_EE /= np.sqrt(mean)
    return distance_EE + distance_EE.T


def measured(value: Array | None, name: str, advice: str, *, layer: int) -> Array:
    """The statistic, if it was measured and is finite.

    Raises:
        PlanError: Naming the layer and what to do.
    """
    if value is None:
        raise PlanError(f"layer {layer}: the statistics lack its {name}. {advice}")
    if not np.isfinite(value).all():
        raise PlanError(
            f"layer {layer}: its {name} contain NaN or infinity. Check the "
            "checkpoint's weights, then run `vllm-moe-prune measure` again."
        )
    return value
