"""How sparse each layer becomes: asked for, or what is left over from a total."""

from collections import Counter
from collections.abc import Sequence

from ..calibrate.stats import Stats
from ..errors import RecipeError
from ..recipes.schema import Recipe, SlimStage, parse_pattern
from .allocation import least_allocation, owl_offsets
from .cut_plan import LayerPlan
from .facts import LayerFacts, ModelFacts, Routing, Slimming, count_layers
from .groups import together
from .sparsity import least_sparsity, zeros_at, zeros_needed
from .widths import width_step


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
    # Zeros outside the experts are written too, but count towards no total of experts.
    counted = _groups(slimming, pairs, experts_only=True) if of_experts else groups
    zeros = _zeros_wanted(recipe, facts, layers, counted)
    if not zeros:
        return [0.0] * len(layers)
    if recipe.slim.allocation == "uniform":
        # A sparsity asked for is kept as it is; only a total is met from above.
        asked = _asked(recipe.slim) if recipe.total_sparsity is None else None
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
        return zeros_at(_asked(recipe.slim), _sum(counted))
    zeros = _zeros_for_total(recipe, recipe.total_sparsity, facts, layers)
    if zeros and recipe.slim.method == "none":
        raise RecipeError(
            f"total_sparsity {recipe.total_sparsity:g} needs {zeros:,} more parameters "
            "gone than experts and layers remove, and slim.method is none. "
            "Remove more (experts.drop, layers), or set slim.method: wanda."
        )
    return zeros


def _asked(stage: SlimStage) -> float:
    """The sparsity that the pattern or ``sparsity`` asks for."""
    pattern = parse_pattern(stage.pattern)
    # n of every m neighbors stay.
    return (stage.sparsity or 0.0) if pattern is None else 1 - pattern[0] / pattern[1]


def _zeros_for_total(
    recipe: Recipe, total: float, facts: ModelFacts, layers: Sequence[LayerPlan]
) -> int:
    count = count_layers(facts, layers, Slimming("none"), plan_routing(recipe))
    of_experts = recipe.sparsity_of == "experts"
    return zeros_needed(
        total,
        parameters=count.expert_parameters if of_experts else count.all_parameters,
        removed=(
            count.expert_parameters_removed
            if of_experts
            else count.all_parameters_removed
        ),
        rounding=_rounding(recipe, facts, layers),
    )


def _rounding(recipe: Recipe, facts: ModelFacts, layers: Sequence[LayerPlan]) -> int:
    """Parameters by which rounding to whole experts and widths may exceed a total."""
    # Widths are rounded down by less than a step, in every expert that stays.
    widths = sum(
        len(plan.keep)
        * layer.expert_parameters
        // layer.width
        * (width_step(recipe.narrow, layer.channel_block) - 1)
        for layer, plan in zip(facts.layers, layers, strict=True)
        if plan.width is not None and layer.width
    )
    experts = [
        counted_size(recipe, layer.with_width(plan.width))
        * together(layer, recipe.experts)
        for layer, plan in zip(facts.layers, layers, strict=True)
        if layer.has_moe
    ]
    if recipe.experts.drop is None or not experts:
        return widths
    # per-layer rounds once in every layer, the other budgets once in all.
    per_layer = recipe.experts.budget == "per-layer"
    return widths + (sum(experts) if per_layer else max(experts))


def counted_size(recipe: Recipe, layer: LayerFacts) -> int:
    """Parameters that leave with one expert, as far as the total counts them."""
    # Router rows are no experts, and under redirect they stay.
    if recipe.sparsity_of == "experts" or plan_routing(recipe) == "redirect":
        return layer.expert_parameters
    return layer.expert_parameters + layer.router_parameters_per_expert


def plan_routing(recipe: Recipe) -> Routing:
    """A plan spells ``preserve`` as a redirect to nobody."""
    return "drop" if recipe.routing == "drop" else "redirect"


def _sum(groups: dict[int, Counter[int]]) -> Counter[int]:
    return sum(groups.values(), Counter[int]())


def check_slimming(recipe: Recipe, facts: ModelFacts) -> None:
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
        # Groups of m lie within a row; a remainder would belong to none.
        if pattern and slimming.takes(matrix) and matrix.cols % pattern[1]:
            raise RecipeError(
                f"layer {at}: slim.pattern {stage.pattern} needs rows of a multiple of "
                f"{pattern[1]}, but {matrix.name or 'an expert matrix'} has "
                f"{matrix.cols} columns. Exclude it, or choose another pattern."
            )
