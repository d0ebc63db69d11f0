"""OWL's outliers, counted on the model that stage 1 leaves, in one forward pass.

Axes: N tokens, D hidden, F expert width, E experts of the input.
"""

from dataclasses import replace

import numpy as np
import torch

from ..calibrate.data import Tokens
from ..calibrate.expert_forward import add_expert, expert_tokens, place
from ..calibrate.forward import StreamingModel
from ..calibrate.memory import release_freed
from ..calibrate.stats import LayerStats, Stats
from ..decide.cut_plan import CutPlan, trimming
from ..progress import Progress, Report, ignore
from ..slim.owl import outliers, score_sum
from .layer_cut import LayerCut, layer_cuts
from .slim_expert import input_sums
from .slim_layer import trimmed_routing
from .trimmed import survivor


@torch.no_grad()
def with_outliers(
    model: StreamingModel,
    plan: CutPlan,
    stats: Stats,
    tokens: Tokens,
    report: Report = ignore,
) -> Stats:
    """The statistics with each expert's outliers under ``plan.recipe.slim.owl_m``.

    Args:
        model: The input.
        plan: What stage 1 leaves; its sparsities are not looked at.
        stats: What was measured before.
        tokens: Calibration tokens; their forward goes through the trimmed model.
        report: Called after every layer.
    """
    found = dict(stats.layers)
    hidden_STD = model.embed(tokens.ids_ST)
    layers = model.checkpoint.layers
    total = model.checkpoint.tensor_bytes
    for cut in layer_cuts(model.checkpoint, plan):
        layer = cut.layer
        if not cut.drops_block:
            known = found.get(layer.index, LayerStats())
            if layer.mtp:
                hidden_STD = model.further(layer.index, hidden_STD, tokens.ids_ST)
            hidden_STD, after = _through(model, cut, known, hidden_STD)
            if layer.has_moe:
                found[layer.index] = after
        release_freed()
        done = layer.index + 1
        share = total * done // len(layers)
        report(
            Progress(
                stage="outliers",
                layer=done,
                layers=len(layers),
                bytes_done=share,
                bytes_total=total,
            )
        )
    return replace(
        stats,
        layers=found,
        forward_passes=stats.forward_passes + 1,
        trimming=trimming(plan),
    )


def _through(
    model: StreamingModel,
    cut: LayerCut,
    known: LayerStats,
    hidden_STD: torch.Tensor,
) -> tuple[torch.Tensor, LayerStats]:
    """One layer: two looks at each expert, first for the mean score, then to count."""
    plan, trimmed = cut.plan, cut.trimmed
    hidden_STD, x_ND = model.enter(cut.index, hidden_STD)
    if x_ND is not None and trimmed.norm_only:
        hidden_STD += x_ND.view_as(hidden_STD)
    if x_ND is None or not trimmed.has_moe:
        return hidden_STD, known
    routing = trimmed_routing(model, cut, x_ND)
    out_ND = torch.zeros_like(x_ND)
    squares, scores, weights = [], 0.0, 0
    for new in range(trimmed.num_experts):
        expert = place(survivor(cut, new), x_ND)
        served = expert_tokens(routing, new, trimmed.redirect)
        # Kept for the second look, in which the experts are read again.
        squares.append(input_sums(expert, plan, x_ND, *served, model.act))
        for matrix, sums in zip(expert, squares[-1], strict=True):
            scores += score_sum(matrix, sums)
            weights += matrix.numel()
        add_expert(out_ND, x_ND, *served, expert, model.act)
    # OWL's threshold: M times the mean Wanda score of the whole layer.
    factor = plan.recipe.slim.owl_m
    threshold = factor * scores / weights
    counted_E = np.zeros(cut.layer.num_experts)
    for new, sums_of in enumerate(squares):
        expert = place(survivor(cut, new), x_ND)
        # By the ids of the input, as all statistics are; removed experts stay at 0.
        counted_E[cut.keep[new]] = sum(
            outliers(matrix, sums, threshold)
            for matrix, sums in zip(expert, sums_of, strict=True)
        )
    model.add_shared(cut.index, x_ND, out_ND)
    hidden_STD += out_ND.view_as(hidden_STD)
    return hidden_STD, replace(known, owl_outliers_E=counted_E, owl_m=np.array(factor))
