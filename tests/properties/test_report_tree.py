"""The merge tree of the report: nothing crosses, nothing is outlined twice."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_prune.decide.clusters import cut_at, merge_sequence
from vllm_moe_prune.report.tree import forks, leaf_order, outlines

SEEDS = st.integers(0, 10**6)


def distances(seed: int, experts: int, apart: int = 0) -> np.ndarray:
    """Random, symmetric; with few values there are ties; ``apart`` never meet."""
    rng = np.random.default_rng(seed)
    found_EE = np.triu(rng.integers(-3, 5, (experts, experts)).astype(float), 1)
    found_EE += found_EE.T
    found_EE[:apart, :apart] = np.inf
    return found_EE


@given(seed=SEEDS, experts=st.integers(1, 12), apart=st.integers(0, 3))
def test_branches_do_not_cross(seed: int, experts: int, apart: int) -> None:
    merges = merge_sequence(distances(seed, experts, min(apart, experts)))
    order = leaf_order(merges, experts)
    assert sorted(order) == list(range(experts))
    members = {expert: {expert} for expert in range(experts)}
    for merge in merges:
        members[merge.first] |= members.pop(merge.second)
        places = sorted(order.index(expert) for expert in members[merge.first])
        assert places == list(range(places[0], places[0] + len(places)))


@given(seed=SEEDS, experts=st.integers(2, 12), data=st.data())
def test_the_merges_of_the_plan_are_those_below_its_cut(
    seed: int, experts: int, data: st.DataObject
) -> None:
    merges = merge_sequence(distances(seed, experts))
    count = data.draw(st.integers(0, len(merges)))
    clusters = cut_at(merges, count, experts=experts)
    drawn = forks(merges, leaf_order(merges, experts), clusters)
    assert [fork.height for fork in drawn] == [merge.height for merge in merges]
    assert [fork.within for fork in drawn] == [at < count for at in range(len(merges))]
    for fork in drawn:
        for base in (fork.left_base, fork.right_base):
            assert base is None or base <= fork.height
        assert fork.left != fork.right


@given(seed=SEEDS, experts=st.integers(1, 12), clusters=st.integers(1, 6))
def test_outlines_hold_exactly_the_pairs_within_a_cluster(
    seed: int, experts: int, clusters: int
) -> None:
    rng = np.random.default_rng(seed)
    # In any order, so that clusters are torn apart, as the reference rule's can be.
    order = rng.permutation(experts).tolist()
    home = rng.integers(0, clusters, experts)
    groups = [np.flatnonzero(home == at).tolist() for at in range(clusters)]
    covered = np.zeros((experts, experts), int)
    for x, y, width, height in outlines(order, groups):
        covered[y : y + height, x : x + width] += 1
    for row, one in enumerate(order):
        for column, two in enumerate(order):
            alone = list(home).count(home[one]) == 1
            assert covered[row, column] == (home[one] == home[two] and not alone)
