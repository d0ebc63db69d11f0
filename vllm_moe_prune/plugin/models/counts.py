"""What vLLM's MoE blocks of every family say of how many experts they have."""

from typing import Any

from vllm.config import VllmConfig
from vllm.distributed import get_ep_group

from ..layers import ServedLayer
from ..routing import RowTable


def count_experts(moe: Any, layer: ServedLayer, vllm_config: VllmConfig) -> None:
    """Set the numbers that vLLM's loader and load balancer read from a MoE block."""
    parallel_config = vllm_config.parallel_config
    moe.ep_group = get_ep_group().device_group
    moe.ep_size = moe.ep_group.size()
    moe.enable_eplb = parallel_config.enable_eplb
    moe.n_routed_experts = moe.n_logical_experts = layer.experts
    moe.n_redundant_experts = parallel_config.eplb_config.num_redundant_experts
    moe.n_physical_experts = moe.n_logical_experts + moe.n_redundant_experts
    moe.n_local_physical_experts = moe.n_physical_experts // moe.ep_size


def count_where_rows_are(experts: Any, rows: RowTable) -> None:
    """Where routed tokens are counted, let our routing do it instead of vLLM's.

    It knows which slots weigh nothing, and experts by their ids in the whole model.
    """
    hand_over = getattr(experts, "hand_over", None)  # CountingMoERunner, if at all
    load = hand_over() if hand_over is not None else None
    if load is not None:
        rows.count_into(load)
