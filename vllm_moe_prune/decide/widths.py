"""How many channels each expert keeps: the narrowing that a recipe asks for."""

import math
from collections.abc import Sequence
from dataclasses import replace

from ..errors import RecipeError
from ..recipes.schema import NarrowStage, Recipe
from ..slim.quota import SLACK
from .cut_plan import LayerPlan
from .facts import LayerFacts, ModelFacts


def width_step(stage: NarrowStage, block: int) -> int:
    """What widths are multiples of: the stage's number, and whole FP8 blocks."""
    return math.lcm(stage.multiple, block)


def kept_width(stage: NarrowStage, width: int, block: int = 1) -> int:
    """The most channels that are at most the share asked for; 0 where none are.

    Args:
        stage: Says the share, and what widths are multiples of.
        width: Channels before.
        block: Neighbors that stay or leave together; widths are multiples of it too.
    """
    step = width_step(stage, block)
    # The slack keeps 0.25 of 1408 from losing one more step to rounding.
    return int(width * (1.0 - stage.share) * (1.0 + SLACK)) // step * step


def narrow_widths(recipe: Recipe, facts: ModelFacts) -> list[int | None]:
    """The channels that the experts of each layer keep; None: all, or none are there.

    Raises:
        RecipeError: A width that nobody could serve, naming the layer and what to do.
    """
    stage = resolved_narrow(recipe, facts)
    if stage.share == 0:
        return [None] * len(facts.layers)
    return [
        _width(stage, layer, at) if layer.has_moe else None
        for at, layer in enumerate(facts.layers)
    ]


def narrowed_facts(facts: ModelFacts, widths: Sequence[int | None]) -> ModelFacts:
    """The checkpoint with experts of these widths; other counts are still the old."""
    pairs = zip(facts.layers, widths, strict=True)
    layers = tuple(layer.with_width(width) for layer, width in pairs)
    return replace(facts, layers=layers)


def resolved_narrow(recipe: Recipe, facts: ModelFacts) -> NarrowStage:
    """The stage in numbers: its share, and whether there is a refit.

    Experts that stay FP8 are not refitted.
    """
    stage, total = recipe.narrow, recipe.total_sparsity
    if stage.of_total is not None and total is not None:
        share = stage.of_total * total
        if recipe.sparsity_of == "all" and facts.expert_parameters:
            share *= facts.all_parameters / facts.expert_parameters
        if share >= 1:
            raise RecipeError(
                f"narrow.of_total {stage.of_total:g} of total_sparsity {total:g} is "
                "more than the experts have. Narrow less."
            )
        stage = stage.model_copy(update={"share": share, "of_total": None})
    if any(layer.channel_block > 1 for layer in facts.layers):
        return stage.model_copy(update={"refit": "none"})
    return stage


def _width(stage: NarrowStage, layer: LayerFacts, at: int) -> int:
    where, before = f"layer {at}: narrow.share {stage.share:g}", layer.width or 0
    if before % layer.channel_block:
        raise RecipeError(
            f"{where}: its experts have {before} channels, which do not divide "
            f"into FP8 blocks of {layer.channel_block}. Start from bf16 weights."
        )
    width = kept_width(stage, before, layer.channel_block)
    if width == 0:
        raise RecipeError(
            f"{where} of {before} channels leaves fewer than narrow.multiple "
            f"{stage.multiple}. Narrow less, or choose a smaller multiple."
        )
    shared = layer.shared_width
    if shared and shared % width:
        step = stage.multiple
        fit = [one for one in range(step, before, step) if shared % one == 0]
        hint = ", ".join(f"{1 - one / before:.4g} ({one})" for one in fit)
        raise RecipeError(
            f"{where} leaves {width} channels, of which its shared experts' {shared} "
            "are no multiple, so no config could describe both. "
            + (f"Shares that work: {hint}." if fit else "Leave narrow out.")
        )
    return width


def with_widths(
    plans: Sequence[LayerPlan], widths: Sequence[int | None]
) -> list[LayerPlan]:
    """The plans with the widths of their survivors."""
    return [
        plan.model_copy(update={"width": width}) if plan.keep and width else plan
        for plan, width in zip(plans, widths, strict=True)
    ]
