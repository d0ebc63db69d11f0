"""Defects of published weight pruning, one test each, and what each method refuses."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vllm_moe_prune.errors import CalibrationError, CheckpointError
from vllm_moe_prune.slim.magnitude import magnitude, magnitude_rows
from vllm_moe_prune.slim.owl import outliers, score_sum
from vllm_moe_prune.slim.quota import zeros_in_matrix
from vllm_moe_prune.slim.sparsegpt import inverse_factor, sparsegpt
from vllm_moe_prune.slim.wanda import wanda
from vllm_moe_prune.slim.wanda_variant import wanda_variant

Method = Callable[[Tensor, Tensor], Tensor]

ROW = torch.tensor([[3.0, -1.0, 2.0, -4.0]])
FLAT = torch.ones(4)


@pytest.mark.parametrize(
    "pruned",
    [
        magnitude(ROW, 0.5),
        magnitude(ROW, 0.5, 4),
        wanda(ROW, FLAT, 0.5),
        wanda(ROW, FLAT, 0.5, 4),
        wanda_variant(ROW, FLAT, 0.5),
        sparsegpt(ROW, torch.eye(4), 0.5),
        sparsegpt(ROW, torch.eye(4), 0.5, 4),
    ],
    ids=["magnitude", "m-4", "wanda", "w-4", "variant", "sparsegpt", "s-4"],
)
def test_defect_1_the_small_weights_go_and_the_large_ones_stay(pruned: Tensor) -> None:
    assert pruned.tolist() == [[3.0, 0.0, 0.0, -4.0]]


@pytest.mark.parametrize("m", [None, 4])
def test_defect_17_unseen_experts_are_pruned_by_magnitude(m: int | None) -> None:
    """As many zeros as planned, in the groups of the method asked for."""
    weight = torch.randn(6, 260, generator=torch.Generator().manual_seed(0))
    nothing, none_sq = torch.zeros(260, 260), torch.zeros(260)
    by_wanda = wanda(weight, none_sq, 0.5, m)
    assert torch.equal(by_wanda, magnitude_rows(weight, 0.5, m))
    by_sparsegpt = sparsegpt(weight, nothing, 0.5, m)
    zeros = zeros_in_matrix("sparsegpt", 6, 260, 0.5, m)
    assert int((by_sparsegpt == 0).sum()) == zeros
    kept = by_sparsegpt != 0
    assert torch.equal(by_sparsegpt[kept], weight[kept])
    if m is not None:
        assert torch.equal(by_sparsegpt, magnitude(weight, 0.5, m))
    else:
        assert torch.equal(
            by_sparsegpt[:, 256:], magnitude(weight[:, 256:].contiguous(), 0.5)
        )
    variant = wanda_variant(weight, none_sq, 0.5)
    assert torch.equal(variant, wanda_variant(weight, torch.ones(260), 0.5))


def test_inputs_that_never_fired_go_first_but_no_more_than_asked() -> None:
    """The published code zeroes all their weights, whatever the sparsity."""
    hessian = torch.diag(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    weight = torch.tensor([[0.1, 5.0, 5.0, 5.0]])
    assert sparsegpt(weight, hessian, 0.25).tolist() == [
        pytest.approx([0.1, 0.0, 5.0, 5.0])
    ]
    assert sparsegpt(weight, hessian, 0.5, 2).tolist() == [
        pytest.approx([0.1, 0.0, 0.0, 5.0])
    ]


def test_later_columns_make_up_for_earlier_ones() -> None:
    """Two equal inputs: the weight of the first moves to the second."""
    x = torch.randn(100, 1, generator=torch.Generator().manual_seed(1)).repeat(1, 2)
    pruned = sparsegpt(torch.tensor([[1.0, 2.0]]), x.T @ x, 0.5, damping=1e-4)
    assert pruned.tolist() == [pytest.approx([0.0, 3.0], abs=1e-3)]


def test_no_sparsity_leaves_every_bit() -> None:
    weight = torch.randn(5, 9, generator=torch.Generator().manual_seed(2)).bfloat16()
    hessian = torch.eye(9)
    assert torch.equal(sparsegpt(weight, hessian, 0.0), weight)
    assert torch.equal(wanda_variant(weight, torch.ones(9), 0.0), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_stored_dtype_is_kept(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(3)).to(dtype)
    for pruned in (
        sparsegpt(weight, torch.eye(8), 0.5),
        wanda_variant(weight, torch.ones(8), 0.5),
        wanda(weight, torch.ones(8), 0.5, 4),
    ):
        assert pruned.dtype == dtype
        assert pruned.is_contiguous()
        assert int((pruned == 0).sum()) == 16


def test_the_input_is_left_alone() -> None:
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(4))
    hessian, sums = torch.eye(8), torch.ones(8)
    copies = weight.clone(), hessian.clone(), sums.clone()
    sparsegpt(weight, hessian, 0.5)
    wanda_variant(weight, sums, 0.5)
    inverse_factor(hessian)
    score_sum(weight, sums)
    outliers(weight, sums, 1.0)
    for value, copy in zip((weight, hessian, sums), copies, strict=True):
        assert torch.equal(value, copy)


METHODS: list[Method] = [
    lambda weight, sums: sparsegpt(weight, torch.diag(sums), 0.5),
    lambda weight, sums: wanda_variant(weight, sums, 0.5),
    lambda weight, sums: wanda(weight, sums, 0.5, 2),
]


@pytest.mark.parametrize("method", METHODS, ids=["sparsegpt", "variant", "nm"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(method: Method, bad: float) -> None:
    weight = torch.ones(2, 4)
    weight[1, 2] = bad
    with pytest.raises(CheckpointError, match="NaN or infinite weights"):
        method(weight, torch.ones(4))
    sums = torch.ones(4)
    sums[1] = bad
    with pytest.raises(CalibrationError, match="overflowed"):
        method(torch.ones(2, 4), sums)


def test_sums_that_are_no_sums_of_squares_are_refused() -> None:
    with pytest.raises(CalibrationError, match="too singular"):
        sparsegpt(torch.ones(2, 2), torch.tensor([[1.0, 5.0], [5.0, 1.0]]), 0.5)


def test_one_token_is_enough() -> None:
    """H of rank one: the damping makes it definite."""
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(5))
    pruned = sparsegpt(torch.ones(3, 64), x.T @ x, 0.5)
    assert torch.isfinite(pruned).all()
    assert int((pruned == 0).sum()) == 96
