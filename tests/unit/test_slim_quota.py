"""How many weights a sparsity means."""

from fractions import Fraction

import pytest

from vllm_moe_prune.slim.quota import Method, groups_in, zeros_in_group, zeros_in_matrix


@pytest.mark.parametrize(
    ("size", "sparsity", "zeros"),
    [
        (10, 0.0, 0),
        (10, 0.3, 3),
        (10, 0.1 + 0.2, 3),
        (100, 0.29, 29),  # 28.999999999999996 in floating point
        (10, 0.39, 3),
        (3, 0.5, 1),
        (1, 0.999, 0),
        (4096, 0.25, 1024),
    ],
)
def test_zeros_are_the_whole_part(size: int, sparsity: float, zeros: int) -> None:
    assert zeros_in_group(size, sparsity) == zeros


def test_every_step_of_a_group_is_reached_exactly() -> None:
    for size in (1, 7, 48, 1408, 14336):
        assert [zeros_in_group(size, k / size) for k in range(size)] == [*range(size)]


def test_slack_is_no_rounding() -> None:
    """One part in a million below a whole number stays below."""
    for size in (3, 100, 14336):
        below = float(Fraction(size - 1, size) - Fraction(1, 10**6))
        assert zeros_in_group(size, below) == size - 2


def test_never_more_than_the_group() -> None:
    assert zeros_in_group(5, 1.0) == 5


def test_each_method_has_its_groups() -> None:
    assert groups_in("wanda", 6, 5) == {5: 6}
    assert groups_in("magnitude", 6, 5) == {30: 1}
    assert groups_in("wanda-variant", 6, 5) == {30: 1}
    assert zeros_in_matrix("wanda", 6, 5, 0.5) == 12
    assert zeros_in_matrix("magnitude", 6, 5, 0.5) == 15


def test_sparsegpt_compares_blocks_of_128_columns() -> None:
    assert groups_in("sparsegpt", 3, 300) == {384: 2, 132: 1}
    assert groups_in("sparsegpt", 3, 256) == {384: 2}
    assert groups_in("sparsegpt", 3, 5) == {15: 1}
    assert zeros_in_matrix("sparsegpt", 3, 300, 0.1) == 2 * 38 + 13


@pytest.mark.parametrize("method", ["wanda", "magnitude", "sparsegpt"])
def test_a_pattern_makes_groups_of_m_in_every_method(method: Method) -> None:
    assert groups_in(method, 3, 8, 4) == {4: 6}
    assert zeros_in_matrix(method, 3, 8, 0.5, 4) == 12
    assert zeros_in_matrix(method, 3, 8, 0.74, 4) == 12, "never more than asked"
