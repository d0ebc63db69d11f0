"""How many zeros a sparsity means: the one definition that plan and cut share.

A slimming method compares weights within groups of one size and zeroes the same
number in each. Imports nothing, so that ``decide`` can predict a cut to the last zero.
"""

import math
from typing import Literal

Method = Literal["wanda", "wanda-variant", "magnitude", "sparsegpt"]

# 100 * 0.29 is 28.999999999999996 in floating point and must still mean 29.
SLACK = 1e-12
BLOCK_COLS = 128
"""SparseGPT decides which weights go in blocks of this many columns."""


def zeros_in_group(size: int, sparsity: float) -> int:
    """How many of ``size`` weights are zeroed: ``int(size * sparsity)``.

    The product is taken with a relative slack of 1e-12, far below one weight.
    """
    # The slack must not push a sparsity of 1 past the group.
    return min(size, math.floor(size * sparsity * (1.0 + SLACK)))


def groups_in(
    method: Method, rows: int, cols: int, m: int | None = None
) -> dict[int, int]:
    """The comparison groups of one [rows, cols] matrix: how many of each size.

    Args:
        method: Wanda compares within a row, SparseGPT within a block of columns, the
            others within the whole matrix.
        rows: Output rows.
        cols: Input columns; a multiple of ``m`` if that is given.
        m: Of an n:m pattern, whose groups are m neighbors in a row for every method.
    """
    # Within n:m the method chooses among m neighbors, whatever it compares otherwise.
    if m is not None:
        return {m: rows * (cols // m)}
    if method == "wanda":
        return {cols: rows}
    if method != "sparsegpt":
        return {rows * cols: 1}
    # The last block may be narrower; its zeros are rounded down on their own.
    whole, rest = divmod(cols, BLOCK_COLS)
    groups = {rows * BLOCK_COLS: whole, rows * rest: 1 if rest else 0}
    return {size: count for size, count in groups.items() if count}


def zeros_in_matrix(
    method: Method, rows: int, cols: int, sparsity: float, m: int | None = None
) -> int:
    """Exactly how many weights a method zeroes in one [rows, cols] matrix."""
    groups = groups_in(method, rows, cols, m)
    return sum(count * zeros_in_group(size, sparsity) for size, count in groups.items())
