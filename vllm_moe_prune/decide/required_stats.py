"""Which statistics a recipe's decisions read: what ``measure`` has to collect.

Names are the fields of ``LayerStats`` and ``Stats``.
"""

from ..recipes.schema import ExpertStage, Recipe
from .scores import FIELDS

DATA_FREE = frozenset(
    {
        "router_sqdist_EE",
        "router_norm",
        "router_row_norm_E",
        "weight_sqdist_EE",
        "weight_powers_E5",
    }
)
"""Fields that need no forward pass."""


def needed_statistics(recipe: Recipe) -> frozenset[str]:
    """The fields without which ``make_plan`` cannot follow the recipe."""
    fields: set[str] = set()
    if removes_experts(recipe):
        fields |= _of_experts(recipe.experts)
        if recipe.structured_share == "auto":
            fields |= {"sensitivity_P2", "zeros"}
        if recipe.experts.protect == "super":
            fields.add("activation_max_E")
    if recipe.routing == "mean":
        fields |= {"output_sum_ED", "routed_E"}
    if recipe.layers.moe_count or recipe.layers.moe_share:
        norm = recipe.layers.moe_norm
        fields |= {
            "tokens",
            "moe_cosine_sum" if norm == "drop" else "moe_only_cosine_sum",
        }
    if recipe.layers.block_count or recipe.layers.block_share:
        fields |= {"block_cosine_HH", "block_tokens"}
    if recipe.slim.method != "none" and recipe.slim.allocation == "owl":
        fields |= {"owl_outliers_E", "owl_m"}
    return frozenset(fields)


def needs_tokens(recipe: Recipe) -> bool:
    """Whether ``measure`` needs calibration tokens for the recipe."""
    return not needed_statistics(recipe) <= DATA_FREE


def removes_experts(recipe: Recipe) -> bool:
    """Whether any expert may leave a layer that stays."""
    stage = recipe.experts
    asked = stage.drop or stage.keep or recipe.structured_share
    return stage.method != "none" and bool(asked)


def _of_experts(stage: ExpertStage) -> set[str]:
    fields = {"sensitivity_P2"} if stage.budget == "sensitivity" else set()
    if stage.method == "score":
        # This search goes by the Gram matrix alone, whatever the criterion.
        if stage.search == "exhaustive":
            return fields | {"contribution_gram_EE"}
        return fields | set(FIELDS[stage.criterion])
    if stage.cluster_by == "outputs":
        fields |= {"output_sqdist_EE", "output_sqnorm_E"}
    else:
        if stage.router_weight:
            fields.add("router_sqdist_EE")
            if stage.divide_by_router_norm:
                fields.add("router_norm")
        if stage.coactivation_weight:
            fields.add("coactivation_EE")
    # Eq. 14-17 need distances between weights; other rules need their score.
    if stage.representative == "nearest-mean":
        fields.add("weight_sqdist_EE")
    else:
        fields |= set(FIELDS[stage.representative])
    if stage.merge == "frequency" and stage.reconstruct != "never":
        fields.add("routed_E")
    return fields
