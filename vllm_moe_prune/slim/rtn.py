"""Rounding to nearest: every weight becomes the nearest value of its group's grid."""

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..kernels.quantized import Form, Quantized, quantize_by, scales_of
from .wanda import NOT_FINITE_WEIGHTS


def rtn(weight_RD: Tensor, form: Form) -> Quantized:
    """Quantize one matrix without data; scales are kept in the weight's dtype.

    Raises:
        CheckpointError: If a weight is NaN or infinite.
    """
    check_finite(weight_RD)
    scales = scales_of(weight_RD, form, weight_RD.dtype)
    return Quantized(quantize_by(weight_RD, scales, form), scales)


def check_finite(weight_RD: Tensor) -> None:
    """Refuse weights that no grid holds.

    Raises:
        CheckpointError: Without a name: the caller knows which tensor it was.
    """
    # One NaN or infinity makes the sum one, without a matrix of booleans.
    if not torch.isfinite(weight_RD.sum(dtype=torch.float32)):
        raise CheckpointError(NOT_FINITE_WEIGHTS)
