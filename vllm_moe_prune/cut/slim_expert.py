"""Slimming one expert by the plan's method, from the tokens that reach it.

An expert that no token reached has all-zero sums, on which every method falls back to
magnitudes in its own comparison groups, so that the planned number of zeros holds.
"""

from collections.abc import Callable, Iterator, Sequence

import torch

from ..calibrate.expert_forward import Activation, expert_hidden, place, token_chunks
from ..checkpoint.reader import Expert
from ..decide.cut_plan import CutPlan
from ..slim.magnitude import magnitude
from ..slim.ridge import Ridge
from ..slim.sparsegpt import Factored, add_inputs, factored, sparsegpt
from ..slim.wanda import Ranked, wanda
from ..slim.wanda_variant import wanda_variant

Taken = Sequence[bool]
"""Whether gate, up and down are slimmed."""
ALL = (True, True, True)
Slimming = tuple[str, str, bool, bool]
COMPENSATION_RIDGE = 0.05
"""Relative to the mean diagonal of what slimmed gate and up feed down."""
Known = Sequence[torch.Tensor | Factored | Ranked]
"""What a method knows of gate, up and down."""


def kind_of(plan: CutPlan) -> Slimming:
    """How a plan writes zeros, but for how many."""
    return plan.slim, plan.pattern, plan.router_weighted, plan.compensate


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
    if plan.compensate and taken[2]:
        return _slim_in_turn(
            expert, plan, sparsity, x_ND, token_n, weight_n, act, taken
        )
    known = known_of(input_sums(expert, plan, x_ND, token_n, weight_n, act), plan)
    return slim_by_known(expert, known, plan, sparsity, taken)


def _slim_in_turn(
    expert: Expert,
    plan: CutPlan,
    sparsity: float,
    x_ND: torch.Tensor,
    token_n: torch.Tensor,
    weight_n: torch.Tensor,
    act: Activation,
    taken: Taken,
) -> Expert:
    """Gate and up first; down makes up for that on what they feed it, then is slimmed.

    With h of the dense and g of the slimmed gate and up, down is to give on g what it
    gave on h (asymmetric calibration, arXiv 2504.02692, within an expert).
    """
    served = (token_n, weight_n)
    hidden, width = expert.gate_FD.shape[1], expert.down_DF.shape[1]
    x_sums = no_sums(hidden, plan, x_ND.device)
    for some_n, weight in token_chunks(*served, expert):
        add_sums(x_sums, _weighted(x_ND.index_select(0, some_n), weight, plan), plan)
    known = factored(x_sums) if plan.slim == "sparsegpt" else x_sums
    gate_FD, up_FD = (
        slim_matrix(matrix, known, plan, sparsity) if take else matrix
        for matrix, take in zip(expert[:2], taken[:2], strict=True)
    )
    del x_sums, known
    dense, slimmed = (
        place(expert, x_ND),
        place(expert._replace(gate_FD=gate_FD, up_FD=up_FD), x_ND),
    )
    sums = no_sums(width, plan, x_ND.device)
    gram_FF = x_ND.new_zeros(width, width, dtype=torch.float32)
    cross_FF = torch.zeros_like(gram_FF)
    for some_n, weight in token_chunks(*served, dense):
        x_nD = x_ND.index_select(0, some_n)
        own_nF = expert_hidden(x_nD, slimmed, act)
        lost_nF = expert_hidden(x_nD, dense, act).float() - own_nF.float()
        add_inputs(gram_FF, own_nF)
        cross_FF.addmm_(own_nF.float().T, lost_nF)
        if plan.slim != "sparsegpt":
            add_sums(sums, _weighted(own_nF, weight, plan), plan)
    down_DF = expert.down_DF
    if bool(gram_FF.diagonal().any()):
        # What down gave on what is lost is to come from what is left.
        change_DF = Ridge(gram_FF, COMPENSATION_RIDGE).change(
            cross_FF @ down_DF.float().T, torch.zeros_like(down_DF, dtype=torch.float32)
        )
        changed_DF = (down_DF.float() + change_DF).to(down_DF.dtype)
        down_DF = changed_DF.masked_fill_(expert.down_DF == 0, 0.0)
    found = gram_FF if plan.slim == "sparsegpt" else sums
    return Expert(gate_FD, up_FD, slim_matrix(down_DF, found, plan, sparsity))


def slim_by_known(
    expert: Expert, known: Known, plan: CutPlan, sparsity: float, taken: Taken = ALL
) -> Expert:
    """Slim one expert by what the plan's method knows of its matrices."""
    return Expert(
        *(
            slim_matrix(weight, found, plan, sparsity) if take else weight
            for weight, found, take in zip(expert, known, taken, strict=True)
        )
    )


def known_of(sums: Sequence[torch.Tensor], plan: CutPlan) -> Known:
    """What is known once there are the sums of ``input_sums``, for any sparsity."""
    if plan.slim == "sparsegpt":
        # gate and up read the same inputs: one factorization for both.
        inputs, inner = factored(sums[0]), factored(sums[2])
        return inputs, inputs, inner
    return sums


@torch.no_grad()
def input_sums(
    expert: Expert,
    plan: CutPlan,
    x_ND: torch.Tensor,
    token_n: torch.Tensor,
    weight_n: torch.Tensor,
    act: Activation,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the method knows of the inputs of gate, up and down; see ``no_sums``."""
    x_sums = no_sums(expert.gate_FD.shape[1], plan, x_ND.device)
    inner_sums = no_sums(expert.down_DF.shape[1], plan, x_ND.device)
    for x_nD, inner_nF in _inputs(expert, plan, x_ND, token_n, weight_n, act):
        add_sums(x_sums, x_nD, plan)
        add_sums(inner_sums, inner_nF, plan)
    # gate and up read the same x.
    return x_sums, x_sums, inner_sums


def no_sums(cols: int, plan: CutPlan, device: torch.device | str) -> torch.Tensor:
    """Zeros: of SparseGPT's Hessian [cols, cols], else of squares [cols] in float64."""
    if plan.slim == "sparsegpt":
        return torch.zeros(cols, cols, device=device)
    # Small enough for fp64, which millions of squares need; H is not.
    return torch.zeros(cols, dtype=torch.float64, device=device)


def add_sums(sums: torch.Tensor, x_nD: torch.Tensor, plan: CutPlan) -> None:
    """Add some inputs of a matrix, in place."""
    if plan.slim == "sparsegpt":
        add_inputs(sums, x_nD)
    else:
        sums += column_sums(x_nD, torch.square)


def column_sums(
    x_nD: torch.Tensor, of: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Sum [D] of a function of each element, without a whole fp32 copy of ``x_nD``."""
    total_D = torch.zeros(x_nD.shape[1], dtype=torch.float64, device=x_nD.device)
    for start in range(0, len(x_nD), 2048):
        total_D += of(x_nD[start : start + 2048].float()).sum(dim=0)
    return total_D


def slim_matrix(
    weight_RD: torch.Tensor,
    known: torch.Tensor | Factored | Ranked,
    plan: CutPlan,
    sparsity: float,
) -> torch.Tensor:
    """Slim one matrix by the plan's method, from its sums or what was made of them."""
    if isinstance(known, Ranked):
        return known.at(sparsity)
    if isinstance(known, Factored):
        return sparsegpt(weight_RD, known, sparsity, plan.group)
    if plan.slim == "magnitude":
        return magnitude(weight_RD, sparsity, plan.group)
    if plan.slim == "sparsegpt":
        return sparsegpt(weight_RD, known, sparsity, plan.group)
    if plan.slim == "wanda-variant":
        return wanda_variant(weight_RD, known, sparsity)
    return wanda(weight_RD, known, sparsity, plan.group)


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
        yield _weighted(x_nD, weight, plan), _weighted(inner_nF, weight, plan)


def _weighted(
    x_nD: torch.Tensor, weight_n: torch.Tensor, plan: CutPlan
) -> torch.Tensor:
    # MoE-Pruner's score: |W| * ||x * g||, g the routing weight of each token.
    return x_nD * weight_n[:, None] if plan.router_weighted else x_nD
