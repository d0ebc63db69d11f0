"""Agglomerative clustering with complete linkage: which experts merge, and when.

The whole merge sequence of a layer is computed once; any budget is then a prefix of
it. The height of a merge is the largest distance within the cluster it forms, so the
heights never decrease and "all merges up to t" is STUN's Algorithm 1 at threshold t.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .similarity import Array


@dataclass(frozen=True)
class Merge:
    """Two clusters becoming one, each named by its smallest member."""

    height: float
    """Largest distance between any two members of the new cluster."""
    first: int
    second: int
    """Greater than ``first``, which names the new cluster."""


def merge_sequence(distance_EE: Array) -> list[Merge]:
    """All merges of one layer; ties go to the smallest (first, second).

    Args:
        distance_EE: Symmetric; the diagonal is not looked at. Infinite between experts
            that must not meet; without any such there are E - 1 merges.
    """
    linkage_EE = distance_EE.copy()
    np.fill_diagonal(linkage_EE, np.inf)
    experts = len(linkage_EE)
    merges = []
    for _ in range(experts - 1):
        # argmin returns the first minimum in row-major order, hence first < second.
        first, second = divmod(int(linkage_EE.argmin()), experts)
        if np.isinf(linkage_EE[first, second]):
            break
        merges.append(Merge(float(linkage_EE[first, second]), first, second))
        # Complete linkage: the farthest members count. The diagonal stays infinite.
        joined_E = np.maximum(linkage_EE[first], linkage_EE[second])
        linkage_EE[first] = linkage_EE[:, first] = joined_E
        # The cluster lives on under its smallest member alone.
        linkage_EE[second] = linkage_EE[:, second] = np.inf
    return merges


def cut_at(
    merges: Sequence[Merge], count: int, *, experts: int
) -> tuple[tuple[int, ...], ...]:
    """The clusters after the first ``count`` merges, by smallest member.

    Args:
        merges: A layer's sequence.
        count: How many to carry out, that is, how many experts go.
        experts: How many the layer has.
    """
    members = {expert: [expert] for expert in range(experts)}
    for merge in merges[:count]:
        members[merge.first] += members.pop(merge.second)
    return tuple(tuple(sorted(cluster)) for _, cluster in sorted(members.items()))
