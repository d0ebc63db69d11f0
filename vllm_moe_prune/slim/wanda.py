"""Wanda: zero the weights of each output row that matter least to their inputs.

Score |W_jk| * ||x_k||_2; in every row (or in every m columns of it) the lowest
``int(size * sparsity)`` go, ties to the lower column, as if by a stable sort.
Weighting the inputs by the router gives MoE-Pruner's score. R output rows, D input
columns.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import CalibrationError, CheckpointError
from .nm import lowest_in_groups
from .quota import zeros_in_group

CHUNK_BYTES = 64 * 2**20
"""Size of a float32 temporary; a call needs about three of them beside its output."""
FEW_ROWS = 64
"""On a GPU a row is selected from by one multiprocessor, but sorted by all of them."""

NOT_FINITE_WEIGHTS = (
    "contains NaN or infinite weights, which cannot be ranked. "
    "Check the download, or set slim.method: none."
)
"""Raised without a name: the caller knows which tensor it was."""
NOT_FINITE_INPUTS = (
    "input statistics contain NaN or infinity: the calibration forward "
    "overflowed. Calibrate in float32, or check the checkpoint's weights."
)
"""Likewise, of the sums of what a matrix reads."""


def wanda(
    weight_RD: Tensor, input_sqsum_D: Tensor, sparsity: float, m: int | None = None
) -> Tensor:
    """Prune one matrix by Wanda; a new tensor, surviving weights bit for bit the same.

    Where no input was seen (all sums zero: an expert without calibration tokens) the
    scores say nothing and the weights' magnitudes decide, row by row, so that the
    number of zeros stays what the plan promised.

    Args:
        weight_RD: The weight, output rows by input columns, any floating dtype.
        input_sqsum_D: Sum over tokens of the squared inputs; a mean does as well.
        sparsity: Share of each row, or of each group, to zero.
        m: Of an n:m pattern; a divisor of D.

    Raises:
        CalibrationError: If the sums are not finite.
        CheckpointError: If a weight is NaN or infinite.
    """
    norm_D = _norms(weight_RD, input_sqsum_D)
    return _zero_lowest_in_rows(weight_RD, norm_D, sparsity, m)


def magnitude_rows(weight_RD: Tensor, sparsity: float, m: int | None = None) -> Tensor:
    """Prune one matrix by |W| compared within each output row (Wanda's groups)."""
    return _zero_lowest_in_rows(weight_RD, None, sparsity, m)


class Ranked(NamedTuple):
    """One matrix whose rows are ranked by Wanda's scores, for zeros at any sparsity."""

    weight_RD: Tensor
    scores_RD: Tensor
    """float32."""
    sorted_RD: Tensor
    """Each row of the scores in ascending order."""

    def at(self, sparsity: float) -> Tensor:
        """What ``wanda`` gives at a sparsity; a new tensor."""
        count = zeros_in_group(self.scores_RD.shape[1], sparsity)
        if count == 0:
            return self.weight_RD.clone()
        last_R1 = self.sorted_RD[:, count - 1 : count]
        count_R1 = torch.full_like(last_R1, count, dtype=torch.int64)
        mask_RD = lowest_up_to(self.scores_RD, last_R1, count_R1)
        return zeroed(self.weight_RD, mask_RD)


def ranked(weight_RD: Tensor, input_sqsum_D: Tensor) -> Ranked:
    """Rank once what is to be pruned at several sparsities; see ``wanda``.

    Raises:
        CalibrationError: If the sums are not finite.
        CheckpointError: If a weight is NaN or infinite.
    """
    norm_D = _norms(weight_RD, input_sqsum_D)
    scores_RD, finite = scores_of(weight_RD, scales_of(norm_D))
    refuse_not_finite([finite], norm_D)
    return Ranked(weight_RD, scores_RD, sorted_rows(scores_RD))


def zeroed(weight_RD: Tensor, mask_RD: Tensor) -> Tensor:
    """A copy that is +0 where the mask is true; other bits are the same."""
    # Times 0 or 1 as integers: five times faster on a CPU than torch.where.
    bits = {2: torch.int16, 4: torch.int32}[weight_RD.element_size()]
    kept_RD: Tensor = weight_RD.view(bits) * ~mask_RD
    return kept_RD.view(weight_RD.dtype)


def sorted_rows(scores_RD: Tensor) -> Tensor:
    """Each row in ascending order."""
    if scores_RD.device.type == "cpu":
        # numpy sorts with vector instructions, several times faster than torch.
        return torch.from_numpy(np.sort(scores_RD.numpy(), axis=1))
    return torch.sort(scores_RD, dim=1).values


def input_norms(weight_RD: Tensor, input_sqsum_D: Tensor) -> Tensor:
    """L2 norm of each input feature, in float64 on the weight's device.

    Raises:
        CalibrationError: If the sums are not finite.
    """
    norm_D = _norms(weight_RD, input_sqsum_D)
    refuse_not_finite([], norm_D)
    return norm_D


def _norms(weight_RD: Tensor, input_sqsum_D: Tensor) -> Tensor:
    # fp64: sums over millions of tokens, of which fp32 would drop the small ones.
    return input_sqsum_D.to(weight_RD.device, torch.float64).sqrt()


def scales_of(norm_D: Tensor) -> Tensor:
    """What |W| is multiplied by, in float32: 1 where no input was seen at all."""
    return torch.where(norm_D.any(), norm_D.float(), 1.0)


def scores_of(chunk_RD: Tensor, scale_D: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores of some rows in float32: |W|, times the inputs' scales if there are any.

    Returns:
        The scores, and whether all weights are finite, for ``refuse_not_finite``.
    """
    scores_RD = chunk_RD.to(torch.float32, copy=True).abs_()
    # The largest |w| is NaN or infinite as soon as any weight is.
    finite = torch.isfinite(scores_RD.amax())
    return scores_RD if scale_D is None else scores_RD.mul_(scale_D), finite


def refuse_not_finite(weights: Sequence[Tensor], norm_D: Tensor | None) -> None:
    """Refuse what cannot be ranked; the host waits for the device once.

    Args:
        weights: Whether some weights are finite, of each chunk.
        norm_D: Norms of the inputs.

    Raises:
        CalibrationError: If the norms are not finite.
        CheckpointError: If a weight is not.
    """
    inputs = [] if norm_D is None else [torch.isfinite(norm_D).all()]
    told = torch.stack([*inputs, *weights]).tolist()
    if not all(told[: len(inputs)]):
        raise CalibrationError(NOT_FINITE_INPUTS)
    if not all(told):
        raise CheckpointError(NOT_FINITE_WEIGHTS)


def _zero_lowest_in_rows(
    weight_RD: Tensor, norm_D: Tensor | None, sparsity: float, m: int | None
) -> Tensor:
    rows, cols = weight_RD.shape
    count = zeros_in_group(m or cols, sparsity)
    pruned_RD = torch.empty_like(weight_RD, memory_format=torch.contiguous_format)
    # torch.where with a scalar of another dtype would promote; bits must stay.
    zero = torch.zeros((), dtype=weight_RD.dtype, device=weight_RD.device)
    scale_D = None if norm_D is None else scales_of(norm_D)
    finite = []
    # Whole rows: no comparison crosses a chunk.
    step = max(1, CHUNK_BYTES // (4 * max(1, cols)))
    for start in range(0, rows, step):
        chunk_RD = weight_RD[start : start + step]
        scores_RD, chunk_finite = scores_of(chunk_RD, scale_D)
        finite.append(chunk_finite)
        if m is None:
            mask_RD = lowest(scores_RD, count)
        else:
            mask_RD = lowest_in_groups(scores_RD, count, m)
        torch.where(mask_RD, zero, chunk_RD, out=pruned_RD[start : start + step])
    # Last: until then the host has had nothing to wait for.
    refuse_not_finite(finite, norm_D)
    return pruned_RD


def lowest(scores_RD: Tensor, count: int) -> Tensor:
    """True at the ``count`` lowest scores of each row, ties to the lower column."""
    if count == 0:
        return torch.zeros_like(scores_RD, dtype=torch.bool)
    count_R1 = torch.full((len(scores_RD), 1), count, device=scores_RD.device)
    return lowest_up_to(scores_RD, _kth_lowest(scores_RD, count), count_R1)


def lowest_up_to(scores_RD: Tensor, threshold_R1: Tensor, count_R1: Tensor) -> Tensor:
    """True at as many scores of each row as asked for, ties to the lower column.

    Args:
        scores_RD: Finite.
        threshold_R1: The highest score that goes, of each row.
        count_R1: How many go; if 0 the threshold may be any not above the lowest.
    """
    if scores_RD.device.type != "cpu":
        # Counting out every row takes less time than asking which of them are tied.
        return _lowest_tied(scores_RD, threshold_R1, count_R1)
    # Where the threshold value is unique this is exact; only tied rows are counted out.
    mask_RD = scores_RD <= threshold_R1
    tied_R = mask_RD.sum(1, dtype=torch.int32) > count_R1[:, 0]
    if tied_R.any():
        mask_RD[tied_R] = _lowest_tied(
            scores_RD[tied_R], threshold_R1[tied_R], count_R1[tied_R]
        )
    return mask_RD


def _kth_lowest(scores_RD: Tensor, k: int) -> Tensor:
    """The k-th lowest score of each row, shape [R, 1]."""
    if scores_RD.device.type == "cpu":
        # numpy selects with vector instructions, several times faster than torch.
        parted_RD = np.partition(scores_RD.numpy(), k - 1, axis=1)
        return torch.from_numpy(parted_RD[:, k - 1 : k].copy())
    if len(scores_RD) < FEW_ROWS:
        return sorted_rows(scores_RD)[:, k - 1 : k]
    return torch.kthvalue(scores_RD, k, dim=1, keepdim=True).values


def _lowest_tied(scores_RD: Tensor, threshold_R1: Tensor, count_R1: Tensor) -> Tensor:
    below_RD = scores_RD < threshold_R1
    equal_RD = scores_RD == threshold_R1
    # Of the equal ones the first, by cumulative count: the same on every device.
    wanted_R1 = count_R1 - below_RD.sum(1, dtype=torch.int32, keepdim=True)
    return below_RD | (equal_RD & (equal_RD.cumsum(1, dtype=torch.int32) <= wanted_R1))
