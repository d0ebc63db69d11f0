"""Dense weights of the experts that tokens chose, in one launch.

E experts, B blocks, S steps, N outputs, K inputs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocks import BITS, BLOCK, STEP, Blocks
from . import workspace
from .tile import weights_of

BLOCKS, STEPS, WARPS = 2, 32, 4
"""What one program expands at a time: blocks and steps, by how many warps."""


@triton.jit
def expand_kernel(
    masks_EBS,
    starts_EB1,
    values,
    scales_EBC,
    used_E,
    out_ENK,
    n,
    k,
    steps,
    blocks,
    SOURCES: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCKS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """A program: BLOCKS blocks of one of SOURCES matrices of an expert, all steps."""
    expert = tl.program_id(2).to(tl.int64)
    if tl.load(used_E + expert) == 0:
        return
    source = tl.program_id(1)
    group = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    inside = group * 16 < n
    block = group * SOURCES + source
    starts = tl.load(starts_EB1 + expert * (blocks + 1) + block, mask=inside, other=0)
    # 64 bits once, 32 from here on: no few blocks have 2^31 values.
    low = tl.min(tl.where(inside, starts, 1 << 62), axis=0)
    first = (starts - low).to(tl.int32)
    row = expert * blocks + block
    rows = tl.reshape(group[:, None] * 16 + tl.arange(0, 16)[None, :], (BLOCKS * 16,))
    out = out_ENK + ((expert * SOURCES + source) * n + rows) * k
    step, column = tl.arange(0, STEPS), tl.arange(0, 2 * STEPS)
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
            *(SCALED, out_ENK.dtype.element_ty, BLOCKS, STEPS),
        )
        columns = 2 * at + column
        shown = (rows < n)[:, None] & (columns < k)[None, :]
        tl.store(out[:, None] + columns[None, :], weights, mask=shown)


def expand(blocks: Blocks, used_E: Tensor, sources: int, out_ENK: Tensor) -> None:
    """Write the dense matrices of some experts; the others' places stay as they are.

    Like ``blocks.decode``, without any host synchronization.

    Args:
        blocks: Weights of a layer.
        used_E: int32, not 0 where an expert is wanted.
        sources: How many matrices alternate: 2 for gate and up, 1 for down.
        out_ENK: N the outputs of all sources, one matrix below the other; contiguous,
            in the type of the values, or of tokens where those have scales.
    """
    experts, count, steps = blocks.masks_EBS.shape
    outputs, inputs = out_ENK.shape[1] // sources, out_ENK.shape[2]
    scaled = blocks.scales_EBC is not None
    assert out_ENK.is_contiguous()
    assert len(out_ENK) == len(used_E) == experts
    assert count >= sources * -(-outputs // BLOCK)
    assert steps * 2 == -(-inputs // STEP) * STEP
    assert scaled or out_ENK.dtype == blocks.values.dtype
    values = blocks.values
    if scaled:
        values = values.view(BITS[values.element_size()])
    else:
        # As integers: what is copied must not pass through arithmetic.
        bits = BITS[values.element_size()]
        values, out_ENK = values.view(bits), out_ENK.view(bits)
    grid = (triton.cdiv(triton.cdiv(outputs, BLOCK), BLOCKS), sources, experts)
    expand_kernel[grid](
        *(blocks.masks_EBS, blocks.starts_EB1, values),
        *(blocks.scales_EBC if scaled else values, used_E, out_ENK),
        *(outputs, inputs, steps, count),
        SOURCES=sources,
        SCALED=scaled,
        BLOCKS=BLOCKS,
        STEPS=STEPS,
        num_warps=WARPS,
        num_stages=1,
    )


def chosen(local_TK: Tensor, experts: int) -> Tensor:
    """Which experts some slot goes to, int32 [E]; -1 is none."""
    # One place more than experts: all slots that go elsewhere meet there.
    used = torch.zeros(experts + 1, dtype=torch.int32, device=local_TK.device)
    used.index_fill_(0, local_TK.flatten().remainder(experts + 1), 1)
    return used[:experts]


def workspace_bytes(experts: int, hidden: int, width: int, dtype: torch.dtype) -> int:
    """What ``expand_layer`` needs of the workspace."""
    return 3 * experts * hidden * width * dtype.itemsize


def expand_layer(
    x_TD: Tensor, local_TK: Tensor, w13: Blocks, w2: Blocks, width: int
) -> tuple[Tensor, Tensor]:
    """Gate above up [E, 2F, D] and down [E, D, F] of chosen experts, in two launches.

    They lie in the workspace, until another layer is expanded; experts that no slot
    goes to have anything there.

    Args:
        x_TD: Tokens, whose type weights get.
        local_TK: As ``blocks.local_ids`` gives them.
        w13: Gate and up.
        w2: Down.
        width: F.
    """
    experts, hidden = len(w13.masks_EBS), x_TD.shape[1]
    shapes = [(experts, 2 * width, hidden), (experts, hidden, width)]
    gate_up, down = workspace.tensors(x_TD.device, x_TD.dtype, shapes)
    used_E = chosen(local_TK, experts)
    expand(w13, used_E, 2, gate_up)
    expand(w2, used_E, 1, down)
    return gate_up, down
