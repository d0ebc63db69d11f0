"""Complete linkage on small matrices that can be checked by eye."""

import numpy as np
import pytest

from vllm_moe_prune.decide.clusters import Merge, cut_at, merge_sequence
from vllm_moe_prune.decide.similarity import Array


def on_a_line(*places: float) -> Array:
    x_E = np.array(places)
    return np.asarray(np.abs(x_E[:, None] - x_E[None, :]), dtype=np.float64)


def test_the_farthest_members_decide() -> None:
    # Single linkage would chain 0-1-2 (gap 2) before 3-4 (gap 2.5).
    merges = merge_sequence(on_a_line(0.0, 1.0, 3.0, 10.0, 12.5))
    assert merges == [
        Merge(1.0, 0, 1),
        Merge(2.5, 3, 4),
        Merge(3.0, 0, 2),
        Merge(12.5, 0, 3),
    ]


def test_ties_go_to_the_smallest_pair() -> None:
    merges = merge_sequence(on_a_line(0.0, 1.0, 2.0, 3.0))
    assert merges == [Merge(1.0, 0, 1), Merge(1.0, 2, 3), Merge(3.0, 0, 2)]


def test_all_equal_distances_merge_in_index_order() -> None:
    distance_EE = 1.0 - np.eye(4)
    assert merge_sequence(distance_EE) == [Merge(1.0, 0, j) for j in (1, 2, 3)]


def test_heights_may_be_negative() -> None:
    distance_EE = -5.0 * (1.0 - np.eye(3))
    distance_EE[0, 2] = distance_EE[2, 0] = -7.0
    assert merge_sequence(distance_EE) == [Merge(-7.0, 0, 2), Merge(-5.0, 0, 1)]


@pytest.mark.parametrize("experts", [0, 1])
def test_nothing_to_merge(experts: int) -> None:
    assert merge_sequence(np.zeros((experts, experts))) == []


def test_input_is_left_alone() -> None:
    distance_EE = on_a_line(0.0, 1.0, 5.0)
    before = distance_EE.copy()
    merge_sequence(distance_EE)
    assert np.array_equal(distance_EE, before)


def test_cut_gives_sorted_clusters_by_smallest_member() -> None:
    merges = merge_sequence(on_a_line(0.0, 9.0, 0.1, 9.5, 4.0))
    assert cut_at(merges, 0, experts=5) == ((0,), (1,), (2,), (3,), (4,))
    assert cut_at(merges, 2, experts=5) == ((0, 2), (1, 3), (4,))
    assert cut_at(merges, 3, experts=5) == ((0, 2, 4), (1, 3))
    assert cut_at(merges, 4, experts=5) == ((0, 1, 2, 3, 4),)
    assert cut_at([], 0, experts=1) == ((0,),)


def test_heights_of_512_experts_never_decrease() -> None:
    """The largest layers known; about 0.1 s."""
    places = np.random.default_rng(0).random(512)
    merges = merge_sequence(on_a_line(*places))
    heights = [merge.height for merge in merges]
    assert heights == sorted(heights)
    assert heights[-1] == places.max() - places.min()
