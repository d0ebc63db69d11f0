"""Wanda and magnitude equal a stable sort, whatever the weights."""

from unittest.mock import patch

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_moe_prune.slim import magnitude as magnitude_module
from vllm_moe_prune.slim import wanda as wanda_module
from vllm_moe_prune.slim.magnitude import magnitude
from vllm_moe_prune.slim.quota import zeros_in_matrix
from vllm_moe_prune.slim.wanda import magnitude_rows, wanda

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Few distinct values make ties; a seed makes weights without any.
VALUES = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, 1.5, -3.0, 2.0**-20])
SPARSITIES = st.floats(0.0, 0.999)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    rows, cols = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    dtype = draw(st.sampled_from(DTYPES))
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
        return torch.randn(rows, cols, generator=generator).to(dtype)
    values = draw(st.lists(VALUES, min_size=rows * cols, max_size=rows * cols))
    return torch.tensor(values).view(rows, cols).to(dtype)


@st.composite
def wanda_cases(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    weight = draw(matrices())
    cols = weight.shape[1]
    sums = st.one_of(st.just(0.0), st.just(1.0), st.floats(0.001, 1000.0))
    values = draw(st.lists(sums, min_size=cols, max_size=cols))
    return weight, torch.tensor(values, dtype=torch.float64)


def wanda_by_sorting(weight: Tensor, sqsum: Tensor, sparsity: float) -> Tensor:
    """Wanda as its authors wrote it."""
    metric = weight.abs().float() * sqsum.sqrt().float().reshape(1, -1)
    if not sqsum.any():
        metric = weight.abs().float()
    mask = torch.zeros_like(metric, dtype=torch.bool)
    _, order = torch.sort(metric, dim=-1, stable=True)
    zeros = zeros_in_matrix("wanda", 1, weight.shape[1], sparsity)
    mask.scatter_(1, order[:, :zeros], True)
    return weight.masked_fill(mask, 0.0)


def magnitude_by_sorting(weight: Tensor, sparsity: float) -> Tensor:
    flat = weight.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda index: (abs(flat[index]), index))
    zeros = zeros_in_matrix("magnitude", 1, len(flat), sparsity)
    pruned = weight.flatten().clone()
    pruned[order[:zeros]] = 0.0
    return pruned.view_as(weight)


def same_bits(one: Tensor, two: Tensor) -> bool:
    return torch.equal(one, two) and torch.equal(one.signbit(), two.signbit())


@given(case=wanda_cases(), sparsity=SPARSITIES, chunk=st.sampled_from([1, 16, 10**6]))
def test_wanda_equals_the_stable_sort(
    case: tuple[Tensor, Tensor], sparsity: float, chunk: int
) -> None:
    weight, sqsum = case
    with patch.object(wanda_module, "CHUNK_BYTES", 4 * chunk):
        pruned = wanda(weight, sqsum, sparsity)
    assert same_bits(pruned, wanda_by_sorting(weight, sqsum, sparsity))


@given(weight=matrices(), sparsity=SPARSITIES)
def test_magnitude_rows_is_wanda_on_equal_inputs(
    weight: Tensor, sparsity: float
) -> None:
    ones = torch.ones(weight.shape[1])
    pruned = magnitude_rows(weight, sparsity)
    assert same_bits(pruned, wanda_by_sorting(weight, ones, sparsity))


@settings(max_examples=50)
@given(weight=matrices(), sparsity=SPARSITIES, chunk=st.sampled_from([13, 10**6]))
def test_magnitude_equals_the_stable_sort(
    weight: Tensor, sparsity: float, chunk: int
) -> None:
    with patch.object(magnitude_module, "CHUNK_BYTES", 4 * chunk):
        pruned = magnitude(weight, sparsity)
    assert same_bits(pruned, magnitude_by_sorting(weight, sparsity))


@settings(max_examples=50)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 12),
    cols=st.integers(1, 12),
    sparsity=SPARSITIES,
)
def test_zeros_are_exactly_as_predicted(
    seed: int, rows: int, cols: int, sparsity: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(rows, cols, generator=generator) + 0.1
    sqsum = torch.rand(cols, generator=generator)
    by_wanda = wanda(weight, sqsum, sparsity)
    unseen = wanda(weight, torch.zeros(cols), sparsity)
    by_magnitude = magnitude(weight, sparsity)
    predicted = zeros_in_matrix("wanda", rows, cols, sparsity)
    assert int((by_wanda == 0).sum()) == int((unseen == 0).sum()) == predicted
    predicted = zeros_in_matrix("magnitude", rows, cols, sparsity)
    assert int((by_magnitude == 0).sum()) == predicted
