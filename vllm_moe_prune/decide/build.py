"""The whole plan: a recipe, the statistics and the facts of one checkpoint."""

from collections.abc import Sequence

from ..calibrate.stats import Stats
from ..errors import PlanError, RecipeError
from ..recipe import Recipe
from .facts import ModelFacts, count_sparsity, slimmed_groups
from .plan import CutPlan, LayerPlan
from .sparsity import least_sparsity, zeros_needed
from .stun import decide_experts


def make_plan(
    stats: Stats | None, recipe: Recipe, facts: ModelFacts, *, tool_version: str
) -> CutPlan:
    """Decide everything about one checkpoint; ``predicted`` is left to who knows files.

    Args:
        stats: Needed only where experts are removed.
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
    layers, threshold = decide_experts(stats, facts.layers, recipe)
    return CutPlan(
        tool_version=tool_version,
        model=facts.model,
        recipe=recipe,
        routing=recipe.routing,
        slim=recipe.slim.method,
        threshold=threshold,
        layers=_with_sparsity(layers, slim_sparsity(recipe, facts, layers)),
    )


def slim_sparsity(
    recipe: Recipe, facts: ModelFacts, layers: Sequence[LayerPlan]
) -> float:
    """The sparsity of the surviving experts: asked for, or left over from a total.

    Raises:
        RecipeError: If ``total_sparsity`` is passed already or cannot be reached.
    """
    if recipe.total_sparsity is None:
        return 0.0 if recipe.slim.method == "none" else recipe.slim.sparsity or 0.0
    zeros = _zeros_for_total(recipe, recipe.total_sparsity, facts, layers)
    if not zeros:
        return 0.0
    if recipe.slim.method == "none":
        raise RecipeError(
            f"total_sparsity {recipe.total_sparsity:g} needs {zeros:,} more parameters "
            "gone than experts and layers remove, and slim.method is none. "
            "Remove more (experts.drop, layers), or set slim.method: wanda."
        )
    pairs = zip(facts.layers, layers, strict=True)
    return least_sparsity(zeros, slimmed_groups(pairs, recipe.slim.method))


def _zeros_for_total(
    recipe: Recipe, total: float, facts: ModelFacts, layers: Sequence[LayerPlan]
) -> int:
    count = count_sparsity(facts, layers, "none", recipe.routing)
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
    experts = [layer.expert_parameters for layer in facts.layers if layer.has_moe]
    if recipe.experts.drop is None or not experts:
        return 0
    return sum(experts) if recipe.experts.budget == "per-layer" else max(experts)


def _with_sparsity(
    layers: Sequence[LayerPlan], sparsity: float
) -> tuple[LayerPlan, ...]:
    return tuple(
        layer.model_copy(update={"sparsity": sparsity}) if layer.keep else layer
        for layer in layers
    )
