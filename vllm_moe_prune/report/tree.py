"""The merge tree of a layer's experts, laid out for drawing.

Leaves stand at 0, 1, ... E - 1; a merge stands half way between the two it joins.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..decide.clusters import Merge

Clusters = Sequence[Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Fork:
    """One merge as drawn: from (x, base) up to ``height`` on either side."""

    left: float
    left_base: float | None
    """Height where the branch starts; None: at a leaf."""
    right: float
    right_base: float | None
    height: float
    within: bool
    """Whether the plan carried it out: both sides are in one of its clusters."""


def leaf_order(merges: Sequence[Merge], experts: int) -> tuple[int, ...]:
    """Experts from left to right, so that no two branches of the tree cross."""
    rows = {expert: [expert] for expert in range(experts)}
    for merge in merges:
        # Clusters are named by their smallest member, so the first name stays.
        rows[merge.first] += rows.pop(merge.second)
    return tuple(expert for _, row in sorted(rows.items()) for expert in row)


def forks(
    merges: Sequence[Merge], order: Sequence[int], clusters: Clusters | None
) -> list[Fork]:
    """Every merge, lowest first."""
    place = {expert: float(at) for at, expert in enumerate(order)}
    base: dict[int, float] = {}
    cluster_of = {
        expert: at for at, cluster in enumerate(clusters or ()) for expert in cluster
    }
    members = {expert: [expert] for expert in order}
    found = []
    for merge in merges:
        members[merge.first] += members.pop(merge.second)
        homes = {cluster_of.get(expert) for expert in members[merge.first]}
        found.append(
            Fork(
                left=place[merge.first],
                left_base=base.get(merge.first),
                right=place[merge.second],
                right_base=base.get(merge.second),
                height=merge.height,
                within=len(homes) == 1 and None not in homes,
            )
        )
        place[merge.first] = (place[merge.first] + place[merge.second]) / 2
        base[merge.first] = merge.height
    return found


def outlines(
    order: Sequence[int], clusters: Clusters
) -> list[tuple[int, int, int, int]]:
    """Rectangles (x, y, width, height) around what a cluster holds of an E x E map.

    A cluster that the order tears apart is drawn as several; single experts as none.
    """
    place = {expert: at for at, expert in enumerate(order)}
    found = []
    for cluster in clusters:
        if len(cluster) < 2:
            continue
        runs: list[list[int]] = []
        for at in sorted(place[expert] for expert in cluster):
            if runs and runs[-1][0] + runs[-1][1] == at:
                runs[-1][1] += 1
            else:
                runs.append([at, 1])
        # Every run with every other: cells between two runs are the cluster's too.
        found += [(x, y, width, height) for x, width in runs for y, height in runs]
    return found
