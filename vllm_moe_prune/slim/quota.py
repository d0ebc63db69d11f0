"""How many zeros a sparsity means: the one definition that plan and cut share.

A slimming method compares weights within groups of one size and zeroes the same
number in each: an output row for Wanda, the whole matrix for magnitude. Imports
nothing, so that ``decide`` can predict a cut to the last zero.
"""

import math
from typing import Literal

Method = Literal["wanda", "magnitude"]

# 100 * 0.29 is 28.999999999999996 in floating point and must still mean 29.
SLACK = 1e-12


def zeros_in_group(size: int, sparsity: float) -> int:
    """How many of ``size`` weights are zeroed: ``int(size * sparsity)``.

    The product is taken with a relative slack of 1e-12, far below one weight.
    """
    return min(size, math.floor(size * sparsity * (1.0 + SLACK)))


def groups_in(method: Method, rows: int, cols: int) -> tuple[int, int]:
    """Number and size of the comparison groups of one [rows, cols] matrix."""
    return (rows, cols) if method == "wanda" else (1, rows * cols)


def zeros_in_matrix(method: Method, rows: int, cols: int, sparsity: float) -> int:
    """Exactly how many weights a method zeroes in one [rows, cols] matrix."""
    groups, size = groups_in(method, rows, cols)
    return groups * zeros_in_group(size, sparsity)
