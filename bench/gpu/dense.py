"""What compressed experts are compared with: the same layer, dense.

Where vLLM is installed, its own kernel. Everywhere, a grouped product in Triton, and
one product of cuBLAS for each expert; the fastest of all counts. S slots, N outputs, K
inputs, G groups of M slots that go to one expert.
"""

import importlib.util

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import silu

from vllm_moe_prune.kernels.blocks import local_ids
from vllm_moe_prune.kernels.triton.choice import Dense
from vllm_moe_prune.kernels.triton.fused import GROUP, grouped

TILES = ((64, 128, 4, 4), (32, 256, 4, 4), (128, 64, 4, 4), (64, 128, 8, 3))
"""Outputs and inputs at a time, warps, stages."""
SMALL_TILE = (16, 32, 4, 2)
"""For tiny layers."""


@triton.jit(do_not_specialize=["slots"])
def product_kernel(
    x,
    w_ENK,
    expert_G,
    slot_GM,
    out_SN,
    slots,
    n,
    k,
    SHARED: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A group's inputs times some of its expert's weights; SHARED slots an input."""
    expert = tl.load(expert_G + tl.program_id(1)).to(tl.int64)
    if expert < 0:
        return
    slot = tl.load(slot_GM + tl.program_id(1) * GROUP + tl.arange(0, GROUP))
    real = slot < slots
    row = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    column = tl.arange(0, INPUTS)
    weights = w_ENK + (expert * n + row[:, None]) * k
    inputs = x + (slot // SHARED).to(tl.int64)[None, :] * k
    total = tl.zeros((OUTPUTS, GROUP), tl.float32)
    for at in range(0, k, INPUTS):
        inside = at + column < k
        w = tl.load(
            weights + (at + column)[None, :],
            mask=(row < n)[:, None] & inside[None, :],
            other=0.0,
        )
        given = tl.load(
            inputs + (at + column)[:, None],
            mask=real[None, :] & inside[:, None],
            other=0.0,
        )
        total = tl.dot(w, given, total)
    place = out_SN + slot.to(tl.int64)[None, :] * n + row[:, None]
    shown = real[None, :] & (row < n)[:, None]
    tl.store(place, total.to(out_SN.dtype.element_ty), mask=shown)


def by_triton(tile: tuple[int, int, int, int]) -> Dense:
    """Grouped products with one kind of tile."""
    outputs, inputs, warps, stages = tile

    def product(
        x: Tensor, w_ENK: Tensor, groups: tuple[Tensor, Tensor], slots: int, shared: int
    ) -> Tensor:
        n, k = w_ENK.shape[1:]
        out_SN = x.new_zeros(slots, n)
        product_kernel[(triton.cdiv(n, outputs), len(groups[0]))](
            *(x, w_ENK, *groups, out_SN, slots, n, k),
            SHARED=shared,
            OUTPUTS=outputs,
            INPUTS=inputs,
            GROUP=GROUP,
            num_warps=warps,
            num_stages=stages,
        )
        return out_SN

    def call(
        x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, up: Tensor, down: Tensor
    ) -> Tensor:
        slots, top_k = ids_TK.numel(), ids_TK.shape[1]
        groups = grouped(local_ids(ids_TK, None, len(up)), len(up))
        gate_SF, up_SF = product(x_TD, up, groups, slots, top_k).chunk(2, dim=1)
        out_SD = product(silu(gate_SF) * up_SF, down, groups, slots, 1).float()
        weighted = out_SD * weights_TK.flatten()[:, None]
        return weighted.view(*ids_TK.shape, -1).sum(1).to(x_TD.dtype)

    return call


def by_cublas(ids_TK: Tensor) -> Dense:
    """A product for each expert; the routing is known beforehand, which flatters it."""
    chosen = ids_TK.unique().tolist()
    served = [(ids_TK == expert).nonzero(as_tuple=True) for expert in chosen]

    def call(
        x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, up: Tensor, down: Tensor
    ) -> Tensor:
        out_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for expert, (token_n, slot_n) in zip(chosen, served, strict=True):
            gate_nF, up_nF = (x_TD[token_n] @ up[expert].T).chunk(2, dim=1)
            out_nD = ((silu(gate_nF) * up_nF) @ down[expert].T).float()
            out_nD = out_nD * weights_TK[token_n, slot_n][:, None]
            out_TD.index_add_(0, token_n, out_nD)
        return out_TD.to(x_TD.dtype)

    return call


def by_vllm() -> Dense | None:
    """vLLM's own, with its own choice of tiles."""
    if importlib.util.find_spec("vllm") is None:
        return None
    from vllm.triton_utils import HAS_TRITON

    if not HAS_TRITON:  # a build for CPUs
        return None
    from vllm.model_executor.layers.fused_moe import fused_experts

    def call(
        x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, up: Tensor, down: Tensor
    ) -> Tensor:
        found: Tensor = fused_experts(x_TD, up, down, weights_TK, ids_TK)
        return found

    return call
