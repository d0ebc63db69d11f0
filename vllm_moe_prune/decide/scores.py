"""How much each expert of a layer matters: one function per criterion, E experts.

A score is high for an expert that should stay. All of them are sums over calibration
tokens or properties of the router, so that no criterion needs more than one forward
pass; ``random`` is the control.
"""

from collections.abc import Callable

import numpy as np

from ..calibrate.stats import LayerStats
from ..errors import PlanError
from ..recipes.schema import Criterion
from .similarity import MEASURE_ROUTER, Array, measured

MEASURE_SCORES = "Run `vllm-moe-prune measure` with this recipe and --calibration."

Measured = Callable[[str], Array]
"""Gives one statistic of the layer at hand, checked."""

FIELDS: dict[Criterion, tuple[str, ...]] = {
    "routing-score": ("tokens", "score_full_sum_E"),
    "routing-score-selected": ("tokens", "score_selected_sum_E"),
    "frequency": ("tokens", "routed_E"),
    "reap": ("routed_E", "weighted_norm_sum_E"),
    "total-output": ("weighted_norm_sum_E",),
    "man": ("routed_E", "activation_norm_sum_E"),
    "msan": ("routed_E", "activation_sqnorm_sum_E"),
    "router-norm": ("router_row_norm_E",),
    "removal-loss": ("weighted_sqnorm_sum_E",),
    "random": (),
}
"""The statistics behind each criterion."""


def expert_scores(
    stats: LayerStats | None,
    criterion: Criterion,
    *,
    layer: int,
    experts: int,
    seed: int = 0,
) -> Array:
    """The scores of one layer's experts.

    Args:
        stats: What was measured of the layer; ``random`` needs nothing.
        criterion: Which score.
        layer: Named in errors; its own stream of random numbers.
        experts: How many there are.
        seed: Of ``random``.

    Raises:
        PlanError: If a statistic is missing, not finite or of other experts.
    """
    if criterion == "random":
        return random_score(layer, experts, seed)

    def value_of(name: str) -> Array:
        advice = MEASURE_ROUTER if criterion == "router-norm" else MEASURE_SCORES
        value = getattr(stats, name) if stats is not None else None
        value = measured(value, name, advice, layer=layer)
        # Shape []: the count of tokens, which all experts share.
        if value.shape not in ((), (experts,)):
            raise PlanError(
                f"layer {layer}: {name} is of {len(value)} experts, but the checkpoint "
                f"has {experts}. {advice}"
            )
        return value

    return SCORES[criterion](value_of)


def routing_score(of: Measured) -> Array:
    """Mean full-softmax score over all tokens (Expert Drop of Mixtral and Qwen)."""
    return _over(of("score_full_sum_E"), of("tokens"))


def routing_score_selected(of: Measured) -> Array:
    """Mean score with zeros where the expert was not chosen (that of DeepSeek)."""
    return _over(of("score_selected_sum_E"), of("tokens"))


def frequency(of: Measured) -> Array:
    """Share of the tokens that chose the expert."""
    return _over(of("routed_E"), of("tokens"))


def reap(of: Measured) -> Array:
    """Mean over the expert's own tokens of weight x ||output||; 0 if it had none."""
    return _over(of("weighted_norm_sum_E"), of("routed_E"))


def total_output(of: Measured) -> Array:
    """Sum over tokens of weight x ||output||: REAP's mean times the count."""
    return of("weighted_norm_sum_E")


def man(of: Measured) -> Array:
    """Mean over the expert's own tokens of ||output||, without the router's weight."""
    return _over(of("activation_norm_sum_E"), of("routed_E"))


def msan(of: Measured) -> Array:
    """Mean over the expert's own tokens of ||output||^2, likewise."""
    return _over(of("activation_sqnorm_sum_E"), of("routed_E"))


def router_norm(of: Measured) -> Array:
    """L2 norm of the expert's router row; no data needed."""
    return of("router_row_norm_E")


def removal_loss(of: Measured) -> Array:
    """||layer output - layer output without this expert||_F over all tokens.

    The routing of the other experts is kept as it is, so the difference is the
    expert's own weighted output.
    """
    # A sum of squares by way of a Gram matrix can be a rounding error below zero.
    root_E: Array = np.sqrt(np.maximum(of("weighted_sqnorm_sum_E"), 0.0))
    return root_E


def random_score(layer: int, experts: int, seed: int) -> Array:
    """Uniform numbers that depend on the seed and the layer alone."""
    # A seed per layer: dropping one layer does not change the draw of another.
    return np.random.default_rng((seed, layer)).random(experts)


SCORES: dict[Criterion, Callable[[Measured], Array]] = {
    "routing-score": routing_score,
    "routing-score-selected": routing_score_selected,
    "frequency": frequency,
    "reap": reap,
    "total-output": total_output,
    "man": man,
    "msan": msan,
    "router-norm": router_norm,
    "removal-loss": removal_loss,
}


def _over(total_E: Array, count: Array) -> Array:
    """Total per count, 0 where nothing was counted."""
    counts = np.broadcast_to(count, total_E.shape)
    return np.divide(total_E, counts, out=np.zeros_like(total_E), where=counts > 0)
