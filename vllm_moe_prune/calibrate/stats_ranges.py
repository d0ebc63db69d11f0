"""What numbers of statistics can be: checked as they are read from a file.

E experts, H hidden states, P points.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.config_values import MAX_EXPERTS

Array = NDArray[np.float64]
MAX_HIDDEN = 1 << 17
COUNT = float(1 << 53)
"""Up to here float64 has every whole number."""
LARGE = 1e100
"""Above any sum of squares of fp32 numbers, and its square is still finite."""
SLACK = 1e-5
"""Relative; cosines are summed in fp32."""


class Range(NamedTuple):
    """Least and largest value; whole numbers only; equal to its transpose."""

    least: float = 0.0
    most: float = LARGE
    whole: bool = False
    symmetric: bool = False


ANY = Range(-LARGE)
COUNTS = Range(most=COUNT, whole=True)
DISTANCES = Range(symmetric=True)
RANGES = {
    "router_sqdist_EE": DISTANCES,
    "router_norm": Range(),
    "router_row_norm_E": Range(),
    "weight_sqdist_EE": DISTANCES,
    # fp32 ends at 3.4e38; its fourth power is 1.3e154, times the number of weights.
    "weight_powers_E5": Range(-1e160, 1e160),
    "tokens": COUNTS,
    "routed_E": COUNTS,
    "coactivation_EE": Range(most=COUNT, whole=True, symmetric=True),
    "score_full_sum_E": Range(),
    "score_selected_sum_E": Range(),
    "weighted_norm_sum_E": Range(),
    "weighted_sqnorm_sum_E": Range(),
    "activation_norm_sum_E": Range(),
    "activation_sqnorm_sum_E": Range(),
    "activation_max_E": Range(),
    # Inner products, and cosines, may be negative.
    "contribution_gram_EE": ANY,
    "output_sqdist_EE": DISTANCES,
    "output_sqnorm_E": Range(),
    "output_sum_ED": ANY,
    "moe_cosine_sum": ANY,
    "moe_only_cosine_sum": ANY,
    "owl_outliers_E": COUNTS,
    "owl_m": Range(most=1e6),
    "sensitivity_P2": Range(most=1e6),
    "block_cosine_HH": ANY,
    "block_tokens": COUNTS,
}
"""By the name of a field of ``LayerStats`` or ``Stats``; losses of ``sensitivity_P2``
are in nats."""
PER_TOKEN = ("routed_E", "coactivation_EE", "moe_cosine_sum", "moe_only_cosine_sum")
"""Sums over tokens of what is at most 1."""
# Columns: the count and even powers; sums of w and w^3 have either sign.
NO_LESS_THAN_ZERO = ("weight_powers_E5", (0, 2, 4))


def axes_of(name: str) -> str:
    """The axis letters a field's name ends in; none for a single number."""
    suffix = re.search(r"(?<=_)[A-Z][A-Z0-9]*$", name)
    return suffix[0] if suffix else ""


def check_shapes(shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Compare the shapes of one layer's arrays with their axis letters, unread.

    Raises:
        ValueError: One is of another number of experts, or of other axes.
    """
    experts: int | None = None
    for name, shape in shapes.items():
        axes = axes_of(name)
        # The first array sets how many experts there are; the others have to agree.
        if len(shape) == len(axes) and axes.startswith("E") and experts is None:
            experts = shape[0]
        # H and P are free: None is of any size.
        sizes = [{"E": experts, "5": 5, "2": 2}.get(axis) for axis in axes]
        if len(shape) != len(axes) or any(
            size not in (None, found) for size, found in zip(sizes, shape, strict=True)
        ):
            raise ValueError(
                f"{where}: {name} has shape {list(shape)}, but the layer has {experts} "
                "experts"
            )
        # Bounds an [E, E] array before it is read.
        if max(shape, default=0) > (MAX_HIDDEN if "D" in axes else MAX_EXPERTS):
            raise ValueError(f"{where}: {name} has shape {list(shape)}")


def check_numbers(arrays: Mapping[str, Array], where: str) -> None:
    """Refuse what no measurement gives.

    Raises:
        ValueError: Naming the first number that cannot be.
    """
    for name, array in arrays.items():
        allowed = RANGES[name]
        if not np.isfinite(array).all():
            raise ValueError(f"{where}: {name} contains NaN or infinity")
        wrong = (array < allowed.least) | (array > allowed.most)
        if allowed.whole:
            wrong |= array != np.floor(array)
        if wrong.any():
            raise ValueError(f"{where}: {name} contains {array[wrong][0]:g}")
        # To the bit, as it is measured: which triangle is read must not decide a tie.
        if allowed.symmetric and (array != array.T).any():
            raise ValueError(f"{where}: {name} is not symmetric")
    _check_together(arrays, where)


def _check_together(arrays: Mapping[str, Array], where: str) -> None:
    name, columns = NO_LESS_THAN_ZERO
    if name in arrays and (arrays[name][:, columns] < 0).any():
        raise ValueError(f"{where}: {name} has an even power below zero")
    tokens = float(arrays["tokens"]) if "tokens" in arrays else math.inf
    for name in PER_TOKEN:
        if name in arrays and (most := np.abs(arrays[name]).max(initial=0.0)) > (
            tokens * (1 + SLACK)
        ):
            raise ValueError(f"{where}: {name} contains {most:g} for {tokens:g} tokens")


def check_blocks(arrays: Mapping[str, Array]) -> None:
    """The same for what is of the whole model.

    Raises:
        ValueError: Naming the first number that cannot be.
    """
    check_numbers(arrays, "model")
    cosine_HH: Any = arrays.get("block_cosine_HH")
    if cosine_HH is None:
        return
    if cosine_HH.ndim != 2 or cosine_HH.shape[0] != cosine_HH.shape[1]:
        raise ValueError(f"block_cosine_HH has shape {list(cosine_HH.shape)}")
    tokens = arrays.get("block_tokens")
    if tokens is None or tokens.ndim:
        raise ValueError("block_tokens, one number, is missing")
    if np.abs(cosine_HH).max(initial=0.0) > float(tokens) * (1 + SLACK):
        raise ValueError(f"block_cosine_HH exceeds its {float(tokens):g} tokens")
