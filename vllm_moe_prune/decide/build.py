"""The whole plan: a recipe, the statistics and the facts of one checkpoint."""

import math
from collections import Counter
from collections.abc import Sequence

from ..calibrate.stats import Stats
from ..errors import PlanError, RecipeError
from ..recipe import Recipe, parse_pattern
from ..slim.quota import zeros_in_group
from .allocation import least_allocation, owl_offsets
from .experts import decide_experts
from .facts import LayerFacts, ModelFacts, Routing, Slimming, count_layers
from .layers import decide_layers
from .plan import CutPlan, LayerPlan
from .sparsity import least_sparsity, zeros_at, zeros_needed


def make_plan(
    stats: Stats | None, recipe: Recipe, facts: ModelFacts, *, tool_version: str
) -> CutPlan:
    """Decide everything about one checkpoint; ``predicted`` is left to who knows files.

    Args:
        stats: Needed only where a decision is not fixed by the recipe alone; see
            ``needs.needed_statistics``.
        recipe: What was asked for.
        facts: The checkpoint.
        tool_version: Recorded in the plan.

    Raises:
        RecipeError: If what was asked for cannot be done.
        PlanError: If the statistics do not suffice or are of another checkpoint.
    """
    if stats is not None and stats.fingerprint != facts.model.fingerprint:
        raise PlanError(
            f"the statistics are of another model (statistics "
            f"{stats.fingerprint[:12]}, checkpoint {facts.model.fingerprint[:12]}). "
            "Run `vllm-moe-prune measure` on this checkpoint."
        )
    if recipe.order == "unstructured-first":
        raise RecipeError(
            "order: unstructured-first takes two cuts, one plan each. "
            "Set order: structured-first for a single plan."
        )
    _check_slimming(recipe, facts)
    complete = resolved(recipe, facts, stats)
    layers, threshold = decide_experts(stats, facts.layers, complete)
    sparsities = slim_sparsities(complete, facts, layers, stats)
    pattern = parse_pattern(recipe.slim.pattern)
    return CutPlan(
        tool_version=tool_version,
        model=facts.model,
        recipe=recipe,
        routing=_routing(recipe),
        slim=recipe.slim.method,
        pattern=recipe.slim.pattern,
        slim_parts=recipe.slim.scope,
        slim_exclude=recipe.slim.exclude,
        router_weighted=recipe.slim.router_weighted,
        threshold=threshold,
        layers=tuple(
            layer.model_copy(update={"sparsity": _snapped(sparsity, pattern)})
            for layer, sparsity in zip(layers, sparsities, strict=True)
        ),
    )


def resolved(recipe: Recipe, facts: ModelFacts, stats: Stats | None) -> Recipe:
    """The recipe with ``experts.drop`` in place of ``structured_share``.

    What dropped layers remove counts towards the share. A share of 1 is rounded up to
    whole experts, so that nothing is left to zero.
    """
    share, total = recipe.structured_share, recipe.total_sparsity
    if share is None or total is None:
        return recipe
    actions = decide_layers(stats, facts.layers, recipe)
    layers = [
        LayerPlan(
            layer=at,
            action=action,
            experts=facts.layers[at].num_experts,
            keep=tuple(range(facts.layers[at].num_experts)) if action == "keep" else (),
        )
        for at, action in enumerate(actions)
    ]
    count = count_layers(facts, layers, Slimming("none"), _routing(recipe))
    staying = [
        (layer.num_experts, layer.expert_parameters + _row(recipe, at, facts))
        for at, layer in enumerate(facts.layers)
        if layers[at].keep
    ]
    experts = sum(number for number, _ in staying)
    removable = sum(number * size for number, size in staying)
    if recipe.sparsity_of == "experts":
        parameters, gone = count.expert_parameters, count.expert_parameters_removed
    else:
        parameters, gone = count.all_parameters, count.all_parameters_removed
    wanted = max(0.0, share * total * parameters - gone)
    drop = wanted / removable if removable else 0.0
    if share == 1.0 and experts:
        drop = math.ceil(drop * experts * (1.0 - 1e-12)) / experts
    stage = recipe.experts.model_copy(update={"drop": drop})
    return recipe.model_copy(update={"experts": stage, "structured_share": None})


def slim_sparsities(
    recipe: Recipe, facts: ModelFacts, layers: Sequence[LayerPlan], stats: Stats | None
) -> list[float]:
    """Each layer's sparsity: asked for, or left over from a total, spread as asked.

    Raises:
        RecipeError: If ``total_sparsity`` is passed already or cannot be reached.
        PlanError: If OWL's outliers were not measured.
    """
    slimming = slimming_of(recipe)
    pairs = list(zip(facts.layers, layers, strict=True))
    groups = _groups(slimming, pairs)
    of_experts = recipe.total_sparsity is not None and recipe.sparsity_of == "experts"
    counted = _groups(slimming, pairs, experts_only=True) if of_experts else groups
    zeros = _zeros_wanted(recipe, facts, layers, counted)
    if not zeros:
        return [0.0] * len(layers)
    if recipe.slim.allocation == "uniform":
        asked = recipe.slim.asked if recipe.total_sparsity is None else None
        everywhere = asked or least_sparsity(zeros, _sum(counted))
        spread = dict.fromkeys(groups, everywhere)
    else:
        offsets = owl_offsets(stats, pairs, groups, recipe.slim)
        spread = least_allocation(zeros, groups, counted, offsets)
    return [spread.get(plan.layer, 0.0) for plan in layers]


def slimming_of(recipe: Recipe) -> Slimming:
    """What the recipe slims, and in which groups."""
    stage = recipe.slim
    pattern = parse_pattern(stage.pattern)
    return Slimming(
        stage.method, pattern[1] if pattern else None, stage.scope, stage.exclude
    )


def _groups(
    slimming: Slimming,
    pairs: Sequence[tuple[LayerFacts, LayerPlan]],
    *,
    experts_only: bool = False,
) -> dict[int, Counter[int]]:
    """The groups of every layer in which something is slimmed."""
    return {
        plan.layer: found
        for layer, plan in pairs
        if (found := slimming.groups(layer, plan, experts_only=experts_only))
    }


def _zeros_wanted(
    recipe: Recipe,
    facts: ModelFacts,
    layers: Sequence[LayerPlan],
    counted: dict[int, Counter[int]],
) -> int:
    if recipe.total_sparsity is None:
        return zeros_at(recipe.slim.asked or 0.0, _sum(counted))
    zeros = _zeros_for_total(recipe, recipe.total_sparsity, facts, layers)
    if zeros and recipe.slim.method == "none":
        raise RecipeError(
            f"total_sparsity {recipe.total_sparsity:g} needs {zeros:,} more parameters "
            "gone than experts and layers remove, and slim.method is none. "
            "Remove more (experts.drop, layers), or set slim.method: wanda."
        )
    return zeros


def _zeros_for_total(
    recipe: Recipe, total: float, facts: ModelFacts, layers: Sequence[LayerPlan]
) -> int:
    count = count_layers(facts, layers, Slimming("none"), _routing(recipe))
    of_experts = recipe.sparsity_of == "experts"
    return zeros_needed(
        total,
        parameters=count.expert_parameters if of_experts else count.all_parameters,
        removed=(
            count.expert_parameters_removed
            if of_experts
            else count.all_parameters_removed
        ),
        rounding=_rounding(recipe, facts),
    )


def _rounding(recipe: Recipe, facts: ModelFacts) -> int:
    """Parameters by which rounding ``drop`` to whole experts may exceed a total."""
    experts = [
        layer.expert_parameters + _row(recipe, at, facts)
        for at, layer in enumerate(facts.layers)
        if layer.has_moe
    ]
    if recipe.experts.drop is None or not experts:
        return 0
    return sum(experts) if recipe.experts.budget == "per-layer" else max(experts)


def _row(recipe: Recipe, layer: int, facts: ModelFacts) -> int:
    """What an expert takes with it besides its matrices, if that counts."""
    if recipe.sparsity_of == "experts" or _routing(recipe) == "redirect":
        return 0
    return facts.layers[layer].router_parameters_per_expert


def _routing(recipe: Recipe) -> Routing:
    """A plan spells ``preserve`` as a redirect to nobody."""
    return "drop" if recipe.routing == "drop" else "redirect"


def _sum(groups: dict[int, Counter[int]]) -> Counter[int]:
    return sum(groups.values(), Counter[int]())


def _snapped(sparsity: float, pattern: tuple[int, int] | None) -> float:
    """The sparsity itself, or with n:m the share of whole zeros per group."""
    if pattern is None:
        return sparsity
    return zeros_in_group(pattern[1], sparsity) / pattern[1]


def _check_slimming(recipe: Recipe, facts: ModelFacts) -> None:
    """Refuse exclusions that match nothing, and groups that do not fit the matrices."""
    stage = recipe.slim
    matrices = [
        (at, matrix)
        for at, layer in enumerate(facts.layers)
        for matrix in (*layer.expert_matrices, *layer.others)
        if stage.method != "none" and matrix.part in stage.scope
    ]
    for text in stage.exclude:
        if not any(text in matrix.name for _, matrix in matrices):
            raise RecipeError(
                f"slim.exclude: {text!r} is in no name of a matrix in slim.scope."
            )
    pattern = parse_pattern(stage.pattern)
    slimming = slimming_of(recipe)
    for at, matrix in matrices:
        if pattern and slimming.takes(matrix) and matrix.cols % pattern[1]:
            raise RecipeError(
                f"layer {at}: slim.pattern {stage.pattern} needs rows of a multiple of "
                f"{pattern[1]}, but {matrix.name or 'an expert matrix'} has "
                f"{matrix.cols} columns. Exclude it, or choose another pattern."
            )
