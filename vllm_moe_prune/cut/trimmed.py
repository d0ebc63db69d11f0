"""A layer as the plan leaves it before slimming: survivors, means, trimmed router."""

import dataclasses
from collections.abc import Sequence

import torch

from ..archs.spec import TensorRule
from ..checkpoint.open import Checkpoint, Layer
from ..checkpoint.reader import Expert, read_expert, read_router_part
from ..decide.cut_plan import CutPlan, LayerPlan
from .slice import keeps_router, members_of, redirect_of, row_groups


def trimmed_layer(layer: Layer, layer_plan: LayerPlan, plan: CutPlan) -> Layer:
    """The layer's view after trimming, as the forward pass needs it."""
    if layer_plan.drops_moe:
        return dataclasses.replace(
            layer,
            num_experts=0,
            has_moe=False,
            dropped=True,
            norm_only=layer_plan.action == "drop-moe-keep-norm",
        )
    if not layer.has_moe:
        return layer
    redirect = None
    rows = len(layer_plan.keep)
    if keeps_router(plan, layer_plan):
        rows = layer_plan.experts
        redirect = redirect_of(layer_plan)
    return dataclasses.replace(
        layer,
        num_experts=len(layer_plan.keep),
        top_k=min(layer.top_k, rows),
        redirect=redirect,
        groups=row_groups(layer, layer_plan, plan),
    )


def trimmed_router(
    checkpoint: Checkpoint,
    rule: TensorRule,
    layer: Layer,
    layer_plan: LayerPlan,
    plan: CutPlan,
) -> torch.Tensor:
    """The router rows, or their biases, after trimming, in their stored dtype."""
    router_ED = read_router_part(checkpoint, layer, rule)
    if keeps_router(plan, layer_plan):
        return router_ED
    rows = []
    for new in range(len(layer_plan.keep)):
        members = members_of(layer_plan, new)
        weights = [weight for _, weight in members]
        rows.append(mean_of([router_ED[old] for old, _ in members], weights))
    return torch.stack(rows)


def survivor(
    checkpoint: Checkpoint, layer: Layer, layer_plan: LayerPlan, new: int
) -> Expert:
    """The weights of new expert ``new``: its own, or the mean of its cluster."""
    members = members_of(layer_plan, new)
    first = read_expert(checkpoint, layer, members[0][0])
    if len(members) == 1:
        return first
    # One member in memory at a time: sums in fp32, then the stored dtype.
    sums = [_weighted(matrix, members[0][1]) for matrix in first]
    for old, weight in members[1:]:
        matrices = read_expert(checkpoint, layer, old)
        for total, matrix in zip(sums, matrices, strict=True):
            total += _weighted(matrix, weight)
    parts = 1 if members[0][1] is not None else len(members)
    dtype = first.gate_FD.dtype
    return Expert(*((total / parts).to(dtype) for total in sums))


def mean_of(
    tensors: Sequence[torch.Tensor], weights: Sequence[float | None]
) -> torch.Tensor:
    """Mean in fp32, rounded once to the stored dtype; a single one stays itself.

    Args:
        tensors: At least one.
        weights: Adding up to 1, or all None for a plain mean.
    """
    if len(tensors) == 1:
        return tensors[0]
    total = _weighted(tensors[0], weights[0])
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total = total + _weighted(tensor, weight)
    parts = 1 if weights[0] is not None else len(tensors)
    return (total / parts).to(tensors[0].dtype)


def _weighted(tensor: torch.Tensor, weight: float | None) -> torch.Tensor:
    """A copy in fp32, times the weight if there is one."""
    copied = tensor.to(torch.float32, copy=True)
    return copied if weight is None else copied.mul_(weight)
