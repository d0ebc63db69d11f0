"""Total-sparsity arithmetic, from whole weights."""

import pytest

from vllm_moe_prune.decide.sparsity import (
    least_sparsity,
    zeros_at,
    zeros_needed,
)
from vllm_moe_prune.errors import RecipeError


def test_numbers_of_the_arctic_example() -> None:
    """STUN, section 5: 19.9 % of the experts gone; 40 % and 65 % in total."""
    for total, rest in ((0.40, 0.251), (0.65, 0.563)):
        zeros = zeros_needed(total, parameters=100_000, removed=19_900)
        assert zeros / (100_000 - 19_900) == pytest.approx(rest, abs=5e-4)


def test_zeros_make_up_what_the_removal_left() -> None:
    assert zeros_needed(0.4, parameters=1000, removed=200) == 200
    assert zeros_needed(0.4, parameters=1001, removed=200) == 201, "never fewer"
    assert zeros_needed(0.29, parameters=100, removed=0) == 29
    assert zeros_needed(0.4, parameters=1000, removed=400) == 0
    assert zeros_needed(0.4, parameters=0, removed=0) == 0


def test_a_removal_beyond_the_total_is_refused_with_the_numbers() -> None:
    with pytest.raises(RecipeError, match=r"0.4 asks for 400 of 1,000 .* 450 \(0.45\)"):
        zeros_needed(0.4, parameters=1000, removed=450)


def test_rounding_to_whole_experts_may_overshoot() -> None:
    assert zeros_needed(0.4, parameters=1000, removed=450, rounding=50) == 0
    with pytest.raises(RecipeError):
        zeros_needed(0.4, parameters=1000, removed=451, rounding=50)


def test_the_first_step_that_suffices() -> None:
    # 12 rows of 10: steps of 12 zeros.
    assert least_sparsity(24, {10: 12}) == 0.2
    assert least_sparsity(25, {10: 12}) == 0.3
    assert least_sparsity(1, {10: 12}) == 0.1
    assert least_sparsity(0, {10: 12}) == 0.0
    assert zeros_at(0.3, {10: 12}) == 36


def test_rows_of_different_length_share_one_sparsity() -> None:
    # At 1/3 the rows of 4 give 1 each and those of 3 give 1 each.
    assert least_sparsity(20, {4: 10, 3: 10}) == 1 / 3
    assert least_sparsity(10, {4: 10, 3: 10}) == 0.25


def test_no_row_may_be_emptied() -> None:
    assert least_sparsity(108, {10: 12}) == 0.9
    with pytest.raises(RecipeError, match="109 zeros, but the surviving experts have"):
        least_sparsity(109, {10: 12})
    with pytest.raises(RecipeError, match="Lower total_sparsity"):
        least_sparsity(1, {})
    with pytest.raises(RecipeError, match="Lower total_sparsity"):
        least_sparsity(1, {1: 100})
