"""Every decision equals a reference written straight from its definition."""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import scipy.cluster.hierarchy as oracle
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import squareform

from vllm_moe_prune.calibrate.stats import LayerStats, Stats
from vllm_moe_prune.decide.budget import most_removed, spend_global
from vllm_moe_prune.decide.clusters import Merge, cut_at, merge_sequence
from vllm_moe_prune.decide.experts import decide_experts
from vllm_moe_prune.decide.representative import nearest_to_mean
from vllm_moe_prune.decide.similarity import Array, expert_distance
from vllm_moe_prune.decide.sparsity import least_sparsity, zeros_at
from vllm_moe_prune.recipes.schema import ExpertStage, Recipe

Clusters = tuple[tuple[int, ...], ...]
SEEDS = st.integers(0, 2**32 - 1)


@dataclass(frozen=True)
class Shape:
    num_experts: int
    top_k: int
    has_moe: bool = True
    groups: tuple[int, ...] | None = None
    group_floor: int = 1
    mtp: bool = False


def squared_distances(x_EP: Array) -> Array:
    gaps_EEP = x_EP[:, None] - x_EP[None]
    return np.asarray((gaps_EEP**2).sum(-1), dtype=np.float64)


def random_stats(rng: np.random.Generator, experts: int) -> LayerStats:
    router_ED = rng.normal(size=(experts, 5))
    counts_EE = np.triu(rng.integers(0, 50, size=(experts, experts)), 1).astype(float)
    return LayerStats(
        router_sqdist_EE=squared_distances(router_ED),
        router_norm=np.array(np.linalg.norm(router_ED)),
        weight_sqdist_EE=squared_distances(rng.normal(size=(experts, 9))),
        coactivation_EE=counts_EE + counts_EE.T,
    )


@st.composite
def tied_distances(draw: st.DrawFn, least: int = 1) -> Array:
    """Few distinct values, so nearly every choice is a tie."""
    experts = draw(st.integers(least, 8))
    pairs = experts * (experts - 1) // 2
    values = draw(st.lists(st.integers(-2, 3), min_size=pairs, max_size=pairs))
    distance_EE = np.zeros((experts, experts))
    distance_EE[np.triu_indices(experts, 1)] = values
    return distance_EE + distance_EE.T


def merges_by_definition(distance_EE: Array) -> list[Merge]:
    """All pairs of clusters, all pairs of members, at every step."""
    clusters = [{expert} for expert in range(len(distance_EE))]
    merges = []
    while len(clusters) > 1:
        height, first, second, one, two = min(
            (
                max(distance_EE[i, j] for i in one for j in two),
                min(one),
                min(two),
                sorted(one),
                sorted(two),
            )
            for one in clusters
            for two in clusters
            if min(one) < min(two)
        )
        merges.append(Merge(height, first, second))
        clusters = [c for c in clusters if c not in (set(one), set(two))]
        clusters.append({*one, *two})
    return merges


@given(seed=SEEDS, experts=st.integers(1, 7), data=st.data())
def test_distance_is_equation_7(seed: int, experts: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    router_ED = rng.normal(size=(experts, 4))
    counts_EE = rng.integers(0, 9, size=(experts, experts)).astype(float)
    counts_EE = np.triu(counts_EE, 1) + np.triu(counts_EE, 1).T
    stats = LayerStats(
        router_sqdist_EE=squared_distances(router_ED),
        router_norm=np.array(np.linalg.norm(router_ED)),
        coactivation_EE=counts_EE,
    )
    stage = ExpertStage(
        router_weight=data.draw(st.sampled_from([0.5, 1.0, 2.0])),
        coactivation_weight=data.draw(st.sampled_from([0.0, 0.1, 1.0])),
        divide_by_router_norm=data.draw(st.booleans()),
    )
    distance_EE = expert_distance(stats, stage, layer=0)
    norm = math.sqrt((router_ED**2).sum()) if stage.divide_by_router_norm else 1.0
    mean = counts_EE.sum() / experts**2 or 1.0
    for i in range(experts):
        for j in range(experts):
            apart = math.dist(router_ED[i], router_ED[j]) / norm
            together = counts_EE[i, j] / mean
            b_ij = -stage.router_weight * apart + stage.coactivation_weight * together
            assert math.isclose(distance_EE[i, j], -b_ij, rel_tol=1e-9, abs_tol=1e-9)


@given(tied_distances())
def test_merges_follow_the_definition_ties_included(distance_EE: Array) -> None:
    assert merge_sequence(distance_EE) == merges_by_definition(distance_EE)


@given(tied_distances())
def test_equal_heights_come_in_index_order(distance_EE: Array) -> None:
    """So that sorting by (height, layer, first, second) takes prefixes."""
    keys = [(m.height, m.first, m.second) for m in merge_sequence(distance_EE)]
    assert keys == sorted(keys)


@settings(max_examples=40)
@given(seed=SEEDS, experts=st.integers(2, 24))
def test_merges_equal_scipys_complete_linkage(seed: int, experts: int) -> None:
    x_EP = np.random.default_rng(seed).normal(size=(experts, 3))
    distance_EE = np.sqrt(squared_distances(x_EP))
    merges = merge_sequence(distance_EE)
    tree = oracle.linkage(squareform(distance_EE), "complete")
    assert np.allclose([merge.height for merge in merges], tree[:, 2])
    for count in range(experts):
        labels = oracle.cut_tree(tree, n_clusters=experts - count).ravel()
        expected = {
            tuple(np.flatnonzero(labels == label).tolist()) for label in set(labels)
        }
        assert set(cut_at(merges, count, experts=experts)) == expected


@given(tied_distances(), st.integers(0, 7))
def test_no_cluster_is_wider_than_the_height_reached(
    distance_EE: Array, count: int
) -> None:
    """True complete linkage, where the official rule can exceed its threshold."""
    merges = merge_sequence(distance_EE)
    count = min(count, len(merges))
    reached = merges[count - 1].height if count else -math.inf
    clusters = cut_at(merges, count, experts=len(distance_EE))
    assert len(clusters) == len(distance_EE) - count
    assert sorted(e for cluster in clusters for e in cluster) == [
        *range(len(distance_EE))
    ]
    for cluster in clusters:
        for i in cluster:
            for j in cluster:
                assert i == j or distance_EE[i, j] <= reached


@given(st.lists(tied_distances(), min_size=1, max_size=4), st.data())
def test_global_budget_equals_one_greedy_pass_over_the_model(
    layers: list[Array], data: st.DataObject
) -> None:
    sequences = {
        2 * at: merge_sequence(distance_EE) for at, distance_EE in enumerate(layers)
    }
    most = {
        layer: data.draw(st.integers(0, len(sequence)))
        for layer, sequence in sequences.items()
    }
    target = data.draw(st.integers(0, sum(most.values())))
    taken = dict.fromkeys(sequences, 0)
    threshold = None
    for _ in range(target):
        threshold, layer, _, _ = min(
            (merge.height, layer, merge.first, merge.second)
            for layer, sequence in sequences.items()
            if taken[layer] < most[layer]
            for merge in [sequence[taken[layer]]]
        )
        taken[layer] += 1
    budget = spend_global(sequences, most, target)
    assert budget.steps == taken
    assert budget.threshold == threshold


@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=2, max_size=2), min_size=1),
)
def test_representative_is_nearest_to_the_mean(places: list[list[int]]) -> None:
    """In whole numbers, so that ties are exact: ||m theta_i - sum theta||^2."""
    theta_EP = np.array(places)
    count = len(places)
    gaps_E = ((count * theta_EP - theta_EP.sum(0)) ** 2).sum(1)
    expected = int(gaps_E.argmin())
    sqdist_EE = squared_distances(theta_EP.astype(np.float64))
    assert nearest_to_mean(sqdist_EE, range(count)) == expected


@given(
    groups=st.dictionaries(st.integers(1, 30), st.integers(1, 40), min_size=1),
    share=st.floats(0.0, 1.0),
)
def test_least_sparsity_is_the_first_step_that_suffices(
    groups: dict[int, int], share: float
) -> None:
    most = sum((size - 1) * count for size, count in groups.items())
    zeros = int(share * most)
    steps = sorted({Fraction(k, size) for size in groups for k in range(size)})

    def exact(step: Fraction) -> int:
        return sum(count * math.floor(size * step) for size, count in groups.items())

    enough = [step for step in steps if exact(step) >= zeros]
    found = least_sparsity(zeros, groups)
    assert found == float(enough[0])
    assert zeros_at(found, groups) == exact(enough[0])


@given(
    seed=SEEDS,
    experts=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    top_k=st.integers(1, 3),
    cap=st.one_of(st.none(), st.integers(0, 9)),
    data=st.data(),
)
def test_plans_meet_the_budget_within_every_limit(
    seed: int, experts: list[int], top_k: int, cap: int | None, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    shapes = [Shape(count, top_k) for count in experts]
    room = sum(most_removed(0, s, ExpertStage(max_removed=cap)) for s in shapes)
    target = data.draw(st.integers(0, room))
    drop = target / sum(experts)
    stage = ExpertStage(drop=drop, max_removed=cap)
    stats = Stats(
        fingerprint="f",
        layers={at: random_stats(rng, count) for at, count in enumerate(experts)},
    )
    layers, threshold = decide_experts(stats, shapes, Recipe(experts=stage))
    removed = [layer.experts - len(layer.keep) for layer in layers]
    assert sum(removed) == target
    assert (threshold is None) == (target == 0)
    for layer, shape, gone in zip(layers, shapes, removed, strict=True):
        assert len(layer.keep) >= min(top_k, shape.num_experts)
        assert cap is None or gone <= cap
        assert layer.clusters is not None
        assert all(k in c for k, c in zip(layer.keep, layer.clusters, strict=True))
        firsts = [cluster[0] for cluster in layer.clusters]
        assert firsts == sorted(firsts)
        assert layer.reconstruct == (gone > 0 and len(layer.keep) < 3)
    again = decide_experts(stats, shapes, Recipe(experts=stage))
    assert again == (layers, threshold)


@given(seed=SEEDS, experts=st.integers(3, 9), data=st.data())
def test_permuting_experts_permutes_the_answer(
    seed: int, experts: int, data: st.DataObject
) -> None:
    """Where no tie is decided by index: distinct heights, no pair of two."""
    rng = np.random.default_rng(seed)
    stats = random_stats(rng, experts)
    order = data.draw(st.permutations(range(experts)))
    count = data.draw(st.integers(1, experts - 2))

    def permuted(value_EE: Array | None) -> Array:
        assert value_EE is not None
        return value_EE[np.ix_(order, order)]

    moved = LayerStats(
        router_sqdist_EE=permuted(stats.router_sqdist_EE),
        router_norm=stats.router_norm,
        weight_sqdist_EE=permuted(stats.weight_sqdist_EE),
        coactivation_EE=permuted(stats.coactivation_EE),
    )
    recipe = Recipe(experts=ExpertStage(keep=experts - count))
    shapes = [Shape(experts, 2)]
    before, height = decide_experts(
        Stats(fingerprint="f", layers={0: stats}), shapes, recipe
    )
    after, moved_height = decide_experts(
        Stats(fingerprint="f", layers={0: moved}), shapes, recipe
    )
    assert before[0].clusters is not None
    assert after[0].clusters is not None
    heights = [
        m.height
        for m in merge_sequence(expert_distance(stats, recipe.experts, layer=0))
    ]
    assume(len(set(heights)) == len(heights))
    back = {
        tuple(sorted(order[expert] for expert in cluster)): order[kept]
        for kept, cluster in zip(after[0].keep, after[0].clusters, strict=True)
    }
    there = dict(zip(before[0].clusters, before[0].keep, strict=True))
    assert back.keys() == there.keys()
    # In a cluster of two the members are equally far from their mean: a tie.
    for cluster, kept in there.items():
        assert len(cluster) == 2 or back[cluster] == kept
    assert height is not None
    assert moved_height is not None
    assert math.isclose(height, moved_height)
