"""Splitting a budget over layers by the measured loss of each.

Each layer has a curve: held-out loss against experts removed from that layer alone,
measured at a few points and linear between them. The split minimizes the sum of the
curves exactly (dynamic programming, since a measured curve need not be convex).
"""

import json
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ..calibrate.stats import Stats
from ..errors import PlanError, RecipeError
from ..recipes.schema import Recipe
from .similarity import Array, measured

MEASURE_SENSITIVITY = "Run `vllm-moe-prune measure` with this recipe."
UNIT = 1e-9
"""Losses are counted in whole units, so that sums, and with them ties, are exact."""

# What decides which experts leave a layer, once it is known how many.
STUN_FIELDS = (
    *("cluster_by", "linkage", "representative", "merge"),
    *("router_weight", "coactivation_weight", "divide_by_router_norm"),
    *("reconstruct", "reconstruct_below"),
)
SCORE_FIELDS = ("criterion", "reverse", "search")


def rule(recipe: Recipe) -> str:
    """By which rule experts leave a layer: curves hold for one rule only."""
    stage = recipe.experts
    # Budget, drop and keep are not in it: they say how many leave, not which.
    names = STUN_FIELDS if stage.method == "stun" else SCORE_FIELDS
    values = stage.model_dump(mode="json")
    values["groups"] = "equal" if stage.equal_groups else "uneven"
    chosen = {
        name: values[name] for name in ("method", "protected", "seed", "groups", *names)
    }
    # Left out where nothing is asked: rules of earlier versions had no such word.
    if stage.protect != "none":
        chosen["protect"] = stage.protect
    return json.dumps({**chosen, "routing": recipe.routing}, sort_keys=True)


def loss_curves(
    stats: Stats | None, recipe: Recipe, most: Mapping[int, int]
) -> dict[int, Array]:
    """For each layer the loss after removing 0, 1, ... experts from it alone.

    Args:
        stats: Holds the points.
        recipe: Its rule must be the one the points were measured by.
        most: How many experts each layer may lose; its points may end before that,
            and then so does the curve.

    Raises:
        PlanError: If the points are missing, malformed or of another rule.
    """
    if stats is None or not stats.sensitivity:
        raise PlanError(
            f"the statistics lack the layers' sensitivity. {MEASURE_SENSITIVITY}"
        )
    if stats.sensitivity.get("rule") != rule(recipe):
        raise PlanError(
            "the layers' sensitivity was measured by another rule "
            f"({stats.sensitivity.get('rule')}). {MEASURE_SENSITIVITY}"
        )
    return {layer: _curve(stats, layer, removable) for layer, removable in most.items()}


def split_by_loss(curves: Mapping[int, Array], target: int) -> dict[int, int]:
    """How many experts leave each layer for the least sum of losses.

    Among equally good splits the lowest layer loses most, then the next.

    Args:
        curves: ``curves[layer][r]`` is the loss with r experts removed from it.
        target: How many leave in all.

    Raises:
        RecipeError: If the curves do not go that far.
    """
    room = sum(len(curve) - 1 for curve in curves.values())
    if target > room:
        raise RecipeError(
            f"asked to remove {target} experts, but the layers' sensitivity was "
            f"measured for {room} only. Lower experts.drop, or measure more points."
        )
    # Integers: sums of floats would depend on the order of layers, and ties with them.
    costs = {
        layer: np.rint((curve - curve[0]) / UNIT).astype(np.int64)
        for layer, curve in curves.items()
    }
    layers = list(costs)
    # Dynamic programming over layers, O(layers * target * experts): exact, not greedy.
    # least[i][r]: the least cost of removing r experts from layers[i:].
    least = [_start(target)]
    for layer in reversed(layers):
        least.insert(0, _joined(costs[layer], least[0]))
    left, split = target, {}
    for at, layer in enumerate(layers):
        cost, rest = costs[layer], least[at + 1]
        # Most first: of equal splits the lowest layer loses most.
        split[layer] = next(
            removed
            for removed in range(min(left, len(cost) - 1), -1, -1)
            if _plus(cost[removed], rest[left - removed]) == least[at][left]
        )
        left -= split[layer]
    return split


NEVER = np.iinfo(np.int64).max
Costs = NDArray[np.int64]


def _start(target: int) -> Costs:
    cost = np.full(target + 1, NEVER, dtype=np.int64)
    cost[0] = 0
    return cost


def _plus(one: np.int64, two: np.int64) -> np.int64:
    return np.int64(NEVER) if two == NEVER else one + two


def _joined(cost: Costs, rest: Costs) -> Costs:
    """Least cost of each total, over one layer more."""
    joined = np.full_like(rest, NEVER)
    for removed in range(min(len(cost), len(rest))):
        tail = rest[: len(rest) - removed]
        # NEVER plus anything would overflow to a negative cost.
        sums = np.where(tail == NEVER, NEVER, tail + cost[removed])
        np.minimum(joined[removed:], sums, out=joined[removed:])
    return joined


def _curve(stats: Stats, layer: int, most: int) -> Array:
    found = stats.layers.get(layer)
    points_P2 = measured(
        None if found is None else found.sensitivity_P2,
        "sensitivity",
        MEASURE_SENSITIVITY,
        layer=layer,
    )
    if points_P2.ndim != 2 or points_P2.shape[1] != 2 or not len(points_P2):
        raise PlanError(f"layer {layer}: sensitivity needs pairs of removed and loss.")
    removed_P, loss_P = points_P2.T
    # np.interp does not check that its points rise.
    if removed_P[0] != 0 or (np.diff(removed_P) <= 0).any():
        raise PlanError(
            f"layer {layer}: sensitivity points must start at 0 experts removed and "
            f"rise, but are at {removed_P.tolist()}. {MEASURE_SENSITIVITY}"
        )
    # Nothing is extrapolated: the curve ends with its last point.
    reached = np.arange(min(most, int(removed_P[-1])) + 1)
    # Between measured points the loss is taken to be linear.
    loss_R: Array = np.interp(reached, removed_P, loss_P)
    return loss_R
