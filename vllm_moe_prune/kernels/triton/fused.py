"""A layer's experts, multiplied from masks and values: dense weights are never stored.

Two launches: gate and up with SiLU between, then down; the slots of a token are added
in their order, so that results do not depend on which program ends first. T tokens, K
slots of a token, D hidden, F width, G groups of slots that go to one expert, M slots of
a group, S steps, B blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocks import BITS, Blocks, local_ids
from .tile import weights_of

GROUP = 16
"""Slots of an expert that share the expansion of its weights."""
BLOCKS, STEPS, WARPS = 2, 32, 4
"""What a program multiplies by at a time: blocks of outputs and steps of inputs."""


@triton.jit
def multiply(
    masks_EBS,
    starts_EB1,
    values,
    scales_EBC,
    inputs,
    expert,
    block,
    rows,
    real,
    width,
    steps,
    blocks,
    SCALED: tl.constexpr,
    BLOCKS: tl.constexpr,
    STEPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Some of an expert's weights times inputs: [16 BLOCKS, GROUP] float32."""
    inside = block < blocks
    starts = tl.load(starts_EB1 + expert * (blocks + 1) + block, mask=inside, other=0)
    # 64 bits once, 32 from here on: no few blocks have 2^31 values.
    low = tl.min(tl.where(inside, starts, 1 << 62), axis=0)
    first = (starts - low).to(tl.int32)
    row = expert * blocks + block
    step, column = tl.arange(0, STEPS), tl.arange(0, 2 * STEPS)
    total = tl.zeros((16 * BLOCKS, GROUP), tl.float32)
    for at in range(0, steps, STEPS):
        there = inside[:, None] & ((at + step) < steps)[None, :]
        place = row[:, None] * steps + (at + step)[None, :]
        masks = tl.load(masks_EBS + place, mask=there, other=0)
        scales = masks
        if SCALED:
            place = row[:, None] * (steps // 16) + ((at + step) // 16)[None, :]
            scales = tl.load(scales_EBC + place, mask=there, other=0.0)
        weights, first = weights_of(
            *(masks, values + low, first, scales),
            *(SCALED, inputs.dtype.element_ty, BLOCKS, STEPS),
        )
        columns = 2 * at + column
        shown = real[None, :] & (columns < width)[:, None]
        place = rows.to(tl.int64)[None, :] * width + columns[:, None]
        given = tl.load(inputs + place, mask=shown, other=0.0)
        total = tl.dot(weights, given, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["slots"])
def gate_up_kernel(
    x_TD,
    masks_EBS,
    starts_EB1,
    values,
    scales_EBC,
    expert_G,
    slot_GM,
    inner_SF,
    slots,
    hidden,
    width,
    steps,
    blocks,
    TOP_K: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCKS: tl.constexpr,
    STEPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """silu(gate) * up of a group's slots, for 16 BLOCKS of the width."""
    expert = tl.load(expert_G + tl.program_id(1)).to(tl.int64)
    if expert < 0:
        return
    slot = tl.load(slot_GM + tl.program_id(1) * GROUP + tl.arange(0, GROUP))
    real = slot < slots
    # Gate and up of the same 16 outputs alternate.
    block = tl.program_id(0) * 2 * BLOCKS + tl.arange(0, 2 * BLOCKS)
    total = multiply(
        *(masks_EBS, starts_EB1, values, scales_EBC, x_TD, expert, block),
        *(slot // TOP_K, real, hidden, steps, blocks),
        *(SCALED, 2 * BLOCKS, STEPS, GROUP),
    )
    pairs = tl.reshape(total, (BLOCKS, 2, 16, GROUP))
    gate, up = tl.split(tl.permute(pairs, (0, 2, 3, 1)))
    inner = tl.reshape(gate / (1 + tl.exp(-gate)) * up, (16 * BLOCKS, GROUP))
    f = tl.program_id(0) * 16 * BLOCKS + tl.arange(0, 16 * BLOCKS)
    place = slot.to(tl.int64)[None, :] * width + f[:, None]
    shown = real[None, :] & (f < width)[:, None]
    tl.store(inner_SF + place, inner.to(inner_SF.dtype.element_ty), mask=shown)


@triton.jit(do_not_specialize=["slots"])
def down_kernel(
    inner_SF,
    masks_EBS,
    starts_EB1,
    values,
    scales_EBC,
    weight_S,
    expert_G,
    slot_GM,
    out_SD,
    slots,
    hidden,
    width,
    steps,
    blocks,
    SCALED: tl.constexpr,
    BLOCKS: tl.constexpr,
    STEPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Weighted outputs of a group's slots, for 16 BLOCKS of the hidden size."""
    expert = tl.load(expert_G + tl.program_id(1)).to(tl.int64)
    if expert < 0:
        return
    slot = tl.load(slot_GM + tl.program_id(1) * GROUP + tl.arange(0, GROUP))
    real = slot < slots
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    total = multiply(
        *(masks_EBS, starts_EB1, values, scales_EBC, inner_SF, expert, block),
        *(slot, real, width, steps, blocks),
        *(SCALED, BLOCKS, STEPS, GROUP),
    )
    weight = tl.load(weight_S + slot, mask=real, other=0.0)
    d = tl.program_id(0) * 16 * BLOCKS + tl.arange(0, 16 * BLOCKS)
    place = slot.to(tl.int64)[None, :] * hidden + d[:, None]
    shown = real[None, :] & (d < hidden)[:, None]
    tl.store(out_SD + place, total * weight[None, :], mask=shown)


def grouped(local_TK: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Slots by expert, without the host knowing how many go where.

    Args:
        local_TK: As ``blocks.local_ids`` gives them.
        experts: How many are here.

    Returns:
        The expert of each group [G] int32, -1 of groups that are not needed; and their
        slots [G, GROUP] int32, filled up with the number of all slots.
    """
    slots = local_TK.numel()
    device = local_TK.device
    expert_S = local_TK.flatten().remainder(experts + 1)  # -1 comes last
    sorted_S, order_S = expert_S.sort(stable=True)
    ones = torch.ones(slots, dtype=torch.int64, device=device)
    count_E = torch.zeros(experts + 1, dtype=torch.int64, device=device)
    count_E.index_add_(0, expert_S, ones)
    needed_E = (count_E[:experts] + GROUP - 1) // GROUP
    end_E = needed_E.cumsum(0)
    # As many as any routing needs: a launch must not depend on it.
    groups = min(slots, slots // GROUP + experts)
    group_G = torch.arange(groups, device=device)
    expert_G = torch.searchsorted(end_E, group_G, right=True)
    expert_G = torch.where(expert_G < experts, expert_G, -1)
    first_E = count_E.cumsum(0) - count_E
    rank_S = torch.arange(slots, device=device) - first_E[sorted_S]
    here_S = sorted_S.clamp(max=experts - 1)
    place_S = (end_E - needed_E)[here_S] * GROUP + rank_S
    # Slots of experts elsewhere all meet behind the last group.
    place_S = torch.where(sorted_S < experts, place_S, groups * GROUP)
    size = groups * GROUP + 1
    slot_X = torch.full((size,), slots, dtype=torch.int32, device=device)
    slot_X.index_copy_(0, place_S, order_S.to(torch.int32))
    return expert_G.to(torch.int32), slot_X[:-1].view(groups, GROUP)


def fused_moe(
    x_TD: Tensor,
    weights_TK: Tensor,
    ids_TK: Tensor,
    expert_map_G: Tensor | None,
    w13: Blocks,
    w2: Blocks,
    width: int,
) -> Tensor:
    """Like ``blocks.fused_moe``, without any host synchronization."""
    experts, (tokens, hidden), top_k = len(w13.masks_EBS), x_TD.shape, ids_TK.shape[1]
    slots = tokens * top_k
    if not slots:
        return torch.empty_like(x_TD)
    expert_G, slot_GM = grouped(local_ids(ids_TK, expert_map_G, experts), experts)
    x_TD, weight_S = x_TD.contiguous(), weights_TK.float().flatten()
    inner_SF = x_TD.new_empty(slots, width)
    # Slots of experts elsewhere stay 0.
    out_SD = x_TD.new_zeros(slots, hidden, dtype=torch.float32)
    numbers = (slots, hidden, width)
    sizes = {"BLOCKS": BLOCKS, "STEPS": STEPS, "GROUP": GROUP}
    how = sizes | {"num_warps": WARPS, "num_stages": 1}
    count, steps = w13.masks_EBS.shape[1:]
    grid = (triton.cdiv(triton.cdiv(width, 16), BLOCKS), len(expert_G))
    gate_up_kernel[grid](
        *(x_TD, *_parts(w13), expert_G, slot_GM, inner_SF, *numbers, steps, count),
        TOP_K=top_k,
        SCALED=w13.scales_EBC is not None,
        **how,
    )
    count, steps = w2.masks_EBS.shape[1:]
    grid = (triton.cdiv(triton.cdiv(hidden, 16), BLOCKS), len(expert_G))
    down_kernel[grid](
        *(inner_SF, *_parts(w2), weight_S, expert_G, slot_GM, out_SD),
        *(*numbers, steps, count),
        SCALED=w2.scales_EBC is not None,
        **how,
    )
    return out_SD.view(tokens, top_k, hidden).sum(dim=1).to(x_TD.dtype)


def _parts(w: Blocks) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of e4m3 the bits; the last is any tensor where there are no scales."""
    if w.scales_EBC is None:
        return w.masks_EBS, w.starts_EB1, w.values, w.values
    bits = w.values.view(BITS[w.values.element_size()])
    return w.masks_EBS, w.starts_EB1, bits, w.scales_EBC
