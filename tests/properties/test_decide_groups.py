"""Experts routed by groups: budgets and floors, against what the words say."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_prune.calibrate.stats import LayerStats, Stats
from vllm_moe_prune.decide.cut_plan import LayerPlan
from vllm_moe_prune.decide.experts import decide_experts
from vllm_moe_prune.errors import RecipeError
from vllm_moe_prune.recipes.schema import Recipe

GROUPS, SIZE, LAYERS = 4, 5, 3
EXPERTS = GROUPS * SIZE
BY_GROUP = tuple(expert // SIZE for expert in range(EXPERTS))


@dataclass(frozen=True)
class Shape:
    num_experts: int = EXPERTS
    top_k: int = 4
    has_moe: bool = True
    groups: tuple[int, ...] | None = field(default=BY_GROUP)
    group_floor: int = 2
    mtp: bool = False


def stats_of(seed: int) -> Stats:
    rng = np.random.default_rng(seed)

    def distances() -> np.ndarray:
        points = rng.normal(size=(EXPERTS, 3))
        return ((points[:, None] - points[None]) ** 2).sum(-1)

    layers = {
        layer: LayerStats(
            router_sqdist_EE=distances(),
            router_norm=np.asarray(1.0),
            router_row_norm_E=rng.uniform(1, 2, EXPERTS),
            weight_sqdist_EE=distances(),
        )
        for layer in range(LAYERS)
    }
    return Stats(fingerprint="fingerprint", layers=layers)


def decide(seed: int, **stage: object) -> list[LayerPlan]:
    stage = {"coactivation_weight": 0.0, "reconstruct": "never"} | stage
    recipe = Recipe.model_validate({"experts": stage, "slim": {"method": "none"}})
    return decide_experts(stats_of(seed), [Shape()] * LAYERS, recipe)[0]


def left(plan: LayerPlan) -> Counter[int]:
    return Counter(BY_GROUP[expert] for expert in plan.keep)


METHODS = {
    "stun": {"method": "stun"},
    "score": {"method": "score", "criterion": "router-norm"},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", ["global", "per-layer"])
@given(seed=st.integers(0, 99), drop=st.sampled_from([0.1, 0.25, 0.4, 0.6]))
def test_equal_takes_the_same_number_from_every_group(
    method: str, budget: str, seed: int, drop: float
) -> None:
    plans = decide(seed, drop=drop, budget=budget, **METHODS[method])
    for plan in plans:
        assert len(set(left(plan).values())) == 1
        assert min(left(plan).values()) >= 2
        assert plan.keep == tuple(sorted(plan.keep)) or method == "stun"
    removed = sum(EXPERTS - len(plan.keep) for plan in plans)
    whole = EXPERTS * (LAYERS if budget == "global" else 1)
    per = removed if budget == "global" else removed / LAYERS
    assert per == GROUPS * np.floor(drop * whole / GROUPS + 0.5)


@pytest.mark.parametrize("method", METHODS)
@given(seed=st.integers(0, 99), drop=st.sampled_from([0.05, 0.3, 0.45, 0.6]))
def test_uneven_meets_the_budget_exactly_and_keeps_the_floor(
    method: str, seed: int, drop: float
) -> None:
    plans = decide(seed, drop=drop, groups="uneven", **METHODS[method])
    assert sum(EXPERTS - len(plan.keep) for plan in plans) == round(
        drop * EXPERTS * LAYERS
    )
    for plan in plans:
        assert set(left(plan)) == set(range(GROUPS))
        assert min(left(plan).values()) >= 2
        for cluster in plan.clusters or ():
            assert len({BY_GROUP[expert] for expert in cluster}) == 1


@given(seed=st.integers(0, 99), removed=st.integers(1, 12))
def test_uneven_scores_are_the_lowest_that_the_floors_allow(
    seed: int, removed: int
) -> None:
    plans = decide(
        seed,
        keep=EXPERTS - removed,
        budget="per-layer",
        groups="uneven",
        **METHODS["score"],
    )
    for layer, plan in enumerate(plans):
        score_E = stats_of(seed).layers[layer].router_row_norm_E
        gone: list[int] = []
        for expert in np.argsort(score_E, kind="stable").tolist():
            group = [e for e in range(EXPERTS) if BY_GROUP[e] == BY_GROUP[expert]]
            if len(set(group) - set(gone)) > 2 and len(gone) < removed:
                gone.append(expert)
        assert set(plan.keep) == set(range(EXPERTS)) - set(gone)


def test_uneven_is_not_always_equal() -> None:
    plans = decide(0, drop=0.4, groups="uneven", **METHODS["score"])
    assert any(len(set(left(plan).values())) > 1 for plan in plans)


def test_protected_experts_stay_in_their_groups() -> None:
    protected = {0: (0, 1, 2, 3)}
    plans = decide(0, drop=0.5, groups="uneven", protected=protected, **METHODS["stun"])
    assert {0, 1, 2, 3} <= set(plans[0].keep)
    assert left(plans[0])[0] >= 4


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"drop": 0.7}, "routing by groups needs, only 36"),
        ({"keep": 17, "method": "score", "criterion": "router-norm"}, "4 leave at a"),
        ({"keep": 7, "budget": "per-layer", "groups": "uneven"}, "by groups needs 8"),
        ({"drop": 0.2, "linkage": "reference"}, "does not know the groups"),
        (
            {"drop": 0.2, "budget": "sensitivity", "groups": "equal"},
            "set experts.groups: uneven",
        ),
    ],
)
def test_what_groups_do_not_allow_is_refused(
    stage: dict[str, object], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        decide(0, **stage)
