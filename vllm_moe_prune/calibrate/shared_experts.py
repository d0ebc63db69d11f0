"""Running a layer's experts on several ranks, with the bits of one process.

An expert runs on its owner, over all of its tokens in their order. Outputs are added
in the order of experts on every rank, so that all hold the same hidden states.

Axes: N tokens, n those of one expert, D hidden.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping

import torch

from ..checkpoint.open import Layer
from ..checkpoint.reader import Expert
from ..ranks.group import Ranks
from .expert_forward import (
    Activation,
    Read,
    Routing,
    Served,
    Visit,
    expert_outputs,
    expert_tokens,
    place,
    run_experts,
)

# Of one rank before all exchange: experts have different numbers of tokens.
AT_ONCE = 4


def turns(ranks: Ranks, experts: int) -> Iterator[range]:
    """The experts of a layer in groups: each rank has some of a group, or is alone."""
    step = 1 if ranks.size == 1 else AT_ONCE * ranks.size
    for start in range(0, experts, step):
        yield range(start, min(start + step, experts))


@torch.no_grad()
def scaled_outputs(
    x_ND: torch.Tensor,
    token_n: torch.Tensor,
    weight_n: torch.Tensor,
    expert: Expert,
    act: Activation,
    see: Callable[[Served], None] | None = None,
) -> torch.Tensor:
    """One expert's weighted output [n, D] for its tokens, for ``add_outputs``."""
    scaled_nD = x_ND.new_empty(len(token_n), x_ND.shape[1])
    if len(token_n):
        placed = place(expert, x_ND)
        outputs = expert_outputs(x_ND, token_n, weight_n, placed, act, see)
        torch.cat([scaled for _, scaled in outputs], out=scaled_nD)
    return scaled_nD


def add_outputs(
    ranks: Ranks,
    out_ND: torch.Tensor,
    served: Mapping[int, torch.Tensor],
    own: Mapping[int, torch.Tensor],
) -> None:
    """Add what the experts of a group gave to ``out_ND``, in their order.

    Args:
        ranks: All of them come here for the same group.
        out_ND: On every rank; changed in place.
        served: The tokens of each expert of the group.
        own: What the own experts gave, see ``scaled_outputs``.
    """
    for expert, token_n in served.items():
        scaled_nD = own.get(expert)
        if scaled_nD is None:
            scaled_nD = out_ND.new_empty(len(token_n), out_ND.shape[1])
        given_nD = ranks.broadcast(scaled_nD, ranks.owner(expert))
        given_nD += out_ND.index_select(0, token_n)
        out_ND.index_copy_(0, token_n, given_nD)


def check_states(ranks: Ranks, x_ND: torch.Tensor, index: int) -> None:
    """Refuse ranks whose arithmetic differs: the result would be of a mixture.

    Args:
        ranks: All of them come here.
        x_ND: What enters the experts.
        index: Of which layer.
    """
    if ranks.size > 1:
        data = x_ND.cpu().contiguous().flatten().view(torch.uint8).numpy().data
        digest = hashlib.sha256(data).hexdigest()
        ranks.agree(**{f"hidden_state_before_the_experts_of_layer_{index}": digest})


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
    for turn in turns(ranks, layer.num_experts):
        served, own = {}, {}
        for expert in turn:
            tokens = expert_tokens(routing, expert, layer.redirect)
            served[expert] = tokens[0]
            if ranks.owns(expert) and len(tokens[0]):
                see = functools.partial(visit, expert) if visit else None
                own[expert] = scaled_outputs(x_ND, *tokens, read(expert), act, see)
        add_outputs(ranks, out_ND, served, own)
    return out_ND
