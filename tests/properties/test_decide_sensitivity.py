"""The split by measured loss is the best of all splits, and exact."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_prune.calibrate.stats import Stats
from vllm_moe_prune.decide.experts import decide_experts, remove_counts
from vllm_moe_prune.decide.sensitivity import loss_curves, rule, split_by_loss
from vllm_moe_prune.decide.similarity import Array
from vllm_moe_prune.errors import PlanError, RecipeError
from vllm_moe_prune.recipes.schema import ExpertStage, Recipe

from .test_decide_toy import SEEDS, toy_facts, toy_stats

CURVES = st.lists(
    st.lists(st.integers(-3, 5), min_size=1, max_size=5), min_size=1, max_size=4
)


@given(CURVES, st.data())
def test_the_split_is_the_best_of_all_with_ties_to_the_lowest_layers(
    curves: list[list[int]], data: st.DataObject
) -> None:
    """Curves need not be convex, nor rise."""
    target = data.draw(st.integers(0, sum(len(curve) - 1 for curve in curves)))
    arrays = {2 * at: np.array(curve, dtype=float) for at, curve in enumerate(curves)}
    found = split_by_loss(arrays, target)
    every = itertools.product(*(range(len(curve)) for curve in curves))
    best = min(
        (split for split in every if sum(split) == target),
        key=lambda split: (
            sum(curve[count] for curve, count in zip(curves, split, strict=True)),
            [-count for count in split],
        ),
    )
    assert tuple(found.values()) == best
    assert list(found) == list(arrays)


def test_a_sensitive_layer_is_left_alone() -> None:
    """As seen on a 48-expert model whose first layer is very sensitive."""
    curves = {0: np.array([2.6, 3.4, 4.0]), 1: np.linspace(2.6, 2.63, 25)}
    assert split_by_loss(curves, 24) == {0: 0, 1: 24}


def test_many_layers_of_many_experts_are_split_in_no_time() -> None:
    """61 layers of 256 experts, half to go."""
    rng = np.random.default_rng(0)
    curves: dict[int, Array] = {
        at: rng.random(249).cumsum() ** rng.uniform(1, 2) for at in range(61)
    }
    assert sum(split_by_loss(curves, 7000).values()) == 7000


def test_more_than_was_measured_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"remove 5 experts, but .* for 4 only"):
        split_by_loss({0: np.zeros(3), 1: np.zeros(3)}, 5)


def measured(seed: int, counts: list[int], recipe: Recipe, points: int) -> Stats:
    """The toy's statistics with a random curve for every layer."""
    rng = np.random.default_rng(seed)
    stats = toy_stats(rng, *counts)
    layers = {}
    for at, layer in stats.layers.items():
        removed = np.unique(np.linspace(0, counts[at] - 1, points).astype(int))
        loss = 2.0 + rng.random(len(removed)).cumsum()
        layers[at] = replace(layer, sensitivity_P2=np.stack([removed, loss], 1))
    return replace(stats, layers=layers, sensitivity={"rule": rule(recipe)})


@settings(max_examples=40)
@given(
    seed=SEEDS,
    counts=st.lists(st.integers(2, 8), min_size=1, max_size=4),
    method=st.sampled_from(["stun", "score"]),
    points=st.integers(2, 5),
    data=st.data(),
)
def test_every_method_meets_a_budget_by_sensitivity(
    seed: int, counts: list[int], method: str, points: int, data: st.DataObject
) -> None:
    target = data.draw(st.integers(0, sum(count - 2 for count in counts)))
    stage = ExpertStage.model_validate(
        {"method": method, "budget": "sensitivity", "drop": target / sum(counts)}
    )
    recipe = Recipe(experts=stage)
    facts = toy_facts(*counts)
    stats = measured(seed, counts, recipe, points)
    plans, threshold = decide_experts(stats, facts.layers, recipe)
    assert threshold is None
    assert sum(plan.experts - len(plan.keep) for plan in plans) == target
    assert all(len(plan.keep) >= 2 for plan in plans)
    most = {at: count - 2 for at, count in enumerate(counts)}
    split = split_by_loss(loss_curves(stats, recipe, most), target)
    assert [plan.experts - len(plan.keep) for plan in plans] == list(split.values())


def test_curves_are_linear_between_their_points() -> None:
    recipe = Recipe(experts=ExpertStage(budget="sensitivity", drop=0.1))
    stats = measured(0, [9], recipe, 3)
    points = np.array([[0.0, 2.0], [4.0, 3.0], [6.0, 7.0]])
    layer = replace(stats.layers[0], sensitivity_P2=points)
    stats = replace(stats, layers={0: layer})
    curve = loss_curves(stats, recipe, {0: 5})[0]
    assert curve.tolist() == [2.0, 2.25, 2.5, 2.75, 3.0, 5.0]
    assert len(loss_curves(stats, recipe, {0: 8})[0]) == 7, "no further than measured"


def test_curves_hold_for_one_rule() -> None:
    asked = Recipe(experts=ExpertStage(budget="sensitivity", drop=0.25))
    stats = measured(0, [6, 6], asked, 3)
    facts = toy_facts(6, 6)
    other_budget = asked.experts.model_copy(update={"drop": 0.5, "min_experts": 1})
    decide_experts(stats, facts.layers, Recipe(experts=other_budget))
    other_rule = asked.experts.model_copy(update={"representative": "reap"})
    with pytest.raises(PlanError, match="measured by another rule"):
        decide_experts(stats, facts.layers, Recipe(experts=other_rule))
    with pytest.raises(PlanError, match="lack the layers' sensitivity"):
        decide_experts(replace(stats, sensitivity={}), facts.layers, asked)
    for points in ([[1.0, 2.0]], [[0.0, 2.0], [0.0, 3.0]], [0.0, 1.0], []):
        layer = replace(stats.layers[1], sensitivity_P2=np.array(points))
        bad = replace(stats, layers={**stats.layers, 1: layer})
        with pytest.raises(PlanError, match="layer 1: sensitivity"):
            decide_experts(bad, facts.layers, asked)


@settings(max_examples=30)
@given(
    seed=SEEDS,
    method=st.sampled_from(["stun", "score"]),
    linkage=st.sampled_from(["complete", "reference"]),
    data=st.data(),
)
def test_one_layer_alone_loses_what_a_curve_is_measured_with(
    seed: int, method: str, linkage: str, data: st.DataObject
) -> None:
    """And more removals remove the same experts and one more (true linkage, scores)."""
    counts = [6, 0, 7, 5]
    layer = data.draw(st.sampled_from([0, 2, 3]))
    stage = ExpertStage.model_validate({"method": method, "linkage": linkage})
    recipe, facts = Recipe(experts=stage), toy_facts(*counts)
    stats = toy_stats(np.random.default_rng(seed), *counts)
    before: set[tuple[int, ...]] = set()
    for removed in range(counts[layer]):
        plans = remove_counts(stats, facts.layers, recipe, {layer: removed})
        for plan in plans:
            gone = plan.experts - len(plan.keep)
            assert gone == (removed if plan.layer == layer else 0)
        clusters = set(plans[layer].clusters or ())
        if method == "stun" and linkage == "complete" and removed:
            assert len(before - clusters) == 2, "two clusters became one"
        before = clusters
