"""The compiled CPU kernel behind its C interface; ``kernels/cpu`` holds the sources.

Everything is checked here, in Python: the library trusts its arguments.
"""

import ctypes
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from math import inf
from pathlib import Path

import torch
from torch import Tensor

from . import blocks
from .bitmask import Bitmask, unpack
from .blocks import BLOCK, FP8, PAIR, STEP, TAIL, Blocks, round_up

log = logging.getLogger(__name__)

TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
LEVELS = (
    *("portable", "AVX2", "AVX-512", "AVX-512 VBMI2"),
    *("AVX-512 VBMI2 + BF16", "AMX"),
)
AVX512, BF16, AMX = 2, 4, 5
NEVER = 1 << 40
COUNTS = (*range(1, 13), 24)
"""Tokens of an expert at which ways are compared; more than 12 share a panel."""
POINTERS = (
    *("x", "weights", "ids", "expert_map"),
    *("w13_masks", "w13_starts", "w13_values", "w13_scales"),
    *("w2_masks", "w2_starts", "w2_values", "w2_scales", "out"),
)
NUMBERS = (
    *("tokens", "top_k", "hidden", "width", "experts", "map_size"),
    *("tile_from", "dot_to", "threads"),
)


@dataclass(frozen=True)
class Borders:
    """Of bf16: tokens of an expert at which other instructions are the faster ones."""

    dot_to: int = NEVER
    """Up to so many: dot products of bf16; for more, products in FP32."""
    tile_from: int = NEVER
    """From so many on: AMX tiles."""


class _Layer(ctypes.Structure):
    """``MoePruneLayer`` of ``cpu/moe.cpp``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in NUMBERS),
        *(("type", ctypes.c_int32), ("level", ctypes.c_int32)),
    )


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel; None, with one warning, where there is none."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_cpu{suffix}")
        if path.is_file():
            break
    else:
        log.warning(
            "vllm-moe-prune was installed without its CPU kernel; compressed experts "
            "run many times slower. Install a C++ compiler, then the package again."
        )
        return None
    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:
        log.warning(
            "The CPU kernel cannot be loaded, and compressed experts run many times "
            "slower: %s",
            error,
        )
        return None
    found.moe_prune_level.restype = ctypes.c_int32
    return found


@cache
def level() -> int:
    """The best instructions here, an index of ``LEVELS``; -1: there is no library."""
    found = library()
    if found is None:
        return -1
    best = int(found.moe_prune_level())
    if best < AVX512:
        log.warning(
            "This processor lacks AVX-512: compressed experts run on the %s path, "
            "which saves memory but is slow.",
            LEVELS[best],
        )
    return best


def unpack_matrix(packed: Bitmask) -> Tensor:
    """Like ``bitmask.unpack``, in native code; ``packed`` has passed ``check``."""
    found = library()
    if found is None:
        return unpack(packed)
    rows, cols = packed.shape
    values = packed.values.contiguous()
    mask_RB, starts_R1 = packed.mask_RB.contiguous(), packed.starts_R1.contiguous()
    dense_RC = torch.empty(rows, cols, dtype=values.dtype)
    found.moe_prune_unpack(
        ctypes.c_void_p(mask_RB.data_ptr()),
        ctypes.c_void_p(values.data_ptr()),
        ctypes.c_void_p(starts_R1.data_ptr()),
        ctypes.c_int64(rows),
        ctypes.c_int64(cols),
        ctypes.c_int32(values.element_size()),
        ctypes.c_void_p(dense_RC.data_ptr()),
    )
    return dense_RC


def encode(sources: Sequence[Tensor], scales: Sequence[Tensor] | None = None) -> Blocks:
    """Like ``blocks.encode``, in native code."""
    found = library()
    if found is None:
        return blocks.encode(sources, scales)
    sources = [source.contiguous() for source in sources]
    outputs, inputs = sources[0].shape
    assert all(
        source.shape == (outputs, inputs) and source.dtype == sources[0].dtype
        for source in sources
    )
    count = round_up(len(sources) * (round_up(outputs, BLOCK) // BLOCK), 2)
    masks_BS = torch.empty(count, round_up(inputs, STEP) // 2, dtype=torch.int32)
    starts_B1 = torch.empty(count + 1, dtype=torch.int64)
    size = sources[0].element_size()
    stored = sum(
        int(torch.count_nonzero(source.view(blocks.BITS[size]))) for source in sources
    )
    values = torch.empty(stored + TAIL, dtype=blocks.BITS[size])
    values[stored:] = 0
    pointers = (ctypes.c_void_p * len(sources))(*(s.data_ptr() for s in sources))
    found.moe_prune_encode(
        pointers,
        ctypes.c_int64(len(sources)),
        ctypes.c_int64(outputs),
        ctypes.c_int64(inputs),
        ctypes.c_int32(size),
        ctypes.c_void_p(masks_BS.data_ptr()),
        ctypes.c_void_p(starts_B1.data_ptr()),
        ctypes.c_void_p(values.data_ptr()),
    )
    return Blocks(
        masks_BS[None],
        starts_B1[None],
        values.view(sources[0].dtype),
        None if scales is None else blocks.alternate(scales)[None],
    )


def fused_moe(
    x_TD: Tensor,
    weights_TK: Tensor,
    ids_TK: Tensor,
    expert_map_G: Tensor | None,
    w13: Blocks,
    w2: Blocks,
    width: int,
    *,
    borders: Borders | None = None,
    at_level: int | None = None,
    threads: int = 0,
) -> Tensor:
    """Like ``blocks.fused_moe``, in native code.

    Args:
        x_TD: See there, as for all arguments up to ``width``.
        weights_TK: .
        ids_TK: .
        expert_map_G: .
        w13: .
        w2: .
        width: .
        borders: Which instructions are for how many tokens; None: measured.
        at_level: Run on older instructions than the processor has; None: the best.
        threads: 0: as many as PyTorch uses.
    """
    found = library()
    if found is None:
        return blocks.fused_moe(x_TD, weights_TK, ids_TK, expert_map_G, w13, w2, width)
    used = level() if at_level is None else min(at_level, level())
    if borders is None:
        choice = x_TD.dtype == torch.bfloat16 and used >= BF16
        borders = measured(used, w13.scales_EBC is not None) if choice else Borders()
    _check(x_TD, w13, w2, width)
    x_TD, weights_TK = x_TD.contiguous(), weights_TK.float().contiguous()
    ids_TK = ids_TK.to(torch.int32).contiguous()
    assert weights_TK.shape == ids_TK.shape
    assert len(ids_TK) == len(x_TD)
    map_size = len(w13.masks_EBS)
    if expert_map_G is not None:
        expert_map_G = expert_map_G.to(torch.int32).contiguous()
        map_size = len(expert_map_G)
    out_TD = torch.empty_like(x_TD)
    tensors = (
        *(x_TD, weights_TK, ids_TK, expert_map_G),
        *(w13.masks_EBS, w13.starts_EB1, w13.values, w13.scales_EBC),
        *(w2.masks_EBS, w2.starts_EB1, w2.values, w2.scales_EBC, out_TD),
    )
    addresses = [None if item is None else item.data_ptr() for item in tensors]
    numbers = (
        *(len(x_TD), ids_TK.shape[1], x_TD.shape[1], width),
        *(len(w13.masks_EBS), map_size, borders.tile_from, borders.dot_to, threads),
    )
    layer = _Layer(*addresses, *numbers, TYPES[x_TD.dtype], used)
    found.moe_prune_run(ctypes.byref(layer))
    return out_TD


def _check(x_TD: Tensor, w13: Blocks, w2: Blocks, width: int) -> None:
    """The shapes that the library computes from hidden size and width."""
    hidden, experts = x_TD.shape[1], len(w13.masks_EBS)
    pairs13, pairs2 = -(-width // BLOCK), -(-hidden // PAIR)
    for part, pairs, inputs in ((w13, pairs13, hidden), (w2, pairs2, width)):
        assert part.masks_EBS.shape == (experts, 2 * pairs, round_up(inputs, STEP) // 2)
        assert part.starts_EB1.shape == (experts, 2 * pairs + 1)
        assert part.masks_EBS.is_contiguous()
        assert part.starts_EB1.is_contiguous()
        if part.scales_EBC is None:
            assert part.values.dtype == x_TD.dtype
        else:
            steps = round_up(inputs, STEP) // STEP
            assert part.values.dtype == FP8
            assert part.scales_EBC.shape == (experts, 2 * pairs, steps)
            assert part.scales_EBC.dtype == torch.float32
            assert part.scales_EBC.is_contiguous()
    assert (w13.scales_EBC is None) == (w2.scales_EBC is None)


@cache
def measured(at_level: int, fp8: bool) -> Borders:
    """Which instructions are the fastest for how many tokens, measured here.

    All ways run on the same small layer, which stays in the cache, so that what is
    compared is their arithmetic; the memory they read is the same. What counts is the
    processor time of one thread: others may be busy. It is a thread of its own, since
    OpenMP would forget the threads, and their places, that this one does not use.
    """
    with ThreadPoolExecutor(max_workers=1) as own:
        return own.submit(_measured, at_level, fp8).result()


def _measured(at_level: int, fp8: bool) -> Borders:
    hidden, width = 1024, 512
    generator = torch.Generator().manual_seed(0)

    def encoded(outputs: int, inputs: int, count: int) -> Blocks:
        made = torch.randn(count, outputs, inputs, generator=generator)
        made *= torch.rand(made.shape, generator=generator) < 0.5
        scales = torch.ones(count, outputs // BLOCK, inputs // STEP)
        if fp8:
            return blocks.encode(list(made.to(FP8)), list(scales))
        return blocks.encode(list(made.bfloat16()))

    w13, w2 = encoded(width, hidden, 2), encoded(hidden, width, 1)
    most = COUNTS[-1]
    x_TD = torch.randn(most, hidden, generator=generator).bfloat16()
    ones_T1, ids_T1 = torch.ones(most, 1), torch.zeros(most, 1, dtype=torch.int32)

    def seconds(tokens: int, borders: Borders) -> float:
        start = time.thread_time()
        fused_moe(
            *(x_TD[:tokens], ones_T1[:tokens], ids_T1[:tokens], None, w13, w2, width),
            borders=borders,
            at_level=at_level,
            threads=1,
        )
        return time.thread_time() - start

    def best(borders: Borders) -> list[float]:
        return [min(seconds(count, borders) for _ in range(7)) for count in COUNTS]

    dot, fma = best(Borders(dot_to=NEVER)), best(Borders(dot_to=0))
    tiles = best(Borders(tile_from=1)) if at_level == AMX else [inf] * len(COUNTS)
    return fastest(dot, fma, tiles)


def fastest(dot: list[float], fma: list[float], tiles: list[float]) -> Borders:
    """The borders with the least time in all: one disturbed measurement moves little.

    Each argument: seconds for as many tokens as ``COUNTS`` says.
    """
    ends = range(len(COUNTS) + 1)
    _, first, last = min(
        (sum(dot[:first]) + sum(fma[first:last]) + sum(tiles[last:]), first, last)
        for last in ends
        for first in range(last + 1)
    )
    return Borders(
        dot_to=NEVER if first == len(COUNTS) else (0, *COUNTS)[first],
        tile_from=(*COUNTS, NEVER)[last],
    )
