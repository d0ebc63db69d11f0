"""How heavy the tails of a weight distribution are, from sums that can be added.

STUN's argument: unstructured pruning takes the small weights and with them kurtosis,
removing whole experts leaves it. Zeros are not counted: they are no weights any more.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

PIECE = 1 << 17
"""Weights at a time: powers of them in fp64 stay in a CPU's caches."""
LAUNCH_PIECE = 1 << 24
"""On other devices, where launches cost more than memory: about 400 MiB."""


def power_sums(weights: Tensor) -> Tensor:
    """Sums of w^0, w^1, ... w^4 over the non-zero weights of each row, in fp64.

    Args:
        weights: [..., P].

    Returns:
        [..., 5].
    """
    sums = weights.new_zeros((*weights.shape[:-1], 5), dtype=torch.float64)
    rows = weights.numel() // max(weights.shape[-1], 1)
    most = PIECE if weights.device.type == "cpu" else LAUNCH_PIECE
    # Columns of all rows: about as many weights, whatever the shape.
    for piece in torch.split(weights, max(most // max(rows, 1), 1), dim=-1):
        values = piece.double()
        squares = values * values
        # Three times as fast as count_nonzero.
        sums[..., 0] += values.ne(0).to(torch.uint8).sum(-1, dtype=torch.int32)
        sums[..., 1] += values.sum(-1)
        sums[..., 2] += squares.sum(-1)
        sums[..., 3] += torch.linalg.vecdot(squares, values)
        sums[..., 4] += torch.linalg.vecdot(squares, squares)
    return sums


def kurtosis(sums: Sequence[float]) -> float | None:
    """E[(w - mean)^4] / E[(w - mean)^2]^2, 3 for a normal distribution.

    Args:
        sums: Of ``power_sums``, perhaps added up over several matrices.

    Returns:
        None where it is not defined: of no weights, of equal ones, or beyond fp64.
    """
    count = sums[0]
    if not count:
        return None
    # Damaged records hold anything: beyond fp64 it is infinite, not an error.
    with np.errstate(all="ignore"):
        mean, second, third, fourth = np.array(sums[1:], dtype=np.float64) / count
        # Central moments from raw ones: sums add up over matrices, deviations do not.
        variance = second - mean**2
        central = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
        found = float(central / variance**2) if variance > 0 else math.nan
    return found if math.isfinite(found) else None
