"""Narrower experts among what ``tune`` tries: candidates for the last round alone.

How channels leave depends on the text, so that only plans that are calibrated and
judged as they would be cut can be compared.
"""

from collections.abc import Sequence
from typing import Any

from ..recipes.schema import Recipe, TuneStage
from .candidates import Candidate, variant


def narrowings(
    recipe: Recipe, finalists: Sequence[Candidate], tune: TuneStage
) -> list[Candidate]:
    """The size reached by narrowing, alone, with zeros, and with whole experts.

    Args:
        recipe: What the search was asked with.
        finalists: Best first; whole experts leave as in the first of those that lose
            some.
        tune: Says which shares of the size narrowing takes.
    """
    nothing: dict[str, Any] = {"experts": {"method": "none"}, "structured_share": None}
    chosen = next((one for one in finalists if _loses_experts(one.recipe)), None)
    found = []
    for share in tune.narrow:
        name, narrow = f"narrow {share:.0%}", {"share": 0, "of_total": share}
        if share == 1:
            data: dict[str, Any] = {
                **nothing,
                "slim": {"method": "none"},
                "narrow": narrow,
            }
            found.append(variant(recipe, name, data))
            continue
        # Where whole experts take all of the size, zeros are not wanted.
        if any(share < 1 for share in tune.shares):
            zeros = {**nothing, "slim": {"method": tune.slims[0]}, "narrow": narrow}
            found.append(variant(recipe, f"{name} + {tune.slims[0]}", zeros))
        if chosen is not None:
            stage = chosen.recipe.experts
            rest = stage.criterion if stage.method == "score" else "stun"
            data = {
                # The total says how many go.
                "experts": {**stage.model_dump(), "drop": None, "keep": None},
                "slim": {"method": "none"},
                "structured_share": 1.0,
                "narrow": narrow,
            }
            found.append(variant(recipe, f"{name} + {rest} ({stage.budget})", data))
    return found


def _loses_experts(recipe: Recipe) -> bool:
    return recipe.experts.method != "none" and not recipe.layers.moe_count
