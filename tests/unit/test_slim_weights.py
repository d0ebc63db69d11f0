"""Wanda and magnitude: what they refuse, what they leave alone, the traps."""

import numpy as np
import pytest
import torch
from torch import Tensor

from vllm_moe_prune.errors import CalibrationError, CheckpointError
from vllm_moe_prune.slim import magnitude as magnitude_module
from vllm_moe_prune.slim import wanda as wanda_module
from vllm_moe_prune.slim.magnitude import magnitude
from vllm_moe_prune.slim.wanda import magnitude_rows, wanda


def random_weight(rows: int, cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + cols)
    return torch.randn(rows, cols, generator=generator).to(dtype)


def test_wanda_weighs_by_the_input_norm() -> None:
    weight = torch.tensor([[3.0, -2.0, 1.0, 4.0]])
    sums = torch.tensor([1.0, 4.0, 100.0, 0.25])  # norms 1, 2, 10, 0.5
    # Scores 3, 4, 10, 2: columns 3 and 0 go, though 4 and 3 are the largest weights.
    assert wanda(weight, sums, 0.5).tolist() == [[0.0, -2.0, 1.0, 0.0]]


def test_wanda_ties_go_to_the_lower_column() -> None:
    weight = torch.tensor([[1.0, -1.0, 1.0, 1.0], [2.0, 1.0, 1.0, 1.0]])
    pruned = wanda(weight, torch.ones(4), 0.5)
    assert pruned.tolist() == [[0.0, 0.0, 1.0, 1.0], [2.0, 0.0, 0.0, 1.0]]


def test_mean_and_sum_of_squares_give_the_same() -> None:
    weight, sums = random_weight(9, 32), torch.rand(32) + 0.1
    assert torch.equal(wanda(weight, sums, 0.4), wanda(weight, sums / 1024, 0.4))


def test_expert_without_tokens_is_pruned_by_magnitude_row_by_row() -> None:
    """The reference zeroes the lowest-index columns there."""
    weight = torch.tensor([[9.0, 1.0, 2.0, 8.0], [1.0, 7.0, 6.0, 2.0]])
    pruned = wanda(weight, torch.zeros(4), 0.5)
    assert pruned.tolist() == [[9.0, 0.0, 0.0, 8.0], [0.0, 7.0, 6.0, 0.0]]
    assert torch.equal(pruned, magnitude_rows(weight, 0.5))


def test_inputs_that_never_fired_go_first() -> None:
    weight = torch.tensor([[9.0, 1.0, 9.0, 1.0]])
    pruned = wanda(weight, torch.tensor([0.0, 1.0, 0.0, 1.0]), 0.5)
    assert pruned.tolist() == [[0.0, 1.0, 0.0, 1.0]]


def test_pruning_again_at_the_same_sparsity_changes_nothing() -> None:
    weight, sums = random_weight(33, 64, torch.bfloat16), torch.rand(64) + 0.1
    once = wanda(weight, sums, 0.5)
    assert torch.equal(wanda(once, sums, 0.5), once)
    once = magnitude(weight, 0.5)
    assert torch.equal(magnitude(once, 0.5), once)


def test_magnitude_removes_the_small_ones_of_the_whole_matrix() -> None:
    """The reference keeps the small and deletes the large."""
    weight = torch.tensor([[1.0, -2.0], [30.0, -40.0]])
    assert magnitude(weight, 0.5).tolist() == [[0.0, 0.0], [30.0, -40.0]]


def test_magnitude_ties_go_to_the_lower_flat_index() -> None:
    weight = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert magnitude(weight, 0.75).tolist() == [[0.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["wanda", "magnitude"])
def test_survivors_keep_their_bits_and_the_input_its_values(
    name: str, dtype: torch.dtype
) -> None:
    weight = random_weight(50, 40, dtype)
    weight[0, 0] = -0.0
    before = weight.clone()
    if name == "wanda":
        pruned = wanda(weight, torch.rand(40, dtype=torch.float64) + 0.1, 0.3)
        assert int((pruned == 0).sum()) == 50 * 12
    else:
        pruned = magnitude(weight, 0.3)
        assert int((pruned == 0).sum()) == 600
    assert pruned.dtype == dtype
    assert pruned.data_ptr() != weight.data_ptr()
    assert torch.equal(weight, before)
    alive = pruned != 0
    assert torch.equal(pruned[alive], before[alive])


def test_sparsity_zero_copies_every_bit() -> None:
    weight = torch.tensor([[-0.0, 0.0, 1.0]])
    for pruned in (wanda(weight, torch.ones(3), 0.0), magnitude(weight, 0.0)):
        assert torch.signbit(pruned).tolist() == [[True, False, False]]
        assert pruned.data_ptr() != weight.data_ptr()


def test_a_slice_of_a_larger_tensor_is_pruned_like_a_copy() -> None:
    packed, sums = random_weight(32, 48), torch.rand(24) + 0.1
    view = packed[:, ::2].narrow(0, 8, 16)
    assert torch.equal(wanda(view, sums, 0.5), wanda(view.clone(), sums, 0.5))
    assert torch.equal(magnitude(view, 0.5), magnitude(view.clone(), 0.5))


@pytest.mark.parametrize("rows_per_chunk", [1, 3, 64])
def test_chunks_do_not_show(
    rows_per_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, sums = random_weight(64, 20).round(decimals=1), torch.rand(20) + 0.1
    whole = wanda(weight, sums, 0.6), magnitude(weight, 0.6)
    monkeypatch.setattr(wanda_module, "CHUNK_BYTES", 4 * 20 * rows_per_chunk)
    monkeypatch.setattr(magnitude_module, "CHUNK_BYTES", 4 * 20 * rows_per_chunk)
    assert torch.equal(wanda(weight, sums, 0.6), whole[0])
    assert torch.equal(magnitude(weight, 0.6), whole[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_cannot_be_ranked_are_refused(bad: float) -> None:
    weight = random_weight(4, 8)
    weight[3, 1] = bad
    refused = pytest.raises(CheckpointError, match="NaN or infinite weights")
    with refused:
        wanda(weight, torch.ones(8), 0.5)
    with refused:
        magnitude_rows(weight, 0.5)
    for sparsity in (0.5, 0.0):
        with refused:
            magnitude(weight, sparsity)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_overflowed_statistics_are_refused(bad: float) -> None:
    sums = torch.ones(8)
    sums[2] = bad
    with pytest.raises(CalibrationError, match="calibration forward overflowed"):
        wanda(random_weight(4, 8), sums, 0.5)


def test_threshold_equals_torchs_own_selection() -> None:
    """The CPU takes numpy's selection, other devices ``torch.kthvalue``."""
    scores = random_weight(20, 31).abs().round(decimals=1)
    for k in (1, 7, 31):
        expected = np.sort(scores.numpy(), axis=1)[:, k - 1 : k]
        assert wanda_module._kth_lowest(scores, k).numpy().tolist() == expected.tolist()
        on_device = torch.kthvalue(scores, k, dim=1, keepdim=True).values
        assert on_device.numpy().tolist() == expected.tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_gives_the_bits_of_the_cpu(dtype: torch.dtype) -> None:
    weight, sums = random_weight(512, 384, dtype), torch.rand(384) + 0.1
    pairs = [
        (wanda(weight, sums, 0.5), wanda(weight.cuda(), sums, 0.5)),
        (magnitude_rows(weight, 0.5), magnitude_rows(weight.cuda(), 0.5)),
        (magnitude(weight, 0.5), magnitude(weight.cuda(), 0.5)),
    ]
    for on_cpu, on_cuda in pairs:
        assert torch.equal(on_cpu, on_cuda.cpu())
