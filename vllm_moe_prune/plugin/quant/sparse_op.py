"""The custom op behind ``sparse_moe``: opaque to torch.compile, one for all devices.

On CPUs it is the compiled kernel. On CUDA devices, few tokens are multiplied by experts
as they are stored. For many, those that they chose are expanded into a workspace that
all layers share, and vLLM's own fused MoE runs on that. Neither makes the host wait, so
that CUDA graphs can capture both. What of it was run where is in docs/gpu.md.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.library import Library

from ...kernels import cpu_library
from ...kernels.blocks import Blocks, local_ids

NAMESPACE = "vllm_moe_prune"
# At module level: torch drops the ops together with this object.
LIBRARY = Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
LIBRARY.define(  # type: ignore[no-untyped-call]
    "sparse_moe(Tensor x, Tensor weights, Tensor ids, Tensor? expert_map, "
    "Tensor w13_masks, Tensor w13_starts, Tensor w13_values, Tensor? w13_scales, "
    "Tensor w2_masks, Tensor w2_starts, Tensor w2_values, Tensor? w2_scales, "
    "int width) -> Tensor"
)


Run = Callable[[Tensor, Tensor, Tensor, Tensor | None, Blocks, Blocks, int], Tensor]


def _of_parts(run: Run) -> Callable[..., Tensor]:
    """A kernel with its blocks in parts, as the op's schema has them."""

    def unpacked(
        x_TD: Tensor,
        weights_TK: Tensor,
        ids_TK: Tensor,
        expert_map_G: Tensor | None,
        w13_masks: Tensor,
        w13_starts: Tensor,
        w13_values: Tensor,
        w13_scales: Tensor | None,
        w2_masks: Tensor,
        w2_starts: Tensor,
        w2_values: Tensor,
        w2_scales: Tensor | None,
        width: int,
    ) -> Tensor:
        w13 = Blocks(w13_masks, w13_starts, w13_values, w13_scales)
        w2 = Blocks(w2_masks, w2_starts, w2_values, w2_scales)
        return run(x_TD, weights_TK, ids_TK, expert_map_G, w13, w2, width)

    return unpacked


def _on_cuda(
    x_TD: Tensor,
    weights_TK: Tensor,
    ids_TK: Tensor,
    expert_map_G: Tensor | None,
    w13: Blocks,
    w2: Blocks,
    width: int,
) -> Tensor:
    from vllm.model_executor.layers.fused_moe import fused_experts

    from ...kernels.triton.choice import slots_per_expert
    from ...kernels.triton.expand import expand_layer
    from ...kernels.triton.fused import fused_moe

    def dense(
        x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, up: Tensor, down: Tensor
    ) -> Tensor:
        found: Tensor = fused_experts(x_TD, up, down, weights_TK, ids_TK)
        return found

    experts, top_k = len(w13.masks_EBS), ids_TK.shape[1]
    most = slots_per_expert(x_TD, top_k, w13, w2, width, dense)
    if ids_TK.numel() <= most * experts:
        return fused_moe(x_TD, weights_TK, ids_TK, expert_map_G, w13, w2, width)
    local_TK = local_ids(ids_TK, expert_map_G, experts)
    gate_up, down = expand_layer(x_TD, local_TK, w13, w2, width)
    found: Tensor = fused_experts(
        x_TD,
        gate_up,
        down,
        weights_TK,
        ids_TK,
        global_num_experts=experts if expert_map_G is None else len(expert_map_G),
        expert_map=expert_map_G,
    )
    return found


def _fake(x_TD: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(x_TD)


torch.library.impl(
    f"{NAMESPACE}::sparse_moe", "CPU", _of_parts(cpu_library.fused_moe), lib=LIBRARY
)
torch.library.impl(f"{NAMESPACE}::sparse_moe", "CUDA", _of_parts(_on_cuda), lib=LIBRARY)
torch.library.register_fake(f"{NAMESPACE}::sparse_moe", _fake, lib=LIBRARY)
sparse_moe = torch.ops.vllm_moe_prune.sparse_moe.default
