"""Stage 1: which experts leave each layer, by whichever method was asked for."""

from collections.abc import Mapping, Sequence

from ..calibrate.stats import LayerStats, Stats
from ..errors import PlanError, RecipeError
from ..recipes.schema import ExpertStage, Recipe
from .budget import (
    Layers,
    global_target,
    layer_targets,
    most_removed,
    spend_global,
    unit_of,
)
from .cut_plan import Action, LayerPlan, LayerShape
from .expert_drop import Removal, best_set, removal_sequence
from .groups import Together, in_groups, together
from .layer_drop import chooses_layers, decide_layers, fixed_actions
from .scores import MEASURE_SCORES, expert_scores
from .sensitivity import loss_curves, split_by_loss
from .similarity import Array, measured
from .stun import cluster_experts, merged_plan

Removed = tuple[int, ...]


def decide_experts(
    stats: Stats | None, layers: Sequence[LayerShape], recipe: Recipe
) -> tuple[list[LayerPlan], float | None]:
    """Decide what happens to every layer and expert; sparsity is left at 0.

    ``experts.drop`` is a share of the experts in the layers that stay: the experts of
    dropped layers are gone anyway and spend none of the budget.

    Args:
        stats: Needed only where a decision is not fixed by the recipe alone.
        layers: The checkpoint's decoder layers.
        recipe: What was asked for.

    Returns:
        One plan per layer, and the height (of a merge, or a score) reached by a global
        budget.

    Raises:
        RecipeError: If what was asked for cannot be done.
        PlanError: If the statistics do not suffice or do not fit.
    """
    actions = decide_layers(stats, layers, recipe)
    _check_protected(layers, actions, recipe.experts)
    counts = _counts(stats, _staying(layers, actions), recipe)
    plans, threshold = _with_removals(stats, layers, recipe, actions, counts)
    if any(plan.experts for plan in plans) and not any(plan.keep for plan in plans):
        raise RecipeError(
            "no layer would be left with experts. Remove less: keep at least one layer "
            "with experts."
        )
    return plans, threshold


def check_experts(layers: Sequence[LayerShape], recipe: Recipe) -> None:
    """Refuse what no statistics could make possible, before they are measured.

    Args:
        layers: The checkpoint's decoder layers.
        recipe: What was asked for.

    Raises:
        RecipeError: If what was asked for cannot be done.
    """
    actions = fixed_actions(layers, recipe.layers)
    _check_protected(layers, actions, recipe.experts)
    # With layers yet to be chosen nobody knows whose experts are left.
    if not chooses_layers(recipe.layers):
        _check_budget(_staying(layers, actions), recipe.experts)


def remove_counts(
    stats: Stats | None,
    layers: Sequence[LayerShape],
    recipe: Recipe,
    counts: Mapping[int, int],
) -> list[LayerPlan]:
    """The same with the number of experts that leave each layer given.

    What the sensitivity of a layer is measured with: ``counts = {layer: removed}``.

    Args:
        stats: What was measured.
        layers: The checkpoint's decoder layers.
        recipe: Says which experts leave first; its budget is not looked at.
        counts: Layers that are not in it lose nothing.
    """
    actions = decide_layers(stats, layers, recipe)
    _check_protected(layers, actions, recipe.experts)
    every = dict.fromkeys(_staying(layers, actions), 0) | dict(counts)
    return _with_removals(stats, layers, recipe, actions, every)[0]


def _staying(layers: Sequence[LayerShape], actions: Sequence[Action]) -> Layers:
    return {
        layer: shape
        for layer, shape in enumerate(layers)
        if shape.has_moe and actions[layer] == "keep"
    }


def _with_removals(
    stats: Stats | None,
    layers: Sequence[LayerShape],
    recipe: Recipe,
    actions: Sequence[Action],
    counts: Mapping[int, int] | None,
) -> tuple[list[LayerPlan], float | None]:
    moe = _staying(layers, actions)
    plans = [
        _untouched(layer, shape, actions[layer]) for layer, shape in enumerate(layers)
    ]
    known = {} if stats is None else stats.layers
    threshold = None
    if recipe.experts.method == "stun":
        clusters, threshold = cluster_experts(stats, moe, recipe, counts)
        for layer, found in clusters.items():
            plans[layer] = merged_plan(layer, found, known[layer], recipe)
    elif recipe.experts.method == "score":
        removed, threshold = _removed(known, moe, recipe.experts, counts)
        for layer, gone in removed.items():
            plans[layer] = _dropped_plan(layer, moe[layer], gone, recipe)
    return plans, threshold


def _counts(stats: Stats | None, moe: Layers, recipe: Recipe) -> dict[int, int] | None:
    """How many experts leave each layer; None if one threshold decides."""
    stage = recipe.experts
    _check_budget(moe, stage)
    if stage.budget == "global" or stage.method == "none":
        return None
    if stage.budget == "per-layer":
        return layer_targets(moe, stage)
    target = global_target(moe, stage)
    if target == 0:
        return dict.fromkeys(moe, 0)
    most = {layer: most_removed(layer, shape, stage) for layer, shape in moe.items()}
    return split_by_loss(loss_curves(stats, recipe, most), target)


def _check_budget(moe: Layers, stage: ExpertStage) -> None:
    """Refuse a number of experts that the layers cannot lose, or a wrong way to."""
    if stage.method == "none":
        return
    if stage.budget == "per-layer":
        layer_targets(moe, stage)
        return
    if global_target(moe, stage) == 0 or stage.budget == "global":
        return
    if further := [layer for layer, shape in moe.items() if shape.mtp]:
        raise RecipeError(
            "experts.budget: sensitivity asks what a layer adds to the loss, but layer "
            f"{further[0]} (MTP) adds nothing to it. Set layers.mtp: drop."
        )
    if unit_of(moe, stage) > 1:
        raise RecipeError(
            "experts.budget: sensitivity takes experts one at a time. As this model "
            "routes by groups, set experts.groups: uneven."
        )


def _removed(
    known: Mapping[int, LayerStats],
    moe: Layers,
    stage: ExpertStage,
    counts: Mapping[int, int] | None,
) -> tuple[dict[int, Removed], float | None]:
    """The experts that leave by score, of every layer that loses any."""
    if counts is not None:
        touched = {layer: count for layer, count in counts.items() if count}
        return {
            layer: _lowest(known.get(layer), layer, moe[layer], count, stage)
            for layer, count in touched.items()
        }, None
    target = global_target(moe, stage)
    # Where nothing leaves no score is asked for: it may not be measured.
    if target == 0:
        return {}, None
    unit = unit_of(moe, stage)
    sequences = {
        layer: _sequence(known.get(layer), layer, shape, stage)
        for layer, shape in moe.items()
    }
    # Room in steps: one expert, or one of every group.
    most = {
        layer: most_removed(layer, shape, stage) // unit for layer, shape in moe.items()
    }
    budget = spend_global(sequences, most, target // unit)
    # With reverse heights are negated scores; a threshold is told as a score.
    height = budget.threshold
    return {
        layer: _experts(sequences[layer][:count])
        for layer, count in budget.steps.items()
        if count
    }, -height if stage.reverse and height is not None else height


def _lowest(
    stats: LayerStats | None,
    layer: int,
    shape: LayerShape,
    count: int,
    stage: ExpertStage,
) -> Removed:
    protected = stage.protected.get(layer, ())
    if stage.search == "exhaustive":
        if shape.groups is not None:
            raise RecipeError(
                f"layer {layer}: experts.search: exhaustive does not know the groups "
                "that this model routes by. Use experts.search: greedy."
            )
        gram_EE = measured(
            None if stats is None else stats.contribution_gram_EE,
            "contribution_gram_EE",
            MEASURE_SCORES,
            layer=layer,
        )
        if gram_EE.shape != (shape.num_experts, shape.num_experts):
            raise PlanError(
                f"layer {layer}: contribution_gram_EE is of {len(gram_EE)} experts, "
                f"but the checkpoint has {shape.num_experts}. {MEASURE_SCORES}"
            )
        return best_set(gram_EE, count, protected, layer=layer)
    sequence = _sequence(stats, layer, shape, stage)
    return _experts(sequence[: count // together(shape, stage)])


def _sequence(
    stats: LayerStats | None, layer: int, shape: LayerShape, stage: ExpertStage
) -> list[Together[Removal]]:
    """In what order experts leave a layer, as its groups allow."""
    steps = removal_sequence(
        _scores(stats, layer, shape, stage),
        stage.protected.get(layer, ()),
        reverse=stage.reverse,
    )
    return in_groups(steps, lambda step: step.expert, layer, shape, stage)


def _experts(sequence: Sequence[Together[Removal]]) -> Removed:
    return tuple(sorted(step.expert for at_once in sequence for step in at_once.steps))


def _scores(
    stats: LayerStats | None, layer: int, shape: LayerShape, stage: ExpertStage
) -> Array:
    return expert_scores(
        stats,
        stage.criterion,
        layer=layer,
        experts=shape.num_experts,
        seed=stage.seed,
    )


def _untouched(layer: int, shape: LayerShape, action: Action) -> LayerPlan:
    """The plan of a layer none of whose experts is removed singly."""
    experts = shape.num_experts if shape.has_moe else 0
    if action != "keep" or not experts:
        return LayerPlan(layer=layer, action=action, experts=experts, keep=())
    everyone = tuple(range(experts))
    # Each its own cluster: routing: redirect needs clusters in every layer.
    clusters = tuple((expert,) for expert in everyone)
    return LayerPlan(layer=layer, experts=experts, keep=everyone, clusters=clusters)


def _dropped_plan(
    layer: int, shape: LayerShape, removed: Removed, recipe: Recipe
) -> LayerPlan:
    keep = tuple(sorted(set(range(shape.num_experts)) - set(removed)))
    if not keep:
        return _untouched(layer, shape, "drop-moe-keep-norm")
    if recipe.routing == "drop":
        return LayerPlan(layer=layer, experts=shape.num_experts, keep=keep)
    return LayerPlan(
        layer=layer,
        experts=shape.num_experts,
        keep=keep,
        clusters=tuple((expert,) for expert in keep),
        # preserve, mean: rows of removed experts stay, and lead to none that is kept.
        unserved=removed,
    )


def _check_protected(
    layers: Sequence[LayerShape], actions: Sequence[Action], stage: ExpertStage
) -> None:
    for layer, experts in stage.protected.items():
        at = f"experts.protected: layer {layer}"
        if layer >= len(layers) or not layers[layer].has_moe:
            raise RecipeError(f"{at} has no experts in this model.")
        count = layers[layer].num_experts
        unknown = sorted(expert for expert in experts if expert >= count)
        if unknown:
            raise RecipeError(f"{at} has no experts {unknown}, only 0 to {count - 1}.")
        if experts and actions[layer] != "keep":
            raise RecipeError(
                f"{at} is dropped by layers ({actions[layer]}). Take it off one list."
            )
