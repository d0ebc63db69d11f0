"""The compiled CPU kernel behind its C interface; ``kernels/cpu`` holds the sources.

Everything is checked here, in Python: the library trusts its arguments.
"""

import ctypes
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from math import inf
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import blocks, int_blocks
from .blocks import BLOCK, FP8, PAIR, STEP, Blocks, round_up
from .int_blocks import IntBlocks, Integers

log = logging.getLogger(__name__)

TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
LEVELS = (
    *("portable", "AVX2", "AVX-512", "AVX-512 VBMI2"),
    *("AVX-512 VBMI2 + BF16", "AMX"),
)
AVX2, AVX512, BF16, AMX = 1, 2, 4, 5
DOTS = {"AVX-512 VNNI": 4, "AVX-VNNI": 2, "AVX2": 1}
"""Dot products of bytes, which multiply integers by tokens rounded to int8; the fastest
first. A processor may have any of them."""
EXACT = 0
"""Instead of one of ``DOTS``: tokens stay as they are."""
AS_TOKENS, E4M3, INT8, INT4 = range(4)
"""How weights are stored: as the type of tokens, or as one of these, with scales."""
NEVER = 1 << 40
COUNTS = (*range(1, 13), 24)
"""Tokens of an expert at which ways are compared; more than 12 share a panel."""
POINTERS = (
    *("x", "weights", "ids", "expert_map"),
    *("w13_masks", "w13_starts", "w13_values", "w13_scales", "w13_zeros"),
    *("w2_masks", "w2_starts", "w2_values", "w2_scales", "w2_zeros", "out"),
)
NUMBERS = (
    *("tokens", "top_k", "hidden", "width", "experts", "map_size"),
    *("tile_from", "dot_to", "threads", "w13_group", "w2_group"),
    *("w13_scale_type", "w2_scale_type"),
)


@dataclass(frozen=True)
class Borders:
    """Of bf16: tokens of an expert at which other instructions are the faster ones."""

    dot_to: int = NEVER
    """Up to so many: dot products of bf16; for more, products in FP32."""
    tile_from: int = NEVER
    """From so many on: AMX tiles."""


class _LayerStruct(ctypes.Structure):
    """``MoePruneLayer`` of ``cpu/moe.cpp``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in NUMBERS),
        *((name, ctypes.c_int32) for name in ("type", "storage", "level", "dots")),
    )


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel; None, with one warning, where there is none."""
    # Built as an extension, so named like one, but it has no init function: ctypes
    # loads it.
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_cpu{suffix}")
        if path.is_file():
            break
    else:
        log.warning(
            "vllm-moe-prune was installed without its CPU kernel; compressed experts "
            "run many times slower. There was no C++ compiler, or it failed: with a "
            "recent one, install the package again (pip's -v shows what is wrong)."
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
    if not hasattr(found, "moe_prune_dots"):
        # Its structures are others: calling it would read what is not there.
        raise RuntimeError(
            f"{path} was compiled from an older version; install the package again."
        )
    found.moe_prune_level.restype = ctypes.c_int32
    found.moe_prune_dots.restype = ctypes.c_int32
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


def fused_moe(
    x_TD: Tensor,
    weights_TK: Tensor,
    ids_TK: Tensor,
    expert_map_G: Tensor | None,
    w13: Blocks | IntBlocks,
    w2: Blocks | IntBlocks,
    width: int,
    *,
    dots: int = EXACT,
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
        w13: . Integers need ``runs_integers()``.
        w2: .
        width: .
        dots: Of integers whose groups are multiples of 32: tokens of experts without
            tiles are rounded as ``int_blocks.rounded`` says, before each of the two
            products, and multiplied by these ``all_dots()``.
        borders: Which instructions are for how many tokens; None: measured.
        at_level: Run on older instructions than the processor has; None: the best.
        threads: 0: as many as PyTorch uses.
    """
    found = library()
    if found is None:
        assert isinstance(w13, Blocks)
        assert isinstance(w2, Blocks)
        return blocks.fused_moe(x_TD, weights_TK, ids_TK, expert_map_G, w13, w2, width)
    used = level() if at_level is None else min(at_level, level())
    storage = _storage(w13)
    # Only bf16 has more than one way; fp16 and fp32 are always widened.
    if borders is None:
        from_level = AMX if storage >= INT8 else BF16
        choice = x_TD.dtype == torch.bfloat16 and used >= from_level
        borders = measured(used, storage, dots) if choice else Borders()
    # Pointers go to C++ from here: every shape it computes with is checked first.
    held = _checked(w13, x_TD, 2 * -(-width // BLOCK), x_TD.shape[1])
    held2 = _checked(w2, x_TD, 2 * -(-x_TD.shape[1] // PAIR), width)
    assert storage == _storage(w2)
    if dots != EXACT:
        assert storage >= INT8
        assert dots in all_dots()
        assert held.group % STEP == held2.group % STEP == 0
    x_TD, weights_TK = x_TD.contiguous(), weights_TK.float().contiguous()
    # vLLM's routers give int32 or int64, and views.
    ids_TK = ids_TK.to(torch.int32).contiguous()
    assert weights_TK.shape == ids_TK.shape
    assert len(ids_TK) == len(x_TD)
    # Without a map ids are local; the library checks them against this.
    map_size = held.experts
    if expert_map_G is not None:
        expert_map_G = expert_map_G.to(torch.int32).contiguous()
        map_size = len(expert_map_G)
    out_TD = torch.empty_like(x_TD)  # where the tokens are
    tensors = (
        x_TD,
        weights_TK,
        ids_TK,
        expert_map_G,
        *held.parts,
        *held2.parts,
        out_TD,
    )
    # `tensors` keeps converted copies alive until the library returns.
    addresses = [None if item is None else item.data_ptr() for item in tensors]
    numbers = (
        *(len(x_TD), ids_TK.shape[1], x_TD.shape[1], width, held.experts, map_size),
        *(borders.tile_from, borders.dot_to, threads, held.group, held2.group),
        *(held.scale_type, held2.scale_type),
    )
    how = (TYPES[x_TD.dtype], storage, used, dots)
    layer = _LayerStruct(*addresses, *numbers, *how)
    found.moe_prune_run(ctypes.byref(layer))
    return out_TD


def runs_integers() -> bool:
    """Whether the kernel is the way to run integers here."""
    return level() >= AVX2


@cache
def all_dots() -> tuple[int, ...]:
    """Of ``DOTS`` those that this processor has, the fastest first."""
    found = library()
    bits = 0 if found is None else int(found.moe_prune_dots())
    return tuple(one for one in DOTS.values() if bits & one)


def _storage(w: Blocks | IntBlocks) -> int:
    if isinstance(w, IntBlocks):
        return INT4 if w.bits == 4 else INT8
    return AS_TOKENS if w.scales_EBC is None else E4M3


class _Held(NamedTuple):
    """What the library is told of a matrix of all experts."""

    parts: tuple[Tensor | None, ...]
    """Masks, starts, values, scales and zero points."""
    experts: int
    group: int
    scale_type: int


def _checked(w: Blocks | IntBlocks, x_TD: Tensor, count: int, inputs: int) -> _Held:
    """Parts whose shapes are those that the library computes from x and width."""
    padded = round_up(inputs, STEP)
    parts: tuple[Tensor | None, ...]
    if isinstance(w, IntBlocks):
        experts, groups = len(w.values_EBWO), w.scales_EBGO.shape[2]
        scale_type = TYPES[w.scales_EBGO.dtype]
        assert w.bits in {4, 8}
        assert w.values_EBWO.shape == (experts, count, padded * w.bits // 32, BLOCK)
        assert w.values_EBWO.dtype == torch.int32
        # `group` is derived from this quotient.
        assert padded % groups == 0
        # A step is two inputs: they must share a scale.
        assert w.group % 2 == 0
        for part in (w.scales_EBGO, w.zeros_EBGO):
            assert part is None or part.shape == (experts, count, groups, BLOCK)
        assert w.zeros_EBGO is None or w.zeros_EBGO.dtype == torch.int8
        parts = (None, None, w.values_EBWO, w.scales_EBGO, w.zeros_EBGO)
        group = w.group
    else:
        experts, group, scale_type = len(w.masks_EBS), 0, 0
        assert w.masks_EBS.shape == (experts, count, padded // 2)
        assert w.starts_EB1.shape == (experts, count + 1)
        if w.scales_EBC is None:
            assert w.values.dtype == x_TD.dtype
        else:
            assert w.values.dtype == FP8
            assert w.scales_EBC.shape == (experts, count, padded // STEP)
            assert w.scales_EBC.dtype == torch.float32
        parts = (w.masks_EBS, w.starts_EB1, w.values, w.scales_EBC, None)
    assert all(part is None or part.is_contiguous() for part in parts)
    return _Held(parts, experts, group, scale_type)


@cache
def measured(at_level: int, storage: int, dots: int = EXACT) -> Borders:
    """Which instructions are the fastest for how many tokens, measured here.

    All ways run on the same small layer, which stays in the cache, so that what is
    compared is their arithmetic; the memory they read is the same. What counts is the
    processor time of one thread: others may be busy. It is a thread of its own, since
    OpenMP would forget the threads, and their places, that this one does not use.
    """
    with ThreadPoolExecutor(max_workers=1) as own:
        return own.submit(_measured, at_level, storage, dots).result()


def _measured(at_level: int, storage: int, dots: int) -> Borders:
    hidden, width = 1024, 512
    generator = torch.Generator("cpu").manual_seed(0)
    w13 = _example(width, hidden, 2, storage, generator)
    w2 = _example(hidden, width, 1, storage, generator)
    most = COUNTS[-1]
    x_TD = torch.randn(most, hidden, generator=generator, device="cpu").bfloat16()
    ones_T1 = torch.ones(most, 1, device="cpu")
    ids_T1 = torch.zeros(most, 1, dtype=torch.int32, device="cpu")

    def seconds(tokens: int, borders: Borders) -> float:
        # Not wall time: a server starts while other processes load.
        start = time.thread_time()
        fused_moe(
            *(x_TD[:tokens], ones_T1[:tokens], ids_T1[:tokens], None, w13, w2, width),
            dots=dots,
            borders=borders,
            at_level=at_level,
            threads=1,
        )
        return time.thread_time() - start

    def best(borders: Borders) -> list[float]:
        # The least of seven: disturbances only ever add time.
        return [min(seconds(count, borders) for _ in range(7)) for count in COUNTS]

    no = [inf] * len(COUNTS)
    dot = best(Borders(dot_to=NEVER)) if storage < INT8 else no
    # Tiles need permission from the kernel, which the level includes.
    tiles = best(Borders(tile_from=1)) if at_level == AMX else no
    return fastest(dot, best(Borders(dot_to=0)), tiles)


def _example(
    outputs: int, inputs: int, count: int, storage: int, generator: torch.Generator
) -> Blocks | IntBlocks:
    """Random weights, half of them zero where zeros are left out."""
    if storage in {INT8, INT4}:
        bits = 8 if storage == INT8 else 4
        shape = (outputs, inputs * bits // 32)
        words_NW = torch.randint(1 << 31, shape, generator=generator, device="cpu").to(
            torch.int32
        )
        ones_NG = torch.ones(outputs, inputs // 128, device="cpu")
        made = [Integers(words_NW, ones_NG, None)] * count
        return int_blocks.encode(made, 128, bits)
    dense = torch.randn(count, outputs, inputs, generator=generator, device="cpu")
    dense *= torch.rand(dense.shape, generator=generator, device="cpu") < 0.5
    if storage == AS_TOKENS:
        return blocks.encode(list(dense.bfloat16()))
    ones = torch.ones(count, outputs // BLOCK, inputs // STEP, device="cpu")
    return blocks.encode(list(dense.to(FP8)), list(ones))


def fastest(dot: list[float], fma: list[float], tiles: list[float]) -> Borders:
    """The borders with the least time in all: one disturbed measurement moves little.

    Each argument: seconds for as many tokens as ``COUNTS`` says.
    """
    # Dot products for few tokens, FMA between, tiles for many: two borders, all pairs
    # tried.
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
