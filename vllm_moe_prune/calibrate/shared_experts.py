"""Running a layer's experts on several ranks, with the bits of one process.

An expert runs on its owner, over all of its tokens in their order. Outputs are added
in the order of experts on every rank, so that all hold the same hidden states.

Axes: N tokens, n those of one expert, D hidden.
"""

import functools
from typing import NamedTuple

import torch

from ..checkpoint.open import Layer
from ..ranks.group import Ranks
from .expert_forward import (
    Activation,
    Read,
    Routing,
    Visit,
    expert_outputs,
    expert_tokens,
    place,
    run_experts,
)

# Of one rank before all exchange: experts have different numbers of tokens.
AT_ONCE = 4


class _Turn(NamedTuple):
    expert: int
    token_n: torch.Tensor
    scaled_nD: torch.Tensor


@torch.no_grad()
def run_shared(
    ranks: Ranks,
    x_ND: torch.Tensor,
    routing: Routing,
    layer: Layer,
    read: Read,
    act: Activation,
    visit: Visit | None = None,
) -> torch.Tensor:
    """What ``run_experts`` returns, on every rank; ``visit`` sees the own experts."""
    if ranks.size == 1:
        return run_experts(x_ND, routing, layer, read, act, visit)
    out_ND = torch.zeros_like(x_ND)
    step = AT_ONCE * ranks.size
    for start in range(0, layer.num_experts, step):
        turns = []
        for expert in range(start, min(start + step, layer.num_experts)):
            token_n, weight_n = expert_tokens(routing, expert, layer.redirect)
            scaled_nD = x_ND.new_empty(len(token_n), x_ND.shape[1])
            if ranks.owns(expert) and len(token_n):
                see = functools.partial(visit, expert) if visit else None
                placed = place(read(expert), x_ND)
                outputs = expert_outputs(x_ND, token_n, weight_n, placed, act, see)
                torch.cat([scaled for _, scaled in outputs], out=scaled_nD)
            turns.append(_Turn(expert, token_n, scaled_nD))
        for expert, token_n, scaled_nD in turns:
            given_nD = ranks.broadcast(scaled_nD, ranks.owner(expert))
            given_nD += out_ND.index_select(0, token_n)
            out_ND.index_copy_(0, token_n, given_nD)
    return out_ND
