"""Super-experts: found as the paper says, and kept by every method."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_prune.calibrate.stats import Stats
from vllm_moe_prune.decide.build_plan import make_plan
from vllm_moe_prune.decide.sensitivity import rule
from vllm_moe_prune.decide.super_experts import super_experts
from vllm_moe_prune.errors import PlanError, RecipeError
from vllm_moe_prune.recipes.schema import Recipe, parse_recipe

from .test_decide_toy import toy_facts, toy_stats

SIZES = (6, 0, 5, 6, 4)
SCORE = {"method": "score", "protect": "super", "drop": 0.4}


def naive(maxima: dict[int, list[float]]) -> dict[int, tuple[int, ...]]:
    """By sorting and counting, one expert at a time."""
    every = sorted(value for values in maxima.values() for value in values)
    at = 0.995 * (len(every) - 1)
    low, part = int(at), at - int(at)
    high = min(low + 1, len(every) - 1)
    percentile = every[low] + part * (every[high] - every[low])
    first = sorted(maxima)[: len(maxima) * 3 // 4]
    found = {
        layer: tuple(
            expert
            for expert, value in enumerate(maxima[layer])
            if value > percentile and value > every[-1] / 10
        )
        for layer in first
    }
    return {layer: experts for layer, experts in found.items() if experts}


@settings(max_examples=200)
@given(
    st.dictionaries(
        st.integers(0, 9),
        st.lists(st.integers(0, 1000), min_size=1, max_size=120),
        min_size=1,
        max_size=8,
    )
)
def test_super_experts_are_those_of_the_definition(
    maxima: dict[int, list[int]],
) -> None:
    values = {layer: [float(one) for one in each] for layer, each in maxima.items()}
    found = super_experts({layer: np.array(each) for layer, each in values.items()})
    assert found == naive(values)


def toy(massive: dict[int, int]) -> Stats:
    """Statistics in which some experts alone have huge outputs, and low scores."""
    stats = toy_stats(np.random.default_rng(0), *SIZES)
    layers = dict(stats.layers)
    for layer, expert in massive.items():
        values = {
            name: getattr(layers[layer], name).copy()
            for name in ("activation_max_E", "weighted_norm_sum_E")
        }
        values["activation_max_E"][expert] = 1e4 + layer
        values["weighted_norm_sum_E"][expert] = 0.0
        layers[layer] = replace(layers[layer], **values)
    return replace(stats, layers=layers)


def asking(experts: dict[str, Any], **options: Any) -> Recipe:
    return parse_recipe({"experts": experts, "slim": {"method": "none"}} | options, "x")


@pytest.mark.parametrize(
    "experts",
    [
        SCORE,
        SCORE | {"budget": "per-layer"},
        {"method": "stun", "protect": "super", "drop": 0.4},
        SCORE
        | {"search": "exhaustive", "criterion": "removal-loss", "budget": "per-layer"},
    ],
    ids=["global", "per-layer", "stun", "exhaustive"],
)
@pytest.mark.parametrize("massive", [0, 3, 5])
def test_a_super_expert_stays_whatever_its_score(
    experts: dict[str, Any], massive: int
) -> None:
    stats, facts = toy({0: massive}), toy_facts(*SIZES)
    recipe = asking(experts)
    plan = make_plan(stats, recipe, facts, tool_version="")
    assert plan.super_experts == {0: (massive,)}
    assert massive in plan.layers[0].keep
    assert plan.recipe == recipe
    free = make_plan(
        stats, asking(experts | {"protect": "none"}), facts, tool_version=""
    )
    assert free.super_experts == {}
    kept = [sum(len(layer.keep) for layer in one.layers) for one in (plan, free)]
    assert kept[0] == kept[1]
    if experts["method"] == "score" and "search" not in experts:
        assert massive not in free.layers[0].keep


def test_its_layer_is_not_chosen_to_leave_but_leaves_if_listed() -> None:
    stats, facts = toy({0: 2}), toy_facts(*SIZES)
    chosen = make_plan(
        stats, asking(SCORE, layers={"moe_count": 3}), facts, tool_version=""
    )
    assert chosen.layers[0].action == "keep"
    listed = make_plan(
        stats, asking(SCORE, layers={"drop_moe": [0]}), facts, tool_version=""
    )
    assert listed.layers[0].action == "drop-moe"


def test_nothing_is_asked_where_no_expert_leaves() -> None:
    recipe = asking({"method": "none", "protect": "super"})
    assert make_plan(None, recipe, toy_facts(*SIZES), tool_version="").layers
    bare = toy({0: 1})
    layers = {
        at: replace(layer, activation_max_E=None) for at, layer in bare.layers.items()
    }
    with pytest.raises(PlanError, match="lack its activation_max_E"):
        make_plan(
            replace(bare, layers=layers),
            asking(SCORE),
            toy_facts(*SIZES),
            tool_version="",
        )


def test_curves_of_unprotected_experts_are_of_another_rule() -> None:
    plain = asking(SCORE | {"protect": "none"})
    assert "protect" not in rule(plain).replace("protected", "")
    assert rule(asking(SCORE)) != rule(plain)


def test_too_many_protected_experts_are_told() -> None:
    with pytest.raises(RecipeError, match="or protect fewer"):
        make_plan(
            toy({0: 1}),
            asking(SCORE | {"drop": 0.99, "min_experts": 0}),
            toy_facts(*SIZES),
            tool_version="",
        )
