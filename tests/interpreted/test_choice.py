"""Which of two ways runs a layer, measured on a device that is not there."""

import logging

import pytest
import torch

from bench.gpu.dense import SMALL_TILE, by_triton
from tests.interpreted.making import layer
from tests.pretended.cuda import PretendedCuda
from vllm_moe_prune.kernels.triton import choice, workspace
from vllm_moe_prune.kernels.triton.choice import Times, most_fused, said
from vllm_moe_prune.kernels.triton.expand import workspace_bytes


@pytest.mark.parametrize(
    ("fused", "expanded", "most"),
    [
        ((1, 2, 3), (2, 3, 4), 4),
        ((1, 4, 3), (2, 3, 4), 1),
        ((3, 4, 5), (2, 3, 4), 0),
        ((2, 3, 4), (2, 3, 4), 4),
    ],
)
def test_fused_is_for_as_many_slots_as_it_was_never_slower(
    fused: tuple[float, ...], expanded: tuple[float, ...], most: int
) -> None:
    pairs = zip((1, 2, 4), fused, expanded, strict=True)
    assert most_fused([Times(*each, 1.0) for each in pairs]) == most


def test_dense_is_advised_only_where_it_is_faster() -> None:
    advice = "convert --storage dense"
    assert advice in said([Times(2, 3.0, 4.0, 1.0)], 2, "sizes")
    assert advice not in said([Times(2, 3.0, 4.0, 3.5)], 2, "sizes")
    assert "always expanded" in said([Times(2, 5.0, 4.0, 3.5)], 0, "sizes")


def test_a_layer_is_measured_once_and_never_in_a_graph(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "GROUP", 1)
    monkeypatch.setattr(choice, "ROUNDS", 1)
    hidden, width, experts = 16, 16, 1
    w13 = layer((width, hidden), 2, [0.5] * experts, torch.bfloat16)
    w2 = layer((hidden, width), 1, [0.5] * experts, torch.bfloat16)
    dense = by_triton(SMALL_TILE)
    with PretendedCuda(), caplog.at_level(logging.INFO):
        x_TD = torch.ones(1, hidden, device="cuda").bfloat16()
        size = workspace_bytes(experts, hidden, width, torch.bfloat16)
        workspace.reserve(size, x_TD.device)
        given = (x_TD, 1, w13.to(x_TD.device), w2.to(x_TD.device), width, dense)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            assert choice.slots_per_expert(*given) == 1.0
        assert not caplog.records
        first = choice.slots_per_expert(*given)
        assert choice.slots_per_expert(*given) == first
        assert first in (0.0, 1.0, 2.0)
    (record,) = caplog.records
    assert "1 of 16 x 16" in record.getMessage()
