"""GPTQ: round one column at a time and let the later ones make up for its error.

With H = sum over tokens of x x' and R the upper Cholesky factor of its inverse, column
k is rounded to q_k and the error (w_k - q_k) / R_kk moves to the columns behind it
(Frantar et al., arXiv 2210.17323). A group's scales are those of its columns as they
are when its turn comes. With ``act_order`` columns are taken by falling H_kk, and
scales are those of the untouched weights, so that groups stay runs of columns.

D input columns, R output rows, C columns of a block; weights are held transposed, so
that a column is contiguous.
"""

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..kernels.quantized import Form, Quantized, Scales, scales_of
from .quota import BLOCK_COLS
from .rtn import check_finite, rtn
from .sparsegpt import DAMPING, inverse_factor
from .wanda import NOT_FINITE_INPUTS

LOWEST, HIGHEST = -8, 7


def gptq(
    weight_RD: Tensor,
    hessian_DD: Tensor,
    form: Form,
    *,
    act_order: bool = False,
    damping: float = DAMPING,
) -> Quantized:
    """Quantize one matrix to int4; scales are kept in the weight's dtype.

    Where no input was seen (an expert without calibration tokens) it is rounding to
    nearest; inputs that never fired cost nothing and are so rounded too.

    Args:
        weight_RD: Of any floating dtype; D divides into groups of at most a block.
        hessian_DD: Sums of x x' over tokens; its scale does not matter, its dtype is
            the one that is computed in.
        form: int4.
        act_order: Take columns by falling diagonal of H, ties by index.
        damping: Part of the mean diagonal added to the diagonal.

    Raises:
        CalibrationError: If the sums are not finite, or too singular.
        CheckpointError: If a weight is NaN or infinite.
    """
    check_finite(weight_RD)
    diagonal_D = hessian_DD.diagonal()
    if not torch.isfinite(diagonal_D).all():
        raise CalibrationError(NOT_FINITE_INPUTS)
    if not diagonal_D.any():
        return rtn(weight_RD, form)
    size = form.group_size or len(diagonal_D)
    order_D = torch.arange(len(diagonal_D), device=diagonal_D.device)
    # Columns with the largest inputs first, while many others can still make up for
    # them.
    if act_order:
        order_D = torch.argsort(diagonal_D, descending=True, stable=True)
        hessian_DD = hessian_DD[order_D][:, order_D]
    factor_DD = inverse_factor(hessian_DD, damping).to(weight_RD.device)
    order_D = order_D.to(weight_RD.device)
    groups = order_D.div(size, rounding_mode="floor").tolist()
    weight_DR = weight_RD.T[order_D].to(factor_DD.dtype)
    # In another order a group's columns are never together: its scale is set
    # beforehand.
    fixed = act_order or form.group_size is None
    grid = _Grid(weight_RD, form, weight_DR.dtype, fixed=fixed)
    values_DR = torch.empty_like(weight_DR, dtype=torch.int8)
    for start in range(0, len(weight_DR), BLOCK_COLS):
        stop = min(start + BLOCK_COLS, len(weight_DR))
        block, rest = slice(start, stop), slice(stop, None)
        error_CR = torch.empty_like(weight_DR[block])
        values_CR = torch.empty_like(error_CR)
        for at in range(start, stop):
            # Scales from the columns as the errors before have left them, as the paper
            # does.
            if at % size == 0:
                grid.enter(at // size, weight_DR[at : at + size])
            column_R = weight_DR[at]
            error_R = error_CR[at - start]
            nearest_R = grid.nearest(column_R, groups[at], values_CR[at - start])
            torch.sub(column_R, nearest_R, out=error_R).div_(factor_DD[at, at])
            later = slice(at + 1, stop)
            weight_DR[later].addr_(factor_DD[at, later], error_R, alpha=-1.0)
        values_DR[block] = values_CR
        # As SparseGPT: one product per block for all columns behind it.
        weight_DR[rest].addmm_(factor_DD[block, rest].T, error_CR, alpha=-1.0)
    # Back in the order of the inputs.
    values_RD = torch.empty_like(values_DR).index_copy_(0, order_D, values_DR).T
    return Quantized(values_RD.contiguous(), grid.scales)


class _Grid:
    """The scales of a matrix, set group by group as the columns before are done."""

    def __init__(
        self, weight_RD: Tensor, form: Form, dtype: torch.dtype, *, fixed: bool
    ) -> None:
        self.scales = scales_of(weight_RD, form, weight_RD.dtype)
        self._columns = _columns(self.scales, dtype)
        self._form = form
        self._fixed = fixed

    def enter(self, group: int, weight_gR: Tensor) -> None:
        """Scale a group by its columns as they are now, unless scales are fixed."""
        if self._fixed:
            return
        scale_RG, zero_RG = self.scales
        found = scales_of(weight_gR.T.contiguous(), self._form, scale_RG.dtype)
        scale_RG[:, group] = found.scale_RG[:, 0]
        if zero_RG is not None and found.zero_RG is not None:
            zero_RG[:, group] = found.zero_RG[:, 0]
        (self._columns[group],) = _columns(found, weight_gR.dtype)

    def nearest(self, column_R: Tensor, group: int, values_R: Tensor) -> Tensor:
        """The weights nearest to a column; ``values_R`` gets what stands for them."""
        scale_R, zero_R = self._columns[group]
        torch.div(column_R, scale_R, out=values_R)
        if zero_R is not None:
            values_R += zero_R
        # Clamped before rounding, as compressed-tensors quantizes.
        values_R.clamp_(LOWEST, HIGHEST).round_()
        shifted_R = values_R if zero_R is None else values_R - zero_R
        return shifted_R * scale_R


def _columns(scales: Scales, dtype: torch.dtype) -> list[tuple[Tensor, Tensor | None]]:
    """Each group's scales and zero points, as they are computed with."""
    scale_GR = scales.scale_RG.T.to(dtype).contiguous()
    if scales.zero_RG is None:
        return [(scale_R, None) for scale_R in scale_GR]
    return list(zip(scale_GR, scales.zero_RG.T.to(dtype).contiguous(), strict=True))
