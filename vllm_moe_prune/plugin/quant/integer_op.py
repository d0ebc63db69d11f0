"""The custom op behind ``integer_moe``: opaque to torch.compile, on CPUs only."""

import torch
from torch import Tensor

from ...kernels import cpu_library
from ...kernels.int_blocks import IntBlocks
from .sparse_op import LIBRARY, NAMESPACE

LIBRARY.define(  # type: ignore[no-untyped-call]
    "integer_moe(Tensor x, Tensor weights, Tensor ids, Tensor? expert_map, "
    "Tensor w13_values, Tensor w13_scales, Tensor? w13_zeros, "
    "Tensor w2_values, Tensor w2_scales, Tensor? w2_zeros, "
    "int bits, int width, int dots) -> Tensor"
)


def _on_cpu(
    x_TD: Tensor,
    weights_TK: Tensor,
    ids_TK: Tensor,
    expert_map_G: Tensor | None,
    w13_values: Tensor,
    w13_scales: Tensor,
    w13_zeros: Tensor | None,
    w2_values: Tensor,
    w2_scales: Tensor,
    w2_zeros: Tensor | None,
    bits: int,
    width: int,
    dots: int,
) -> Tensor:
    w13 = IntBlocks(w13_values, w13_scales, w13_zeros, bits)
    w2 = IntBlocks(w2_values, w2_scales, w2_zeros, bits)
    return cpu_library.fused_moe(
        x_TD, weights_TK, ids_TK, expert_map_G, w13, w2, width, dots=dots
    )


def _fake(x_TD: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(x_TD)


torch.library.impl(f"{NAMESPACE}::integer_moe", "CPU", _on_cpu, lib=LIBRARY)
torch.library.register_fake(f"{NAMESPACE}::integer_moe", _fake, lib=LIBRARY)
integer_moe = torch.ops.vllm_moe_prune.integer_moe.default
