"""SparseGPT: zero weights one column at a time and let later columns make up for it.

With H = sum over tokens of x x' and R the upper Cholesky factor of its inverse, the
error of zeroing W_jk is (W_jk / R_kk)^2, and each column's error moves to the columns
behind it. Which weights go is decided per block of 128 columns over all rows, or with
n:m per group of each row. Surviving weights change. D input columns, R output rows, C
columns of a block; weights are held transposed, so that a column is contiguous.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import CalibrationError, CheckpointError
from .magnitude import magnitude
from .nm import lowest_in_groups
from .quota import BLOCK_COLS, zeros_in_group
from .wanda import NOT_FINITE_INPUTS, NOT_FINITE_WEIGHTS, lowest

DAMPING = 0.01
"""Added to the diagonal of H, as a part of its mean."""


def add_inputs(hessian_DD: Tensor, x_nD: Tensor) -> None:
    """Add a batch of inputs to the sums of x x', in place and in float32."""
    x_nD = x_nD.float()
    hessian_DD.addmm_(x_nD.T, x_nD)


class Factored(NamedTuple):
    """What SparseGPT needs to know of a matrix's inputs, whatever the sparsity."""

    factor_DD: Tensor | None
    """R; None where no input ever fired."""
    dead_D: Tensor
    """Inputs that never fired."""


def factored(hessian_DD: Tensor, *, damping: float = DAMPING) -> Factored:
    """Factorize the sums once, for every matrix that reads those inputs.

    Args:
        hessian_DD: Sums of x x' over tokens, float32; its scale does not matter.
        damping: Part of the mean diagonal added to the diagonal.

    Raises:
        CalibrationError: If the sums are not finite, or too singular.
    """
    diagonal_D = hessian_DD.diagonal()
    if not torch.isfinite(diagonal_D).all():
        raise CalibrationError(NOT_FINITE_INPUTS)
    dead_D = diagonal_D == 0
    # Equation 3 of the paper needs H^-1 of the columns not yet done: R has them all at
    # once.
    factor_DD = None if bool(dead_D.all()) else inverse_factor(hessian_DD, damping)
    return Factored(factor_DD, dead_D)


def sparsegpt(
    weight_RD: Tensor,
    inputs: Tensor | Factored,
    sparsity: float,
    m: int | None = None,
    *,
    damping: float = DAMPING,
) -> Tensor:
    """Prune one matrix by SparseGPT; a new tensor in the weight's dtype.

    Inputs that never fired tell nothing about their weights, which therefore go first.
    Where none fired at all (an expert without calibration tokens) magnitudes decide,
    in the same groups.

    Args:
        weight_RD: The weight, output rows by input columns, any floating dtype.
        inputs: What ``factored`` made of the sums of x x' [D, D], or these sums.
        sparsity: Share of each block, or of each group, to zero.
        m: Of an n:m pattern; a divisor of D.
        damping: Part of the mean diagonal added to the diagonal, of sums.

    Raises:
        CalibrationError: If the sums are not finite, or too singular.
        CheckpointError: If a weight is NaN or infinite.
    """
    # One NaN or infinity makes the sum of all weights one.
    if not torch.isfinite(weight_RD.sum(dtype=torch.float32)):
        raise CheckpointError(NOT_FINITE_WEIGHTS)
    if isinstance(inputs, Tensor):
        inputs = factored(inputs, damping=damping)
    if inputs.factor_DD is None:
        return _by_magnitude(weight_RD, sparsity, m)
    if zeros_in_group(m or len(weight_RD) * BLOCK_COLS, sparsity) == 0:
        return weight_RD.clone()
    factor_DD = inputs.factor_DD.to(weight_RD.device)
    dead_D = inputs.dead_D.to(weight_RD.device)
    # Turned, so that a column of the weight is a row in memory.
    weight_DR = weight_RD.T.to(torch.float32, copy=True).contiguous()
    cols, step = len(weight_DR), _block_cols(m)
    for start in range(0, cols, step):
        block = slice(start, min(start + step, cols))
        error_CR = _prune_block(
            weight_DR[block], factor_DD[block, block], dead_D[block], sparsity, m
        )
        # Lazy update: one matrix product per block instead of one rank-1 update per
        # column.
        rest = slice(block.stop, cols)
        weight_DR[rest].addmm_(factor_DD[block, rest].T, error_CR, alpha=-1.0)
    return weight_DR.T.to(weight_RD.dtype).contiguous()


def inverse_factor(hessian_DD: Tensor, damping: float = DAMPING) -> Tensor:
    """R, upper triangular, with R'R the inverse of the damped H.

    Turned by 180 degrees, H has the Cholesky factor of a U with H = U U', and R is the
    inverse of U: one factorisation where the published code makes two and an inverse.

    Raises:
        CalibrationError: If H is not positive definite in spite of the damping.
    """
    dtype = torch.promote_types(hessian_DD.dtype, torch.float32)
    damped_DD = hessian_DD.to(dtype, copy=True)
    diagonal_D = damped_DD.diagonal()
    live_D = diagonal_D > 0
    mean = diagonal_D[live_D].mean()
    # Dead inputs get the mean, not 1 as in the published code, which depends on scale.
    diagonal_D.add_(torch.where(live_D, damping * mean, mean))
    # _ex: failing is normal here and tried again in fp64, where rounding is no reason.
    lower_DD, failed = torch.linalg.cholesky_ex(damped_DD.flip(0, 1))
    if failed:
        lower_DD, failed = torch.linalg.cholesky_ex(damped_DD.flip(0, 1).double())
    if failed:
        raise CalibrationError(
            "input statistics are too singular. Calibrate with more tokens, or choose "
            "slim.method: wanda, or quantize.method: rtn, which invert nothing."
        )
    upper_DD = lower_DD.flip(0, 1)
    eye_DD = torch.eye(len(upper_DD), dtype=upper_DD.dtype, device=upper_DD.device)
    factor_DD: Tensor = torch.linalg.solve_triangular(upper_DD, eye_DD, upper=True)
    return factor_DD.to(dtype)


def _block_cols(m: int | None) -> int:
    """Columns of a block; with n:m whole groups."""
    if m is None:
        return BLOCK_COLS
    return max(m, BLOCK_COLS - BLOCK_COLS % m)


def _prune_block(
    block_CR: Tensor,
    factor_CC: Tensor,
    dead_C: Tensor,
    sparsity: float,
    m: int | None,
) -> Tensor:
    """Prune one block in place; the errors that the columns behind it make up for."""
    # Score 0: what no token reaches goes before anything that one does.
    scale_C1 = factor_CC.diagonal().masked_fill(dead_C, torch.inf)[:, None]
    # The paper's saliency: w^2 / [H^-1]_jj.
    error_CR = torch.empty_like(block_CR)
    zero = torch.zeros((), device=block_CR.device)
    if m is None:
        scores_RC = (block_CR / scale_C1).square_().T
        count = zeros_in_group(scores_RC.numel(), sparsity)
        mask_CR = lowest(scores_RC.reshape(1, -1), count).view(scores_RC.shape).T
    else:
        mask_CR = torch.zeros_like(block_CR, dtype=torch.bool)
    for at in range(len(block_CR)):
        if m is not None and at % m == 0:
            group = slice(at, at + m)
            # Scored when its turn comes: earlier columns have changed it.
            scores_Rm = (block_CR[group] / scale_C1[group]).square_().T
            count = zeros_in_group(m, sparsity)
            mask_CR[group] = lowest_in_groups(scores_Rm, count, m).T
        torch.where(mask_CR[at], block_CR[at], zero, out=error_CR[at])
        error_CR[at].div_(factor_CC[at, at])
        # Columns behind make up for what this one lost.
        block_CR[at + 1 :].addr_(factor_CC[at, at + 1 :], error_CR[at], alpha=-1.0)
    # Nobody reads a column once its turn is over.
    block_CR.masked_fill_(mask_CR, 0)
    return error_CR


def _by_magnitude(weight_RD: Tensor, sparsity: float, m: int | None) -> Tensor:
    if m is not None:
        return magnitude(weight_RD, sparsity, m)
    blocks = torch.split(weight_RD, BLOCK_COLS, dim=1)
    return torch.cat([magnitude(block.contiguous(), sparsity) for block in blocks], 1)
