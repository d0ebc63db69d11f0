"""The layout kernels run on: blocks of 16 outputs, values in the order they are used.

A matrix has N outputs (rows) and K inputs. Step k of a block holds the inputs 2k and
2k + 1 of its 16 outputs: one 32-bit mask, whose bit 2 n + i says whether input 2k + i
of output n is stored, and the stored values in the order of the bits. Blocks come in
pairs: gate and up of the same outputs alternate, down is padded to whole pairs; K is
padded to a multiple of 32. It is made while loading and never written to a file.

The functions here are the definition, in plain torch: every kernel is tested against
them, and without a compiled library they are what runs. E experts, B blocks, S = K / 2
steps, C = K / 32 scales, N outputs, K inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 16
PAIR = 32
STEP = 32
TAIL = 64
"""Elements behind the last value, which kernels read but never use (``moe.h``)."""
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Blocks:
    """Matrices of the same shape, one per expert."""

    masks_EBS: Tensor
    """int32."""
    starts_EB1: Tensor
    """int64: where each block's values begin, counted over all experts."""
    values: Tensor
    """bf16, fp16, fp32 or e4m3, one dimension; ``TAIL`` more than are stored."""
    scales_EBC: Tensor | None = None
    """float32, of e4m3 only: weights are values times scales, in the type of tokens."""

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        parts = (self.masks_EBS, self.starts_EB1, self.values, self.scales_EBC)
        return sum(part.nbytes for part in parts if part is not None)

    def to(self, device: torch.device) -> "Blocks":
        """On another device; themselves where they are there."""
        scales = self.scales_EBC
        return Blocks(
            self.masks_EBS.to(device),
            self.starts_EB1.to(device),
            self.values.to(device),
            None if scales is None else scales.to(device),
        )


def round_up(value: int, step: int) -> int:
    """The next multiple of ``step``."""
    return -(-value // step) * step


def encode(sources: Sequence[Tensor], scales: Sequence[Tensor] | None = None) -> Blocks:
    """One expert's matrices [N, K] as blocks: (gate, up) alternating, or (down,).

    Args:
        sources: The matrices.
        scales: Of e4m3: for each, what 16 outputs of 32 inputs have in common
            [N / 16, K / 32], both rounded up.
    """
    outputs, inputs = sources[0].shape
    rows, cols = round_up(outputs, BLOCK), round_up(inputs, STEP)
    bits = BITS[sources[0].element_size()]
    # On bits, not values: -0.0 and NaNs are stored like any other value.
    stacked = torch.zeros(
        len(sources), rows, cols, dtype=bits, device=sources[0].device
    )
    for index, source in enumerate(sources):
        stacked[index, :outputs, :inputs] = source.view(bits)
    # [source, block, n, step, i] -> [block, source, step, n, i]
    parts = stacked.view(len(sources), -1, BLOCK, cols // 2, 2)
    lanes_BSL = parts.permute(1, 0, 3, 2, 4).reshape(-1, cols // 2, 2 * BLOCK)
    # The kernel multiplies two blocks at a time: down with an odd number gets an empty
    # one.
    if len(lanes_BSL) % 2:
        lanes_BSL = torch.cat([lanes_BSL, torch.zeros_like(lanes_BSL[:1])])
    kept_BSL = lanes_BSL != 0
    # Bit 31 makes the int64 sum exceed int32; the cast keeps the bit pattern.
    weights_L = 2 ** torch.arange(2 * BLOCK, device=stacked.device)
    masks_BS = (kept_BSL * weights_L).sum(dim=2).to(torch.int32)
    counts_B = kept_BSL.sum(dim=(1, 2))
    starts_B1 = torch.cat([counts_B.new_zeros(1), counts_B.cumsum(0)])
    # Boolean indexing walks in row-major order: block, step, lane, as kernels read.
    values = torch.cat([lanes_BSL[kept_BSL], lanes_BSL.new_zeros(TAIL)])
    return Blocks(
        masks_BS[None],
        starts_B1[None],
        values.view(sources[0].dtype),
        None if scales is None else alternate(scales)[None],
    )


def alternate(scales: Sequence[Tensor]) -> Tensor:
    """The scales of each block [B, C], in the order of the blocks."""
    scales_BC = torch.stack(list(scales), dim=1).flatten(0, 1).float()
    if len(scales_BC) % 2:
        scales_BC = torch.cat([scales_BC, torch.ones_like(scales_BC[:1])])
    return scales_BC


def join(experts: Sequence[Blocks]) -> Blocks:
    """Experts encoded one by one as one."""
    # Every expert brings its own tail; the joined values need one.
    sizes = [len(expert.values) - TAIL for expert in experts]
    first = [sum(sizes[:index]) for index in range(len(sizes))]
    # As integers: PyTorch does not join FP8.
    bits = BITS[experts[0].values.element_size()]
    pieces = [
        expert.values.view(bits)[:size]
        for expert, size in zip(experts, sizes, strict=True)
    ]
    values = torch.cat(
        [*pieces, torch.zeros(TAIL, dtype=bits, device=pieces[0].device)]
    )
    starts = [
        expert.starts_EB1 + start for expert, start in zip(experts, first, strict=True)
    ]
    scales = [expert.scales_EBC for expert in experts if expert.scales_EBC is not None]
    return Blocks(
        torch.cat([expert.masks_EBS for expert in experts]),
        torch.cat(starts),
        values.view(experts[0].values.dtype),
        torch.cat(scales) if scales else None,
    )


def decode(
    blocks: Blocks,
    expert: int,
    sources: int,
    shape: tuple[int, int],
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """The dense matrices [N, K] of one expert, without any host synchronization.

    Args:
        blocks: The layer's weights.
        expert: Which one.
        sources: How many matrices alternate: 2 for gate and up, 1 for down.
        shape: N and K.
        dtype: Of weights that are values times scales; None: of what is stored.
    """
    masks_BS = blocks.masks_EBS[expert]
    # Arithmetic shift: the sign bit is lane 31, and & 1 drops what it smears.
    lanes_L = torch.arange(2 * BLOCK, device=masks_BS.device, dtype=torch.int32)
    kept_BSL = (masks_BS[:, :, None] >> lanes_L) & 1
    # A value's place is the number of bits set before it; unset lanes get some other's
    # and are masked.
    rank_BX = kept_BSL.flatten(1).cumsum(dim=1, dtype=torch.int64) - 1
    index_BX = (blocks.starts_EB1[expert, :-1, None] + rank_BX).clamp_(min=0)
    found_BX = blocks.values.view(BITS[blocks.values.element_size()])[index_BX]
    # where, not boolean indexing: its size would need the host to wait for the device.
    bits_BX = torch.where(kept_BSL.flatten(1).bool(), found_BX, 0)
    dense_BX = bits_BX.view(blocks.values.dtype)
    if blocks.scales_EBC is not None and dtype is not None:
        lanes = STEP * BLOCK  # that have a scale in common
        dense_BCX = dense_BX.float().view(len(dense_BX), -1, lanes)
        dense_BCX = dense_BCX * blocks.scales_EBC[expert, :, :, None]
        dense_BX = dense_BCX.to(dtype).flatten(1)
    return matrices(dense_BX, sources, shape)


def matrices(lanes_BX: Tensor, sources: int, shape: tuple[int, int]) -> list[Tensor]:
    """The matrices [N, K] whose weights are in the order of blocks, steps and lanes."""
    outputs, inputs = shape
    rows = round_up(outputs, BLOCK)
    lanes_BX = lanes_BX[: sources * rows // BLOCK]
    # [block, source, step, n, i] -> [source, block, n, step, i]
    parts = lanes_BX.view(rows // BLOCK, sources, -1, BLOCK, 2).permute(1, 0, 3, 2, 4)
    dense = parts.reshape(sources, rows, -1)[:, :outputs, :inputs]
    return list(dense.unbind())


def local_ids(ids_TK: Tensor, expert_map_G: Tensor | None, experts: int) -> Tensor:
    """Which expert here each slot goes to, int64; -1: none.

    Args:
        ids_TK: Among all experts; vLLM pads batches with -1.
        expert_map_G: As ``fused_moe`` has it.
        experts: How many are here.
    """
    local_TK = ids_TK.long()
    if expert_map_G is not None:
        # An index into the map must not see what is no expert.
        there = (local_TK >= 0) & (local_TK < len(expert_map_G))
        mapped_TK = expert_map_G.long()[local_TK.clamp(0, len(expert_map_G) - 1)]
        local_TK = torch.where(there, mapped_TK, -1)
    return torch.where((local_TK >= 0) & (local_TK < experts), local_TK, -1)


def fused_moe(
    x_TD: Tensor,
    weights_TK: Tensor,
    ids_TK: Tensor,
    expert_map_G: Tensor | None,
    w13: Blocks,
    w2: Blocks,
    width: int,
) -> Tensor:
    """What every kernel computes: experts with SiLU gates, weighted, added up [T, D].

    Products accumulate in fp32; silu(gate) * up is rounded to the type of ``x_TD``.

    Args:
        x_TD: Tokens.
        weights_TK: Routing weights, fp32.
        ids_TK: Which expert each slot goes to, int32, among all experts.
        expert_map_G: Index here of every expert, -1 where it is elsewhere; None: the
            same. Slots of experts that are not here count nothing.
        w13: Gate and up.
        w2: Down.
        width: Outputs of gate and of up.
    """
    hidden = x_TD.shape[1]
    experts = len(w13.masks_EBS)
    local_TK = local_ids(ids_TK, expert_map_G, experts)
    out_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    for expert in range(experts):
        token_n, slot_n = (local_TK == expert).nonzero(as_tuple=True)
        if len(token_n) == 0:
            continue
        gate_FD, up_FD = decode(w13, expert, 2, (width, hidden), x_TD.dtype)
        (down_DF,) = decode(w2, expert, 1, (hidden, width), x_TD.dtype)
        x_nD = x_TD[token_n].float()
        gate_nF = x_nD @ gate_FD.float().T
        inner_nF = torch.nn.functional.silu(gate_nF) * (x_nD @ up_FD.float().T)
        # Rounded once between the two products, as the kernels do.
        y_nD = inner_nF.to(x_TD.dtype).float() @ down_DF.float().T
        weight_n = weights_TK[token_n, slot_n].float()
        out_TD.index_add_(0, token_n, y_nD * weight_n[:, None])
    return out_TD.to(x_TD.dtype)
