"""Stage 1 of STUN: cluster each layer's experts and keep one of each cluster."""

from collections.abc import Mapping

import numpy as np

from ..calibrate.stats import LayerStats, Stats
from ..errors import PlanError, RecipeError
from ..recipes.schema import ExpertStage, Recipe
from .budget import Layers, global_target, most_removed, spend_global, unit_of
from .clusters import Merge, cut_at, merge_sequence
from .cut_plan import LayerPlan, LayerShape
from .groups import Together, in_groups
from .reference import reference_clusters, search_threshold
from .representative import highest_score, nearest_to_mean
from .scores import MEASURE_SCORES, expert_scores
from .similarity import MEASURE_ROUTER, Array, expert_distance, measured

Clusters = tuple[tuple[int, ...], ...]


def cluster_experts(
    stats: Stats | None,
    layers: Layers,
    recipe: Recipe,
    counts: Mapping[int, int] | None,
) -> tuple[dict[int, Clusters], float | None]:
    """The clusters of every layer that loses an expert, and the threshold.

    Args:
        stats: What was measured.
        layers: The layers that take part.
        recipe: What was asked for.
        counts: How many experts leave each layer; None for a global budget.

    Raises:
        PlanError: If the statistics do not suffice or do not fit.
        RecipeError: If the budget cannot be met.
    """
    stage = recipe.experts
    if counts is not None:
        touched = {layer: shape for layer, shape in layers.items() if counts[layer]}
        found = _distances(stats, touched, stage)
        if stage.linkage == "reference":
            return _by_reference(found, counts), None
        merges = {
            layer: _merges(distance_EE, layer, layers[layer], stage)
            for layer, distance_EE in found.items()
        }
        return _after(merges, layers, counts), None
    target = global_target(layers, stage)
    if target == 0:
        return {}, None
    most = {layer: most_removed(layer, layers[layer], stage) for layer in layers}
    distances = _distances(stats, layers, stage)
    # The published code clusters for one threshold and searches for it by bisection.
    if stage.linkage == "reference":
        reached = search_threshold(distances, most, target)
        clusters = {
            layer: reached.clusters[layer]
            for layer, shape in layers.items()
            if len(reached.clusters[layer]) < shape.num_experts
        }
        return clusters, reached.threshold
    # Complete linkage gives every layer one order of merges; a threshold is a height in
    # it.
    merges = {
        layer: _merges(distances[layer], layer, shape, stage)
        for layer, shape in layers.items()
    }
    # Equal groups lose one expert each at a time, so budgets are counted in such steps.
    unit = unit_of(layers, stage)
    rooms = {layer: count // unit for layer, count in most.items()}
    budget = spend_global(merges, rooms, target // unit)
    removed = {layer: count * unit for layer, count in budget.steps.items()}
    return _after(merges, layers, removed), budget.threshold


def merged_plan(
    layer: int, clusters: Clusters, stats: LayerStats, recipe: Recipe
) -> LayerPlan:
    """The plan of a layer in which something merged."""
    stage = recipe.experts
    reconstruct = _reconstructs(len(clusters), stage)
    frequent = reconstruct and stage.merge == "frequency"
    return LayerPlan(
        layer=layer,
        experts=sum(map(len, clusters)),
        keep=_survivors(layer, clusters, stats, stage),
        clusters=clusters,
        reconstruct=reconstruct,
        merge_weights=_shares(layer, clusters, stats) if frequent else None,
    )


def _merges(
    distance_EE: Array, layer: int, shape: LayerShape, stage: ExpertStage
) -> list[Together[Merge]]:
    """In what order experts of a layer merge, as its groups allow."""
    sequence = merge_sequence(distance_EE)
    return in_groups(sequence, lambda merge: merge.first, layer, shape, stage)


def _after(
    merges: Mapping[int, list[Together[Merge]]],
    layers: Layers,
    counts: Mapping[int, int],
) -> dict[int, Clusters]:
    return {
        layer: cut_at(
            [merge for at_once in sequence for merge in at_once.steps],
            counts[layer],
            experts=layers[layer].num_experts,
        )
        for layer, sequence in merges.items()
        if counts[layer]
    }


def _by_reference(
    distances: Mapping[int, Array], counts: Mapping[int, int]
) -> dict[int, Clusters]:
    """The published rule without a threshold: nearest pairs up to the cap."""
    clusters = {}
    for layer, distance_EE in distances.items():
        found = reference_clusters(distance_EE, np.inf, counts[layer])
        removed = len(distance_EE) - len(found)
        if removed != counts[layer]:
            raise RecipeError(
                f"layer {layer}: linkage: reference removes {removed} experts where "
                f"{counts[layer]} were asked for, as protected experts must not meet. "
                "Use experts.linkage: complete."
            )
        clusters[layer] = found
    return clusters


def _distances(
    stats: Stats | None, layers: Layers, stage: ExpertStage
) -> dict[int, Array]:
    return {
        layer: _distance(stats, layer, shape, stage) for layer, shape in layers.items()
    }


def _distance(
    stats: Stats | None, layer: int, shape: LayerShape, stage: ExpertStage
) -> Array:
    if stats is None or layer not in stats.layers:
        raise PlanError(f"layer {layer}: there are no statistics. {MEASURE_ROUTER}")
    distance_EE = expert_distance(stats.layers[layer], stage, layer=layer)
    if distance_EE.shape != (shape.num_experts, shape.num_experts):
        raise PlanError(
            f"layer {layer}: the statistics are of {len(distance_EE)} experts, but the "
            f"checkpoint has {shape.num_experts}. {MEASURE_ROUTER}"
        )
    # Protected experts are survivors, so no two of them may share a cluster.
    protected = list(stage.protected.get(layer, ()))
    distance_EE[np.ix_(protected, protected)] = np.inf
    if shape.groups is not None:
        # Infinite distance is never merged, whatever the budget.
        # A cluster has one survivor, which serves in one group.
        group_E = np.array(shape.groups)
        distance_EE[group_E[:, None] != group_E[None, :]] = np.inf
        if stage.linkage == "reference":
            raise RecipeError(
                f"layer {layer}: experts.linkage: reference does not know the groups "
                "that this model routes by. Use experts.linkage: complete."
            )
    return distance_EE


def _survivors(
    layer: int, clusters: Clusters, stats: LayerStats, stage: ExpertStage
) -> tuple[int, ...]:
    protected = stage.protected.get(layer, ())
    # A protected expert is its cluster's survivor; no two of them share one.
    candidates = [
        tuple(expert for expert in cluster if expert in protected) or cluster
        for cluster in clusters
    ]
    if stage.representative == "nearest-mean":
        weights_EE = measured(
            stats.weight_sqdist_EE, "expert distances", MEASURE_ROUTER, layer=layer
        )
        return tuple(
            nearest_to_mean(weights_EE, cluster, among)
            for cluster, among in zip(clusters, candidates, strict=True)
        )
    score_E = expert_scores(
        stats,
        stage.representative,
        layer=layer,
        experts=sum(map(len, clusters)),
        seed=stage.seed,
    )
    return tuple(highest_score(score_E, among) for among in candidates)


def _shares(
    layer: int, clusters: Clusters, stats: LayerStats
) -> tuple[tuple[float, ...], ...]:
    """Each member's part of the tokens of its cluster; equal parts if it has none."""
    routed_E = measured(stats.routed_E, "routed_E", MEASURE_SCORES, layer=layer)
    shares = []
    for cluster in clusters:
        tokens = [float(routed_E[expert]) for expert in cluster]
        total = sum(tokens)
        # No token reached the cluster: nothing tells its members apart.
        parts = [count / total for count in tokens] if total else None
        shares.append(tuple(parts or [1.0 / len(cluster)] * len(cluster)))
    return tuple(shares)


def _reconstructs(clusters: int, stage: ExpertStage) -> bool:
    """Whether a layer in which something was merged gets its clusters' means.

    Kappa counts the clusters of the layer, as the official code does (Algorithm 2).
    """
    if stage.reconstruct == "selective":
        return clusters < stage.reconstruct_below
    return stage.reconstruct == "always"
