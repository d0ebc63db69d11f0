"""Whole plans on a small model whose clusters can be seen in its numbers."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vllm_moe_prune.calibrate.stats import LayerStats, Stats
from vllm_moe_prune.decide.build_plan import make_plan
from vllm_moe_prune.decide.check_plan import check_plan
from vllm_moe_prune.decide.cut_plan import CutPlan, ModelId
from vllm_moe_prune.decide.experts import decide_experts
from vllm_moe_prune.decide.facts import (
    LayerFacts,
    ModelFacts,
    SparsityCount,
    count_plan,
)
from vllm_moe_prune.errors import PlanError, RecipeError
from vllm_moe_prune.recipes.schema import ExpertStage, LayerStage, Recipe, SlimStage

ROWS, COLS = 6, 10
PER_EXPERT = 3 * ROWS * COLS
MODEL = ModelId(model_type="mixtral", fingerprint="f" * 64, source="tiny")
ROUTER = {"coactivation_weight": 0.0, "divide_by_router_norm": False}


def layer_stats(*places: float) -> LayerStats:
    """Experts that stand at these places on a line, in router and weights alike."""
    x_E = np.array(places)
    sqdist_EE = (x_E[:, None] - x_E[None, :]) ** 2
    return LayerStats(
        router_sqdist_EE=sqdist_EE,
        router_norm=np.array(1.0),
        weight_sqdist_EE=sqdist_EE,
    )


def layer_facts(experts: int) -> LayerFacts:
    shapes = ((ROWS, COLS), (ROWS, COLS), (COLS, ROWS))
    if not experts:
        return LayerFacts(num_experts=0, top_k=2, has_moe=False, parameters=500)
    moe = experts * (PER_EXPERT + COLS) + COLS
    return LayerFacts(
        num_experts=experts,
        top_k=2,
        has_moe=True,
        parameters=moe + 300,
        moe_parameters=moe,
        expert_shapes=shapes,
        router_parameters_per_expert=COLS,
    )


def model_facts(*experts: int) -> ModelFacts:
    layers = tuple(layer_facts(count) for count in experts)
    return ModelFacts(MODEL, layers, sum(layer.parameters for layer in layers) + 700)


# Layer 0 is dense. In layer 1 experts 1 and 5 are near, then 3, 0, 2 around 2.0;
# layer 2 is wider apart.
FACTS = model_facts(0, 6, 6)
STATS = Stats(
    fingerprint=MODEL.fingerprint,
    layers={
        1: layer_stats(2.1, 9.0, 2.4, 2.0, 30.0, 9.05),
        2: layer_stats(1.0, 2.0, 4.0, 8.0, 16.0, 32.0),
    },
)


def stun(**stage: Any) -> ExpertStage:
    return ExpertStage(**{**ROUTER, **stage})


def planned(recipe: Recipe, stats: Stats | None = STATS) -> CutPlan:
    plan = make_plan(stats, recipe, FACTS, tool_version="1")
    check_plan(plan, FACTS.layers, MODEL.fingerprint, "plan")
    return plan


def counted(plan: CutPlan, facts: ModelFacts = FACTS) -> SparsityCount:
    return count_plan(facts, plan)


def test_near_experts_merge_and_the_middle_one_stays() -> None:
    layers, threshold = decide_experts(
        STATS, FACTS.layers, Recipe(experts=stun(drop=0.25))
    )
    assert [layer.experts for layer in layers] == [0, 6, 6]
    # 0.05 for 1 and 5, 0.1 for 0 and 3, 0.4 for those and 2: three of twelve.
    assert layers[1].clusters == ((0, 2, 3), (1, 5), (4,))
    assert layers[1].keep == (0, 1, 4)
    assert layers[2].keep == (0, 1, 2, 3, 4, 5)
    assert threshold == pytest.approx(0.4)


def test_survivors_come_in_the_order_of_their_clusters() -> None:
    """By smallest member, not by the id of the member that stays."""
    stats = Stats(
        fingerprint=MODEL.fingerprint, layers={0: layer_stats(1.0, 9.0, 1.2, 1.1)}
    )
    recipe = Recipe(experts=stun(drop=0.5))
    layers, _ = decide_experts(stats, model_facts(4).layers, recipe)
    assert layers[0].clusters == ((0, 2, 3), (1,))
    assert layers[0].keep == (3, 1)


def test_per_layer_budget_removes_the_same_everywhere() -> None:
    plan = planned(Recipe(experts=stun(drop=0.34, budget="per-layer")))
    assert [len(layer.keep) for layer in plan.layers] == [0, 4, 4]
    assert plan.threshold is None


@pytest.mark.parametrize("budget", ["global", "per-layer"])
@pytest.mark.parametrize("stage", [{"drop": 0.0}, {"keep": 6}, {}, {"drop": 0.04}])
def test_nothing_to_remove_needs_no_statistics(
    stage: dict[str, Any], budget: str
) -> None:
    plan = planned(Recipe(experts=stun(budget=budget, **stage)), stats=None)
    assert plan.layers[1].keep == tuple(range(6))
    assert plan.layers[1].clusters == tuple((expert,) for expert in range(6))
    assert not plan.layers[1].reconstruct
    assert plan.threshold is None


def test_method_none_keeps_every_expert() -> None:
    plan = planned(Recipe(experts=ExpertStage(method="none", drop=0.5)), stats=None)
    assert [len(layer.keep) for layer in plan.layers] == [0, 6, 6]


def test_every_layer_can_end_at_the_minimum() -> None:
    plan = planned(Recipe(experts=stun(drop=8 / 12)))
    assert [len(layer.keep) for layer in plan.layers] == [0, 2, 2]
    plan = planned(Recipe(experts=stun(drop=10 / 12, min_experts=1)))
    assert [len(layer.keep) for layer in plan.layers] == [0, 1, 1]


@pytest.mark.parametrize(
    ("reconstruct", "below", "flags"),
    [
        ("selective", 3, [False, True, False]),
        ("selective", 2, [False, False, False]),
        ("selective", 7, [False, True, False]),
        ("always", 3, [False, True, False]),
        ("never", 3, [False, False, False]),
    ],
)
def test_reconstruction_by_clusters_in_the_layer(
    reconstruct: str, below: int, flags: list[bool]
) -> None:
    """Layer 1 is left with two clusters; in layer 2 nothing merges."""
    stage = stun(drop=4 / 12, reconstruct=reconstruct, reconstruct_below=below)
    apart = layer_stats(100.0, 200.0, 300.0, 400.0, 500.0, 600.0)
    stats = replace(STATS, layers={**STATS.layers, 2: apart})
    plan = planned(Recipe(experts=stage), stats)
    assert [len(layer.keep) for layer in plan.layers] == [0, 2, 6]
    assert [layer.reconstruct for layer in plan.layers] == flags


def test_few_experts_without_a_merge_are_not_reconstructed() -> None:
    facts = model_facts(2, 6)
    stats = Stats(
        fingerprint=MODEL.fingerprint,
        layers={0: layer_stats(0.0, 99.0), 1: STATS.layers[1]},
    )
    recipe = Recipe(experts=stun(drop=0.125))
    layers, _ = decide_experts(stats, facts.layers, recipe)
    assert len(layers[0].keep) == 2
    assert not layers[0].reconstruct


def test_dropped_layers_take_no_part_in_the_expert_budget() -> None:
    """``drop`` is a share of the experts in the layers that stay."""
    recipe = Recipe(experts=stun(drop=0.5), layers=LayerStage(drop_moe=(1,)))
    plan = planned(recipe)
    assert plan.layers[1].action == "drop-moe"
    assert plan.layers[1].keep == ()
    assert plan.layers[1].clusters is None
    assert len(plan.layers[2].keep) == 3
    count = counted(plan)
    assert count.expert_parameters_removed == 9 * PER_EXPERT
    assert count.expert_sparsity == 0.75
    assert count.all_parameters_removed == (
        FACTS.layers[1].moe_parameters + 3 * (PER_EXPERT + COLS)
    )


def test_dropped_blocks_are_gone_as_a_whole() -> None:
    plan = planned(Recipe(layers=LayerStage(drop_blocks=(0, 2))), stats=None)
    assert [layer.action for layer in plan.layers] == [
        "drop-block",
        "keep",
        "drop-block",
    ]
    count = counted(plan)
    assert count.expert_sparsity == 0.5
    assert count.all_parameters_removed == 500 + FACTS.layers[2].parameters


def test_redirect_keeps_the_router_rows() -> None:
    experts = stun(drop=0.25)
    dropped = counted(planned(Recipe(experts=experts)))
    redirected = counted(planned(Recipe(experts=experts, routing="redirect")))
    assert dropped.all_parameters_removed - redirected.all_parameters_removed == (
        3 * COLS
    )
    assert dropped.expert_sparsity == redirected.expert_sparsity


def test_total_sparsity_is_reached_and_not_by_far() -> None:
    recipe = Recipe(total_sparsity=0.4, experts=stun(drop=0.2))
    plan = planned(recipe)
    sparsity = {layer.sparsity for layer in plan.layers if layer.keep}
    # 864 of 2,160 are to go, 2 experts take 360: 504 zeros in 10 experts. At 0.3 an
    # expert has 6*3 + 6*3 + 10*1 = 46 zeros, too few; the next step is 2 of 6.
    assert sparsity == {1 / 3}
    assert plan.layers[0].sparsity == 0.0
    count = counted(plan)
    assert count.expert_sparsity >= 0.4
    assert count.zeros == 560
    assert counted(_at(plan, 0.333)).expert_sparsity < 0.4


def _at(plan: CutPlan, sparsity: float) -> CutPlan:
    layers = tuple(
        layer.model_copy(update={"sparsity": sparsity}) for layer in plan.layers
    )
    return plan.model_copy(update={"layers": layers})


def test_total_sparsity_of_all_parameters() -> None:
    recipe = Recipe(total_sparsity=0.4, sparsity_of="all", experts=stun(drop=0.2))
    count = counted(planned(recipe))
    assert count.total_sparsity >= 0.4
    assert count.expert_sparsity > count.total_sparsity


def test_magnitude_meets_the_total_to_one_weight_per_matrix() -> None:
    recipe = Recipe(
        total_sparsity=0.4,
        experts=stun(drop=0.2),
        slim=SlimStage(method="magnitude"),
    )
    count = counted(planned(recipe))
    gone = count.expert_parameters_removed + count.zeros
    assert 0 <= gone - 0.4 * count.expert_parameters <= 10 * 3


def test_an_explicit_sparsity_is_taken_as_it_is() -> None:
    plan = planned(Recipe(slim=SlimStage(sparsity=0.37)), stats=None)
    assert plan.layers[1].sparsity == 0.37
    assert counted(plan).zeros == 12 * (6 * 3 + 6 * 3 + 10 * 2)
    none = planned(Recipe(slim=SlimStage(method="none", sparsity=0.37)), stats=None)
    assert not none.is_slimmed
    assert counted(none).zeros == 0


def test_structured_only_total_may_be_rounded_to_whole_experts() -> None:
    recipe = Recipe(
        total_sparsity=0.3, experts=stun(drop=0.3), slim=SlimStage(method="none")
    )
    plan = planned(recipe)
    assert counted(plan).expert_sparsity == 4 / 12
    assert not plan.is_slimmed


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (
            Recipe(total_sparsity=0.2, experts=stun(drop=0.5)),
            "alone takes 1,080 .* remove less",
        ),
        (
            Recipe(total_sparsity=0.4, experts=stun(keep=3)),
            "alone takes 1,080",
        ),
        (
            Recipe(total_sparsity=0.4, layers=LayerStage(drop_moe=(1,))),
            "alone takes 1,080",
        ),
        (
            Recipe(total_sparsity=0.99, sparsity_of="all", experts=stun(drop=0.5)),
            "but the surviving experts have 1,080 weights",
        ),
        (
            Recipe(
                total_sparsity=0.4,
                experts=stun(drop=0.25),
                slim=SlimStage(method="none"),
            ),
            "needs 324 more parameters gone .* set slim.method: wanda",
        ),
    ],
)
def test_totals_that_cannot_be_met(recipe: Recipe, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        planned(recipe)


def test_statistics_must_be_there_and_fit() -> None:
    recipe = Recipe(experts=stun(drop=0.25))
    with pytest.raises(PlanError, match="layer 1: there are no statistics"):
        planned(recipe, stats=None)
    with pytest.raises(PlanError, match="statistics are of another model"):
        planned(recipe, stats=replace(STATS, fingerprint="0" * 64))
    layers = {**STATS.layers, 2: layer_stats(1.0, 2.0, 3.0)}
    with pytest.raises(PlanError, match="layer 2: the statistics are of 3 experts"):
        planned(recipe, stats=replace(STATS, layers=layers))
    bare = replace(STATS.layers[1], weight_sqdist_EE=None)
    with pytest.raises(PlanError, match="layer 1: the statistics lack its expert dist"):
        planned(recipe, stats=replace(STATS, layers={**STATS.layers, 1: bare}))


def test_a_plan_records_what_it_is_for() -> None:
    recipe = Recipe(name="mine", total_sparsity=0.4, experts=stun(drop=0.2))
    plan = planned(recipe)
    assert plan.tool_version == "1"
    assert plan.model == MODEL
    assert plan.recipe == recipe
    assert plan.slim == "wanda"
    assert plan.predicted is None
    assert plan == planned(recipe), "the same again"


def test_a_model_without_experts_counts_nothing() -> None:
    facts = model_facts(0, 0)
    plan = make_plan(None, Recipe(experts=stun(drop=0.2)), facts, tool_version="1")
    assert counted(plan, facts).expert_sparsity == 0.0
