"""The published rule as a parity mode, protected experts, who stays, merge weights."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_prune.calibrate.stats import Stats
from vllm_moe_prune.decide.budget import most_removed
from vllm_moe_prune.decide.build_plan import make_plan
from vllm_moe_prune.decide.check_plan import check_plan
from vllm_moe_prune.decide.clusters import cut_at, merge_sequence
from vllm_moe_prune.decide.experts import decide_experts
from vllm_moe_prune.decide.reference import (
    Clusters,
    reference_clusters,
    search_threshold,
)
from vllm_moe_prune.decide.representative import highest_score
from vllm_moe_prune.decide.scores import expert_scores
from vllm_moe_prune.decide.similarity import Array
from vllm_moe_prune.errors import RecipeError
from vllm_moe_prune.recipes.schema import Criterion, ExpertStage, Recipe

from .test_decide_scores import CRITERIA
from .test_decide_toy import SEEDS, squared_distances, toy_facts, toy_layer, toy_stats


def published_rule(distance_EE: Array, threshold: float, most: int) -> Clusters:
    """As described in section 1.3 of the specification, with dictionaries of pairs."""
    experts = range(len(distance_EE))
    value = {(i, j): float(distance_EE[i, j]) for i in experts for j in experts}
    value |= {(i, i): math.inf for i in experts}
    cluster = {i: frozenset({i}) for i in experts}
    while value and min(value.values()) < threshold:
        if len(set(cluster.values())) <= len(experts) - most:
            break
        # Row-major first minimum.
        one, two = min(value, key=lambda pair: (value[pair], pair))
        considered = [value[i, two] for i in cluster[one]]
        considered += [value[j, one] for j in cluster[two]]
        if max(considered) < threshold:
            value |= {(i, two): math.inf for i in cluster[one]}
            value |= {(j, one): math.inf for j in cluster[two]}
            union = cluster[one] | cluster[two]
            cluster |= dict.fromkeys(union, union)
        else:
            value[one, two] = value[two, one] = math.inf
    return tuple(sorted(tuple(sorted(ids)) for ids in set(cluster.values())))


def random_distances(seed: int, experts: int, *, ties: bool) -> Array:
    rng = np.random.default_rng(seed)
    if ties:
        upper_EE = np.triu(rng.integers(-2, 4, (experts, experts)).astype(float), 1)
        return np.asarray(upper_EE + upper_EE.T)
    return np.sqrt(squared_distances(rng.normal(size=(experts, 3))))


@settings(max_examples=150)
@given(
    seed=SEEDS,
    experts=st.integers(1, 9),
    ties=st.booleans(),
    place=st.floats(0.0, 1.3),
    most=st.integers(0, 9),
)
def test_parity_mode_is_the_published_rule(
    seed: int, experts: int, ties: bool, place: float, most: int
) -> None:
    distance_EE = random_distances(seed, experts, ties=ties)
    threshold = float(distance_EE.min() + place * np.ptp(distance_EE)) + 1e-3
    for at in (threshold, math.inf):
        expected = published_rule(distance_EE, at, most)
        assert reference_clusters(distance_EE, at, most) == expected


@given(seed=SEEDS, experts=st.integers(1, 9), most=st.integers(0, 9))
def test_without_a_threshold_the_published_rule_stops_at_its_cap(
    seed: int, experts: int, most: int
) -> None:
    distance_EE = random_distances(seed, experts, ties=False)
    found = reference_clusters(distance_EE, math.inf, most)
    assert len(found) == max(1, experts - most)


def test_the_published_rule_is_not_complete_linkage() -> None:
    """Spec 1.3: some of its clusters hold a pair beyond the threshold."""
    rng = np.random.default_rng(0)
    wider = 0
    for _ in range(20):
        distance_EE = np.sqrt(squared_distances(rng.normal(size=(32, 3))))
        threshold = float(np.median(distance_EE))
        for cluster in reference_clusters(distance_EE, threshold, 31):
            inside_EE = distance_EE[np.ix_(cluster, cluster)]
            wider += int(inside_EE.max() >= threshold)
        merges = merge_sequence(distance_EE)
        count = sum(merge.height < threshold for merge in merges)
        for cluster in cut_at(merges, count, experts=32):
            assert distance_EE[np.ix_(cluster, cluster)].max() < threshold
    assert wider


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, layers=st.integers(1, 3), target=st.integers(1, 12))
def test_the_published_search_meets_its_target_or_says_so(
    seed: int, layers: int, target: int
) -> None:
    distances = {at: random_distances(seed + at, 8, ties=False) for at in range(layers)}
    most = dict.fromkeys(distances, 6)
    try:
        found = search_threshold(distances, most, min(target, 6 * layers))
    except RecipeError:
        return  # the next test looks at what it says
    removed = sum(8 - len(clusters) for clusters in found.clusters.values())
    assert removed == min(target, 6 * layers)
    for layer, distance_EE in distances.items():
        expected = published_rule(distance_EE, found.threshold, most[layer])
        assert found.clusters[layer] == expected


def test_a_target_between_two_counts_is_refused_with_both() -> None:
    """All pairs are equally far: none or everything merges."""
    distances = {0: 1.0 - np.eye(6)}
    with pytest.raises(RecipeError, match=r"removes 2 .*nearest remove 0 and 4"):
        search_threshold(distances, {0: 4}, 2)


@settings(max_examples=60, deadline=None)
@given(
    seed=SEEDS,
    counts=st.lists(st.integers(2, 8), min_size=1, max_size=3),
    linkage=st.sampled_from(["complete", "reference"]),
    cluster_by=st.sampled_from(["behavior", "outputs"]),
    representative=st.sampled_from(["nearest-mean", *CRITERIA]),
    data=st.data(),
)
def test_protected_experts_survive_in_clusters_of_their_own(
    seed: int,
    counts: list[int],
    linkage: str,
    cluster_by: str,
    representative: str,
    data: st.DataObject,
) -> None:
    facts = toy_facts(*counts)
    stats = toy_stats(np.random.default_rng(seed), *counts)
    protected = {
        at: tuple(data.draw(st.sets(st.integers(0, count - 1), max_size=3)))
        for at, count in enumerate(counts)
    }
    stage = ExpertStage.model_validate(
        {
            "linkage": linkage,
            "cluster_by": cluster_by,
            "representative": representative,
            "protected": protected,
        }
    )
    room = sum(most_removed(at, s, stage) for at, s in enumerate(facts.layers))
    target = data.draw(st.integers(0, room))
    recipe = Recipe(experts=stage.model_copy(update={"drop": target / sum(counts)}))
    try:
        plans, threshold = decide_experts(stats, facts.layers, recipe)
    except RecipeError:
        assert linkage == "reference", "complete linkage meets every budget"
        return
    assert sum(plan.experts - len(plan.keep) for plan in plans) == target
    assert (plans, threshold) == decide_experts(stats, facts.layers, recipe)
    for plan in plans:
        assert plan.clusters is not None
        ids = set(protected[plan.layer])
        assert ids <= set(plan.keep)
        assert all(len(ids & set(cluster)) <= 1 for cluster in plan.clusters)
        assert all(k in c for k, c in zip(plan.keep, plan.clusters, strict=True))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_criterion_chooses_the_highest_score_of_each_cluster(
    criterion: Criterion,
) -> None:
    layer = toy_layer(np.random.default_rng(3), 9)
    stage = ExpertStage(keep=4, representative=criterion, seed=5)
    stats = Stats(fingerprint="f", layers={0: layer.stats})
    (plan,), _ = decide_experts(stats, toy_facts(9).layers, Recipe(experts=stage))
    score_E = expert_scores(layer.stats, criterion, layer=0, experts=9, seed=5)
    assert plan.clusters is not None
    for kept, cluster in zip(plan.keep, plan.clusters, strict=True):
        assert score_E[kept] == max(score_E[expert] for expert in cluster)


def test_equal_scores_keep_the_lowest_index() -> None:
    assert highest_score(np.array([1.0, 3.0, 3.0, 2.0]), (0, 1, 2, 3)) == 1
    assert highest_score(np.zeros(4), (3, 2)) == 2


@settings(max_examples=40)
@given(seed=SEEDS, experts=st.integers(3, 8), keep=st.integers(2, 7))
def test_frequency_weights_are_the_shares_of_tokens(
    seed: int, experts: int, keep: int
) -> None:
    layer = toy_layer(np.random.default_rng(seed), experts, tokens=6)
    keep = min(keep, experts)
    stage = ExpertStage(keep=keep, reconstruct="always", merge="frequency")
    facts = toy_facts(experts)
    stats = Stats(fingerprint=facts.model.fingerprint, layers={0: layer.stats})
    (plan,), _ = decide_experts(stats, facts.layers, Recipe(experts=stage))
    assert plan.reconstruct == (keep < experts)
    assert (plan.merge_weights is None) == (keep == experts)
    if plan.merge_weights is None or plan.clusters is None:
        return
    routed_E = (layer.gates_TE > 0).sum(0)
    for cluster, weights in zip(plan.clusters, plan.merge_weights, strict=True):
        tokens = sum(int(routed_E[expert]) for expert in cluster)
        for expert, weight in zip(cluster, weights, strict=True):
            even = 1 / len(cluster)
            assert math.isclose(weight, routed_E[expert] / tokens if tokens else even)
    whole = make_plan(stats, Recipe(experts=stage), facts, tool_version="1")
    check_plan(whole, facts.layers, facts.model.fingerprint, "plan")
