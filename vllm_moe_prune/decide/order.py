"""Control: zeros first, experts second, at the same total (STUN's order reversed).

It takes two cuts, since what is measured for the second is the slimmed model.
"""

from ..calibrate.stats import Stats
from ..errors import RecipeError
from ..recipes.schema import ExpertStage, LayerStage, Recipe, SlimStage
from .build_plan import resolved
from .experts import decide_experts
from .facts import ModelFacts
from .zeros import slim_sparsities


def halves(
    stats: Stats | None, recipe: Recipe, facts: ModelFacts
) -> tuple[Recipe, Recipe]:
    """The recipes of the two cuts; the second is for the output of the first.

    Zeroing a share s2 of everything and then removing a share s1 leaves what the other
    order leaves: S = 1 - (1 - s1)(1 - s2) both ways.

    Args:
        stats: Needed where ``layers`` asks for a number of layers.
        recipe: With ``order: unstructured-first``.
        facts: The checkpoint.

    Raises:
        RecipeError: If the experts differ in size, so that s1 is not known beforehand.
    """
    sizes = {layer.expert_parameters for layer in facts.layers if layer.has_moe}
    if len(sizes) > 1:
        raise RecipeError(
            "order: unstructured-first needs experts of one size in all layers, but "
            f"they have {sorted(sizes)} parameters."
        )
    protect = {"protect": recipe.experts.protect}
    # Super-experts are found in the second half, in the slimmed model.
    unprotected = recipe.experts.model_copy(update={"protect": "none"})
    complete = resolved(
        recipe.model_copy(update={"experts": unprotected}), facts, stats
    )
    # Who goes does not matter here, only how many.
    stage = complete.experts
    anyone = ExpertStage(
        method="none" if stage.method == "none" else "score",
        criterion="random",
        drop=stage.drop,
        keep=stage.keep,
        budget="per-layer" if stage.budget == "per-layer" else "global",
        min_experts=stage.min_experts,
        max_removed=stage.max_removed,
        protected=stage.protected,
    )
    dry = complete.model_copy(update={"experts": anyone})
    layers, _ = decide_experts(stats, facts.layers, dry)
    # Allocation is uniform here, so all that is not 0 is equal.
    sparsity = max(slim_sparsities(dry, facts, layers, stats), default=0.0)
    grouped = complete.slim.is_grouped
    slim = complete.slim.model_copy(
        # A pattern n:m sets its own sparsity; a recipe may not name both.
        update={"sparsity": None if grouped else sparsity},
    )
    same = {
        "total_sparsity": None,
        "structured_share": None,
        "order": "structured-first",
    }
    first = {
        **same,
        "name": f"{recipe.name}-zeros",
        "experts": ExpertStage(method="none"),
        "layers": LayerStage(),
        # No expert leaves in the first cut: no row to redirect or preserve.
        "routing": "drop",
        "slim": slim,
    }
    second = {
        **same,
        "name": f"{recipe.name}-experts",
        "experts": complete.experts.model_copy(update=protect),
        "slim": SlimStage(method="none"),
    }
    return complete.model_copy(update=first), complete.model_copy(update=second)
