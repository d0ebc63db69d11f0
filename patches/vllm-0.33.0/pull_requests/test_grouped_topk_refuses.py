# SPDX-License-Identifier: Apache-2.0
"""Experts that do not form equal groups are refused, not routed by another rule."""

import pytest
import torch
from vllm.model_executor.layers.fused_moe.router.base_router import check_expert_groups
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import (
    GroupedTopKRouter,
)


@pytest.mark.parametrize("router_class", [CPURouter, GroupedTopKRouter])
@pytest.mark.parametrize("num_experts", [6, 4])
def test_router_refuses(router_class, num_experts):
    router = router_class(
        top_k=2, global_num_experts=num_experts, num_expert_group=4, topk_group=2
    )
    router.use_grouped_topk = True
    logits = torch.ones(3, num_experts)
    with pytest.raises(ValueError, match=f"{num_experts} experts do not form 4"):
        router._compute_routing(torch.ones(3, 8), logits, None)


@pytest.mark.parametrize(("num_experts", "groups"), [(8, 4), (256, 8), (6, 1), (5, 0)])
def test_equal_groups_pass(num_experts, groups):
    check_expert_groups(num_experts, groups)
