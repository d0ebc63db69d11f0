"""A layer as the plan leaves it before slimming: survivors, means, trimmed router."""

import dataclasses

import torch

from ..checkpoint.open import Checkpoint, Layer
from ..checkpoint.reader import Expert, read_expert, read_router
from ..decide.plan import CutPlan, LayerPlan
from .slice import keeps_router


def trimmed_layer(layer: Layer, layer_plan: LayerPlan, plan: CutPlan) -> Layer:
    """The layer's view after trimming, as the forward pass needs it."""
    if layer_plan.action == "drop-moe":
        return dataclasses.replace(layer, num_experts=0, has_moe=False, dropped=True)
    if not layer.has_moe:
        return layer
    redirect = None
    rows = len(layer_plan.keep)
    if keeps_router(plan, layer_plan) and layer_plan.clusters is not None:
        rows = layer_plan.experts
        serves = {
            expert: new
            for new, cluster in enumerate(layer_plan.clusters)
            for expert in cluster
        }
        redirect = tuple(serves[row] for row in range(rows))
    return dataclasses.replace(
        layer,
        num_experts=len(layer_plan.keep),
        top_k=min(layer.top_k, rows),
        redirect=redirect,
    )


def trimmed_router(
    checkpoint: Checkpoint, layer: Layer, layer_plan: LayerPlan, plan: CutPlan
) -> torch.Tensor:
    """The router rows after trimming, in their stored dtype."""
    router_ED = read_router(checkpoint, layer)
    if keeps_router(plan, layer_plan):
        return router_ED
    if layer_plan.reconstruct and layer_plan.clusters is not None:
        rows = [mean_of([router_ED[i] for i in ids]) for ids in layer_plan.clusters]
        return torch.stack(rows)
    return router_ED[list(layer_plan.keep)]


def survivor(
    checkpoint: Checkpoint, layer: Layer, layer_plan: LayerPlan, new: int
) -> Expert:
    """The weights of new expert ``new``: its own, or the mean of its cluster."""
    if not (layer_plan.reconstruct and layer_plan.clusters is not None):
        return read_expert(checkpoint, layer, layer_plan.keep[new])
    # One member in memory at a time: sums in fp32, then the stored dtype.
    ids = layer_plan.clusters[new]
    first = read_expert(checkpoint, layer, ids[0])
    sums = [matrix.to(torch.float32) for matrix in first]
    for expert in ids[1:]:
        for total, matrix in zip(
            sums, read_expert(checkpoint, layer, expert), strict=True
        ):
            total += matrix
    dtype = first.gate_FD.dtype
    return Expert(*(total.div_(len(ids)).to(dtype) for total in sums))


def mean_of(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Mean in fp32, rounded once to the stored dtype; a single one stays itself."""
    if len(tensors) == 1:
        return tensors[0]
    total = tensors[0].to(torch.float32)
    for tensor in tensors[1:]:
        total = total + tensor
    return (total / len(tensors)).to(tensors[0].dtype)
