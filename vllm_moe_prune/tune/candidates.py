"""What ``tune`` tries: recipes that reach one size in different ways."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from ..decide.cut_plan import LayerShape
from ..recipes.schema import (
    Budget,
    Chooser,
    Recipe,
    SlimMethod,
    TuneStage,
    parse_recipe,
)


@dataclass(frozen=True)
class Candidate:
    """One recipe, and what tells it from the others."""

    name: str
    recipe: Recipe


def structures(recipe: Recipe, layers: Sequence[LayerShape]) -> list[Candidate]:
    """All combinations of what leaves whole, the rest zeroed by the first method.

    Args:
        recipe: With ``tune``; everything that ``tune`` does not vary is taken from it.
        layers: The checkpoint's decoder layers.
    """
    tune = recipe.tune or TuneStage()
    return [variant(recipe, name, data) for name, data in _structures(tune, layers)]


def refinements(candidate: Candidate, tune: TuneStage) -> list[Candidate]:
    """The same structure with its zeros written or spread in other ways."""
    recipe = candidate.recipe
    if recipe.slim.method == "none":
        return []
    # The first method is left out: structures were judged with it.
    ways: list[tuple[str, dict[str, Any]]] = [
        (slim, {"slim": {"method": slim}}) for slim in tune.slims[1:]
    ]
    if tune.owl and not recipe.slim.is_grouped:
        ways.append(("owl", {"slim": {"allocation": "owl"}}))
    return [variant(recipe, f"{candidate.name}, {way}", data) for way, data in ways]


def zeros_alone(recipe: Recipe, asked: Recipe) -> bool:
    """Whether a candidate removes no more experts or layers than was asked for."""
    return recipe.experts.method == "none" and recipe.layers == asked.layers


def _structures(
    tune: TuneStage, layers: Sequence[LayerShape]
) -> Iterator[tuple[str, dict[str, Any]]]:
    zeros = tune.slims[0]
    for share in tune.shares:
        choosers = product(tune.experts, tune.budgets) if share else [None]
        for chosen in choosers:
            yield _by_experts(share, chosen, zeros)
    # One chooser where layers go too, or candidates would multiply.
    chosen = (tune.experts[0], tune.budgets[0])
    layers = [layer for layer in layers if not layer.mtp]
    moe = sum(layer.has_moe for layer in layers)
    for key, what, most in (
        ("moe_count", "MoE sublayers", moe),
        ("block_count", "blocks", len(layers)),
    ):
        # A set: in small models several shares are the same count.
        for count in sorted({max(1, round(part * most)) for part in tune.layers}):
            for share in tune.shares:
                name, data = _by_experts(share, chosen if share else None, zeros)
                yield f"{name}, {count} {what} gone", {**data, "layers": {key: count}}


def _by_experts(
    share: float, chosen: tuple[Chooser, Budget] | None, zeros: SlimMethod
) -> tuple[str, dict[str, Any]]:
    """The parts of a recipe that take a share of the size by whole experts."""
    slim = {"method": "none"} if share == 1 else {"method": zeros}
    if chosen is None:
        data: dict[str, Any] = {"experts": {"method": "none"}, "slim": slim}
        return zeros, {**data, "structured_share": None}
    chooser, budget = chosen
    # The total says how many go, so the numbers of the recipe do not.
    stage: dict[str, Any] = {"budget": budget, "drop": None, "keep": None}
    stage |= {"method": "stun"} if chooser == "stun" else _scored(chooser)
    data = {"experts": stage, "slim": slim, "structured_share": share}
    rest = "" if share == 1 else f" + {zeros}"
    return f"{chooser} ({budget}) {share:.0%}{rest}", data


def _scored(chooser: Chooser) -> dict[str, Any]:
    return {"method": "score", "criterion": chooser}


def variant(recipe: Recipe, name: str, data: dict[str, Any]) -> Candidate:
    """The recipe with some of its parts replaced, validated again."""
    values = recipe.model_dump()
    for key, value in data.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    # Validated as a whole below: parts that exclude each other are refused.
    values |= {"name": name, "description": "Found by tune.", "tune": None}
    return Candidate(name, parse_recipe(values, name))
