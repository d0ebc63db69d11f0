"""Magnitude: zero the smallest weights of the whole matrix (Wanda's baseline).

The lowest ``int(numel * sparsity)`` absolute values go, ties to the lower flat index.
"""

import torch
from torch import Tensor

from .quota import zeros_in_group
from .wanda import CHUNK_BYTES, require_finite

HALF_BITS = 16


def magnitude(weight: Tensor, sparsity: float) -> Tensor:
    """Prune one matrix by |W|; a new tensor, surviving weights bit for bit the same.

    Raises:
        CheckpointError: If a weight is NaN or infinite.
    """
    flat = weight.reshape(-1)
    count = zeros_in_group(flat.numel(), sparsity)
    pruned = flat.clone()
    if count == 0:
        return pruned.view(weight.shape)
    threshold, tied = _select(flat, count)
    step = CHUNK_BYTES // 4
    for start in range(0, flat.numel(), step):
        keys = _keys(flat[start : start + step])
        mask = keys < threshold
        if tied:
            equal = keys == threshold
            equal &= equal.cumsum(0) <= tied
            tied -= int(equal.sum())
            mask |= equal
        pruned[start : start + step].masked_fill_(mask, 0.0)
    return pruned.view(weight.shape)


def _keys(chunk: Tensor) -> Tensor:
    """Integers in the order of |w|: the bits of a non-negative float32."""
    values = chunk.float().abs()
    require_finite(values)
    return values.view(torch.int32)


def _select(flat: Tensor, count: int) -> tuple[int, int]:
    """The key of the ``count``-th smallest weight, and how many equal keys go.

    A radix selection in two passes: upper, then lower half of the key's bits. Unlike
    a sort it is exact on any number of weights with memory for one chunk.
    """
    high, left = _bucket_of(_histogram(flat, None), count)
    low, tied = _bucket_of(_histogram(flat, high), left)
    return (high << HALF_BITS) | low, tied


def _histogram(flat: Tensor, high: int | None) -> Tensor:
    """Counts of the upper key halves, or of the lower halves below one upper half."""
    total = torch.zeros(1 << HALF_BITS, dtype=torch.int64, device=flat.device)
    for chunk in flat.split(CHUNK_BYTES // 4):
        keys = _keys(chunk)
        if high is None:
            digits = keys >> HALF_BITS
        else:
            digits = keys[keys >> HALF_BITS == high] & ((1 << HALF_BITS) - 1)
        total += torch.bincount(digits, minlength=1 << HALF_BITS)
    return total


def _bucket_of(histogram: Tensor, rank: int) -> tuple[int, int]:
    """The bucket that holds the ``rank``-th element (from 1), and its rank there."""
    reached = histogram.cumsum(0)
    bucket = int(torch.searchsorted(reached, rank))
    return bucket, rank - int(reached[bucket]) + int(histogram[bucket])
