"""The mean output of each removed expert, which stands for it where the plan says so.

Axes: E experts, D hidden.
"""

import torch

from ..calibrate.stats import Stats
from ..checkpoint.open import Checkpoint
from ..decide.cut_plan import CutPlan
from ..errors import PlanError
from .layer_cut import layer_cuts
from .spell import Means

AGAIN = "Measure with routing: mean, and give `cut` the file with --stats."


def means_of(
    checkpoint: Checkpoint, plan: CutPlan, stats: Stats | None
) -> Means | None:
    """By output layer and removed expert; None where the plan means no means.

    An expert that no token chose gives zeros (MoNE, arXiv 2507.00390, leaves it open).

    Raises:
        PlanError: The statistics do not have them.
    """
    if plan.constants != "means":
        return None
    hidden = checkpoint.config[checkpoint.arch.config.hidden]
    found = {}
    for cut in layer_cuts(checkpoint, plan):
        one = cut.layer_plan
        if cut.drops_block or not one.keep or len(one.keep) == one.experts:
            continue
        layer = stats.layers.get(cut.index) if stats is not None else None
        sums_ED = layer.output_sum_ED if layer is not None else None
        routed_E = layer.routed_E if layer is not None else None
        if sums_ED is None or routed_E is None:
            raise PlanError(
                f"layer {cut.index}: the plan puts mean outputs in place of removed "
                f"experts, which were not measured. {AGAIN}"
            )
        if sums_ED.shape != (one.experts, hidden) or len(routed_E) != one.experts:
            raise PlanError(
                f"layer {cut.index}: output_sum_ED has shape {list(sums_ED.shape)}, "
                f"expected [{one.experts}, {hidden}]. {AGAIN}"
            )
        found[cut.new_index] = {
            expert: torch.from_numpy(sums_ED[expert] / max(routed_E[expert], 1.0))
            for expert in sorted(set(range(one.experts)) - set(one.keep))
        }
    return found
