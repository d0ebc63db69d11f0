"""Sparsity as arithmetic on whole weights: what two stages add up to.

With s1 the share of parameters removed and s2 the share of zeros in what survives,
S = 1 - (1 - s1)(1 - s2), hence s2 = (S - s1) / (1 - s1).
"""

import math
from bisect import bisect_left
from collections.abc import Mapping

from ..errors import RecipeError
from ..slim.quota import zeros_in_group


def zeros_needed(
    total: float, *, parameters: int, removed: int, rounding: int = 0
) -> int:
    """How many weights to zero for a total sparsity; never fewer than asked.

    Args:
        total: The total sparsity asked for.
        parameters: All parameters that the share is of.
        removed: How many of them are removed already.
        rounding: By how much rounding to whole experts may overshoot unpunished.

    Raises:
        RecipeError: If more is removed already than was asked in total.
    """
    # The slack keeps a whole product from being rounded up by one.
    asked = math.ceil(parameters * total * (1.0 - 1e-12))
    if removed > asked + rounding:
        raise RecipeError(
            f"total_sparsity {total:g} asks for {asked:,} of {parameters:,} "
            f"parameters, but removing experts and layers alone takes {removed:,} "
            f"({removed / parameters:.4g}). Raise total_sparsity, or remove less "
            "(experts.drop, experts.keep, layers)."
        )
    return max(0, asked - removed)


def zeros_at(sparsity: float, groups: Mapping[int, int]) -> int:
    """How many weights are zeroed at a sparsity.

    Args:
        sparsity: The sparsity of every comparison group.
        groups: How many groups (see ``slim.quota``) there are of each size.
    """
    return sum(count * zeros_in_group(size, sparsity) for size, count in groups.items())


def least_sparsity(zeros: int, groups: Mapping[int, int]) -> float:
    """The smallest sparsity that zeroes at least that many weights.

    A method zeroes ``int(size * sparsity)`` weights of each group, so a plain share
    lands below what was asked, far below in small matrices. Zeros grow in steps at
    sparsities k / size: the first step that suffices is as close from above as the
    groups allow.

    Args:
        zeros: How many weights to zero.
        groups: How many groups (see ``slim.quota``) there are of each size.

    Raises:
        RecipeError: If every group would have to be zeroed whole.
    """
    if zeros <= 0:
        return 0.0
    steps = [_first_step(zeros, size, groups) for size in groups]
    enough = [step for step in steps if step < 1.0]
    if not enough:
        raise not_enough(zeros, groups)
    return min(enough)


def not_enough(zeros: int, groups: Mapping[int, int]) -> RecipeError:
    """The error of a total that the surviving weights cannot give."""
    weights = sum(size * count for size, count in groups.items())
    return RecipeError(
        f"total_sparsity needs {zeros:,} zeros, but the surviving experts have "
        f"{weights:,} weights and no row may lose them all. "
        "Lower total_sparsity, or remove more (experts.drop, layers)."
    )


def _first_step(zeros: int, size: int, groups: Mapping[int, int]) -> float:
    """The smallest k / size that zeroes enough; 1.0 where none does."""
    # Zeros never fall as k rises, so bisection finds the first k that suffices.
    step = bisect_left(range(size), zeros, key=lambda k: zeros_at(k / size, groups))
    return step / size
