"""How heavy the tails of a weight distribution are, from sums that can be added.

STUN's argument: unstructured pruning takes the small weights and with them kurtosis,
removing whole experts leaves it. Zeros are not counted: they are no weights any more.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 1 << 22


def power_sums(weight: Tensor) -> list[float]:
    """Sums of w^0, w^1, ... w^4 over the non-zero weights, in float64."""
    sums = torch.zeros(5, dtype=torch.float64, device=weight.device)
    for chunk in torch.split(weight.reshape(-1), CHUNK):
        values = chunk.double()
        squares = values * values
        sums[0] += torch.count_nonzero(values)
        sums[1] += values.sum()
        sums[2] += squares.sum()
        sums[3] += (squares * values).sum()
        sums[4] += (squares * squares).sum()
    return [float(total) for total in sums]


def kurtosis(sums: Sequence[float]) -> float:
    """E[(w - mean)^4] / E[(w - mean)^2]^2, 3 for a normal distribution.

    Args:
        sums: Of ``power_sums``, perhaps added up over several matrices.
    """
    count = sums[0]
    if not count:
        return 0.0
    mean, second, third, fourth = (total / count for total in sums[1:])
    variance = second - mean**2
    central = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
    return central / variance**2 if variance > 0 else 0.0
