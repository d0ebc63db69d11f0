"""Defects and traps of published code, one test each.

Those of reading, running and serving have their tests beside that code.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from vllm_moe_prune.calibrate.stats import LayerStats, Stats
from vllm_moe_prune.decide.build_plan import make_plan
from vllm_moe_prune.decide.check_plan import check_plan
from vllm_moe_prune.decide.cut_plan import CutPlan, LayerPlan, ModelId
from vllm_moe_prune.decide.experts import decide_experts
from vllm_moe_prune.decide.facts import (
    LayerFacts,
    Matrix,
    ModelFacts,
    count_plan,
    left_matrices,
)
from vllm_moe_prune.decide.layer_drop import decide_layers
from vllm_moe_prune.decide.scores import expert_scores
from vllm_moe_prune.decide.zeros import slimming_of
from vllm_moe_prune.errors import PlanError, RecipeError
from vllm_moe_prune.recipes.schema import ExpertStage, LayerStage, Recipe, SlimStage

FINGERPRINT = "f" * 64


@dataclass(frozen=True)
class Shape:
    num_experts: int
    top_k: int = 2
    has_moe: bool = True
    groups: tuple[int, ...] | None = None
    group_floor: int = 1
    mtp: bool = False
    width: int | None = None


def shapes(*experts: int) -> list[Shape]:
    """0 experts: a dense layer, or one whose MoE went in an earlier cut."""
    return [Shape(count, has_moe=count > 0) for count in experts]


def scored(*layers: list[float]) -> Stats:
    """Total output of every expert; an empty list has no experts."""
    found = {
        at: LayerStats(weighted_norm_sum_E=np.array(scores, dtype=float))
        for at, scores in enumerate(layers)
        if scores
    }
    return Stats(fingerprint=FINGERPRINT, layers=found)


def dropping(**values: Any) -> Recipe:
    values = {"method": "score", "criterion": "total-output", **values}
    return Recipe(experts=ExpertStage.model_validate(values))


def kept(stats: Stats, layers: list[Shape], recipe: Recipe) -> list[tuple[int, ...]]:
    return [plan.keep for plan in decide_experts(stats, layers, recipe)[0]]


def test_defect_4_a_kept_norm_is_kept_in_the_output_too() -> None:
    """The norm's switch changed only the metric; the export dropped the norm anyway."""
    layers = {
        0: LayerStats(
            tokens=np.array(2.0),
            moe_cosine_sum=np.array(1.0),
            moe_only_cosine_sum=np.array(0.1),
        ),
        1: LayerStats(
            tokens=np.array(2.0),
            moe_cosine_sum=np.array(0.5),
            moe_only_cosine_sum=np.array(0.2),
        ),
    }
    stats, model = Stats(fingerprint=FINGERPRINT, layers=layers), shapes(4, 4)
    with_norm = Recipe(layers=LayerStage(moe_count=1))
    assert decide_layers(stats, model, with_norm) == ["drop-moe", "keep"]
    without = Recipe(layers=LayerStage(moe_count=1, moe_norm="keep"))
    assert decide_layers(stats, model, without) == ["keep", "drop-moe-keep-norm"]
    listed = Recipe(layers=LayerStage(drop_moe=(0,), moe_norm="keep"))
    assert decide_layers(None, model, listed) == ["drop-moe-keep-norm", "keep"]


def test_defect_4_the_norm_that_stays_is_counted() -> None:
    moe = 4 * 3 * 32 + 4 * 8 + 8
    layer = LayerFacts(
        num_experts=4,
        top_k=2,
        has_moe=True,
        parameters=moe + 100,
        moe_parameters=moe,
        expert_shapes=((4, 8), (4, 8), (8, 4)),
        router_parameters_per_expert=8,
        moe_norm_parameters=8,
    )
    model = ModelId(model_type="mixtral", fingerprint=FINGERPRINT, source="toy")
    facts = ModelFacts(model, (layer, layer), 2 * layer.parameters)
    gone = {}
    for norm in ("drop", "keep"):
        stage = LayerStage.model_validate({"drop_moe": (1,), "moe_norm": norm})
        plan = make_plan(None, Recipe(layers=stage), facts, tool_version="1")
        gone[norm] = count_plan(facts, plan).all_parameters_removed
    assert gone == {"drop": moe, "keep": moe - 8}


def test_defect_5_a_run_of_blocks_is_not_compared_one_step_too_far() -> None:
    """Blocks 0 and 1 turn the hidden state and back: 0 -> 2 is the nearest pair."""
    cosine_HH = np.full((5, 5), 0.5)
    cosine_HH[0, 2] = 0.9  # the run of blocks 0 and 1
    cosine_HH[1, 4] = 1.0  # three blocks, which the reference would read for 1 and 2
    stats = Stats(fingerprint=FINGERPRINT, layers={}, block_cosine_HH=cosine_HH)
    stage = LayerStage(block_count=2, block_mode="consecutive")
    actions = decide_layers(stats, shapes(4, 4, 4, 4), Recipe(layers=stage))
    assert actions == ["drop-block", "drop-block", "keep", "keep"]


def test_defect_6_layers_with_nothing_to_drop_disturb_no_other() -> None:
    """Each layer is decided by its own statistics."""
    recipe = dropping(drop=0.3, budget="per-layer")
    stats = scored([5, 1, 4, 3, 2, 6], [1, 2], [], [1, 9, 2, 8, 3, 7])
    layers = shapes(6, 2, 0, 6)
    with pytest.raises(RecipeError, match=r"layer 1: drop 0\.3 keeps 1 of 2"):
        kept(stats, layers, recipe)
    found = kept(stats, layers, dropping(drop=0.2, budget="per-layer"))
    assert found == [(0, 2, 3, 4, 5), (0, 1), (), (1, 2, 3, 4, 5)]


def test_defect_7_dropping_nothing_globally_keeps_everyone() -> None:
    found = kept(scored([2, 1, 3], [], [1, 1, 1]), shapes(3, 0, 3), dropping(drop=0.0))
    assert found == [(0, 1, 2), (), (0, 1, 2)]


def test_defect_7_dense_layers_shift_nobodys_scores() -> None:
    stats = scored([], [9, 1, 8, 7], [], [6, 5, 0, 4])
    assert kept(stats, shapes(0, 4, 0, 4), dropping(drop=0.25)) == [
        (),
        (0, 2, 3),
        (),
        (0, 1, 3),
    ]


def test_defect_8_global_dropping_goes_on_after_layers_were_lost() -> None:
    """A layer without MoE, from an earlier cut or dropped now, enters no offset."""
    stats = scored([9, 1, 8, 7], [1, 1, 1, 1], [6, 5, 0, 4])
    recipe = dropping(drop=0.25).model_copy(
        update={"layers": LayerStage(drop_moe=(1,))}
    )
    assert kept(stats, shapes(4, 4, 4), recipe) == [(0, 2, 3), (), (0, 1, 3)]
    earlier = scored([9, 1, 8, 7], [], [6, 5, 0, 4])
    assert kept(earlier, shapes(4, 0, 4), dropping(drop=0.25)) == [
        (0, 2, 3),
        (),
        (0, 1, 3),
    ]


def test_defect_11_layer_drop_works_on_a_model_that_lost_layers_before() -> None:
    layers = {
        at: LayerStats(tokens=np.array(1.0), moe_cosine_sum=np.array(value))
        for at, value in {0: 0.3, 2: 0.9, 3: 0.5}.items()
    }
    stats = Stats(fingerprint=FINGERPRINT, layers=layers)
    recipe = Recipe(layers=LayerStage(moe_count=2))
    actions = decide_layers(stats, shapes(4, 0, 4, 4), recipe)
    assert actions == ["keep", "keep", "drop-moe", "drop-moe"]
    with pytest.raises(RecipeError, match="moe_count: asks for 4, but only 3 can go"):
        decide_layers(stats, shapes(4, 0, 4, 4), Recipe(layers=LayerStage(moe_count=4)))


def test_defect_15_equal_scores_leave_by_index() -> None:
    stats = scored([1, 1, 1, 1], [1, 1, 1, 1])
    assert kept(stats, shapes(4, 4), dropping(drop=0.375)) == [(2, 3), (1, 2, 3)]


def test_defect_17_experts_without_tokens_score_zero_and_go_first() -> None:
    stats = LayerStats(
        tokens=np.array(10.0),
        routed_E=np.array([4.0, 0.0, 6.0]),
        weighted_norm_sum_E=np.array([8.0, 0.0, 3.0]),
    )
    score_E = expert_scores(stats, "reap", layer=0, experts=3)
    assert score_E.tolist() == [2.0, 0.0, 0.5]


def test_defect_2_the_router_is_no_part_that_can_be_slimmed() -> None:
    with pytest.raises(ValueError, match="scope"):
        SlimStage.model_validate({"scope": ("experts", "router")})
    attention = Matrix("self_attn.q_proj.weight", "attention", 4, 4)
    layer = LayerFacts(
        num_experts=2,
        top_k=1,
        has_moe=True,
        parameters=500,
        moe_parameters=400,
        expert_shapes=((4, 8),),
        others=(attention,),
        expert_names=("w1",),
    )
    plan = LayerPlan(layer=0, experts=2, keep=(0, 1))
    every = Recipe.model_validate(
        {"slim": {"scope": ("experts", "attention", "shared", "mlp")}}
    )
    slimming = slimming_of(every)
    taken = {m.name for m, _ in left_matrices(layer, plan) if slimming.takes(m)}
    assert taken == {"w1", "self_attn.q_proj.weight"}


def test_trap_6_top_k_is_the_fewest_a_layer_keeps() -> None:
    stats = scored([1, 2, 3, 4], [9, 9, 9, 9])
    layers = [Shape(4, 3), Shape(4, 3)]
    assert kept(stats, layers, dropping(drop=0.25)) == [(1, 2, 3), (1, 2, 3)]
    with pytest.raises(RecipeError, match="at least 3 per layer only 2 can go"):
        kept(stats, layers, dropping(drop=0.5))


def test_trap_10_a_greedy_global_budget_empties_no_layer() -> None:
    stats = scored([1, 1, 1, 1], [8, 9, 8, 9])
    assert kept(stats, shapes(4, 4), dropping(drop=0.5)) == [(2, 3), (1, 3)]
    one = kept(stats, shapes(4, 4), dropping(drop=0.5, min_experts=1))
    assert one == [(3,), (1, 2, 3)]


def test_trap_10_a_layer_is_emptied_only_where_that_was_allowed() -> None:
    """Then its MoE goes and the norm stays: what UNIFIED exports for it."""
    stats = scored([1, 1, 1, 1], [8, 9, 8, 9])
    recipe = dropping(drop=0.5, min_experts=0)
    plans, threshold = decide_experts(stats, shapes(4, 4), recipe)
    assert [plan.action for plan in plans] == ["drop-moe-keep-norm", "keep"]
    assert plans[0].keep == ()
    assert threshold == 1.0
    with pytest.raises(RecipeError, match="no layer would be left with experts"):
        decide_experts(stats, shapes(4, 4), dropping(drop=0.99, min_experts=0))
    clusters = Recipe(experts=ExpertStage(drop=0.99, min_experts=0))
    with pytest.raises(RecipeError, match="at least 1 per layer only 6 can go"):
        decide_experts(stats, shapes(4, 4), clusters)


def test_trap_7_reap_reads_the_weights_as_the_model_applies_them() -> None:
    """Renormalized or not changes the ranking, so there is one definition only."""
    full_TE = np.array([[0.4, 0.3, 0.3], [0.9, 0.08, 0.02]])
    chosen_TE = np.array([[1, 1, 0], [1, 1, 0]])
    norms_TE = np.array([[1.0, 2.0, 0.0], [1.0, 9.0, 0.0]])
    applied_TE = full_TE * chosen_TE
    applied_TE /= applied_TE.sum(1, keepdims=True)

    def reap(weights_TE: np.ndarray) -> list[float]:
        stats = LayerStats(
            routed_E=chosen_TE.sum(0).astype(float),
            weighted_norm_sum_E=(weights_TE * norms_TE).sum(0),
        )
        return expert_scores(stats, "reap", layer=0, experts=3).tolist()

    assert reap(applied_TE) != reap(full_TE * chosen_TE)
    assert "renormalized if the family" in (LayerStats.__doc__ or "")


def test_trap_9_weights_are_never_zeroed_instead_of_removed() -> None:
    """A removed expert leaves with its router row, or its row leads nowhere."""
    stats = scored([3, 1, 2])
    model = ModelId(model_type="mixtral", fingerprint=FINGERPRINT, source="toy")
    layer = LayerFacts(
        num_experts=3,
        top_k=1,
        has_moe=True,
        parameters=400,
        moe_parameters=300,
        expert_shapes=((4, 8),),
        router_parameters_per_expert=8,
    )
    facts = ModelFacts(model, (layer,), 500)
    for routing in ("drop", "preserve"):
        recipe = Recipe.model_validate(
            {
                "experts": {"method": "score", "drop": 0.34},
                "routing": routing,
                "slim": {"method": "none"},
            }
        )
        plan = make_plan(stats, recipe, facts, tool_version="1")
        check_plan(plan, facts.layers, FINGERPRINT, "plan")
        (found,) = plan.layers
        assert found.keep == (0, 2)
        assert plan.routing == ("drop" if routing == "drop" else "redirect")
        assert found.unserved == (() if routing == "drop" else (1,))
        rows = 8 if routing == "drop" else 0
        assert count_plan(facts, plan).all_parameters_removed == 32 + rows


def edited(plan: CutPlan, **values: Any) -> CutPlan:
    layer = plan.layers[0].model_copy(update=values)
    return plan.model_copy(update={"layers": (layer,)})


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"unserved": (1, 1)}, r"experts \[1\] appear more than once"),
        ({"unserved": ()}, r"clusters leave out experts \[1\]"),
        ({"unserved": (0,)}, r"experts \[0\] appear more than once"),
        ({"merge_weights": ((1.0,), (1.0,))}, "does not reconstruct"),
        (
            {"reconstruct": True, "merge_weights": ((1.0,),)},
            "one weight for each cluster member",
        ),
        (
            {"reconstruct": True, "merge_weights": ((1.0,), (0.5,))},
            "cluster of expert 2 add up to 0.5, not to 1",
        ),
    ],
)
def test_plans_edited_by_hand_are_checked(values: dict[str, Any], says: str) -> None:
    model = ModelId(model_type="mixtral", fingerprint=FINGERPRINT, source="toy")
    good = CutPlan(
        tool_version="1",
        model=model,
        recipe=Recipe(),
        routing="redirect",
        layers=(
            LayerPlan(
                layer=0, experts=3, keep=(0, 2), clusters=((0,), (2,)), unserved=(1,)
            ),
        ),
    )
    check_plan(good, shapes(3), FINGERPRINT, "plan")
    with pytest.raises(PlanError, match=says):
        check_plan(edited(good, **values), shapes(3), FINGERPRINT, "plan")
    dropping_rows = good.model_copy(update={"routing": "drop"})
    with pytest.raises(PlanError, match="unserved experts; they need routing"):
        check_plan(dropping_rows, shapes(3), FINGERPRINT, "plan")


def test_statistics_that_do_not_fit_are_refused() -> None:
    stats = scored([1, 2, 3, 4])
    with pytest.raises(PlanError, match="layer 1: the statistics lack its weighted_"):
        kept(stats, shapes(4, 4), dropping(drop=0.25))
    with pytest.raises(PlanError, match="layer 0: weighted_norm_sum_E is of 4 experts"):
        kept(stats, shapes(5), dropping(drop=0.2))
    layer = replace(stats.layers[0], weighted_norm_sum_E=np.full(4, np.nan))
    with pytest.raises(PlanError, match="contain NaN"):
        kept(
            Stats(fingerprint=FINGERPRINT, layers={0: layer}),
            shapes(4),
            dropping(drop=0.25),
        )
    exhaustive = dropping(
        drop=0.25, criterion="removal-loss", search="exhaustive", budget="per-layer"
    )
    with pytest.raises(PlanError, match="lack its contribution_gram_EE"):
        kept(stats, shapes(4), exhaustive)
    gram = replace(stats.layers[0], contribution_gram_EE=np.eye(3))
    with pytest.raises(PlanError, match="contribution_gram_EE is of 3 experts"):
        kept(Stats(fingerprint=FINGERPRINT, layers={0: gram}), shapes(4), exhaustive)
    wide = replace(stats.layers[0], contribution_gram_EE=np.eye(64))
    half = dropping(
        drop=0.5, criterion="removal-loss", search="exhaustive", budget="per-layer"
    )
    with pytest.raises(RecipeError, match=r"32 of 64 experts has 1\.83e\+18 sets"):
        kept(Stats(fingerprint=FINGERPRINT, layers={0: wide}), shapes(64), half)


@pytest.mark.parametrize(
    ("protected", "says"),
    [
        ({7: (0,)}, "layer 7 has no experts in this model"),
        ({1: (0,)}, "layer 1 has no experts in this model"),
        ({0: (4, 9)}, r"layer 0 has no experts \[4, 9\], only 0 to 3"),
        ({2: (1,)}, r"layer 2 is dropped by layers \(drop-moe\)"),
    ],
)
def test_a_list_of_protected_experts_must_fit(
    protected: dict[int, tuple[int, ...]], says: str
) -> None:
    recipe = Recipe(
        experts=ExpertStage(protected=protected), layers=LayerStage(drop_moe=(2,))
    )
    with pytest.raises(RecipeError, match=says):
        decide_experts(None, shapes(4, 0, 4), recipe)


def test_too_many_protected_for_the_budget() -> None:
    recipe = dropping(drop=0.5, protected={0: (0, 1, 2)})
    with pytest.raises(RecipeError, match=r"only 1 can go\. .*or protect fewer"):
        kept(scored([1, 2, 3, 4]), shapes(4), recipe)
    recipe = dropping(keep=2, budget="per-layer", protected={0: (0, 1, 2)})
    with pytest.raises(RecipeError, match="but 3 are protected"):
        kept(scored([1, 2, 3, 4]), shapes(4), recipe)
