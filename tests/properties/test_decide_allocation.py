"""OWL's allocation follows its formula and meets every total on whole weights."""

import math
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_prune.decide.allocation import least_allocation, owl_offsets
from vllm_moe_prune.decide.build_plan import make_plan
from vllm_moe_prune.decide.cut_plan import CutPlan
from vllm_moe_prune.decide.facts import count_plan
from vllm_moe_prune.decide.zeros import slimming_of
from vllm_moe_prune.errors import RecipeError
from vllm_moe_prune.recipes.schema import ExpertStage, Recipe, SlimStage
from vllm_moe_prune.slim.quota import zeros_in_group

from .test_decide_toy import COLS, ROWS, SEEDS, toy_facts, toy_stats

METHODS = st.sampled_from(["wanda", "wanda-variant", "magnitude", "sparsegpt"])
PER_EXPERT = 3 * ROWS * COLS


def plan_of(recipe: Recipe, seed: int, counts: tuple[int, ...]) -> CutPlan:
    stats = toy_stats(np.random.default_rng(seed), *counts)
    return make_plan(stats, recipe, toy_facts(*counts), tool_version="1")


def owl_density(plan: CutPlan, seed: int, counts: tuple[int, ...]) -> dict[int, float]:
    """OWL straight from its description, centered with the surviving weights."""
    stats = toy_stats(np.random.default_rng(seed), *counts)
    kept = {layer.layer: layer.keep for layer in plan.layers if layer.keep}
    ratio = {}
    for at, keep in kept.items():
        outliers_E = stats.layers[at].owl_outliers_E
        assert outliers_E is not None
        ratio[at] = 100 * sum(outliers_E[e] for e in keep) / (len(keep) * PER_EXPERT)
    low, high = min(ratio.values()), max(ratio.values())
    owl_lambda = plan.recipe.slim.owl_lambda
    scaled = {
        at: (value - low) / (high - low) * 2 * owl_lambda if high > low else 0.0
        for at, value in ratio.items()
    }
    weights = {at: len(keep) for at, keep in kept.items()}
    mean = sum(scaled[at] * weights[at] for at in kept) / sum(weights.values())
    return {at: value - mean for at, value in scaled.items()}


@settings(max_examples=60, deadline=None)
@given(
    seed=SEEDS,
    counts=st.tuples(*[st.integers(3, 7)] * 3),
    total=st.floats(0.2, 0.7),
    drop=st.sampled_from([0.0, 0.15]),
    method=METHODS,
)
def test_owl_meets_the_total_whatever_stage_1_left(
    seed: int, counts: tuple[int, ...], total: float, drop: float, method: str
) -> None:
    """The published centring ignores that layers differ in size and misses it."""
    slim = SlimStage.model_validate({"method": method, "allocation": "owl"})
    recipe = Recipe(
        total_sparsity=total,
        experts=ExpertStage(drop=drop, coactivation_weight=0.0),
        slim=slim,
    )
    plan = plan_of(recipe, seed, counts)
    facts = toy_facts(*counts)
    count = count_plan(facts, plan)
    gone = count.expert_parameters_removed + count.zeros
    assert gone >= total * count.expert_parameters
    # One weight less per group of one layer would miss it.
    groups = [
        slimming_of(recipe).groups(fact, layer)
        for layer, fact in zip(plan.layers, facts.layers, strict=True)
    ]
    step = max(found.total() for found in groups)
    assert gone < total * count.expert_parameters + step
    density = owl_density(plan, seed, counts)
    sparsity = {layer.layer: layer.sparsity for layer in plan.layers}
    most = max(sparsity, key=lambda at: sparsity[at])
    for at in sparsity:
        expected = max(0.0, sparsity[most] - (density[at] - density[most]))
        assert math.isclose(sparsity[at], expected, abs_tol=1e-8)


@settings(max_examples=60)
@given(
    sizes=st.lists(
        st.dictionaries(st.integers(2, 9), st.integers(1, 5), min_size=1, max_size=2),
        min_size=1,
        max_size=4,
    ),
    share=st.floats(0.01, 0.8),
    data=st.data(),
)
def test_the_base_is_the_smallest_that_suffices(
    sizes: list[dict[int, int]], share: float, data: st.DataObject
) -> None:
    groups = {at: Counter(found) for at, found in enumerate(sizes)}
    offsets = {at: data.draw(st.sampled_from([-0.125, 0.0, 0.0625])) for at in groups}
    weights = sum(size * n for found in sizes for size, n in found.items())
    zeros = max(1, int(share * weights))

    def sparsities(base: float) -> dict[int, float]:
        return {
            at: min(max(base + offsets[at], 0.0), (max(found) - 1) / max(found))
            for at, found in groups.items()
        }

    def total(found: dict[int, float]) -> int:
        return sum(
            n * zeros_in_group(size, found[at])
            for at, one in groups.items()
            for size, n in one.items()
        )

    steps = sorted(
        k / size - offsets[at]
        for at, one in groups.items()
        for size in one
        for k in range(size)
    )
    enough = [base for base in steps if total(sparsities(base)) >= zeros]
    gains = {at: sum(one.values()) for at, one in groups.items()}
    try:
        found = least_allocation(zeros, groups, groups, offsets)
    except RecipeError:
        assert not enough
        return
    assert zeros <= total(found) < zeros + max(gains.values())
    exact = sparsities(enough[0])
    assert all(math.isclose(found[at], exact[at], rel_tol=1e-8) for at in groups)
    # What was not needed was left out, of the highest layers first.
    spare = total(exact) - zeros
    for at in sorted(groups, reverse=True):
        fewer = total({**exact, at: exact[at] * (1 - 1e-9)})
        gain = total(exact) - fewer
        taken = 0 < gain <= spare
        assert (found[at] < exact[at]) == taken
        spare -= gain if taken else 0


@settings(max_examples=40, deadline=None)
@given(
    seed=SEEDS,
    counts=st.tuples(*[st.integers(3, 6)] * 4),
    pattern=st.sampled_from(["1:2", "2:4", "1:4", "3:4"]),
    method=st.sampled_from(["wanda", "magnitude", "sparsegpt"]),
)
def test_owl_mixes_patterns_around_the_one_asked_for(
    seed: int, counts: tuple[int, ...], pattern: str, method: str
) -> None:
    """Each layer keeps whole weights of every m; the mean is met from above."""
    n, m = map(int, pattern.split(":"))
    slim = SlimStage.model_validate(
        {"method": method, "allocation": "owl", "pattern": pattern, "owl_lambda": 0.2}
    )
    plan = plan_of(Recipe(slim=slim), seed, counts)
    for layer in plan.layers:
        assert layer.sparsity * m == round(layer.sparsity * m)
    assert plan.group == m
    count = count_plan(toy_facts(*counts), plan)
    asked = (1 - n / m) * count.expert_parameters
    assert count.zeros >= round(asked)
    assert count.zeros < asked + max(counts) * PER_EXPERT / m


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, counts=st.tuples(*[st.integers(3, 6)] * 2), method=METHODS)
def test_layers_without_outliers_are_all_the_same(
    seed: int, counts: tuple[int, ...], method: str
) -> None:
    """With lambda 0 nobody is spared: the uniform allocation."""
    values = {"method": method, "sparsity": 0.4}
    flat = {**values, "allocation": "owl", "owl_lambda": 0.0}
    uniform = plan_of(Recipe(slim=SlimStage.model_validate(values)), seed, counts)
    owl = plan_of(Recipe(slim=SlimStage.model_validate(flat)), seed, counts)
    facts = toy_facts(*counts)
    assert count_plan(facts, owl).zeros == count_plan(facts, uniform).zeros


@settings(max_examples=40, deadline=None)
@given(
    seed=SEEDS,
    counts=st.tuples(st.just(0), *[st.integers(3, 6)] * 2),
    allocation=st.sampled_from(["uniform", "owl"]),
    sparsity_of=st.sampled_from(["experts", "all"]),
    scope=st.sets(st.sampled_from(["attention", "shared", "mlp"])),
)
def test_every_scope_meets_the_total(
    seed: int,
    counts: tuple[int, ...],
    allocation: str,
    sparsity_of: str,
    scope: set[str],
) -> None:
    recipe = Recipe.model_validate(
        {
            "total_sparsity": 0.35,
            "sparsity_of": sparsity_of,
            "experts": {"drop": 0.2},
            "slim": {"allocation": allocation, "scope": ("experts", *sorted(scope))},
        }
    )
    plan = plan_of(recipe, seed, counts)
    count = count_plan(toy_facts(*counts), plan)
    reached = (
        count.expert_sparsity if sparsity_of == "experts" else count.total_sparsity
    )
    assert 0.35 <= reached < 0.42
    slims_dense = plan.layers[0].sparsity > 0
    assert slims_dense == bool(scope & {"attention", "mlp"})
    assert (count.zeros > count.expert_zeros) == bool(scope)


def test_offsets_need_layers_with_experts_only() -> None:
    counts = (0, 0)
    facts = toy_facts(*counts)
    plan = plan_of(Recipe(), 0, counts)
    pairs = list(zip(facts.layers, plan.layers, strict=True))
    assert owl_offsets(None, pairs, {0: Counter({4: 1})}, SlimStage()) == {}
