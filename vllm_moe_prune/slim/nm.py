"""n:m sparsity: of every m neighbors in a row n stay, whatever the score.

R output rows, D input columns.
"""

import torch
from torch import Tensor

SMALL = 16
"""Groups up to this size are ranked by comparing all pairs, larger ones by sorting."""


def lowest_in_groups(scores_RD: Tensor, count: int, m: int) -> Tensor:
    """True at the ``count`` lowest of every m columns, ties to the lower column.

    Args:
        scores_RD: Finite; D is a multiple of m.
        count: How many of each group go: m - n.
        m: Size of the groups.
    """
    grouped = scores_RD.reshape(len(scores_RD), -1, m)
    if m > SMALL:
        # Stable, or ties would go by the device.
        order = torch.sort(grouped, dim=-1, stable=True).indices
        mask = torch.zeros_like(grouped, dtype=torch.bool)
        mask.scatter_(-1, order[..., :count], value=True)
        return mask.flatten(1)
    if scores_RD.device.type != "cpu":
        # Few launches instead of little memory.
        others, own = grouped[..., None, :], grouped[..., :, None]
        earlier = torch.ones(m, m, dtype=torch.bool, device=grouped.device).tril(-1)
        before = (others < own) | ((others == own) & earlier)
        return (before.sum(-1, dtype=torch.int32) < count).flatten(1)
    # A rank is below SMALL, so a byte is enough.
    rank = torch.zeros_like(grouped, dtype=torch.int8)
    for low in range(m):
        for high in range(low + 1, m):
            # Of equal scores the lower column comes first.
            behind = grouped[..., high] >= grouped[..., low]
            rank[..., high] += behind
            rank[..., low] += ~behind
    return (rank < count).flatten(1)
