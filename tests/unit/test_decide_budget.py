"""Budgets are met exactly, or refused with the numbers."""

from typing import Any

import pytest

from tests.shapes import Shape
from vllm_moe_prune.decide.budget import (
    Budget,
    fewest_experts,
    global_target,
    layer_targets,
    most_removed,
    spend_global,
    whole_experts,
)
from vllm_moe_prune.decide.clusters import Merge
from vllm_moe_prune.errors import RecipeError
from vllm_moe_prune.recipes.schema import ExpertStage

MIXTRAL = {layer: Shape() for layer in range(4)}
UNEVEN = {0: Shape(8), 2: Shape(5), 3: Shape(2)}


@pytest.mark.parametrize(
    ("share", "experts", "whole"),
    [(0.0, 8, 0), (0.5, 3, 2), (0.2, 32, 6), (0.145, 100, 15), (0.35, 10, 4)],
)
def test_shares_round_half_up(share: float, experts: int, whole: int) -> None:
    assert whole_experts(share, experts) == whole


def test_a_layer_keeps_top_k_experts_unless_told_otherwise() -> None:
    assert fewest_experts(0, Shape(8, 2), ExpertStage()) == 2
    assert fewest_experts(0, Shape(8, 2), ExpertStage(min_experts=1)) == 1
    assert fewest_experts(0, Shape(8, 2), ExpertStage(min_experts=5)) == 5
    assert fewest_experts(0, Shape(1, 2), ExpertStage()) == 1, "it has no more"


def test_the_cap_limits_what_a_layer_loses() -> None:
    assert most_removed(0, Shape(), ExpertStage()) == 6
    assert most_removed(0, Shape(), ExpertStage(max_removed=3)) == 3
    assert most_removed(0, Shape(), ExpertStage(max_removed=7)) == 6
    assert most_removed(0, Shape(), ExpertStage(max_removed=0)) == 0
    assert most_removed(0, Shape(1), ExpertStage()) == 0


def test_global_targets() -> None:
    assert global_target(MIXTRAL, ExpertStage(drop=0.2)) == 6
    assert global_target(MIXTRAL, ExpertStage(keep=6)) == 8
    assert global_target(MIXTRAL, ExpertStage(keep=8)) == 0
    assert global_target(MIXTRAL, ExpertStage()) == 0
    assert global_target(MIXTRAL, ExpertStage(drop=0.75)) == 24, "all at the minimum"
    assert global_target(UNEVEN, ExpertStage(keep=4)) == 3, "a mean"
    assert global_target({}, ExpertStage(drop=0.5)) == 0


def test_per_layer_targets_round_in_each_layer() -> None:
    stage = ExpertStage(drop=0.3, budget="per-layer")
    assert layer_targets({0: Shape(8), 2: Shape(5)}, stage) == {0: 2, 2: 2}
    stage = ExpertStage(keep=5, budget="per-layer")
    assert layer_targets({0: Shape(8), 2: Shape(5)}, stage) == {0: 3, 2: 0}
    assert layer_targets(UNEVEN, ExpertStage(budget="per-layer")) == {0: 0, 2: 0, 3: 0}


REFUSED_GLOBAL = [
    (
        {"drop": 0.9},
        "asked to remove 29 of 32 experts, but with at least 2 per layer only 24 can "
        "go. Lower experts.drop, or set experts.min_experts: 1 to allow layers with "
        "fewer experts than top-k.",
    ),
    (
        {"drop": 0.9, "min_experts": 3},
        "asked to remove 29 of 32 experts, but with at least 3 per layer only 20 can "
        "go. Lower experts.drop, or lower experts.min_experts.",
    ),
    (
        {"drop": 0.99, "min_experts": 1},
        "asked to remove 32 of 32 experts, but with at least 1 per layer only 28 can "
        "go. Lower experts.drop.",
    ),
    (
        {"keep": 4, "max_removed": 2},
        "asked to remove 16 of 32 experts, but with at least 2 per layer and at most 2 "
        "removed from each only 8 can go. Raise experts.keep, raise "
        "experts.max_removed.",
    ),
    (
        {"drop": 0.2, "max_removed": 0},
        "asked to remove 6 of 32 experts, but with at least 2 per layer and at most 0 "
        "removed from each only 0 can go. Lower experts.drop, raise "
        "experts.max_removed.",
    ),
    (
        {"keep": 1},
        "keep 1 experts per layer, but top-k is 2. Keep at least 2, or set "
        "experts.min_experts: 1 to allow layers with fewer experts than top-k.",
    ),
    (
        {"keep": 2, "min_experts": 3},
        "keep 2 experts per layer, but experts.min_experts is 3. Keep at least 3, or "
        "lower experts.min_experts.",
    ),
    (
        {"keep": 9},
        "keep 9 experts per layer, but the layers have 8 on average. "
        "Lower experts.keep.",
    ),
]


@pytest.mark.parametrize(("stage", "says"), REFUSED_GLOBAL)
def test_impossible_global_budgets(stage: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError) as error:
        global_target(MIXTRAL, ExpertStage(**stage))
    assert str(error.value) == says


REFUSED_PER_LAYER = [
    (
        {"keep": 1},
        "keep 1 experts per layer, but top-k is 2. Keep at least 2, or set "
        "experts.min_experts: 1 to allow layers with fewer experts than top-k.",
    ),
    (
        {"drop": 0.9},
        "layer 0: drop 0.9 keeps 1 of 8 experts, but top-k is 2. Lower experts.drop, "
        "or set experts.min_experts: 1 to allow layers with fewer experts than top-k.",
    ),
    (
        {"drop": 0.99, "min_experts": 1},
        "layer 0: drop 0.99 keeps 0 of 8 experts, but experts.min_experts is 1. "
        "Lower experts.drop.",
    ),
    (
        {"keep": 9},
        "layer 0: keep 9 experts, but it has 8. Lower experts.keep, or use budget: "
        "global.",
    ),
    (
        {"drop": 0.5, "max_removed": 3},
        "layer 0: drop 0.5 keeps 4 of 8 experts, that is 4 fewer, but "
        "experts.max_removed is 3. Remove fewer, or raise experts.max_removed.",
    ),
]


@pytest.mark.parametrize(("stage", "says"), REFUSED_PER_LAYER)
def test_impossible_per_layer_budgets(stage: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError) as error:
        layer_targets(MIXTRAL, ExpertStage(budget="per-layer", **stage))
    assert str(error.value) == says


def test_a_per_layer_drop_may_not_undercut_top_k_in_one_small_layer() -> None:
    with pytest.raises(RecipeError, match=r"layer 3: drop 0\.4 keeps 1 of 2 experts"):
        layer_targets(UNEVEN, ExpertStage(drop=0.4, budget="per-layer"))


def sequence(*heights: float) -> list[Merge]:
    return [Merge(height, 0, at + 1) for at, height in enumerate(heights)]


def test_the_lowest_merges_of_the_model_are_taken() -> None:
    sequences = {0: sequence(0.1, 0.5, 0.6), 4: sequence(0.2, 0.3, 0.9)}
    most = {0: 3, 4: 3}
    assert spend_global(sequences, most, 3) == Budget({0: 1, 4: 2}, 0.3)
    assert spend_global(sequences, most, 6) == Budget({0: 3, 4: 3}, 0.9)
    assert spend_global(sequences, most, 0) == Budget({0: 0, 4: 0}, None)


def test_a_capped_layer_leaves_the_rest_to_the_others() -> None:
    sequences = {0: sequence(0.1, 0.2, 0.3), 1: sequence(0.7, 0.8, 0.9)}
    assert spend_global(sequences, {0: 1, 1: 3}, 3) == Budget({0: 1, 1: 2}, 0.8)
    assert spend_global(sequences, {0: 0, 1: 3}, 1) == Budget({0: 0, 1: 1}, 0.7)


def test_equal_heights_go_to_the_lower_layer_first() -> None:
    sequences = {layer: sequence(1.0, 1.0) for layer in (7, 2, 5)}
    most = dict.fromkeys(sequences, 2)
    assert spend_global(sequences, most, 3).steps == {2: 2, 5: 1, 7: 0}
