"""Wanda: zero the weights of each output row that matter least to their inputs.

Score |W_jk| * ||x_k||_2; in every row the lowest ``int(cols * sparsity)`` go, ties to
the lower column, as if by a stable sort. R output rows, D input columns.
"""

import numpy as np
import torch
from torch import Tensor

from ..errors import CalibrationError, CheckpointError
from .quota import zeros_in_group

CHUNK_BYTES = 64 * 2**20
"""Size of a float32 temporary; a call needs about three of them beside its output."""

NOT_FINITE_WEIGHTS = (
    "contains NaN or infinite weights, which cannot be ranked. "
    "Check the download, or set slim.method: none."
)
"""Raised without a name: the caller knows which tensor it was."""


def wanda(weight_RD: Tensor, input_sqsum_D: Tensor, sparsity: float) -> Tensor:
    """Prune one matrix by Wanda; a new tensor, surviving weights bit for bit the same.

    Where no input was seen (all sums zero: an expert without calibration tokens) the
    scores say nothing and the weights' magnitudes decide, row by row, so that the
    number of zeros stays what the plan promised.

    Args:
        weight_RD: The weight, output rows by input columns, any floating dtype.
        input_sqsum_D: Sum over tokens of the squared inputs; a mean does as well.
        sparsity: Share of each row to zero.

    Raises:
        CalibrationError: If the sums are not finite.
        CheckpointError: If a weight is NaN or infinite.
    """
    norm_D = input_sqsum_D.to(weight_RD.device, torch.float64).sqrt()
    if not torch.isfinite(norm_D).all():
        raise CalibrationError(
            "input statistics contain NaN or infinity: the calibration forward "
            "overflowed. Calibrate in float32, or check the checkpoint's weights."
        )
    if not norm_D.any():
        return magnitude_rows(weight_RD, sparsity)
    return _zero_lowest_in_rows(weight_RD, norm_D.float(), sparsity)


def magnitude_rows(weight_RD: Tensor, sparsity: float) -> Tensor:
    """Prune one matrix by |W| compared within each output row (Wanda's groups)."""
    return _zero_lowest_in_rows(weight_RD, None, sparsity)


def _zero_lowest_in_rows(
    weight_RD: Tensor, scale_D: Tensor | None, sparsity: float
) -> Tensor:
    rows, cols = weight_RD.shape
    count = zeros_in_group(cols, sparsity)
    pruned_RD = torch.empty_like(weight_RD, memory_format=torch.contiguous_format)
    zero = torch.zeros((), dtype=weight_RD.dtype, device=weight_RD.device)
    step = max(1, CHUNK_BYTES // (4 * max(1, cols)))
    for start in range(0, rows, step):
        chunk_RD = weight_RD[start : start + step]
        scores_RD = chunk_RD.to(torch.float32, copy=True).abs_()
        if not torch.isfinite(scores_RD.amax()):
            raise CheckpointError(NOT_FINITE_WEIGHTS)
        if scale_D is not None:
            scores_RD.mul_(scale_D)
        mask_RD = _lowest(scores_RD, count)
        torch.where(mask_RD, zero, chunk_RD, out=pruned_RD[start : start + step])
    return pruned_RD


def _lowest(scores_RD: Tensor, count: int) -> Tensor:
    """True at the ``count`` lowest scores of each row, ties to the lower column."""
    if count == 0:
        return torch.zeros_like(scores_RD, dtype=torch.bool)
    threshold_R1 = _kth_lowest(scores_RD, count)
    mask_RD = scores_RD <= threshold_R1
    tied_R = mask_RD.sum(1, dtype=torch.int32) > count
    if tied_R.any():
        mask_RD[tied_R] = _lowest_tied(scores_RD[tied_R], threshold_R1[tied_R], count)
    return mask_RD


def _kth_lowest(scores_RD: Tensor, k: int) -> Tensor:
    """The k-th lowest score of each row, shape [R, 1]."""
    if scores_RD.device.type == "cpu":
        # numpy selects with vector instructions, several times faster than torch.
        parted_RD = np.partition(scores_RD.numpy(), k - 1, axis=1)
        return torch.from_numpy(parted_RD[:, k - 1 : k].copy())
    return torch.kthvalue(scores_RD, k, dim=1, keepdim=True).values


def _lowest_tied(scores_RD: Tensor, threshold_R1: Tensor, count: int) -> Tensor:
    below_RD = scores_RD < threshold_R1
    equal_RD = scores_RD == threshold_R1
    wanted_R1 = count - below_RD.sum(1, dtype=torch.int32, keepdim=True)
    return below_RD | (equal_RD & (equal_RD.cumsum(1, dtype=torch.int32) <= wanted_R1))
