"""Which layers are refitted: those that lost experts, and those next to what left.

What a dropped MoE sublayer gave, the next layer that has experts makes up for, whose
target is the original's hidden state behind it; what a dropped block did, the layer
right before it, since its output then enters the block that comes next.
"""

from collections.abc import Sequence

from ..recipes.schema import Recipe
from .cut_plan import LayerPlan
from .facts import ModelFacts


def layers_to_refit(
    recipe: Recipe, facts: ModelFacts, layers: Sequence[LayerPlan]
) -> list[bool]:
    """For each layer whether its survivors are refitted.

    Args:
        recipe: Whether that is asked for.
        facts: The checkpoint; experts whose stored values must stay are not refitted.
        layers: What happens to its layers.
    """
    if recipe.experts.refit == "none" or facts.fixed is not None:
        return [False] * len(layers)
    chosen = {plan.layer for plan in layers if 0 < len(plan.keep) < plan.experts}
    for plan, shape in zip(layers, facts.layers, strict=True):
        # Behind an MTP layer comes nothing that could make up for it.
        if plan.action != "keep" and not shape.mtp:
            chosen |= _taking_over(plan, facts, layers)
    return [plan.layer in chosen for plan in layers]


def _taking_over(
    gone: LayerPlan, facts: ModelFacts, layers: Sequence[LayerPlan]
) -> set[int]:
    """The layer that makes up for one that is dropped, if any can."""
    left = [
        plan.layer
        for plan, shape in zip(layers, facts.layers, strict=True)
        if plan.action != "drop-block" and not shape.mtp
    ]
    before = [at for at in left if at < gone.layer and layers[at].keep]
    behind = [at for at in left if at > gone.layer and layers[at].keep]
    if gone.action == "drop-block":
        last = max((at for at in left if at < gone.layer), default=None)
        if last in before:
            return {before[-1]}
    return set(behind[:1])
