"""Super-experts: those whose down projections make the massive activations.

"Unveiling Super Experts in Mixture-of-Experts LLMs" (arXiv 2507.23279): a few experts,
whose output has single components larger than nearly all others of the model. Without
them attention sinks vanish and outputs become repetitive and uninformative. E experts.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ..calibrate.stats import Stats
from ..recipes.schema import Recipe
from .cut_plan import LayerShape
from .layer_drop import fixed_actions
from .required_stats import removes_experts
from .scores import MEASURE_SCORES
from .similarity import Array, measured

QUANTILE = 0.995
OF_MAXIMUM = 0.1
EARLY = 0.75
"""Share of the MoE layers, from the first, in which they are looked for."""

FoundExperts = dict[int, tuple[int, ...]]


def super_experts(maxima: Mapping[int, Array]) -> FoundExperts:
    """The super-experts of a model, by layer.

    Above both the 99.5th percentile over all experts and a tenth of the maximum. Only
    in the first three quarters of the layers, as in REAP's code, where massive
    activations are made; the paper looks for those layers themselves.

    Args:
        maxima: ``activation_max_E`` of every MoE layer.
    """
    layers = sorted(maxima)
    everything = np.concatenate([maxima[layer] for layer in layers])
    least = max(np.quantile(everything, QUANTILE), everything.max() * OF_MAXIMUM)
    found: FoundExperts = {}
    for layer in layers[: int(EARLY * len(layers))]:
        above = np.flatnonzero(maxima[layer] > least)
        if len(above):
            found[layer] = tuple(int(expert) for expert in above)
    return found


def found_in(
    stats: Stats | None, layers: Sequence[LayerShape], recipe: Recipe
) -> FoundExperts:
    """The super-experts that a recipe protects; none where it protects none.

    Raises:
        PlanError: They were not measured.
    """
    if recipe.experts.protect == "none" or not removes_experts(recipe):
        return {}
    known = {} if stats is None else stats.layers
    maxima = {}
    for layer, shape in enumerate(layers):
        if not shape.has_moe or shape.mtp:
            continue
        here = known.get(layer)
        value = None if here is None else here.activation_max_E
        maxima[layer] = measured(value, "activation_max_E", MEASURE_SCORES, layer=layer)
    return super_experts(maxima) if maxima else {}


def protecting(
    recipe: Recipe, stats: Stats | None, layers: Sequence[LayerShape]
) -> Recipe:
    """The recipe with its super-experts among ``experts.protected``.

    Layers that the recipe itself lists as dropped keep nobody.
    """
    found = found_in(stats, layers, recipe)
    if not found:
        return recipe
    actions = fixed_actions(layers, recipe.layers)
    protected = dict(recipe.experts.protected)
    for layer, experts in found.items():
        if actions[layer] == "keep":
            both = {*protected.get(layer, ()), *experts}
            protected[layer] = tuple(sorted(both))
    stage = recipe.experts.model_copy(update={"protected": protected})
    return recipe.model_copy(update={"experts": stage})
