"""The custom op behind ``sparse_moe``: opaque to torch.compile, one for all devices.

On CPUs it is the compiled kernel. On CUDA devices, experts are decompressed into a
workspace that all layers share, and vLLM's own fused MoE runs on that: correct, no
faster than dense, without host synchronization, so that CUDA graphs can capture it. A
kernel that multiplies from the compressed form takes the place of ``_on_cuda``.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.library import Library

from ...kernels import cpu_library
from ...kernels.blocks import Blocks, decode

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

    experts, hidden = len(w13.masks_EBS), x_TD.shape[1]
    device = str(x_TD.device)
    gate_up = _workspace(device, x_TD.dtype, (experts, 2 * width, hidden))
    down = _workspace(device, x_TD.dtype, (experts, hidden, width))
    # All of them: which ones tokens chose only the device knows.
    for expert in range(experts):
        gate_FD, up_FD = decode(w13, expert, 2, (width, hidden), x_TD.dtype)
        gate_up[expert, :width].copy_(gate_FD)
        gate_up[expert, width:].copy_(up_FD)
        down[expert].copy_(decode(w2, expert, 1, (hidden, width), x_TD.dtype)[0])
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


@cache
def _workspace(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """One per shape, for all layers; its address never changes."""
    return torch.empty(shape, dtype=dtype, device=device)


def _fake(x_TD: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(x_TD)


torch.library.impl(
    f"{NAMESPACE}::sparse_moe", "CPU", _of_parts(cpu_library.fused_moe), lib=LIBRARY
)
torch.library.impl(f"{NAMESPACE}::sparse_moe", "CUDA", _of_parts(_on_cuda), lib=LIBRARY)
torch.library.register_fake(f"{NAMESPACE}::sparse_moe", _fake, lib=LIBRARY)
sparse_moe = torch.ops.vllm_moe_prune.sparse_moe.default
