"""Narrowing an expert: whole intermediate channels leave, the rest makes up for them.

An expert is down (act(gate x) * up x); channel c of its F is row c of gate and up and
column c of down. Wanda's score of a weight, |W| ||x||, summed over a channel's column
of down, is what its absence adds to the squared error of the output: E_c ||d_c||^2, E_c
the sum of its squared activations. The lowest leave. Then the columns that stay are
fitted to what the whole expert gave, by ridge regression towards themselves:
D_K + D_R G_RK (G_KK + lambda m I)^-1, G the Gram matrix of the activations. K channels
that stay, R that leave.

Sources: Wanda (arXiv 2306.11695), Minitron's neurons (2407.14679), CAMERA-P
(2508.02322).
"""

import torch
from torch import Tensor

from ..checkpoint.reader import Expert
from ..errors import CheckpointError
from .ridge import Ridge
from .wanda import NOT_FINITE_WEIGHTS


def channel_scores(expert: Expert, energy_F: Tensor) -> Tensor:
    """What each channel's absence would cost, [F] in float64.

    Where nothing was seen (an expert without calibration tokens) the product of the
    squared norms of its row of gate, row of up and column of down.

    Args:
        expert: Of any floating dtype.
        energy_F: Sums of squared activations, perhaps weighted by the router.

    Raises:
        CheckpointError: A weight is NaN or infinite.
    """
    down_F = _sqnorms(expert.down_DF, 0)
    rows_F = _sqnorms(expert.gate_FD, 1) * _sqnorms(expert.up_FD, 1)
    if not bool(torch.isfinite(down_F + rows_F).all()):
        raise CheckpointError(NOT_FINITE_WEIGHTS)
    energy_F = energy_F.to(down_F.device, torch.float64)
    return down_F * (energy_F if bool(energy_F.any()) else rows_F)


def kept_channels(score_F: Tensor, width: int, block: int = 1) -> Tensor:
    """The ``width`` channels that stay, ascending; of equals the lower one leaves.

    Args:
        score_F: Of ``channel_scores``.
        width: How many stay; with blocks a multiple of ``block``, as F is.
        block: Neighbors that stay or leave together.
    """
    score_B = score_F.view(-1, block).sum(dim=1)
    leave = len(score_B) - width // block
    stay_B = torch.argsort(score_B, stable=True)[leave:].sort().values
    within = torch.arange(block, device=score_F.device)
    return (stay_B[:, None] * block + within).flatten()


def narrowed(
    expert: Expert, kept_K: Tensor, gram_FF: Tensor | None = None, penalty: float = 0.0
) -> Expert:
    """The expert with some of its channels, in its own dtype.

    Args:
        expert: Before.
        kept_K: The channels that stay, ascending.
        gram_FF: Sums of a a' over tokens, to refit down by; None: it is not.
        penalty: The ridge, relative to the mean diagonal.

    Raises:
        CalibrationError: See ``Ridge``.
    """
    down_DK = expert.down_DF[:, kept_K]
    # All zero of an expert that no token reached.
    if gram_FF is not None and bool(gram_FF.diagonal().any()):
        leaves_F = torch.ones(len(gram_FF), dtype=torch.bool, device=gram_FF.device)
        gone_R = leaves_F.index_fill_(0, kept_K, False).nonzero()[:, 0]
        left_DR = expert.down_DF.index_select(1, gone_R).to(gram_FF.dtype)
        # Columns first: of the two [F, F] that exist meanwhile one is narrow.
        cross_KR = gram_FF.index_select(1, gone_R).index_select(0, kept_K)
        gram_KK = gram_FF.index_select(1, kept_K).index_select(0, kept_K)
        # Pulled towards the columns as they are, so nothing is away from there.
        present_DK = down_DK.to(gram_FF.dtype)
        away_DK = torch.zeros_like(present_DK)
        change_DK = Ridge(gram_KK, penalty).change(cross_KR @ left_DR.T, away_DK)
        down_DK = (present_DK + change_DK).to(expert.down_DF.dtype)
    return Expert(expert.gate_FD[kept_K], expert.up_FD[kept_K], down_DK.contiguous())


def _sqnorms(matrix: Tensor, axis: int) -> Tensor:
    # fp64: scores of bf16 weights must not tie by rounding.
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=axis, dtype=torch.float64)
    return norms.square()
