"""OWL's outliers: weights whose Wanda score is far above the mean of their layer.

Two passes over a layer's matrices: ``score_sum`` for the mean, then ``outliers``.
Input norms are sums over each matrix's own tokens, not means: experts that see more
tokens weigh more, as in the published code. Only ratios within a layer matter.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .wanda import CHUNK_BYTES, input_norms


def score_sum(weight_RD: Tensor, input_sqsum_D: Tensor) -> float:
    """Sum of the Wanda scores |W_jk| * ||x_k|| of one matrix, in float64."""
    norm_D = input_norms(weight_RD, input_sqsum_D)
    # sum_jk |W_jk| n_k = (sum_j |W_jk|) . n: no [R, D] of scores in fp64.
    total_D = torch.zeros_like(norm_D)
    for chunk_RD in _rows(weight_RD):
        total_D += chunk_RD.abs().sum(0, dtype=torch.float64)
    return float(total_D @ norm_D)


def outliers(weight_RD: Tensor, input_sqsum_D: Tensor, threshold: float) -> int:
    """How many Wanda scores of one matrix exceed a threshold (M times the mean)."""
    norm_D = input_norms(weight_RD, input_sqsum_D)
    return sum(
        # fp64 as in the sum: the threshold is a multiple of the mean it gave.
        int((chunk_RD.abs().double().mul_(norm_D) > threshold).sum())
        for chunk_RD in _rows(weight_RD)
    )


def _rows(weight_RD: Tensor) -> Iterator[Tensor]:
    step = max(1, CHUNK_BYTES // (8 * max(1, weight_RD.shape[1])))
    yield from torch.split(weight_RD, step)
