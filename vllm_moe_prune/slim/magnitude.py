"""Magnitude: zero the smallest weights of the whole matrix (Wanda's baseline).

The lowest ``int(numel * sparsity)`` absolute values go, ties to the lower flat index;
with n:m the lowest of every m columns.
"""

import torch
from torch import Tensor

from ..errors import CheckpointError
from .quota import zeros_in_group
from .wanda import CHUNK_BYTES, NOT_FINITE_WEIGHTS, magnitude_rows

HALF_BITS = 16
NOT_FINITE = 0x7F80
"""Upper half of infinity's bits in float32; NaNs come after it."""


def magnitude(weight: Tensor, sparsity: float, m: int | None = None) -> Tensor:
    """Prune one matrix by |W|; a new tensor, surviving weights bit for bit the same.

    Raises:
        CheckpointError: If a weight is NaN or infinite.
    """
    if m is not None:
        return magnitude_rows(weight, sparsity, m)
    flat = weight.reshape(-1)
    # Keys below the threshold all go; of those equal to it, the first `tied`.
    threshold, tied = select(flat, zeros_in_group(flat.numel(), sparsity))
    zero = torch.zeros((), dtype=flat.dtype, device=flat.device)
    pruned = torch.empty_like(flat)
    # Elements of a float32 temporary.
    step = CHUNK_BYTES // 4
    for start in range(0, flat.numel(), step):
        chunk = flat[start : start + step]
        keys = keys_of(chunk)
        mask = keys < threshold
        if tied:
            equal = keys == threshold
            equal &= equal.cumsum(0, dtype=torch.int32) <= tied
            # Ties that this chunk used up are not left for the next.
            tied -= int(equal.sum())
            mask |= equal
        torch.where(mask, zero, chunk, out=pruned[start : start + step])
    return pruned.view(weight.shape)


def keys_of(chunk: Tensor) -> Tensor:
    """Integers in the order of |w|: the bits of a non-negative float32."""
    # Widening is exact for bf16 and fp16; a copy, or abs_ would change the weight.
    return chunk.to(torch.float32, copy=True).abs_().view(torch.int32)


def select(flat: Tensor, count: int) -> tuple[int, int]:
    """The key of the ``count``-th smallest |w|, and how many of that key go.

    A radix selection in two passes: upper, then lower half of the key's bits. Unlike
    a sort it is exact on any number of weights with memory for one chunk.
    """
    histogram = _histogram(flat, None)
    if int(histogram[NOT_FINITE:].sum()):
        raise CheckpointError(NOT_FINITE_WEIGHTS)
    if count == 0:
        return 0, 0
    # `left`: the rank sought among the keys that share the upper half.
    high, left = _bucket_of(histogram, count)
    low, tied = _bucket_of(_histogram(flat, high), left)
    return (high << HALF_BITS) | low, tied


def _histogram(flat: Tensor, high: int | None) -> Tensor:
    """Counts of the upper key halves, or of the lower halves below one upper half."""
    total = torch.zeros(1 << HALF_BITS, dtype=torch.int64, device=flat.device)
    step = CHUNK_BYTES // 4
    for start in range(0, flat.numel(), step):
        keys = keys_of(flat[start : start + step])
        if high is None:
            digits = keys >> HALF_BITS
        else:
            digits = keys[keys >> HALF_BITS == high] & ((1 << HALF_BITS) - 1)
        total += torch.bincount(digits, minlength=1 << HALF_BITS)
    return total


def _bucket_of(histogram: Tensor, rank: int) -> tuple[int, int]:
    """The bucket that holds the ``rank``-th element (from 1), and its rank there."""
    reached = histogram.cumsum(0)
    # Leftmost: the first bucket at which as many as `rank` have been counted.
    bucket = int(torch.searchsorted(reached, rank))
    return bucket, rank - int(reached[bucket]) + int(histogram[bucket])
