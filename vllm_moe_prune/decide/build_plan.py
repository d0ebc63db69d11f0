"""The whole plan: a recipe, the statistics and the facts of one checkpoint."""

import math

from ..calibrate.stats import Stats
from ..checkpoint.fingerprint import difference
from ..errors import PlanError, RecipeError
from ..recipes.schema import QuantizeStage, Recipe, parse_pattern
from ..slim.quota import zeros_in_group
from .cut_plan import CutPlan, LayerPlan
from .experts import check_experts, decide_experts
from .facts import ModelFacts, Slimming, count_layers
from .groups import together
from .layer_drop import chooses_layers, decide_layers
from .quantize import resolved_form
from .refit import layers_to_refit
from .required_stats import needed_statistics
from .share import chosen_share
from .similarity import measured
from .super_experts import found_in, protecting
from .widths import narrow_widths, narrowed_facts, resolved_narrow, with_widths
from .zeros import check_slimming, counted_size, plan_routing, slim_sparsities


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
    if stats is not None and (
        other := difference(stats.fingerprint, facts.model.fingerprint)
    ):
        raise PlanError(
            f"the statistics are of {other}. "
            "Run `vllm-moe-prune measure` on this checkpoint."
        )
    if recipe.routing == "mean":
        _check_means(stats, facts)
    widths = narrow_widths(recipe, facts)
    quantize = _check_stages(recipe, narrowed_facts(facts, widths))
    complete = resolved(recipe, facts, stats)
    removed, threshold = decide_experts(stats, facts.layers, complete)
    layers = with_widths(removed, widths)
    sparsities = slim_sparsities(complete, facts, layers, stats)
    refits = layers_to_refit(recipe, facts, layers)
    pattern = parse_pattern(recipe.slim.pattern)
    found = found_in(stats, facts.layers, recipe)
    return CutPlan(
        tool_version=tool_version,
        model=facts.model,
        recipe=recipe,
        routing=plan_routing(recipe),
        spelling=recipe.spelling,
        constants="means" if recipe.routing == "mean" else "zeros",
        slim=recipe.slim.method,
        pattern=recipe.slim.pattern,
        slim_parts=recipe.slim.scope,
        slim_exclude=recipe.slim.exclude,
        router_weighted=recipe.slim.router_weighted,
        # As refits: not where the stored values of weights that stay have to stay.
        compensate=recipe.slim.compensate and facts.fixed is None,
        quantize=quantize,
        narrow=resolved_narrow(recipe, facts),
        threshold=threshold,
        super_experts=found,
        weight_hashes=stats.weight_hashes if stats else {},
        layers=tuple(
            layer.model_copy(
                update={"sparsity": _snapped(sparsity, pattern), "refit": refit}
            )
            for layer, sparsity, refit in zip(layers, sparsities, refits, strict=True)
        ),
    )


def _check_means(stats: Stats | None, facts: ModelFacts) -> None:
    """Every layer needs what its removed experts are to give."""
    advice = "Run `vllm-moe-prune measure` with routing: mean."
    for at, shape in enumerate(facts.layers):
        if shape.has_moe and not shape.mtp:
            layer = None if stats is None else stats.layers.get(at)
            for name in ("output_sum_ED", "routed_E"):
                measured(getattr(layer, name, None), name, advice, layer=at)


def check_recipe(recipe: Recipe, facts: ModelFacts) -> None:
    """Refuse what no statistics could make possible, before they are measured.

    Raises:
        RecipeError: If what was asked for cannot be done.
    """
    if not needed_statistics(recipe):
        # Nothing is to be measured: the whole plan can be tried, with all its errors.
        make_plan(None, recipe, facts, tool_version="")
        return
    _check_stages(recipe, narrowed_facts(facts, narrow_widths(recipe, facts)))
    # A share of experts can be counted only once it and the layers that stay are known.
    measured = recipe.structured_share == "auto" or chooses_layers(recipe.layers)
    counted = recipe if measured else _with_drop(recipe, facts, None)
    check_experts(facts.layers, counted)


def _check_stages(recipe: Recipe, facts: ModelFacts) -> QuantizeStage:
    """What concerns no single expert; the form of quantized weights, complete."""
    if recipe.order == "unstructured-first":
        raise RecipeError(
            "order: unstructured-first takes two cuts, one plan each. "
            "Set order: structured-first for a single plan."
        )
    check_slimming(recipe, facts)
    return resolved_form(recipe.quantize, facts)


def resolved(recipe: Recipe, facts: ModelFacts, stats: Stats | None) -> Recipe:
    """The recipe with what follows from the model in place of what asks for it: its
    super-experts are protected, ``experts.drop`` replaces ``structured_share``."""
    return _with_drop(protecting(recipe, stats, facts.layers), facts, stats)


def _with_drop(recipe: Recipe, facts: ModelFacts, stats: Stats | None) -> Recipe:
    """The recipe with ``experts.drop`` in place of ``structured_share``.

    What dropped layers remove counts towards the share. A share of 1 is rounded up to
    whole experts, so that nothing is left to zero.
    """
    share, total = recipe.structured_share, recipe.total_sparsity
    if share is None or total is None:
        return recipe
    if share == "auto":
        share = chosen_share(recipe, facts, stats)
    actions = decide_layers(stats, facts.layers, recipe)
    widths = narrow_widths(recipe, facts)
    whole = [
        LayerPlan(
            layer=at,
            action=action,
            experts=facts.layers[at].num_experts,
            keep=tuple(range(facts.layers[at].num_experts)) if action == "keep" else (),
        )
        for at, action in enumerate(actions)
    ]
    # What narrowing takes from all experts counts towards the share, too.
    layers = with_widths(whole, widths)
    count = count_layers(facts, layers, Slimming("none"), plan_routing(recipe))
    staying = [
        (layer.num_experts, counted_size(recipe, layer))
        for layer, plan in zip(
            narrowed_facts(facts, widths).layers, layers, strict=True
        )
        if plan.keep
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
        unit = max(together(layer, recipe.experts) for layer in facts.layers)
        # The slack keeps rounding from turning a whole number of rounds into one more.
        drop = unit * math.ceil(drop * experts / unit * (1.0 - 1e-12)) / experts
    stage = recipe.experts.model_copy(update={"drop": drop})
    return recipe.model_copy(update={"experts": stage, "structured_share": None})


def _snapped(sparsity: float, pattern: tuple[int, int] | None) -> float:
    """The sparsity itself, or with n:m the share of whole zeros per group."""
    if pattern is None:
        return sparsity
    return zeros_in_group(pattern[1], sparsity) / pattern[1]
