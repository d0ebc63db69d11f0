"""Weights as the plan leaves them before slimming: survivors, means, the router."""

from collections.abc import Sequence

import torch

from ..archs.spec import TensorRule
from ..checkpoint.reader import Expert, read_expert, read_router_part
from .layer_cut import LayerCut


def trimmed_router(cut: LayerCut, rule: TensorRule) -> torch.Tensor:
    """The router rows, or their biases, after trimming, in their stored dtype."""
    router_ED = read_router_part(cut.checkpoint, cut.layer, rule)
    if cut.keeps_router:
        return router_ED
    rows = []
    for members in cut.survivors:
        weights = [weight for _, weight in members]
        rows.append(mean_of([router_ED[old] for old, _ in members], weights))
    return torch.stack(rows)


def survivor(cut: LayerCut, new: int) -> Expert:
    """The weights of new expert ``new``: its own, or the mean of its cluster.

    Where it was refitted, with the projection that it has since.
    """
    expert = _merged(cut, new)
    if new in cut.refitted:
        return expert._replace(down_DF=cut.refitted[new])
    return expert


def _merged(cut: LayerCut, new: int) -> Expert:
    members = cut.members(new)
    first = read_expert(cut.checkpoint, cut.layer, members[0][0])
    if len(members) == 1:
        return first
    # One member in memory at a time: sums in fp32, then the stored dtype.
    sums = [_weighted(matrix, members[0][1]) for matrix in first]
    # In the plan's order, on which the last bits of a sum depend.
    for old, weight in members[1:]:
        matrices = read_expert(cut.checkpoint, cut.layer, old)
        for total, matrix in zip(sums, matrices, strict=True):
            total += _weighted(matrix, weight)
    # Weights add up to 1 already (check_plan).
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
    # A copy of fp32 too: sums and products are made in place.
    copied = tensor.to(torch.float32, copy=True)
    return copied if weight is None else copied.mul_(weight)
