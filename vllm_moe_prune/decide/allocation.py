"""How the zeros are spread over layers: evenly, or by OWL's outlier ratios.

OWL gives layers with many outliers a lower sparsity. The offsets are centered with the
weights that each layer has left, and the base is found on whole weights, so the total
is met exactly however much stage 1 took from each layer.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence

from ..calibrate.stats import Stats
from ..errors import PlanError
from ..recipes.schema import SlimStage
from .cut_plan import LayerPlan
from .facts import LayerFacts
from .similarity import measured
from .sparsity import not_enough, zeros_at

MEASURE_OWL = "Run `vllm-moe-prune measure` with this recipe and --calibration."

JUST_BELOW = 1.0 - 1e-9
"""Takes a sparsity off its step: far less than one weight, far more than rounding."""

Groups = Mapping[int, Counter[int]]
"""Layer -> how many comparison groups of each size it is left with."""


def owl_offsets(
    stats: Stats | None,
    pairs: Sequence[tuple[LayerFacts, LayerPlan]],
    groups: Groups,
    stage: SlimStage,
) -> dict[int, float]:
    """How much each layer's sparsity differs from the mean; no entry means not at all.

    Outlier ratios D are rescaled to 0 ... 2 lambda as densities and centered.

    Raises:
        PlanError: If the outliers were not measured, or with another M.
    """
    ratios = {
        plan.layer: _outlier_ratio(stats, facts, plan, stage)
        for facts, plan in pairs
        if plan.keep and plan.layer in groups
    }
    if not ratios:
        return {}
    low, high = min(ratios.values()), max(ratios.values())
    # OWL rescales to [0, 2 lambda]; where all layers are alike nothing is to be shared
    # out.
    spread = high - low
    density = {
        layer: (ratio - low) / spread * 2.0 * stage.owl_lambda if spread else 0.0
        for layer, ratio in ratios.items()
    }
    weights = {layer: _weights(groups[layer]) for layer in ratios}
    # Weighted by what is slimmed: the total must not change by how it is spread.
    mean = sum(density[layer] * weights[layer] for layer in ratios)
    mean /= sum(weights.values())
    return {layer: mean - value for layer, value in density.items()}


def least_allocation(
    zeros: int, groups: Groups, counted: Groups, offsets: Mapping[int, float]
) -> dict[int, float]:
    """Sparsities base + offset, with the smallest base that zeroes enough.

    Each is kept between 0 and one weight less than the layer's largest group. Of layers
    whose next weight is due at the same base the lower ones take it, as far as needed.

    Args:
        zeros: How many weights to zero.
        groups: All that is slimmed.
        counted: The part of it whose zeros count.
        offsets: Of some of the layers; 0 for the others.

    Raises:
        RecipeError: If every group would have to be zeroed whole.
    """

    def sparsity(base: float, layer: int) -> float:
        largest = max(groups[layer])
        # One weight of a group always stays, or its row would be zero whatever it
        # reads.
        wanted = base + offsets.get(layer, 0.0)
        return min(max(wanted, 0.0), (largest - 1) / largest)

    def total(base: float) -> int:
        return sum(
            zeros_at(sparsity(base, layer), found) for layer, found in counted.items()
        )

    def first_base(layer: int, size: int) -> float | None:
        """The smallest base at which this group's next weight makes it enough."""
        offset = offsets.get(layer, 0.0)
        # total() is monotone in the base, so each group's decisive step is found in
        # log(size).
        step = bisect_left(range(size), zeros, key=lambda k: total(k / size - offset))
        return None if step == size else step / size - offset

    bases = [
        base
        for layer, found in counted.items()
        for size in found
        if (base := first_base(layer, size)) is not None
    ]
    if not bases:
        raise not_enough(zeros, sum(counted.values(), Counter[int]()))
    found = {layer: sparsity(min(bases), layer) for layer in groups}
    # Several layers may reach their next step at once: those not needed step back.
    spare = total(min(bases)) - zeros
    for layer in sorted(counted, reverse=True):
        below = found[layer] * JUST_BELOW
        gain = zeros_at(found[layer], counted[layer]) - zeros_at(below, counted[layer])
        if 0 < gain <= spare:
            found[layer] = below
            spare -= gain
    return found


def _outlier_ratio(
    stats: Stats | None, facts: LayerFacts, plan: LayerPlan, stage: SlimStage
) -> float:
    """OWL's D: percentage of the survivors' weights that are outliers."""
    found = None if stats is None else stats.layers.get(plan.layer)
    outliers_E, factor = (
        measured(
            None if found is None else getattr(found, name),
            name,
            MEASURE_OWL,
            layer=plan.layer,
        )
        for name in ("owl_outliers_E", "owl_m")
    )
    if float(factor) != stage.owl_m:
        raise PlanError(
            f"layer {plan.layer}: outliers were counted with M = {float(factor):g}, "
            f"but slim.owl_m is {stage.owl_m:g}. {MEASURE_OWL}"
        )
    if outliers_E.shape != (plan.experts,):
        raise PlanError(
            f"layer {plan.layer}: outliers are of {len(outliers_E)} experts, but the "
            f"checkpoint has {plan.experts}. {MEASURE_OWL}"
        )
    weights = len(plan.keep) * facts.expert_parameters
    return 100.0 * float(outliers_E[list(plan.keep)].sum()) / weights


def _weights(groups: Counter[int]) -> int:
    return sum(size * count for size, count in groups.items())
