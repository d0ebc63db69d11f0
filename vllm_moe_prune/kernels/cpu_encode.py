"""Expert weights in the form kernels run on, made in native code while loading.

vLLM loads under ``with torch.device(...)``: what native code writes to says that it is
in the host's memory, or its address would be a GPU's.

Same results as ``blocks.encode`` and ``bitmask.unpack``, which run where there is no
compiled library. N outputs, K inputs.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import blocks
from .bitmask import Bitmask, unpack
from .blocks import BLOCK, STEP, TAIL, Blocks, round_up
from .cpu_library import library


class _StoredStruct(ctypes.Structure):
    """``MoePruneStored`` of ``cpu/encode.cpp``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("mask", "values", "starts")),
        *((name, ctypes.c_int64) for name in ("cols", "first_row", "first_col")),
    )


def unpack_matrix(packed: Bitmask) -> Tensor:
    """Like ``bitmask.unpack``, in native code; ``packed`` has passed ``check``."""
    found = library()
    if found is None:
        return unpack(packed)
    rows, cols = packed.shape
    values = packed.values.contiguous()
    assert values.element_size() in blocks.BITS
    mask_RB, starts_R1 = packed.mask_RB.contiguous(), packed.starts_R1.contiguous()
    dense_RC = torch.empty(rows, cols, dtype=values.dtype, device="cpu")
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
    size = sources[0].element_size()
    assert size in blocks.BITS
    # Counted first: the library fills a buffer of just this size.
    stored = sum(
        int(torch.count_nonzero(source.view(blocks.BITS[size]))) for source in sources
    )
    pointers = (ctypes.c_void_p * len(sources))(*(s.data_ptr() for s in sources))
    return _encoded(
        found.moe_prune_encode,
        pointers,
        (outputs, inputs),
        sources[0].dtype,
        stored,
        scales,
    )


def encode_stored(
    sources: Sequence[Bitmask],
    first: tuple[int, int],
    shape: tuple[int, int],
    scales: Sequence[Tensor] | None = None,
) -> Blocks:
    """Like ``encode``, from matrices stored without zeros, of which a part is taken.

    The dense matrices are never made: a thread expands 16 rows at a time.

    Args:
        sources: Have passed ``check``; all of one shape and dtype.
        first: First row and column of the part [N, K].
        shape: N and K.
        scales: As ``encode`` has them.
    """
    found = library()
    (row, col), (outputs, inputs) = first, shape
    if found is None:
        dense = [unpack(one) for one in sources]
        parts = [one[row : row + outputs, col : col + inputs] for one in dense]
        return blocks.encode([part.contiguous() for part in parts], scales)
    cols = sources[0].shape[1]
    assert col + inputs <= cols
    assert all(
        one.shape[1] == cols and row + outputs <= len(one.mask_RB) for one in sources
    )
    dtype = sources[0].values.dtype
    assert dtype.itemsize in blocks.BITS
    bits = blocks.BITS[dtype.itemsize]
    held = []
    # The rows are stored whole: an upper bound where only some columns are taken.
    at_most = 0
    for one in sources:
        assert one.values.dtype == dtype
        values, starts_R1 = one.values.contiguous().view(-1), one.starts_R1.contiguous()
        taken = values[int(starts_R1[row]) : int(starts_R1[row + outputs])]
        # Fixed-rate groups store zeros too; blocks leave them out.
        at_most += int(torch.count_nonzero(taken.view(bits)))
        # Held until the call is done: the structs have addresses only.
        held.append((one.mask_RB.contiguous(), values, starts_R1))
    structs = (_StoredStruct * len(held))(
        *(
            _StoredStruct(*(part.data_ptr() for part in parts), cols, row, col)
            for parts in held
        )
    )
    return _encoded(
        found.moe_prune_encode_stored,
        structs,
        (outputs, inputs),
        dtype,
        at_most,
        scales,
    )


def decode(
    made: Blocks, expert: int, sources: int, shape: tuple[int, int]
) -> list[Tensor]:
    """Like ``blocks.decode`` without scales, in a tenth of its time on a CPU."""
    if made.values.device.type != "cpu":
        return blocks.decode(made, expert, sources, shape)
    masks_BS, starts_B1 = made.masks_EBS[expert].numpy(), made.starts_EB1[expert]
    first, last = int(starts_B1[0]), int(starts_B1[-1])
    bits = made.values.view(blocks.BITS[made.values.element_size()])
    # The lowest bit of the first byte is lane 0: CPUs here are little-endian.
    kept_BX = np.unpackbits(masks_BS.view(np.uint8), axis=1, bitorder="little")
    lanes_BX = np.zeros(kept_BX.shape, dtype=bits.numpy().dtype)
    # In row-major order, as values were encoded.
    lanes_BX[kept_BX.view(np.bool_)] = bits[first:last].numpy()
    lanes = torch.from_numpy(lanes_BX).view(made.values.dtype)
    return blocks.matrices(lanes, sources, shape)


def _encoded(
    run: Callable[..., None],
    sources: "ctypes.Array[Any]",
    shape: tuple[int, int],
    dtype: torch.dtype,
    at_most: int,
    scales: Sequence[Tensor] | None,
) -> Blocks:
    """What the library makes of sources with ``at_most`` values to store."""
    outputs, inputs = shape
    # Sizes as in blocks.encode: whole blocks of 16 outputs, whole pairs of blocks.
    count = round_up(len(sources) * (round_up(outputs, BLOCK) // BLOCK), 2)
    masks_BS = torch.empty(
        count, round_up(inputs, STEP) // 2, dtype=torch.int32, device="cpu"
    )
    starts_B1 = torch.empty(count + 1, dtype=torch.int64, device="cpu")
    bits = blocks.BITS[dtype.itemsize]
    values = torch.empty(at_most + TAIL, dtype=bits, device="cpu")
    run(
        sources,
        ctypes.c_int64(len(sources)),
        ctypes.c_int64(outputs),
        ctypes.c_int64(inputs),
        ctypes.c_int32(dtype.itemsize),
        ctypes.c_void_p(masks_BS.data_ptr()),
        ctypes.c_void_p(starts_B1.data_ptr()),
        ctypes.c_void_p(values.data_ptr()),
    )
    # Of some columns only fewer are stored than their rows have.
    stored = int(starts_B1[-1])
    values[stored:] = 0
    # A copy, or the view would keep the larger buffer alive.
    if stored < at_most:
        values = values[: stored + TAIL].clone()
    return Blocks(
        masks_BS[None],
        starts_B1[None],
        values.view(dtype),
        None if scales is None else blocks.alternate(scales)[None],
    )
