"""Which member of a cluster stays: the one nearest to the cluster's mean (Eq. 14-17).

With pairwise squared distances alone, since over a cluster of m members
||theta_i - mean||^2 = (1/m) sum_j d_ij^2 - const: the smallest row sum wins. No data is
needed, hence O(1) forward passes; any score of ``scores`` can decide instead.
"""

import math
from collections.abc import Sequence

from .similarity import Array

TIE = 1e-9
"""Row sums closer than this, relatively, are equal: the lowest index wins."""


def nearest_to_mean(
    weight_sqdist_EE: Array, members: Sequence[int], among: Sequence[int] | None = None
) -> int:
    """The member nearest to the mean; ties to the lowest index.

    Both members of a pair are exactly equidistant from their mean. The sums run over
    one triangle of the matrix and are rounded once, so that their order or a matrix
    that is not quite symmetric cannot decide such a tie.

    Args:
        weight_sqdist_EE: Squared distances between all experts of the layer.
        members: The cluster, whose mean it is.
        among: The members to choose from; all of them where not given.
    """
    ordered = sorted(members)
    sums = {
        one: math.fsum(
            float(weight_sqdist_EE[min(one, two), max(one, two)])
            for two in ordered
            if two != one
        )
        for one in sorted(among or members)
    }
    least = min(sums.values())
    return next(one for one in sums if sums[one] <= least + TIE * abs(least))


def highest_score(score_E: Array, members: Sequence[int]) -> int:
    """The member with the highest score; ties to the lowest index."""
    return min(members, key=lambda expert: (-score_E[expert], expert))
