"""What recipes may ask for, what they need measured, and how they become plans."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from tests.properties.test_decide_toy import COLS, MODEL, ROWS, toy_facts, toy_stats
from vllm_moe_prune.calibrate.stats import LayerStats, Stats
from vllm_moe_prune.calibrate.stats_file import MODEL_ARRAYS
from vllm_moe_prune.decide.build_plan import make_plan
from vllm_moe_prune.decide.check_plan import check_plan
from vllm_moe_prune.decide.cut_plan import CutPlan, dump_plan
from vllm_moe_prune.decide.facts import ModelFacts, count_plan
from vllm_moe_prune.decide.order import halves
from vllm_moe_prune.decide.required_stats import (
    DATA_FREE,
    needed_statistics,
    needs_tokens,
)
from vllm_moe_prune.decide.sensitivity import rule
from vllm_moe_prune.errors import PlanError, RecipeError
from vllm_moe_prune.recipes.flags import with_overrides
from vllm_moe_prune.recipes.loading import load_recipe, shipped_recipes
from vllm_moe_prune.recipes.schema import Recipe, parse_recipe

COUNTS = (0, 8, 6, 8, 8, 7)
FACTS = toy_facts(*COUNTS)
PER_EXPERT = 3 * ROWS * COLS
# Matrices that divide into groups of quantized weights; else the same.
WIDE = replace(
    FACTS,
    layers=tuple(
        replace(layer, expert_shapes=((128, 256),) * 3 * layer.has_moe)
        for layer in FACTS.layers
    ),
)


def full_stats(recipe: Recipe) -> Stats:
    stats = toy_stats(np.random.default_rng(0), *COUNTS)
    points = np.array([[0.0, 2.0], [3.0, 2.2], [6.0, 3.0]])
    layers = {
        at: replace(layer, sensitivity_P2=points * [1.0, 1.0 + at / 10])
        for at, layer in stats.layers.items()
    }
    measured = {"rule": rule(recipe), ZEROS: [20.0, 40.0, 80.0, 160.0]}
    return replace(stats, layers=layers, sensitivity=measured)


def only(stats: Stats, names: frozenset[str]) -> Stats:
    """The statistics with nothing else in them."""
    layers = {
        at: LayerStats(**{name: getattr(layer, name) for name in names & LAYER_FIELDS})
        for at, layer in stats.layers.items()
    }
    whole = {name: getattr(stats, name) for name in names & set(MODEL_ARRAYS)}
    # The rule goes with whatever was measured by it.
    told = {"rule"} if names & {ZEROS, "sensitivity_P2"} else set()
    told |= names & {ZEROS}
    sensitivity = {part: stats.sensitivity[part] for part in told}
    return Stats(
        fingerprint=stats.fingerprint, layers=layers, sensitivity=sensitivity, **whole
    )


ZEROS = "zeros"
"""What zeros cost, beside the curves: neither of a layer nor an array."""
LAYER_FIELDS = {item.name for item in fields(LayerStats)}

RECIPES: dict[str, dict[str, Any]] = {
    "nothing": {"slim": {"method": "none"}},
    "router": {"experts": {"drop": 0.2, "coactivation_weight": 0}},
    "raw-router": {
        "experts": {
            "drop": 0.2,
            "coactivation_weight": 0,
            "divide_by_router_norm": False,
        }
    },
    "coactivation": {"experts": {"drop": 0.2, "router_weight": 0}},
    "outputs": {"experts": {"keep": 5, "cluster_by": "outputs"}},
    "merged": {"experts": {"drop": 0.4, "reconstruct": "always", "merge": "frequency"}},
    "o-n": {"experts": {"drop": 0.2, "representative": "removal-loss"}},
    "best-member": {"experts": {"drop": 0.2, "representative": "total-output"}},
    "redirect": {"experts": {"drop": 0.2}, "routing": "redirect"},
    **{
        criterion: {"experts": {"method": "score", "criterion": criterion, "drop": 0.3}}
        for criterion in (
            *("routing-score", "routing-score-selected", "frequency", "reap"),
            *("total-output", "man", "msan"),
            *("router-norm", "removal-loss", "random"),
        )
    },
    "super": {"experts": {"method": "score", "drop": 0.3, "protect": "super"}},
    "exhaustive": {
        "experts": {
            "method": "score",
            "criterion": "removal-loss",
            "search": "exhaustive",
            "budget": "per-layer",
            "drop": 0.3,
        }
    },
    "sensitivity": {
        "experts": {"method": "score", "budget": "sensitivity", "drop": 0.3}
    },
    "stun-sensitivity": {"experts": {"budget": "sensitivity", "drop": 0.3}},
    "preserve": {"experts": {"method": "score", "drop": 0.3}, "routing": "preserve"},
    "layers": {"layers": {"moe_count": 2}, "slim": {"method": "none"}},
    "layers-norm": {"layers": {"moe_count": 2, "moe_norm": "keep"}},
    "blocks": {"layers": {"block_count": 2, "block_mode": "consecutive"}},
    "everything": {
        "total_sparsity": 0.7,
        "structured_share": 0.6,
        "layers": {"moe_count": 1, "block_count": 1},
        "experts": {"method": "score", "budget": "global"},
        "slim": {"method": "sparsegpt", "allocation": "owl"},
    },
    "magnitude-owl": {
        "slim": {"method": "magnitude", "allocation": "owl", "sparsity": 0.5}
    },
}


def planned(name: str) -> tuple[Recipe, Stats]:
    recipe = (
        load_recipe(name)
        if name in shipped_recipes()
        else parse_recipe(RECIPES[name], name)
    )
    return recipe, full_stats(recipe)


def facts_of(recipe: Recipe) -> ModelFacts:
    plain = recipe.quantize.method == "none" and not recipe.narrow.share
    return FACTS if plain else WIDE


def make(recipe: Recipe, stats: Stats | None) -> CutPlan:
    facts = facts_of(recipe)
    plan = make_plan(stats, recipe, facts, tool_version="1")
    check_plan(plan, facts.layers, MODEL.fingerprint, "plan")
    assert CutPlan.model_validate_json(dump_plan(plan)) == plan
    return plan


@pytest.mark.parametrize("name", [*RECIPES, *shipped_recipes()])
def test_a_recipe_needs_exactly_what_it_says(name: str) -> None:
    recipe, stats = planned(name)
    needed = needed_statistics(recipe)
    assert needed <= LAYER_FIELDS | set(MODEL_ARRAYS) | {ZEROS}
    plan = make(recipe, stats)
    assert make(recipe, only(stats, needed)) == plan
    assert needs_tokens(recipe) == bool(needed - DATA_FREE)
    for missing in needed - {"block_tokens"}:
        with pytest.raises(PlanError, match=r"lack|no statistics"):
            make(recipe, only(stats, needed - {missing}))
    if not needed:
        assert make(recipe, None) == plan


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_says_what_it_is_for_and_removes_something(name: str) -> None:
    recipe, stats = planned(name)
    assert recipe.description.endswith(".")
    assert "\n" not in recipe.description
    plan = make(recipe, stats)
    count = count_plan(facts_of(recipe), plan)
    assert count.total_sparsity > 0.05 or plan.is_quantized
    if recipe.total_sparsity is not None:
        assert count.expert_sparsity >= recipe.total_sparsity


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("sparsity_of", ["experts", "all"])
@pytest.mark.parametrize("budget", ["global", "per-layer"])
def test_a_structured_share_interpolates_at_one_total(
    share: float, sparsity_of: str, budget: str
) -> None:
    recipe = Recipe.model_validate(
        {
            "total_sparsity": 0.4,
            "structured_share": share,
            "sparsity_of": sparsity_of,
            "experts": {"method": "score", "criterion": "reap", "budget": budget},
        }
    )
    plan = make(recipe, full_stats(recipe))
    count = count_plan(FACTS, plan)
    gone = sum(layer.experts - len(layer.keep) for layer in plan.layers)
    if sparsity_of == "experts":
        reached, of = count.expert_sparsity, count.expert_parameters
        exact = share * 0.4 * 37
    else:
        reached, of = count.total_sparsity, count.all_parameters
        exact = share * 0.4 * of / (PER_EXPERT + COLS)
    rounding = 0.5 * (1 if budget == "global" else 5) + (share == 1.0)
    assert abs(gone - exact) <= rounding
    assert 0.4 <= reached <= 0.4 + 0.05 + (PER_EXPERT * 5 / of if share == 1 else 0)
    assert plan.recipe == recipe, "as it was asked for"
    if share == 1.0 and budget == "global":
        assert not plan.is_slimmed, "nothing is left to zero"


def test_a_structured_share_of_all_needs_no_slimming() -> None:
    values = {
        "total_sparsity": 0.4,
        "structured_share": 1.0,
        "experts": {"method": "score"},
        "slim": {"method": "none"},
    }
    recipe = Recipe.model_validate(values)
    plan = make(recipe, full_stats(recipe))
    assert [len(layer.keep) for layer in plan.layers if layer.keep] != [8, 6, 8, 8, 7]
    assert sum(len(layer.keep) for layer in plan.layers) == 37 - 15


def test_dropped_layers_count_towards_the_structured_share() -> None:
    values: dict[str, Any] = {
        "total_sparsity": 0.4,
        "structured_share": 0.75,
        "layers": {"drop_moe": [1]},
        "experts": {"method": "score"},
    }
    recipe = Recipe.model_validate(values)
    plan = make(recipe, full_stats(recipe))
    # 0.75 x 0.4 x 37 = 11.1 experts, of which layer 1 takes 8.
    assert sum(layer.experts - len(layer.keep) for layer in plan.layers) == 11


@pytest.mark.parametrize("method", ["wanda", "magnitude", "sparsegpt"])
@pytest.mark.parametrize("budget", ["global", "per-layer"])
def test_the_other_order_zeroes_and_removes_as_much(method: str, budget: str) -> None:
    values: dict[str, Any] = {
        "name": "mine",
        "total_sparsity": 0.4,
        "experts": {"method": "score", "drop": 0.25, "budget": budget},
        "slim": {"method": method},
    }
    one = make(Recipe.model_validate(values), full_stats(Recipe.model_validate(values)))
    recipe = Recipe.model_validate({**values, "order": "unstructured-first"})
    with pytest.raises(RecipeError, match="takes two cuts"):
        make(recipe, None)
    first, second = halves(None, recipe, FACTS)
    assert (first.name, second.name) == ("mine-zeros", "mine-experts")
    zeros, removed = make(first, None), make(second, full_stats(second))
    assert not removed.is_slimmed
    assert all(len(layer.keep) == layer.experts for layer in zeros.layers)
    assert [layer.keep for layer in removed.layers] == [
        layer.keep for layer in one.layers
    ]
    slimmed = {layer.sparsity for layer in zeros.layers if layer.keep}
    assert slimmed == {layer.sparsity for layer in one.layers if layer.keep}


def test_the_other_order_works_on_a_pattern_and_a_share() -> None:
    values = {
        "order": "unstructured-first",
        "experts": {"method": "score", "drop": 0.25},
        "slim": {"pattern": "2:4"},
    }
    first, second = halves(None, Recipe.model_validate(values), FACTS)
    assert {layer.sparsity for layer in make(first, None).layers} == {0.0, 0.5}
    shared = {
        "order": "unstructured-first",
        "total_sparsity": 0.4,
        "structured_share": 0.5,
        "experts": {"method": "score"},
    }
    first, second = halves(None, Recipe.model_validate(shared), FACTS)
    assert second.experts.drop == pytest.approx(0.2)
    assert first.slim.sparsity == pytest.approx(0.25, abs=0.07)


def slimmed(**slim: Any) -> CutPlan:
    recipe = Recipe.model_validate({"slim": {"sparsity": 0.5, **slim}})
    return make(recipe, None)


def test_scope_and_exclusions_choose_the_matrices() -> None:
    experts = 37 * PER_EXPERT // 2
    attention, shared, dense = COLS * COLS // 2, ROWS * COLS // 2, ROWS * COLS // 2

    def zeros(**slim: Any) -> int:
        return count_plan(FACTS, slimmed(**slim)).zeros

    assert zeros() == experts
    assert zeros(scope=("experts", "attention")) == experts + 6 * attention
    assert zeros(scope=("attention",)) == 6 * attention
    everything = ("experts", "attention", "shared", "mlp")
    assert zeros(scope=everything) == (experts + 6 * attention + 5 * shared + dense)
    assert zeros(scope=everything, exclude=("shared",)) == (
        experts + 6 * attention + dense
    )
    assert zeros(exclude=("w2",)) == experts * 2 // 3
    with pytest.raises(RecipeError, match="exclude: 'shared' is in no name"):
        slimmed(exclude=("shared",))


def test_what_leaves_with_a_layer_is_not_slimmed() -> None:
    values: dict[str, Any] = {
        "slim": {"sparsity": 0.5, "scope": ["attention", "shared"]},
        "layers": {"drop_moe": [1], "drop_blocks": [2]},
    }
    plan = make(Recipe.model_validate(values), None)
    assert [layer.sparsity for layer in plan.layers] == [0.5, 0.5, 0.0, 0.5, 0.5, 0.5]
    halves_of = 5 * COLS * COLS // 2 + 3 * ROWS * COLS // 2
    assert count_plan(FACTS, plan).zeros == halves_of


def test_patterns_must_fit_the_matrices() -> None:
    plan = slimmed(sparsity=None, pattern="2:4")
    assert {layer.sparsity for layer in plan.layers} == {0.0, 0.5}
    assert plan.group == 4
    with pytest.raises(RecipeError, match=r"layer 1: .*multiple of 8, .*w2 has 12"):
        slimmed(sparsity=None, pattern="4:8")
    fits = slimmed(sparsity=None, pattern="4:8", exclude=("w2",))
    assert count_plan(FACTS, fits).zeros == 37 * ROWS * COLS


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"experts": {"reverse": True}}, "need method: score"),
    ({"experts": {"search": "exhaustive"}}, "need method: score"),
    (
        {"experts": {"method": "score", "search": "exhaustive"}},
        "exhaustive needs criterion: removal-loss",
    ),
    (
        {
            "experts": {
                "method": "score",
                "criterion": "removal-loss",
                "search": "exhaustive",
            }
        },
        "exhaustive needs budget: per-layer or sensitivity",
    ),
    ({"experts": {"protected": {0: [1, 1]}}}, "layer 0 lists an expert twice"),
    ({"experts": {"criterion": "luck"}}, "experts.criterion"),
    ({"slim": {"pattern": "4:2"}}, "n:m with n < m"),
    ({"slim": {"pattern": "2:4", "sparsity": 0.5}}, "sets the sparsity"),
    ({"slim": {"pattern": "2:4", "method": "wanda-variant"}}, "needs pattern: unstr"),
    ({"slim": {"router_weighted": True, "method": "magnitude"}}, "needs method: wanda"),
    ({"slim": {"scope": []}}, "at least one part"),
    ({"slim": {"scope": ["experts", "experts"]}}, "each once"),
    ({"slim": {"exclude": [""]}}, "empty string"),
    ({"total_sparsity": 0.5, "slim": {"pattern": "2:4"}}, "leave out total_sparsity"),
    ({"layers": {"drop_moe": [1], "moe_count": 1}}, "drop_moe or moe_count"),
    ({"layers": {"drop_blocks": [1], "block_count": 1}}, "drop_blocks or block_count"),
    ({"structured_share": 0.5}, "structured_share needs total_sparsity"),
    (
        {"structured_share": 0.5, "total_sparsity": 0.4, "experts": {"drop": 0.1}},
        "not two",
    ),
    (
        {"routing": "redirect", "experts": {"method": "score"}},
        "clusters of method: stun",
    ),
    ({"routing": "preserve", "experts": {"drop": 0.1}}, "needs experts.method: score"),
    (
        {"routing": "preserve", "experts": {"method": "score", "min_experts": 0}},
        "at least one expert per layer",
    ),
    (
        {"order": "unstructured-first", "slim": {"allocation": "owl"}},
        "needs slim.allocation: uniform",
    ),
]


@pytest.mark.parametrize(("values", "says"), REFUSED)
def test_recipes_that_contradict_themselves_are_refused(
    values: dict[str, Any], says: str
) -> None:
    with pytest.raises(RecipeError, match=says) as error:
        parse_recipe(values, "my.yaml")
    assert "\n" not in str(error.value)


def test_experts_of_several_sizes_have_no_other_order() -> None:
    wide = replace(FACTS.layers[1], expert_shapes=((ROWS, 2 * COLS),) * 3)
    facts = replace(FACTS, layers=(wide, *FACTS.layers[1:]))
    recipe = Recipe.model_validate(
        {"order": "unstructured-first", "experts": {"drop": 0.2}}
    )
    with pytest.raises(RecipeError, match="experts of one size"):
        halves(None, recipe, facts)


def test_outliers_of_another_factor_are_refused() -> None:
    recipe, stats = planned("magnitude-owl")
    other = recipe.slim.model_copy(update={"owl_m": 7.0})
    with pytest.raises(PlanError, match=r"counted with M = 3, but slim\.owl_m is 7"):
        make(recipe.model_copy(update={"slim": other}), stats)


@pytest.mark.parametrize(
    ("name", "flags", "expected"),
    [
        ("max-compress", {"drop": 0.3}, {"structured_share": None}),
        ("max-compress", {"keep": 6}, {"structured_share": None}),
        (
            "max-compress",
            {"slim": "none"},
            {"structured_share": 1.0, "total_sparsity": 0.7},
        ),
        ("wanda50", {"total": 0.6}, {"total_sparsity": 0.6}),
        ("stun40-paper", {"total": 0.6}, {"total_sparsity": 0.6}),
    ],
)
def test_a_flag_replaces_the_recipes_own_way_of_saying_it(
    name: str, flags: dict[str, Any], expected: dict[str, Any]
) -> None:
    recipe = with_overrides(load_recipe(name), flags)
    assert {key: getattr(recipe, key) for key in expected} == expected
