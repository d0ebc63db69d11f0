"""What vLLM's MoE blocks of every family have in common once they are pruned."""

from typing import Any

from vllm.config import VllmConfig
from vllm.distributed import get_ep_group

from ..compat import wants_local_ids
from ..load.served_layer import ServedLayer
from ..quant.integer_moe import IntegerMethod
from ..quant.sparse_moe import SparseMoEMethod
from .routing import RowTable


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


def row_table(
    moe: Any, layer: ServedLayer, vllm_config: VllmConfig, *, always: bool = False
) -> RowTable | None:
    """The table of our own routing; None where vLLM's routers will do.

    Args:
        moe: A block that ``count_experts`` has seen.
        layer: What the block serves.
        vllm_config: vLLM's.
        always: None of vLLM's routers will.
    """
    # Before the experts exist: which kernel runs them is not known yet.
    routed = _has_local_ids(moe, vllm_config) or not layer.rows_are_experts
    return RowTable(layer) if routed or always else None


def connect_rows(moe: Any, vllm_config: VllmConfig) -> None:
    """Once a block has its experts: let its table count, and know which are here."""
    if moe.rows is None:
        return
    hand_over = getattr(moe.experts, "hand_over", None)  # CountingMoERunner, if at all
    load = hand_over() if hand_over is not None else None
    if load is not None:
        # It knows which slots weigh nothing, and experts by their ids in the model.
        moe.rows.count_into(load)
    experts = moe.experts.routed_experts
    # Kernels of our own apply the map themselves.
    own_kernel = isinstance(experts.quant_method, IntegerMethod | SparseMoEMethod)
    if _has_local_ids(moe, vllm_config) and not own_kernel:
        moe.rows.localize(experts.expert_map.tolist())


def _has_local_ids(moe: Any, vllm_config: VllmConfig) -> bool:
    return moe.ep_size > 1 and wants_local_ids(vllm_config)
