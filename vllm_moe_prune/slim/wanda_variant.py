"""Wanda's variant: rows lose as many weights as make up an equal share of their score.

With scores sorted within a row, a weight goes if the scores up to it add up to at most
alpha of the row's total. The published code bisects for alpha until the sparsity is
within 0.001; here alpha is the one at which exactly ``int(numel * sparsity)`` go.
R output rows, D input columns.
"""

import torch
from torch import Tensor

from .magnitude import keys_of, select
from .quota import zeros_in_group
from .wanda import (
    CHUNK_BYTES,
    input_norms,
    lowest_up_to,
    refuse_not_finite,
    scales_of,
    scores_of,
    sorted_rows,
)


def wanda_variant(weight_RD: Tensor, input_sqsum_D: Tensor, sparsity: float) -> Tensor:
    """Prune one matrix; a new tensor, surviving weights bit for bit the same.

    Ties go to the lower row, within a row to the lower column. Where no input was seen
    magnitudes take the place of scores.

    Args:
        weight_RD: The weight, any floating dtype.
        input_sqsum_D: Sum over tokens of the squared inputs.
        sparsity: Share of the whole matrix to zero; rows differ.

    Raises:
        CalibrationError: If the sums are not finite.
        CheckpointError: If a weight is NaN or infinite.
    """
    norm_D = input_norms(weight_RD, input_sqsum_D)
    scale_D = scales_of(norm_D)
    finite = []
    # Shares are held, scores made again: both at once would be twice the matrix.
    step = max(1, CHUNK_BYTES // (8 * max(1, weight_RD.shape[1])))
    share_RD = torch.empty(
        weight_RD.shape, dtype=torch.float32, device=weight_RD.device
    )
    for start in range(0, len(weight_RD), step):
        rows = slice(start, start + step)
        scores_RD, chunk_finite = scores_of(weight_RD[rows], scale_D)
        finite.append(chunk_finite)
        share_RD[rows] = _shares(sorted_rows(scores_RD))
    refuse_not_finite(finite, None)
    # One threshold over the whole matrix: rows that matter less lose more.
    count_R = _counts(share_RD, zeros_in_group(weight_RD.numel(), sparsity))
    pruned_RD = torch.empty_like(weight_RD, memory_format=torch.contiguous_format)
    zero = torch.zeros((), dtype=weight_RD.dtype, device=weight_RD.device)
    for start in range(0, len(weight_RD), step):
        rows = slice(start, start + step)
        chunk_RD = weight_RD[rows]
        scores_RD, _ = scores_of(chunk_RD, scale_D)
        count_R1 = count_R[rows, None]
        # A row loses its lowest scores; the last of them is its own threshold.
        last_R1 = sorted_rows(scores_RD).gather(1, (count_R1 - 1).clamp(min=0))
        mask_RD = lowest_up_to(scores_RD, last_R1, count_R1)
        torch.where(mask_RD, zero, chunk_RD, out=pruned_RD[rows])
    return pruned_RD


def _shares(sorted_RD: Tensor) -> Tensor:
    """Part of its row's total that the scores up to each one make up."""
    sums_RD = sorted_RD.cumsum(1, dtype=torch.float64)
    total_R1 = sums_RD[:, -1:]
    # Ascending within a row, so that what a row loses is always a prefix.
    return torch.where(total_R1 > 0, sums_RD / total_R1, 0.0).float()


def _counts(share_RD: Tensor, count: int) -> Tensor:
    """How many weights each row loses, ``count`` in all; ties to the lower row."""
    threshold, tied = select(share_RD.reshape(-1), count)
    keys_RD = keys_of(share_RD)
    below_R = (keys_RD < threshold).sum(1)
    equal_R = (keys_RD == threshold).sum(1)
    # The rows before have used up part of the ties that go.
    before_R = equal_R.cumsum(0) - equal_R
    return below_R + torch.minimum(equal_R, (tied - before_R).clamp(min=0))
