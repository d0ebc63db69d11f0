"""Which recipe of a wish fits a checkpoint into the bytes given."""

from collections.abc import Sequence

from ..checkpoint.open import Checkpoint
from ..cut.predict import facts_of, with_prediction
from ..recipes.schema import Recipe
from .recommend import plan_of_anyone

MOST_EXPERTS = 0.25
"""Share of the experts that leaves before weights get fewer bits."""


def first_that_fits(checkpoint: Checkpoint, recipes: Sequence[Recipe]) -> Recipe:
    """The first recipe that fits without removing more than it says by itself.

    Reads headers only. The last one has to remove what is still too much.

    Args:
        checkpoint: The input.
        recipes: Those of a wish, in the order of preference; their ``max_bytes``
            agree.
    """
    *earlier, last = [one for one in recipes if _possible(checkpoint, one)]
    for recipe in earlier:
        if recipe.max_bytes is None or _fits(checkpoint, recipe, recipe.max_bytes):
            return recipe
    return last


def _possible(checkpoint: Checkpoint, recipe: Recipe) -> bool:
    """Whether the family's routers can keep rows that are never chosen, if asked."""
    masks = recipe.spelling == "stock-vllm" and recipe.routing == "drop"
    known = checkpoint.layout.rule("router_bias") is not None
    return known or not masks or recipe.name != "stock-vllm"


def _fits(checkpoint: Checkpoint, recipe: Recipe, max_bytes: int) -> bool:
    at_most = {"total_sparsity": MOST_EXPERTS, "max_bytes": None}
    facts = facts_of(checkpoint, "")
    decided = plan_of_anyone(facts, recipe.model_copy(update=at_most))
    predicted = with_prediction(checkpoint, decided, facts=facts).predicted
    return predicted is not None and predicted.file_bytes <= max_bytes


def saves_for(recipe: Recipe, wish: str | None) -> bool:
    """Whether what a recipe removes makes the output smaller where it is served."""
    # Zeros that are stored save nothing anywhere; left out, only on CPUs.
    if recipe.asks_zeros:
        return wish is None or (wish == "cpu" and recipe.storage == "bitmask")
    return wish != "any" or recipe.quantize.method == "none"
