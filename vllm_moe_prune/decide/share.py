"""``structured_share: auto``: the part of a total that whole experts take.

Two measured curves decide: what removing experts costs (the sum over layers of their
sensitivities, split best) and what zeros cost (the whole model at a few sparsities).
The sum of the two costs is least at the share that is chosen. It is a sum of costs
measured apart, and so an estimate; docs/methods.md says how good.
"""

import math
from collections.abc import Mapping

import numpy as np

from ..calibrate.stats import Stats
from ..errors import PlanError
from ..recipes.schema import Recipe
from .budget import most_removed, whole_experts
from .facts import ModelFacts
from .sensitivity import MEASURE_SENSITIVITY, loss_curves, split_by_loss
from .similarity import Array

ZEROS = (0.3, 0.5, 0.65, 0.8)
"""Sparsities at which the cost of zeros is measured, by Wanda, which is cheap."""
OF_WANDA = {"sparsegpt": 1 / 3}
"""Zeros by SparseGPT cost a third of Wanda's: 2.3 to 4.2 times less on the four demo
models at 40, 50 and 65 % (docs/results/)."""
SHARES = tuple(eighths / 8 for eighths in range(8))
"""A share of 1 is not among them: it writes no zeros, and rounds experts up."""
LEAST = 1e-6
"""Nats per token below which a cost is noise; interpolation is by its logarithm."""


def chosen_share(recipe: Recipe, facts: ModelFacts, stats: Stats | None) -> float:
    """The share of the total that whole experts take; the least of equally good ones.

    Args:
        recipe: Has a total; says by which rule experts leave.
        facts: The checkpoint.
        stats: Sensitivities by that rule, and the cost of zeros.

    Raises:
        PlanError: They were not measured, or are not of this recipe.
    """
    total = recipe.total_sparsity or 0.0
    moe = {
        at: layer
        for at, layer in enumerate(facts.layers)
        if layer.has_moe and not layer.mtp
    }
    most = {at: most_removed(at, layer, recipe.experts) for at, layer in moe.items()}
    curves = loss_curves(stats, recipe, most)
    zeros = _zero_costs(stats)
    experts = sum(layer.num_experts for layer in moe.values())
    room = sum(len(curve) - 1 for curve in curves.values())
    costs = {}
    for share in SHARES:
        removed = whole_experts(share * total, experts)
        if removed <= room:
            rest = max(0.0, total - removed / experts) / (1 - removed / experts)
            by_zeros = _cost(zeros, rest) * OF_WANDA.get(recipe.slim.method, 1.0)
            costs[share] = _experts_cost(curves, removed) + by_zeros
    return min(costs, key=lambda share: (costs[share], share))


def _experts_cost(curves: Mapping[int, Array], removed: int) -> float:
    split = split_by_loss(curves, removed)
    return sum(float(curves[at][count] - curves[at][0]) for at, count in split.items())


def _zero_costs(stats: Stats | None) -> list[float]:
    """What zeros cost at each of ``ZEROS``, in nats per token; never falling.

    Raises:
        PlanError: It was not measured.
    """
    found = None if stats is None else stats.sensitivity.get("zeros")
    numbers = found if isinstance(found, list) else []
    finite = [one for one in numbers if isinstance(one, float) and math.isfinite(one)]
    if len(finite) != len(ZEROS) or len(numbers) != len(ZEROS):
        raise PlanError(
            "the statistics lack the cost of zeros, by which structured_share: auto "
            f"decides. {MEASURE_SENSITIVITY}"
        )
    return [float(one) for one in np.maximum.accumulate(np.maximum(finite, LEAST))]


def _cost(zeros: list[float], sparsity: float) -> float:
    """Between the points by the logarithm; beyond them by the outer slopes."""
    if sparsity <= 0.0:
        return 0.0
    logs = np.log(zeros)
    at = int(np.clip(np.searchsorted(ZEROS, sparsity), 1, len(ZEROS) - 1))
    low, high = ZEROS[at - 1], ZEROS[at]
    slope = (logs[at] - logs[at - 1]) / (high - low)
    return float(np.exp(logs[at - 1] + slope * (sparsity - low)))
