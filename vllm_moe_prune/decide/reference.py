"""The clustering rule of STUN's published code, for comparison with it.

Its test of a pair looks at some of the cross pairs of two clusters only, and a pair
once rejected fails later tests too, so clusters may be wider than the threshold and
their number need not fall as it rises. ``clusters`` is what the paper describes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import RecipeError
from .similarity import Array

START, STEP = 0.5, 0.1
STUCK = 10
"""The search gives up after this many equal counts in a row."""

Clusters = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Found:
    """A threshold and what it leads to."""

    threshold: float
    clusters: dict[int, Clusters]


def reference_clusters(distance_EE: Array, threshold: float, most: int) -> Clusters:
    """The clusters at one threshold, by smallest member.

    Args:
        distance_EE: Symmetric; infinite between experts that must not meet.
        threshold: Distances have to be below it.
        most: How many experts may go.
    """
    open_EE = distance_EE.copy()
    np.fill_diagonal(open_EE, np.inf)
    experts = len(open_EE)
    cluster_of = {expert: [expert] for expert in range(experts)}
    removed = 0
    while removed < most and open_EE.min(initial=np.inf) < threshold:
        one, two = divmod(int(open_EE.argmin()), experts)
        ones, twos = cluster_of[one], cluster_of[two]
        # The quirk: all of one cluster against `two`, all of the other against `one`.
        widest = max(open_EE[ones, two].max(), open_EE[twos, one].max())
        if widest < threshold:
            open_EE[ones, two] = open_EE[twos, one] = np.inf
            union = ones + twos
            # One list for all members: id() tells clusters apart at the end.
            cluster_of.update(dict.fromkeys(union, union))
            removed += 1
        else:
            open_EE[one, two] = open_EE[two, one] = np.inf
    distinct = {id(cluster): tuple(sorted(cluster)) for cluster in cluster_of.values()}
    return tuple(sorted(distinct.values()))


def search_threshold(
    distances: Mapping[int, Array], most: Mapping[int, int], target: int
) -> Found:
    """The published search for one threshold that removes ``target`` experts in all.

    From 0.5, by steps that double until the count has crossed the target and halve
    from then on.

    Raises:
        RecipeError: If the search settles on another count.
    """
    threshold, step, crossed, last = START, STEP, False, 0
    counts: list[int] = []
    while True:
        clusters = {
            layer: reference_clusters(distance_EE, threshold, most[layer])
            for layer, distance_EE in distances.items()
        }
        removed = sum(
            len(distances[layer]) - len(found) for layer, found in clusters.items()
        )
        if removed == target:
            return Found(threshold, clusters)
        counts.append(removed)
        if len(counts) > STUCK and len(set(counts[-STUCK:])) == 1:
            raise RecipeError(
                f"linkage: reference finds no threshold that removes {target} experts; "
                f"the nearest remove {_nearest(counts, target)}. "
                "Use experts.linkage: complete, which meets every budget."
            )
        direction = 1 if removed < target else -1
        crossed = crossed or last * direction < 0
        step = step / 2 if crossed else step * 2
        threshold += step * direction
        last = direction


def _nearest(counts: list[int], target: int) -> str:
    below = [count for count in counts if count < target]
    above = [count for count in counts if count > target]
    ends = [max(below)] if below else []
    return " and ".join(map(str, ends + ([min(above)] if above else [])))
