"""Routing where a router row is not simply an expert of this process.

Two cases share one table from router row to (expert, share): redirect mode, where rows
of removed experts are served by others, and kernels that ignore vLLM's expert map.
T tokens, K top-k, R router rows.
"""

from collections.abc import Sequence

import torch

from .layers import ServedLayer


def row_table(
    layer: ServedLayer, local_ids: Sequence[int] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which expert serves each router row, and how much of its weight counts.

    Args:
        layer: The layer.
        local_ids: Global expert id -> index in this process, -1 for another process;
            None where the kernel takes global ids.

    Returns:
        The expert ids [R] as int32, and 1.0 or 0.0 [R] as float32. A slot that counts
        nothing here goes to expert 0 with weight 0, which every kernel understands.
    """
    targets = layer.redirect or tuple(range(layer.experts))
    experts = [
        -1 if target is None else target if local_ids is None else local_ids[target]
        for target in targets
    ]
    expert_R = torch.tensor(experts, dtype=torch.int32)
    return expert_R.clamp(min=0), (expert_R >= 0).to(torch.float32)


def route_rows(
    logits_TR: torch.Tensor,
    expert_R: torch.Tensor,
    share_R: torch.Tensor,
    *,
    top_k: int,
    renormalise: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-k and renormalisation over router rows first, then rows become experts.

    Returns:
        Weights [T, K] float32 and expert ids [T, K] int32. Two slots of a token may
        name the same expert; the kernels treat them as two and add them up.
    """
    best_TK, rows_TK = torch.topk(logits_TR.float(), top_k, dim=-1)
    if renormalise:
        weights_TK = torch.softmax(best_TK, dim=-1)
    else:
        total_T1 = torch.logsumexp(logits_TR.float(), dim=-1, keepdim=True)
        weights_TK = torch.exp(best_TK - total_T1)
    return weights_TK * share_R[rows_TK], expert_R[rows_TK]
