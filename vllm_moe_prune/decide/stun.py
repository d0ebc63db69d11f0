"""Stage 1 of STUN: cluster each layer's experts and keep one of each cluster."""

from collections.abc import Mapping, Sequence

from ..calibrate.stats import LayerStats, Stats
from ..errors import PlanError
from ..recipe import ExpertStage, Recipe
from .budget import (
    Budget,
    global_target,
    layer_targets,
    most_removed,
    spend_global,
)
from .clusters import Merge, cut_at, merge_sequence
from .layers import Action, layer_actions
from .plan import LayerPlan, LayerShape
from .representative import nearest_to_mean
from .similarity import MEASURE_ROUTER, Array, expert_distance, measured

Clusters = tuple[tuple[int, ...], ...]


def decide_experts(
    stats: Stats | None, layers: Sequence[LayerShape], recipe: Recipe
) -> tuple[list[LayerPlan], float | None]:
    """Decide what happens to every layer and expert; sparsity is left at 0.

    ``experts.drop`` is a share of the experts in the layers that stay: the experts of
    dropped layers are gone anyway and spend none of the budget.

    Args:
        stats: Needed only where an expert is to be removed.
        layers: The checkpoint's decoder layers.
        recipe: What was asked for.

    Returns:
        One plan per layer, and the merge height reached by a global budget.

    Raises:
        RecipeError: If what was asked for cannot be done.
        PlanError: If the statistics do not suffice or do not fit.
    """
    actions = layer_actions(layers, recipe.layers)
    moe = {
        layer: shape
        for layer, shape in enumerate(layers)
        if shape.has_moe and actions[layer] == "keep"
    }
    layer_stats = {} if stats is None else stats.layers
    budget, sequences = _spend(layer_stats, moe, recipe.experts)
    plans = [
        _layer_plan(layer, shape, actions[layer]) for layer, shape in enumerate(layers)
    ]
    for layer, merged in budget.merges.items():
        if merged:
            clusters = cut_at(sequences[layer], merged)
            plans[layer] = _merged_plan(
                layer, clusters, layer_stats[layer], recipe.experts
            )
    return plans, budget.threshold


def _spend(
    stats: Mapping[int, LayerStats], moe: Mapping[int, LayerShape], stage: ExpertStage
) -> tuple[Budget, dict[int, list[Merge]]]:
    """The budget, and the merge sequence of every layer that it may touch."""
    merges = dict.fromkeys(moe, 0)
    if stage.method == "none":
        return Budget(merges), {}
    if stage.budget == "per-layer":
        merges = layer_targets(moe, stage)
        touched = {layer: moe[layer] for layer in moe if merges[layer]}
        return Budget(merges), _sequences(stats, touched, stage)
    target = global_target(moe, stage)
    if target == 0:
        return Budget(merges), {}
    sequences = _sequences(stats, moe, stage)
    most = {layer: most_removed(shape, stage) for layer, shape in moe.items()}
    return spend_global(sequences, most, target), sequences


def _sequences(
    stats: Mapping[int, LayerStats],
    layers: Mapping[int, LayerShape],
    stage: ExpertStage,
) -> dict[int, list[Merge]]:
    return {
        layer: merge_sequence(_distance(stats, layer, shape, stage))
        for layer, shape in layers.items()
    }


def _distance(
    stats: Mapping[int, LayerStats], layer: int, shape: LayerShape, stage: ExpertStage
) -> Array:
    if layer not in stats:
        raise PlanError(f"layer {layer}: there are no statistics. {MEASURE_ROUTER}")
    distance_EE = expert_distance(stats[layer], stage, layer=layer)
    if distance_EE.shape != (shape.num_experts, shape.num_experts):
        raise PlanError(
            f"layer {layer}: the statistics are of {len(distance_EE)} experts, but the "
            f"checkpoint has {shape.num_experts}. {MEASURE_ROUTER}"
        )
    return distance_EE


def _layer_plan(layer: int, shape: LayerShape, action: Action) -> LayerPlan:
    """The plan of a layer none of whose experts is removed singly."""
    experts = shape.num_experts if shape.has_moe else 0
    if action != "keep" or not experts:
        return LayerPlan(layer=layer, action=action, experts=experts, keep=())
    everyone = tuple(range(experts))
    clusters = tuple((expert,) for expert in everyone)
    return LayerPlan(layer=layer, experts=experts, keep=everyone, clusters=clusters)


def _merged_plan(
    layer: int, clusters: Clusters, stats: LayerStats, stage: ExpertStage
) -> LayerPlan:
    weights_EE = measured(
        stats.weight_sqdist_EE, "expert distances", MEASURE_ROUTER, layer=layer
    )
    return LayerPlan(
        layer=layer,
        experts=sum(map(len, clusters)),
        keep=tuple(nearest_to_mean(weights_EE, cluster) for cluster in clusters),
        clusters=clusters,
        reconstruct=_reconstructs(len(clusters), stage),
    )


def _reconstructs(clusters: int, stage: ExpertStage) -> bool:
    """Whether a layer in which something was merged gets its clusters' means.

    Kappa counts the clusters of the layer, as the official code does (Algorithm 2).
    """
    if stage.reconstruct == "selective":
        return clusters < stage.reconstruct_below
    return stage.reconstruct == "always"
