"""Integers with scales in the layout kernels run on: as ``blocks``, without masks.

A matrix of N outputs and K inputs is cut into blocks of 16 outputs, always in pairs:
gate and up of the same outputs, or two of down. In a block each output has a column of
32-bit words: 8 inputs of 4 bits each, whose lowest value is -8, or 4 of 8 bits, signed;
the lowest bits first. That is how compressed-tensors packs rows, so that encoding only
moves words. A weight is its integer minus a zero point, times a scale, one of each for
so many inputs (``group``) of an output.

E experts, B blocks, W words of an output, G groups, O = 16 outputs of a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import BLOCK, STEP, round_up

SCALES = (torch.bfloat16, torch.float16, torch.float32)
SMALLEST = 2.0**-100
"""Tokens whose largest input of a step is smaller are 0 there, as in ``moe.h``."""


@dataclass(frozen=True)
class IntBlocks:
    """Matrices of the same shape, one per expert."""

    values_EBWO: Tensor
    """int32."""
    scales_EBGO: Tensor
    """bf16, fp16 or float32, as they were stored."""
    zeros_EBGO: Tensor | None
    """int8, the integers that stand for 0; None: 0."""
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
        parts = (self.values_EBWO, self.scales_EBGO, self.zeros_EBGO)
        return sum(part.nbytes for part in parts if part is not None)


class Integers(NamedTuple):
    """One matrix, row by row."""

    words_NW: Tensor
    """int32."""
    scales_NG: Tensor
    """Of any floating dtype."""
    zeros_NG: Tensor | None
    """The integers that stand for 0, within int8; None: 0."""


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
    repeats = -(-group // part)

    def spread(shared_NG: Tensor) -> Tensor:
        spread_NG = shared_NG.repeat_interleave(repeats, 1)[:, : inputs // part]
        return _blocks(spread_NG, inputs // part)

    words = [_blocks(source.words_NW, inputs * bits // 32) for source in sources]
    scales = [spread(_exact(source.scales_NG)) for source in sources]
    zeros = [
        spread(source.zeros_NG.to(torch.int8))
        for source in sources
        if source.zeros_NG is not None
    ]
    return IntBlocks(
        _alternate(words),
        _alternate(scales),
        _alternate(zeros) if zeros else None,
        bits,
    )


def _exact(scales_NG: Tensor) -> Tensor:
    """Scales in a type that kernels read; float64 is the only other one there is."""
    return scales_NG if scales_NG.dtype in SCALES else scales_NG.float()


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
    zeros = [one.zeros_EBGO for one in experts if one.zeros_EBGO is not None]
    return IntBlocks(
        torch.cat([one.values_EBWO for one in experts]),
        torch.cat([one.scales_EBGO for one in experts]),
        torch.cat(zeros) if zeros else None,
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
    if blocks.zeros_EBGO is not None:
        found_BKO -= blocks.zeros_EBGO[expert].repeat_interleave(blocks.group, dim=1)
    scales_BGO = blocks.scales_EBGO[expert].float()
    found_BKO *= scales_BGO.repeat_interleave(blocks.group, dim=1)
    rows, cols = shape
    return [
        found_BKO[index::matrices].transpose(1, 2).flatten(0, 1)[:rows, :cols]
        for index in range(matrices)
    ]


def rounded(x_TD: Tensor) -> Tensor:
    """What tokens rounded to int8 stand for, in float32: the definition for kernels.

    The largest of every 32 inputs is 127 steps; halves go to the even integer. Where
    one of the 32 is not finite, all are NaN.
    """
    tokens, inputs = x_TD.shape
    padded_TK = torch.nn.functional.pad(x_TD.float(), (0, -inputs % STEP))
    x_TCS = padded_TK.view(tokens, -1, STEP)
    most_TC1 = x_TCS.abs().amax(dim=2, keepdim=True)
    kept_TC1 = most_TC1 >= SMALLEST
    q_TCS = torch.where(kept_TC1, (x_TCS * (127 / most_TC1)).round(), 0)
    found_TCS = q_TCS * (most_TC1 / 127)
    found_TCS[~x_TCS.isfinite().all(dim=2)] = torch.nan
    return found_TCS.view(tokens, -1)[:, :inputs]
