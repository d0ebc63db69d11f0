"""Running a layer's experts on several ranks, with the bits of one process.

An expert runs on its owner, over all of its tokens in their order. Outputs are added
in the order of experts on every rank, so that all hold the same hidden states.

Axes: N tokens, n those of one expert, D hidden.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch.nn import functional

from .. import __version__
from ..checkpoint.open import Checkpoint, Layer
from ..checkpoint.reader import Expert
from ..ranks.group import Ranks
from .expert_forward import (
    Activation,
    Routing,
    Served,
    Visit,
    add_expert,
    expert_outputs,
    expert_tokens,
    place,
    run_experts,
    token_chunks,
    weigh,
)
from .read_ahead import Read

# Of one rank before all exchange: experts have different numbers of tokens.
AT_ONCE = 4


def turns(ranks: Ranks, experts: int) -> Iterator[range]:
    """The experts of a layer in groups: each rank has some of one, or all if alone."""
    step = max(1, experts) if ranks.size == 1 else AT_ONCE * ranks.size
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


def exchange(ranks: Ranks, x_STD: torch.Tensor, slices: Sequence[slice]) -> None:
    """Put what each rank has of its slices in turn into ``x_STD``, on all ranks."""
    if ranks.size > 1:
        for at, one in enumerate(slices):
            x_STD[one] = ranks.broadcast(x_STD[one], ranks.owner(at))


@torch.no_grad()
def run_mlp(
    ranks: Ranks,
    out_ND: torch.Tensor,
    x_ND: torch.Tensor,
    mlp: Expert,
    act: Activation,
    weigher_1D: torch.Tensor | None = None,
) -> None:
    """Add an MLP of all tokens to ``out_ND``, in place; ranks take some tokens each.

    The sigmoid of what ``weigher_1D`` makes of a token weighs it, if it is given.
    """
    token_N = torch.arange(len(x_ND), device=x_ND.device)
    weight_N = torch.ones(len(x_ND), device=x_ND.device)
    if weigher_1D is not None:
        weight_N = weigh(x_ND, weigher_1D).flatten().float()
    if ranks.size == 1:
        add_expert(out_ND, x_ND, token_N, weight_N, mlp, act)
        return
    # As one process cuts them: the same products, to the last bit.
    chunks = token_chunks(token_N, weight_N, mlp)
    own = {
        at: scaled_outputs(x_ND, *chunk, mlp, act)
        for at, chunk in enumerate(chunks)
        if ranks.owns(at)
    }
    add_outputs(ranks, out_ND, {at: one for at, (one, _) in enumerate(chunks)}, own)


def agree_on(ranks: Ranks, checkpoint: Checkpoint, **what: object) -> None:
    """Refuse ranks that were not started on the same, or not on the same machines.

    Args:
        ranks: All of them come here.
        checkpoint: What they share the work on.
        what: What else is to be the same, by the names that errors use.

    Raises:
        RanksError: Naming the first rank that differs from rank 0, and in what.
    """
    ranks.agree(
        version_of_this_package=__version__,
        version_of_PyTorch=torch.__version__,
        number_of_threads=torch.get_num_threads(),
        arithmetic=_arithmetic(),
        checkpoint=checkpoint.fingerprint,
        **what,
    )


def _arithmetic() -> str:
    """What a product comes to on this machine: processors differ in the last bits."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(2, 256, 256, generator=generator)
    products = [factors.to(dtype) for dtype in (torch.float32, torch.bfloat16)]
    found = [functional.silu(left @ right).float() for left, right in products]
    return hashlib.sha256(torch.cat(found).numpy().tobytes()).hexdigest()


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
