"""The mean output of each removed expert, which stands for it where the plan says so.

Axes: E experts, D hidden.
"""

import torch

from ..calibrate.stats import Stats
from ..calibrate.stats_file import load_stats
from ..checkpoint.open import Checkpoint
from ..checkpoint.reader import read_tensor
from ..decide.cut_plan import CutPlan
from ..errors import CheckpointError, PlanError
from .build_remap import build_remap
from .config import pruned_config
from .layer_cut import layer_cuts
from .output import STATS_FILE
from .spell import Means, is_stock

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


def check_constants(output: Checkpoint, source: Checkpoint, plan: CutPlan) -> None:
    """Compare the vectors of an output with what its plan puts in place of experts.

    Raises:
        CheckpointError: One differs, or the output is spelled otherwise than planned.
    """
    config = pruned_config(source, plan, build_remap(source, plan))
    spelled = plan.spelling == "stock-vllm" and not is_stock(source, config)
    if spelled != (output.substitution is not None):
        raise CheckpointError(
            f"{output.folder}: is not spelled as plan.json says ({plan.spelling})."
        )
    if output.substitution is None:
        return
    kept = output.folder / STATS_FILE
    means = None
    if plan.constants == "means":
        if not kept.is_file():
            raise CheckpointError(
                f"{kept}: missing, so the means in place of experts cannot be compared."
            )
        means = means_of(source, plan, load_stats(kept))
    for layer, constants in output.substitution.constants.items():
        for expert, info in constants.items():
            found_D = read_tensor(info)
            expected_D = torch.zeros_like(found_D)
            if means is not None:
                expected_D = means[layer][expert].to(found_D.dtype)
            if not torch.equal(found_D, expected_D):
                raise CheckpointError(
                    f"{info.file}: {info.name} is not what plan.json puts in place of "
                    f"expert {expert}."
                )
