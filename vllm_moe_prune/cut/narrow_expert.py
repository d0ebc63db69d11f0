"""Narrowing one expert by the plan, from the tokens that reach it."""

import torch

from ..calibrate.expert_forward import Activation, expert_hidden, place, token_chunks
from ..checkpoint.reader import Expert
from ..recipes.schema import NarrowStage
from ..slim.narrow import channel_scores, kept_channels, narrowed
from ..slim.sparsegpt import add_inputs


@torch.no_grad()
def narrow_expert(
    expert: Expert,
    stage: NarrowStage,
    width: int,
    block: int,
    x_ND: torch.Tensor,
    token_n: torch.Tensor,
    weight_n: torch.Tensor,
    act: Activation,
) -> tuple[Expert, torch.Tensor]:
    """The expert with ``width`` of its channels, and which they are, ascending.

    Activations count with the router's weight, as they do in the layer's output.

    Args:
        expert: The trimmed expert, in its stored dtype.
        stage: Says whether and how what stays is refitted.
        width: Channels that stay.
        block: Neighbors that stay or leave together.
        x_ND: What enters the MoE sublayer.
        token_n: The tokens routed to the expert.
        weight_n: Their routing weights.
        act: The activation between gate and up.
    """
    expert = Expert(*(matrix.to(x_ND.device) for matrix in expert))
    running = place(expert, x_ND)
    channels = len(expert.gate_FD)
    gram_FF = None
    if stage.refit == "ridge":
        # The largest thing in memory; fp32, as SparseGPT's sums.
        gram_FF = torch.zeros(channels, channels, device=x_ND.device)
    energy_F = torch.zeros(channels, dtype=torch.float64, device=x_ND.device)
    for at_n, weight in token_chunks(token_n, weight_n, running):
        inner_nF = expert_hidden(x_ND.index_select(0, at_n), running, act)
        weighted_nF = inner_nF.float() * weight[:, None]
        energy_F += weighted_nF.square().sum(dim=0, dtype=torch.float64)
        if gram_FF is not None:
            add_inputs(gram_FF, weighted_nF)
    kept_K = kept_channels(channel_scores(expert, energy_F), width, block)
    return narrowed(expert, kept_K, gram_FF, stage.ridge), kept_K
