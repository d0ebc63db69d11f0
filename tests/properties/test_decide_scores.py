"""Every criterion equals its formula token by token; budgets, ties, protection."""

import itertools
import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_prune.calibrate.stats import LayerStats, Stats
from vllm_moe_prune.decide.budget import most_removed
from vllm_moe_prune.decide.expert_drop import Removal, best_set, removal_sequence
from vllm_moe_prune.decide.experts import decide_experts
from vllm_moe_prune.decide.scores import expert_scores
from vllm_moe_prune.decide.similarity import Array, expert_distance
from vllm_moe_prune.recipes.schema import Criterion, ExpertStage, Recipe

from .test_decide_toy import SEEDS, ToyLayer, toy_facts, toy_layer, toy_stats

CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
MEASURED = tuple(name for name in CRITERIA if name != "random")


def by_formula(layer: ToyLayer, criterion: Criterion, expert: int) -> float:
    """Straight from the definition, one token at a time."""
    tokens = range(len(layer.x_TD))
    chosen = [t for t in tokens if layer.gates_TE[t, expert] > 0]
    outputs = [
        layer.gates_TE[t, expert] * math.hypot(*layer.outputs_TED[t, expert])
        for t in chosen
    ]
    if criterion == "routing-score":
        return sum(layer.scores_TE[t, expert] for t in tokens) / len(tokens)
    if criterion == "routing-score-selected":
        return sum(layer.scores_TE[t, expert] for t in chosen) / len(tokens)
    if criterion == "frequency":
        return len(chosen) / len(tokens)
    if criterion == "reap":
        return sum(outputs) / len(chosen) if chosen else 0.0
    if criterion == "total-output":
        return sum(outputs)
    if criterion in ("man", "msan"):
        power = {"man": 1, "msan": 2}[criterion]
        own = [math.hypot(*layer.outputs_TED[t, expert]) ** power for t in chosen]
        return sum(own) / len(own) if own else 0.0
    if criterion == "router-norm":
        return math.hypot(*layer.router_ED[expert])
    assert criterion == "removal-loss"
    others = [other for other in range(layer.gates_TE.shape[1]) if other != expert]
    with_it = layer.contributions_TED.sum(1)
    without = layer.contributions_TED[:, others].sum(1)
    return float(np.linalg.norm(with_it - without))


@pytest.mark.parametrize("criterion", MEASURED)
@settings(max_examples=20)
@given(seed=SEEDS, experts=st.integers(2, 7))
def test_a_criterion_equals_its_formula(
    criterion: Criterion, seed: int, experts: int
) -> None:
    layer = toy_layer(np.random.default_rng(seed), experts)
    score_E = expert_scores(layer.stats, criterion, layer=0, experts=experts)
    for expert in range(experts):
        expected = by_formula(layer, criterion, expert)
        assert math.isclose(score_E[expert], expected, rel_tol=1e-9, abs_tol=1e-12)


def test_total_output_is_reaps_mean_times_the_count() -> None:
    stats = toy_layer(np.random.default_rng(1), 6).stats
    reap_E = expert_scores(stats, "reap", layer=0, experts=6)
    total_E = expert_scores(stats, "total-output", layer=0, experts=6)
    assert stats.routed_E is not None
    assert np.allclose(total_E, reap_E * stats.routed_E)


@given(seed=st.integers(0, 9), layer=st.integers(0, 40), experts=st.integers(1, 9))
def test_random_scores_depend_on_seed_and_layer_alone(
    seed: int, layer: int, experts: int
) -> None:
    def scores(seed: int, layer: int) -> list[float]:
        found = expert_scores(None, "random", layer=layer, experts=experts, seed=seed)
        return [float(score) for score in found]

    assert scores(seed, layer) == scores(seed, layer)
    assert scores(seed, layer) != scores(seed + 1, layer)
    assert scores(seed, layer) != scores(seed, layer + 1)


@given(
    st.lists(st.integers(-2, 2), min_size=1, max_size=8),
    st.sets(st.integers(0, 7), max_size=3),
    st.booleans(),
)
def test_the_lowest_scores_go_first_ties_by_index(
    scores: list[int], protected: set[int], reverse: bool
) -> None:
    sequence = removal_sequence(
        np.array(scores, dtype=float), sorted(protected), reverse=reverse
    )
    left = [expert for expert in range(len(scores)) if expert not in protected]
    for removal in sequence:
        sign = -1.0 if reverse else 1.0
        height, first = min((sign * scores[expert], expert) for expert in left)
        assert removal == Removal(height, first)
        left.remove(first)
    assert not left


@settings(max_examples=40)
@given(seed=SEEDS, experts=st.integers(2, 6), data=st.data())
def test_the_exhaustive_search_finds_the_least_change_of_the_output(
    seed: int, experts: int, data: st.DataObject
) -> None:
    """Against all sets of experts, on the layer's outputs themselves."""
    layer = toy_layer(np.random.default_rng(seed), experts)
    count = data.draw(st.integers(0, experts - 1))
    protected = data.draw(st.sets(st.integers(0, experts - 1), max_size=1))
    gram_EE = layer.stats.contribution_gram_EE
    assert gram_EE is not None
    free = [expert for expert in range(experts) if expert not in protected]
    count = min(count, len(free))
    found = best_set(gram_EE, count, sorted(protected), layer=0)

    def change(ids: tuple[int, ...]) -> float:
        return float(np.linalg.norm(layer.contributions_TED[:, list(ids)].sum(1)))

    least = min(change(ids) for ids in itertools.combinations(free, count))
    assert math.isclose(change(found), least, rel_tol=1e-6, abs_tol=1e-6)
    if count == 1:
        score_E = expert_scores(layer.stats, "removal-loss", layer=0, experts=experts)
        assert math.isclose(change(found), score_E[free].min(), abs_tol=1e-9)


def test_the_exhaustive_search_takes_the_first_of_equals() -> None:
    assert best_set(np.eye(4), 2, layer=0) == (0, 1)
    assert best_set(np.eye(4), 2, [0], layer=0) == (1, 2)


@settings(max_examples=60)
@given(
    seed=SEEDS,
    counts=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    criterion=st.sampled_from(CRITERIA),
    budget=st.sampled_from(["global", "per-layer"]),
    reverse=st.booleans(),
    data=st.data(),
)
def test_dropping_meets_budget_floor_and_protection(
    seed: int,
    counts: list[int],
    criterion: Criterion,
    budget: str,
    reverse: bool,
    data: st.DataObject,
) -> None:
    facts = toy_facts(*counts)
    stats = toy_stats(np.random.default_rng(seed), *counts)
    guarded = data.draw(st.integers(0, len(counts) - 1))
    size = data.draw(st.integers(0, min(3, counts[guarded])))
    experts = tuple(range(counts[guarded]))[-size:] if size else ()
    stage = ExpertStage.model_validate(
        {
            "method": "score",
            "criterion": criterion,
            "budget": budget,
            "reverse": reverse,
            "protected": {guarded: experts},
        }
    )
    room = {at: most_removed(at, shape, stage) for at, shape in enumerate(facts.layers)}
    if budget == "global":
        target = data.draw(st.integers(0, sum(room.values())))
        update = {"drop": target / sum(counts)}
    else:
        update = {"drop": min(room[at] / counts[at] for at in room) * 0.99}
    recipe = Recipe(experts=stage.model_copy(update=update))
    plans, threshold = decide_experts(stats, facts.layers, recipe)
    gone = [plan.experts - len(plan.keep) for plan in plans]
    if budget == "global":
        assert sum(gone) == target
    for plan in plans:
        assert plan.experts - len(plan.keep) <= room[plan.layer]
        assert len(plan.keep) >= min(2, plan.experts), "top-k"
        assert list(plan.keep) == sorted(plan.keep), "in their old order"
    assert set(experts) <= set(plans[guarded].keep)
    assert (plans, threshold) == decide_experts(stats, facts.layers, recipe)


@settings(max_examples=40)
@given(
    seed=SEEDS,
    counts=st.lists(st.integers(3, 7), min_size=2, max_size=4),
    criterion=st.sampled_from(MEASURED),
    data=st.data(),
)
def test_global_dropping_takes_the_lowest_scores_of_the_model(
    seed: int, counts: list[int], criterion: Criterion, data: st.DataObject
) -> None:
    facts = toy_facts(*counts)
    stats = toy_stats(np.random.default_rng(seed), *counts)
    target = data.draw(st.integers(1, sum(counts) - 2 * len(counts)))
    stage = ExpertStage(method="score", criterion=criterion, drop=target / sum(counts))
    plans, threshold = decide_experts(stats, facts.layers, Recipe(experts=stage))
    scores = {
        at: expert_scores(stats.layers[at], criterion, layer=at, experts=count)
        for at, count in enumerate(counts)
    }
    left = {at: set(range(count)) for at, count in enumerate(counts)}
    for _ in range(target):
        height, at, expert = min(
            (float(scores[at][expert]), at, expert)
            for at, ids in left.items()
            if len(ids) > 2
            for expert in ids
        )
        left[at].remove(expert)
    assert [set(plan.keep) for plan in plans] == list(left.values())
    assert threshold == height


@settings(max_examples=40)
@given(seed=SEEDS, experts=st.integers(3, 8), data=st.data())
def test_permuting_experts_permutes_the_dropped_ones(
    seed: int, experts: int, data: st.DataObject
) -> None:
    criterion = data.draw(st.sampled_from(MEASURED))
    stats = toy_layer(np.random.default_rng(seed), experts, tokens=40).stats
    order = data.draw(st.permutations(range(experts)))
    count = data.draw(st.integers(1, experts - 2))
    moved = permuted(stats, order)
    score_E = expert_scores(stats, criterion, layer=0, experts=experts)
    if len(set(score_E.tolist())) < experts:
        return  # a tie, which the index decides
    stage = ExpertStage(method="score", criterion=criterion, keep=experts - count)
    recipe, shapes = Recipe(experts=stage), toy_facts(experts).layers
    before, _ = decide_experts(
        Stats(fingerprint="f", layers={0: stats}), shapes, recipe
    )
    after, _ = decide_experts(Stats(fingerprint="f", layers={0: moved}), shapes, recipe)
    assert {order[expert] for expert in after[0].keep} == set(before[0].keep)


def permuted(stats: LayerStats, order: list[int]) -> LayerStats:
    """The same experts in another order: new expert i is the old ``order[i]``."""
    changes = {}
    for name, value in vars(stats).items():
        if value is not None and name.endswith("_EE"):
            changes[name] = value[np.ix_(order, order)]
        elif value is not None and name.endswith("_E"):
            changes[name] = value[order]
    return replace(stats, **changes)


@settings(max_examples=30)
@given(seed=SEEDS, experts=st.integers(1, 7))
def test_distance_of_outputs_is_their_rms_distance(seed: int, experts: int) -> None:
    layer = toy_layer(np.random.default_rng(seed), experts, top_k=1)
    stage = ExpertStage(cluster_by="outputs")
    distance_EE = expert_distance(layer.stats, stage, layer=0)
    out_TED = layer.outputs_TED
    rms = math.sqrt(float((out_TED**2).sum(-1).mean()))

    def apart(i: int, j: int) -> float:
        gap_TD: Array = out_TED[:, i] - out_TED[:, j]
        return math.sqrt(float((gap_TD**2).sum(-1).mean())) / rms

    for i in range(experts):
        for j in range(experts):
            assert math.isclose(distance_EE[i, j], apart(i, j), abs_tol=1e-9)
