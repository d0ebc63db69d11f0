"""Dropping experts by score: the lowest go first, ties by index.

Within a layer the order is (score, expert); whatever the budget, a layer loses a
prefix of it. Protected experts are not in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np

from ..errors import RecipeError
from .similarity import Array

MOST_SETS = 200_000
"""Sets of experts that an exhaustive search tries in one layer at most."""


@dataclass(frozen=True)
class Removal:
    """One expert leaving."""

    height: float
    """Its score, negated where the highest go first."""
    expert: int


def removal_sequence(
    score_E: Array, protected: Sequence[int] = (), *, reverse: bool = False
) -> list[Removal]:
    """All experts that may go, in the order in which they go."""
    heights_E = -score_E if reverse else score_E
    return sorted(
        (
            Removal(float(height), expert)
            for expert, height in enumerate(heights_E)
            if expert not in protected
        ),
        key=lambda removal: (removal.height, removal.expert),
    )


def best_set(
    gram_EE: Array, count: int, protected: Sequence[int] = (), *, layer: int
) -> tuple[int, ...]:
    """The ``count`` experts whose joint removal changes the layer's output least.

    With c_i(t) the weighted output of expert i, removing the set R changes the output
    of token t by sum_{i in R} c_i(t), hence all outputs by 1_R' G 1_R (squared), where
    G is the Gram matrix of the contributions. The routing of the others is kept.

    Args:
        gram_EE: G, summed over tokens.
        count: How many experts go.
        protected: Experts that stay.
        layer: Named in errors.

    Raises:
        RecipeError: If there are too many sets to try them all.
    """
    free = [expert for expert in range(len(gram_EE)) if expert not in protected]
    # Counted, not listed: C(64, 8) is 4.4e9.
    sets = comb(len(free), count)
    if sets > MOST_SETS:
        raise RecipeError(
            f"layer {layer}: an exhaustive search for {count} of {len(free)} experts "
            f"has {sets:.3g} sets to try, at most {MOST_SETS:,} are allowed. "
            "Use experts.search: greedy."
        )
    # combinations come in lexicographic order, and min keeps the first of equals.
    return min(combinations(free, count), key=lambda ids: _loss(gram_EE, ids))


def _loss(gram_EE: Array, ids: tuple[int, ...]) -> float:
    return float(gram_EE[np.ix_(ids, ids)].sum())
