"""AWQ: scale inputs so that rounding spares the columns that see large activations.

Column k of W is multiplied by s_k before it is rounded and its input divided by s_k,
which changes nothing but the rounding (Lin et al., arXiv 2306.00978). Candidates are
s = mean|x| ** a for a = 0, 1/20, ..., 19/20, divided by sqrt(max s * min s); the one
with the least squared error of the outputs wins, ties to the smaller a.

Here every s is rounded to a power of two, before it is judged: dividing a norm by it
and multiplying router rows by it is then exact in bf16, so nothing but what is
quantized changes at all. Weights are not clipped. D input columns, R output rows, n
tokens, A candidates.
"""

import torch
from torch import Tensor

from ..kernels.quantized import Form, dequantize
from .rtn import rtn

CANDIDATES = 20
SAMPLED_TOKENS = 512
"""On so many tokens of an expert, evenly spaced, its candidates are judged."""
LEAST_MEAN = 1e-4
MOST_EXPONENT = 8
"""Scales stay between 2 ** -8 and 2 ** 8, for the sake of fp16."""


def candidates(mean_D: Tensor) -> list[Tensor]:
    """The scales to try, each [D] of powers of two in float32.

    Args:
        mean_D: Mean of |x| over tokens.
    """
    log_D = mean_D.double().clamp(min=LEAST_MEAN).log2()
    # Centered as in AWQ's code (scales / sqrt(max * min)): neither side leaves fp16's
    # range.
    middle_D = log_D - (log_D.max() + log_D.min()) / 2
    found = []
    for step in range(CANDIDATES):
        # Powers of two: multiplying and dividing by them is exact, so nothing else is
        # rounded.
        exponent_D = (step / CANDIDATES * middle_D).round()
        bounded_D = exponent_D.clamp(-MOST_EXPONENT, MOST_EXPONENT)
        found.append(torch.exp2(bounded_D).float())
    return found


def errors(weight_RD: Tensor, x_nD: Tensor, scales: list[Tensor], form: Form) -> Tensor:
    """Squared error [A] of the outputs W x of one matrix under each candidate."""
    x_nD, exact_RD = x_nD.float(), weight_RD.float()
    found = []
    for scale_D in scales:
        matrix = rtn(scaled(weight_RD, scale_D), form)
        # The error of the output, not of the weights: that is AWQ's objective.
        rounded_RD = dequantize(matrix, form, weight_RD.dtype) / scale_D
        error_nR = x_nD @ (exact_RD - rounded_RD).T
        found.append(error_nR.square().sum(dtype=torch.float64))
    return torch.stack(found)


def scaled(weight_RD: Tensor, scale_D: Tensor) -> Tensor:
    """A matrix with its columns multiplied, in its own dtype: exact but for range."""
    return (weight_RD * scale_D).to(weight_RD.dtype)


def best(scales: list[Tensor], errors_A: Tensor) -> Tensor:
    """The candidate of the least error, of equal ones the first."""
    return scales[int(errors_A.argmin())]


def sampled(token_n: Tensor) -> Tensor:
    """At most ``SAMPLED_TOKENS`` of some tokens, evenly spaced."""
    count = min(SAMPLED_TOKENS, len(token_n))
    # float64: float32 has no exact indices above 2 ** 24.
    at_m = torch.linspace(0, len(token_n) - 1, count, dtype=torch.float64)
    return token_n[at_m.round().long().to(token_n.device)]
