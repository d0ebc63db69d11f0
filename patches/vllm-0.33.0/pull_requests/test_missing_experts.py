# SPDX-License-Identifier: Apache-2.0
"""A layer that lacks experts is refused once its weights are loaded."""

from types import SimpleNamespace

import pytest
from torch import nn
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts


def layer_with(arrived: dict, fused_shared: int = 0) -> RoutedExperts:
    """A layer of four local experts; the constructor needs a whole engine."""
    layer = RoutedExperts.__new__(RoutedExperts)
    nn.Module.__init__(layer)
    layer.layer_name = "model.layers.3.mlp.experts"
    layer.local_num_experts = 4
    layer.expert_map_manager = SimpleNamespace(num_fused_shared_experts=fused_shared)
    layer._arrived_experts = arrived
    return layer


def test_missing_experts_are_named():
    layer = layer_with(
        {("w13_weight", "w1"): {0, 2}, ("w2_weight", "w2"): {0, 1, 2, 3}}
    )
    with pytest.raises(ValueError, match=r"layers\.3.*w13_weight \(w1\).*2 of 4.*is 1"):
        layer.check_all_experts_arrived()


def test_complete_and_untouched_layers_pass():
    layer_with({("w2_weight", "w2"): {0, 1, 2, 3}}).check_all_experts_arrived()
    layer_with({}).check_all_experts_arrived()


def test_fused_shared_experts_may_come_another_way():
    arrived = {("w13_weight", "w1"): {0, 1, 2}}
    layer_with(arrived, fused_shared=1).check_all_experts_arrived()
    with pytest.raises(ValueError, match="1 of 4"):
        layer_with(arrived).check_all_experts_arrived()
