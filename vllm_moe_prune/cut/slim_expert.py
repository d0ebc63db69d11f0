"""Slimming one expert by the plan's method, from the tokens that reach it.

An expert that no token reached has all-zero sums, on which every method falls back to
magnitudes in its own comparison groups, so that the planned number of zeros holds.
"""

from collections.abc import Iterator, Sequence

import torch

from ..calibrate.experts import Activation, expert_hidden, place, token_chunks
from ..checkpoint.reader import Expert
from ..decide.plan import CutPlan
from ..slim.magnitude import magnitude
from ..slim.sparsegpt import add_inputs, sparsegpt
from ..slim.wanda import wanda
from ..slim.wanda_variant import wanda_variant

Taken = Sequence[bool]
"""Whether gate, up and down are slimmed."""
ALL = (True, True, True)


def slim_by_magnitude(
    expert: Expert, plan: CutPlan, sparsity: float, taken: Taken = ALL
) -> Expert:
    """Slim without data; an expert of a layer that is not slimmed stays itself."""
    if sparsity == 0 or plan.slim == "none":
        return expert
    return Expert(
        *(
            magnitude(matrix, sparsity, plan.group) if take else matrix
            for matrix, take in zip(expert, taken, strict=True)
        )
    )


@torch.no_grad()
def slim_by_data(
    expert: Expert,
    plan: CutPlan,
    sparsity: float,
    x_ND: torch.Tensor,
    token_n: torch.Tensor,
    weight_n: torch.Tensor,
    act: Activation,
    taken: Taken = ALL,
) -> Expert:
    """Slim one expert by what its tokens feed into each of its matrices.

    Args:
        expert: The trimmed, dense expert, in its stored dtype.
        plan: Names the method, the pattern and whether routing weights count.
        sparsity: Share of zeros to write.
        x_ND: What enters the MoE sublayer.
        token_n: The tokens routed to the expert.
        weight_n: Their routing weights.
        act: The activation between gate and up.
        taken: Whether gate, up and down are slimmed; the others stay as they are.
    """
    expert = Expert(*(matrix.to(x_ND.device) for matrix in expert))
    if plan.slim == "sparsegpt":
        inputs = _inputs(expert, plan, x_ND, token_n, weight_n, act)
        slimmed = _by_hessian(expert, plan, sparsity, inputs)
    else:
        squares = input_squares(expert, plan, x_ND, token_n, weight_n, act)
        pairs = zip(expert, squares, strict=True)
        if plan.slim == "wanda-variant":
            slimmed = Expert(*(wanda_variant(w, sums, sparsity) for w, sums in pairs))
        else:
            found = (wanda(w, sums, sparsity, plan.group) for w, sums in pairs)
            slimmed = Expert(*found)
    choices = zip(slimmed, expert, taken, strict=True)
    return Expert(*(after if take else before for after, before, take in choices))


@torch.no_grad()
def input_squares(
    expert: Expert,
    plan: CutPlan,
    x_ND: torch.Tensor,
    token_n: torch.Tensor,
    weight_n: torch.Tensor,
    act: Activation,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums of squares of what enters gate [D], up [D] and down [F], in float64."""
    x_sq_D = torch.zeros(expert.gate_FD.shape[1], dtype=torch.float64).to(x_ND.device)
    inner_sq_F = x_sq_D.new_zeros(expert.down_DF.shape[1])
    for x_nD, inner_nF in _inputs(expert, plan, x_ND, token_n, weight_n, act):
        x_sq_D += column_squares(x_nD)
        inner_sq_F += column_squares(inner_nF)
    return x_sq_D, x_sq_D, inner_sq_F


def _inputs(
    expert: Expert,
    plan: CutPlan,
    x_ND: torch.Tensor,
    token_n: torch.Tensor,
    weight_n: torch.Tensor,
    act: Activation,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs of gate and up [n, D], and of down [n, F], in chunks of bounded size."""
    # The stored type may be another than that of the hidden states; it has to survive.
    running = place(expert, x_ND)
    for at_n, weight in token_chunks(token_n, weight_n, running):
        x_nD = x_ND.index_select(0, at_n)
        inner_nF = expert_hidden(x_nD, running, act)
        if plan.router_weighted:
            x_nD, inner_nF = x_nD * weight[:, None], inner_nF * weight[:, None]
        yield x_nD, inner_nF


def _by_hessian(
    expert: Expert,
    plan: CutPlan,
    sparsity: float,
    inputs: Iterator[tuple[torch.Tensor, torch.Tensor]],
) -> Expert:
    """SparseGPT; the Hessians of one expert are in memory at a time."""
    hidden, width = expert.down_DF.shape
    x_DD = torch.zeros(hidden, hidden, device=expert.gate_FD.device)
    inner_FF = torch.zeros(width, width, device=expert.gate_FD.device)
    for x_nD, inner_nF in inputs:
        add_inputs(x_DD, x_nD)
        add_inputs(inner_FF, inner_nF)
    return Expert(
        sparsegpt(expert.gate_FD, x_DD, sparsity, plan.group),
        sparsegpt(expert.up_FD, x_DD, sparsity, plan.group),
        sparsegpt(expert.down_DF, inner_FF, sparsity, plan.group),
    )


def column_squares(x_nD: torch.Tensor) -> torch.Tensor:
    """Sum of squares of each column, without a whole fp32 copy of ``x_nD``."""
    total_D = torch.zeros(x_nD.shape[1], dtype=torch.float64, device=x_nD.device)
    for start in range(0, len(x_nD), 2048):
        total_D += x_nD[start : start + 2048].float().square().sum(dim=0)
    return total_D
