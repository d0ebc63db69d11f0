"""Layers for the tests of this folder."""

import torch
from torch import Tensor

from vllm_moe_prune.kernels import blocks
from vllm_moe_prune.kernels.blocks import FP8, Blocks

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def matrix(shape: tuple[int, int], zeros: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(shape, generator=generator)
    # Not a product: -0.0 is stored like any other value.
    return made.masked_fill(torch.rand(shape, generator=generator) < zeros, 0.0)


def layer(
    shape: tuple[int, int],
    sources: int,
    zeros: list[float],
    dtype: torch.dtype,
    scale: float = 1.0,
) -> Blocks:
    """One expert for each share of zeros; e4m3 has random scales about ``scale``."""
    made = []
    for expert, share in enumerate(zeros):
        each = [matrix(shape, share, 7 * expert + at) for at in range(sources)]
        scales = None
        if dtype == FP8:
            tiles = (-(-shape[0] // 16), -(-shape[1] // 32))
            scales = [scale * (torch.rand(tiles) + 0.5) for _ in each]
        else:
            each = [scale * one for one in each]
        made.append(blocks.encode([one.to(dtype) for one in each], scales))
    return blocks.join(made)
