"""Integers with scales in the layout kernels run on: as ``blocks``, without masks.

A matrix of N outputs and K inputs is cut into blocks of 16 outputs, always in pairs:
gate and up of the same outputs, or two of down. In a block each output has a column of
32-bit words: 8 inputs of 4 bits each, whose lowest value is -8, or 4 of 8 bits, signed;
the lowest bits first. That is how compressed-tensors packs rows, so that encoding only
moves words. A weight is its integer times a scale plus an offset, one of each for so
many inputs (``group``) of an output.

E experts, B blocks, W words of an output, G groups, O = 16 outputs of a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import BLOCK, STEP, round_up


@dataclass(frozen=True)
class IntBlocks:
    """Matrices of the same shape, one per expert."""

    values_EBWO: Tensor
    """int32."""
    scales_EBGO: Tensor
    """float32."""
    offsets_EBGO: Tensor | None
    """float32; None: zeros."""
    bits: int
    """4 or 8."""

    @property
    def inputs(self) -> int:
        """K, a multiple of 32."""
        return self.values_EBWO.shape[2] * 32 // self.bits

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.inputs // self.scales_EBGO.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        parts = (self.values_EBWO, self.scales_EBGO, self.offsets_EBGO)
        return sum(part.nbytes for part in parts if part is not None)


class Integers(NamedTuple):
    """One matrix, row by row."""

    words_NW: Tensor
    """int32."""
    scales_NG: Tensor
    """Of any floating dtype."""
    zeros_NG: Tensor | None
    """The integers that stand for 0; None: 0."""


def encode(sources: Sequence[Integers], group: int, bits: int) -> IntBlocks:
    """One expert's matrices as blocks: (gate, up) alternating, or (down,).

    Args:
        sources: The matrices, of one shape.
        group: Inputs that share a scale, an even number. More than a row: all do.
        bits: 4 or 8.
    """
    inputs = round_up(sources[0].words_NW.shape[1] * 32 // bits, STEP)
    group = min(group, inputs)
    # A group must divide what rows are padded to; parts of it repeat its scale.
    # 128 does not divide 1056: scales are repeated for every gcd(128, 1056) = 32
    # inputs.
    part = gcd(group, inputs)
    words = [_blocks(source.words_NW, inputs * bits // 32) for source in sources]
    scales, offsets = [], []
    for source in sources:
        scale_NG = source.scales_NG.float()
        repeats = -(-group // part)
        spread_NG = scale_NG.repeat_interleave(repeats, 1)[:, : inputs // part]
        scales.append(_blocks(spread_NG, inputs // part))
        if source.zeros_NG is not None:
            # (q - z) s = q s + (-z s): one fused multiply-add instead of a subtraction
            # per weight.
            offset_NG = (-source.zeros_NG.float()).repeat_interleave(repeats, 1)
            offset_NG = offset_NG[:, : inputs // part] * spread_NG
            offsets.append(_blocks(offset_NG, inputs // part))
    return IntBlocks(
        _alternate(words),
        _alternate(scales),
        _alternate(offsets) if offsets else None,
        bits,
    )


def _blocks(rows_NC: Tensor, columns: int) -> Tensor:
    """[N, C] as [blocks, columns, 16], padded with zeros."""
    rows, have = rows_NC.shape
    # Padded outputs get scale 0: they are 0 whatever their words say.
    pads = (0, columns - have, 0, -rows % BLOCK)
    padded = torch.nn.functional.pad(rows_NC, pads)
    return padded.view(-1, BLOCK, columns).transpose(1, 2)


def _alternate(parts: Sequence[Tensor]) -> Tensor:
    """Blocks of the matrices in turn [1, B, ...], whole pairs of them."""
    blocks = torch.stack(list(parts), dim=1).flatten(0, 1)
    if len(blocks) % 2:
        blocks = torch.cat([blocks, torch.zeros_like(blocks[:1])])
    return blocks[None].contiguous()


def join(experts: Sequence[IntBlocks]) -> IntBlocks:
    """Experts encoded one by one as one."""
    offsets = [one.offsets_EBGO for one in experts if one.offsets_EBGO is not None]
    return IntBlocks(
        torch.cat([one.values_EBWO for one in experts]),
        torch.cat([one.scales_EBGO for one in experts]),
        torch.cat(offsets) if offsets else None,
        experts[0].bits,
    )


def decode(
    blocks: IntBlocks, expert: int, matrices: int, shape: tuple[int, int]
) -> list[Tensor]:
    """An expert's weights [N, K] in float32: what kernels are tested against."""
    values_BWO = blocks.values_EBWO[expert]
    shifts = torch.arange(
        0, 32, blocks.bits, dtype=torch.int32, device=values_BWO.device
    )
    # int4 is stored with 8 added, as compressed-tensors packs it; int8 in two's
    # complement.
    fields = (values_BWO[:, :, None] >> shifts[:, None]) & ((1 << blocks.bits) - 1)
    fields = fields - 8 if blocks.bits == 4 else fields.to(torch.int8)
    found_BKO = fields.flatten(1, 2).float()
    found_BKO *= blocks.scales_EBGO[expert].repeat_interleave(blocks.group, dim=1)
    if blocks.offsets_EBGO is not None:
        offsets = blocks.offsets_EBGO[expert]
        found_BKO += offsets.repeat_interleave(blocks.group, dim=1)
    rows, cols = shape
    return [
        found_BKO[index::matrices].transpose(1, 2).flatten(0, 1)[:rows, :cols]
        for index in range(matrices)
    ]
