"""n:m, Wanda's variant, SparseGPT, OWL and kurtosis equal their definitions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_moe_prune.slim.kurtosis import PIECE, kurtosis, power_sums
from vllm_moe_prune.slim.magnitude import magnitude
from vllm_moe_prune.slim.owl import outliers, score_sum
from vllm_moe_prune.slim.quota import zeros_in_group, zeros_in_matrix
from vllm_moe_prune.slim.sparsegpt import add_inputs, inverse_factor, sparsegpt
from vllm_moe_prune.slim.wanda import wanda
from vllm_moe_prune.slim.wanda_variant import wanda_variant

SEEDS = st.integers(0, 10**6)
SPARSITIES = st.floats(0.0, 0.95)


def random(seed: int, *shape: int, ties: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if ties:
        return torch.randint(-2, 3, shape, generator=generator).float()
    return torch.randn(shape, generator=generator)


@settings(max_examples=80)
@given(
    seed=SEEDS,
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    m=st.sampled_from([1, 2, 3, 4, 8, 16, 17, 20]),
    sparsity=SPARSITIES,
    ties=st.booleans(),
)
def test_n_of_m_keeps_the_best_of_every_group(
    seed: int, rows: int, groups: int, m: int, sparsity: float, ties: bool
) -> None:
    weight = random(seed, rows, groups * m, ties=ties)
    sums = random(seed + 1, groups * m).square()
    count = zeros_in_group(m, sparsity)
    for pruned, scale in (
        (wanda(weight, sums, sparsity, m), sums.sqrt()),
        (magnitude(weight, sparsity, m), torch.ones(groups * m)),
    ):
        for row in range(rows):
            for start in range(0, groups * m, m):
                score = (weight[row].abs() * scale)[start : start + m]
                order = sorted(range(m), key=lambda at, s=score: (float(s[at]), at))
                expected = weight[row, start : start + m].clone()
                expected[order[:count]] = 0.0
                assert torch.equal(pruned[row, start : start + m], expected)


def bisected(scores_RD: np.ndarray, sparsity: float) -> np.ndarray:
    """The published bisection for alpha, to the end: which weights go."""
    order_RD = np.argsort(scores_RD, axis=1, kind="stable")
    sums_RD = np.take_along_axis(scores_RD, order_RD, 1).cumsum(1)
    low, high = 0.0, 1.0
    for _ in range(60):
        alpha = (low + high) / 2
        goes_RD = sums_RD <= alpha * sums_RD[:, -1:]
        low, high = (low, alpha) if goes_RD.mean() > sparsity else (alpha, high)
    mask_RD = np.zeros_like(goes_RD)
    np.put_along_axis(mask_RD, order_RD, sums_RD <= low * sums_RD[:, -1:], 1)
    return mask_RD


@settings(max_examples=60)
@given(seed=SEEDS, rows=st.integers(1, 8), cols=st.integers(2, 40), sparsity=SPARSITIES)
def test_the_variant_is_the_published_bisection_made_exact(
    seed: int, rows: int, cols: int, sparsity: float
) -> None:
    weight, sums = random(seed, rows, cols), random(seed + 1, cols).square()
    pruned = wanda_variant(weight, sums, sparsity)
    scores_RD = (weight.abs() * sums.sqrt()).double().numpy()
    expected = bisected(scores_RD, sparsity)
    found = (pruned == 0).numpy()
    count = zeros_in_group(rows * cols, sparsity)
    assert (
        found.sum() == count == zeros_in_matrix("wanda-variant", rows, cols, sparsity)
    )
    # float32 shares can swap two weights that are all but equal.
    assert (expected & ~found).sum() <= max(0, expected.sum() - count) + 1
    kept = ~torch.from_numpy(found)
    assert torch.equal(pruned[kept], weight[kept])


@settings(max_examples=40)
@given(seed=SEEDS, rows=st.integers(1, 5), cols=st.integers(1, 9), sparsity=SPARSITIES)
def test_the_variant_is_deterministic_with_ties(
    seed: int, rows: int, cols: int, sparsity: float
) -> None:
    weight = random(seed, rows, cols, ties=True)
    sums = torch.ones(cols)
    pruned = wanda_variant(weight, sums, sparsity)
    zeroed = (pruned == 0) & (weight != 0)
    assert (weight != 0).sum() - zeroed.sum() >= 0
    keys = []
    for row in range(rows):
        order = sorted(range(cols), key=lambda at, r=row: (abs(weight[r, at]), at))
        total = float(weight[row].abs().sum())
        reached = 0.0
        for at in order:
            reached += abs(float(weight[row, at]))
            share = np.float32(reached / total) if total else np.float32(0)
            keys.append((share, row, len(keys), at))
    goes = sorted(keys)[: zeros_in_group(rows * cols, sparsity)]
    expected = weight.clone()
    for _, row, _, at in goes:
        expected[row, at] = 0.0
    assert torch.equal(pruned, expected)


def published_sparsegpt(
    weight: Tensor, hessian: Tensor, sparsity: float, m: int | None, block: int
) -> np.ndarray:
    """Column by column in float64, inverse and factor as the paper has them."""
    w = weight.double().numpy().copy()
    h = hessian.double().numpy().copy()
    cols = w.shape[1]
    dead = np.diag(h) == 0
    mean = np.diag(h)[~dead].mean()
    h[np.diag_indices(cols)] += np.where(dead, mean, 0.01 * mean)
    factor = np.linalg.cholesky(np.linalg.inv(h)).T
    for start in range(0, cols, block):
        stop = min(start + block, cols)
        d = np.diag(factor)[start:stop]
        score = (w[:, start:stop] / d) ** 2
        score[:, dead[start:stop]] = 0.0
        mask = np.zeros_like(score, dtype=bool)
        if m is None:
            order = np.argsort(score.ravel(), kind="stable")
            mask.ravel()[order[: zeros_in_group(score.size, sparsity)]] = True
        for k in range(start, stop):
            if m is not None and k % m == 0:
                part = (w[:, k : k + m] / np.diag(factor)[k : k + m]) ** 2
                part[:, dead[k : k + m]] = 0.0
                lowest = np.argsort(part, axis=1, kind="stable")
                lowest = lowest[:, : zeros_in_group(m, sparsity)]
                np.put_along_axis(mask[:, k - start : k - start + m], lowest, True, 1)
            kept = np.where(mask[:, k - start], 0.0, w[:, k])
            error = (w[:, k] - kept) / factor[k, k]
            w[:, k:] -= np.outer(error, factor[k, k:])
            w[:, k] = kept
    return w


@settings(max_examples=60, deadline=None)
@given(
    seed=SEEDS,
    rows=st.integers(1, 6),
    cols=st.sampled_from([4, 12, 128, 132, 260]),
    tokens=st.integers(2, 40),
    m=st.sampled_from([None, 2, 4]),
    sparsity=st.sampled_from([0.1, 0.25, 0.5, 0.75]),
    dead=st.sampled_from([0.0, 0.2]),
)
def test_sparsegpt_equals_the_paper(
    seed: int,
    rows: int,
    cols: int,
    tokens: int,
    m: int | None,
    sparsity: float,
    dead: float,
) -> None:
    weight, x = random(seed, rows, cols), random(seed + 1, tokens, cols)
    x[:, torch.rand(cols, generator=torch.Generator().manual_seed(seed)) < dead] = 0.0
    if not x.any():
        return
    hessian = torch.zeros(cols, cols)
    for batch in torch.split(x, 7):
        add_inputs(hessian, batch)
    assert torch.allclose(hessian, x.T @ x, atol=1e-4)
    pruned = sparsegpt(weight, hessian, sparsity, m)
    expected = published_sparsegpt(weight, hessian, sparsity, m, 128)
    zeros = int((pruned == 0).sum())
    assert zeros == zeros_in_matrix("sparsegpt", rows, cols, sparsity, m)
    assert np.allclose(pruned.numpy(), expected, rtol=2e-2, atol=2e-2)
    assert np.array_equal(pruned.numpy() == 0, expected == 0)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, cols=st.integers(1, 30), tokens=st.integers(1, 40))
def test_the_factor_is_that_of_the_damped_inverse(
    seed: int, cols: int, tokens: int
) -> None:
    x = random(seed, tokens, cols)
    hessian = x.T @ x
    factor = inverse_factor(hessian).double()
    damped = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(cols)
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(
        factor.T @ factor @ damped, torch.eye(cols).double(), atol=1e-3
    )


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, sparsity=st.sampled_from([0.3, 0.5, 0.7]), scale=st.floats(0.01, 99))
def test_sparsegpt_does_not_depend_on_the_scale_of_its_sums(
    seed: int, sparsity: float, scale: float
) -> None:
    """Sum or mean, with or without the factor 2: the same."""
    weight, x = random(seed, 5, 16), random(seed + 1, 50, 16)
    one = sparsegpt(weight, x.T @ x, sparsity)
    two = sparsegpt(weight, scale * (x.T @ x), sparsity)
    assert torch.allclose(one, two, atol=1e-3)


@pytest.mark.parametrize("m", [None, 4])
def test_sparsegpt_changes_the_output_less_than_wanda(m: int | None) -> None:
    """What it is for: with correlated inputs the error is made up for."""
    ratios = []
    for seed in range(3):
        weight, mix = random(seed, 32, 512), random(seed + 50, 512, 512) / 512**0.5
        x = random(seed + 100, 2000, 512) @ (mix + 0.5 * torch.eye(512))
        hessian = x.T @ x
        losses = [
            float(((weight - pruned) @ x.T).square().sum())
            for pruned in (
                sparsegpt(weight, hessian, 0.5, m),
                wanda(weight, x.square().sum(0), 0.5, m),
            )
        ]
        ratios.append(losses[0] / losses[1])
    assert max(ratios) < 0.7


@settings(max_examples=30)
@given(seed=SEEDS, rows=st.integers(1, 9), cols=st.integers(1, 9), m=st.floats(0.5, 6))
def test_outliers_are_scores_above_a_multiple_of_the_mean(
    seed: int, rows: int, cols: int, m: float
) -> None:
    matrices = [
        (random(seed + at, rows, cols), random(at, cols).square()) for at in (0, 3)
    ]
    scores = np.concatenate(
        [(w.double().abs() * s.double().sqrt()).flatten().numpy() for w, s in matrices]
    )
    mean = sum(score_sum(w, s) for w, s in matrices) / len(scores)
    assert math.isclose(mean, scores.mean(), rel_tol=1e-9)
    found = sum(outliers(w, s, m * mean) for w, s in matrices)
    assert found == (scores > m * mean).sum()


@settings(max_examples=30)
@given(seed=SEEDS, sizes=st.lists(st.integers(9, 60), min_size=1, max_size=3))
def test_kurtosis_of_added_sums_is_that_of_all_weights(
    seed: int, sizes: list[int]
) -> None:
    parts = [random(seed + at, size, 2) for at, size in enumerate(sizes)]
    parts[0][0] = 0.0
    sums = sum(power_sums(part.flatten()) for part in parts).tolist()
    every = torch.cat(parts).flatten().double().numpy()
    every = every[every != 0]
    assert sums[0] == len(every)
    centered = every - every.mean()
    expected = (centered**4).mean() / (centered**2).mean() ** 2
    assert kurtosis(sums) == pytest.approx(expected, rel=1e-9)


def test_power_sums_are_of_rows_longer_than_a_piece() -> None:
    weights_EP = random(1, 3, PIECE + 5)
    weights_EP[1, :PIECE] = 0.0
    every_EP = weights_EP.double()
    expected_E5 = torch.stack([(every_EP**power).sum(1) for power in range(5)], 1)
    expected_E5[:, 0] = (every_EP != 0).sum(1)
    torch.testing.assert_close(power_sums(weights_EP), expected_E5)


def test_kurtosis_beyond_fp64_is_not_defined() -> None:
    assert kurtosis([1, 1e160, 1e160, 1e160, 1e160]) is None


def test_kurtosis_of_nothing_and_of_equal_weights_is_not_defined() -> None:
    for weights in (torch.zeros(4), torch.full((4,), 2.0)):
        assert kurtosis(power_sums(weights).tolist()) is None
