"""The bitmask format: a matrix with zeros as bitmap, packed values and row offsets.

R rows, C columns (a multiple of 8), B = C / 8 bytes of bitmap per row, V values kept.
Bit c % 8 of byte c // 8 of a row is set where column c is stored; ``values`` holds what
is stored, row by row. Only elements whose bits are all zero, +0.0, are dropped: -0.0,
denormals and every NaN payload are values like any other, so that unpacking gives back
every bit. ``offsets_R1[r]`` counts the values before row r.

Fixed rate, for n:m patterns: every group of m neighbors stores exactly n values (a
group with fewer non-zeros also stores its first zeros), so ``values`` has the shape
[R, C / m, n] and offsets are implied.

Everything here works on the bits of the elements, never on their value, and holds one
chunk of rows at a time beside its input and output.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import CheckpointError

CHUNK_ELEMENTS = 1 << 22
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""The types that can be stored compressed, by their names in safetensors."""
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""What the bits of an element are looked at as, by its size in bytes."""


@dataclass(frozen=True)
class Bitmask:
    """One compressed matrix; not trusted before ``check`` has seen it."""

    mask_RB: Tensor
    """uint8."""
    values: Tensor
    """[V], or [R, C / m, n] where the rate is fixed; bf16, fp16, fp32 or fp8."""
    offsets_R1: Tensor | None
    """int64; None where the rate is fixed."""

    @property
    def shape(self) -> tuple[int, int]:
        """R and C of the dense matrix."""
        return self.mask_RB.shape[0], self.mask_RB.shape[1] * 8

    @property
    def starts_R1(self) -> Tensor:
        """The row offsets, whether stored or implied."""
        if self.offsets_R1 is not None:
            return self.offsets_R1
        rows = self.mask_RB.shape[0]
        # At a fixed rate every row holds as many values.
        return torch.arange(rows + 1, device="cpu") * (
            self.values.numel() // max(rows, 1)
        )


def pack(matrix_RC: Tensor, group: tuple[int, int] | None = None) -> Bitmask:
    """Compress a matrix; ``unpack`` gives back every bit.

    Args:
        matrix_RC: Floats of 1, 2 or 4 bytes on the CPU; C is a multiple of 8.
        group: (n, m) to store at a fixed rate.

    Raises:
        ValueError: C does not divide, or a group holds more than n non-zeros.
    """
    rows, cols = matrix_RC.shape
    if cols % 8 or (group is not None and cols % group[1]):
        raise ValueError(f"{cols} columns cannot be stored in groups of {group or 8}")
    bits_RC = _bits(matrix_RC)
    mask_RB = np.empty((rows, cols // 8), dtype=np.uint8)
    counts_R = np.empty(rows, dtype=np.int64)
    # Two passes: how many values there are must be known before they are placed.
    for start, stop in _chunks(rows, cols):
        kept = bits_RC[start:stop] != 0
        if group is not None:
            kept = _filled(kept, *group)
        mask_RB[start:stop] = np.packbits(kept, axis=1, bitorder="little")
        counts_R[start:stop] = np.count_nonzero(kept, axis=1)
    offsets_R1 = np.concatenate(([0], np.cumsum(counts_R)))
    values = np.empty(int(offsets_R1[-1]), dtype=bits_RC.dtype)
    for start, stop in _chunks(rows, cols):
        kept = _kept(mask_RB[start:stop])
        values[offsets_R1[start] : offsets_R1[stop]] = bits_RC[start:stop][kept]
    typed = torch.from_numpy(values).view(matrix_RC.dtype)
    if group is None:
        return Bitmask(torch.from_numpy(mask_RB), typed, torch.from_numpy(offsets_R1))
    # All groups hold n values, so the shape says what offsets would.
    fixed = typed.view(rows, cols // group[1], group[0])
    return Bitmask(torch.from_numpy(mask_RB), fixed, None)


def unpack(packed: Bitmask) -> Tensor:
    """The dense matrix [R, C], bit for bit what was packed; call ``check`` first."""
    rows, cols = packed.shape
    values = _bits(packed.values.reshape(-1))
    starts_R1 = packed.starts_R1.numpy()
    out_RC = np.zeros((rows, cols), dtype=values.dtype)
    for start, stop in _chunks(rows, cols):
        kept = _kept(packed.mask_RB.numpy()[start:stop])
        out_RC[start:stop][kept] = values[starts_R1[start] : starts_R1[stop]]
    return torch.from_numpy(out_RC).view(packed.values.dtype)


def fits(matrix_RC: Tensor, n: int, m: int) -> bool:
    """Whether every group of m neighbors in a row holds at most n non-zeros."""
    rows, cols = matrix_RC.shape
    if cols % m:
        return False
    bits_RC = _bits(matrix_RC)
    return all(
        bool((np.count_nonzero(bits_RC[a:b].reshape(-1, m), axis=1) <= n).all())
        for a, b in _chunks(rows, cols)
    )


def check(packed: Bitmask, shape: tuple[int, int], where: str) -> None:
    """Refuse parts that do not describe one matrix, before anything relies on them.

    Args:
        packed: The parts as they were read.
        shape: R and C that the matrix must have.
        where: Named in every error.

    Raises:
        CheckpointError: Naming the part, and the first row, that is wrong.
    """
    mask_RB, values, offsets_R1 = packed.mask_RB, packed.values, packed.offsets_R1
    rows, cols = shape
    check_shapes(
        shape,
        tuple(mask_RB.shape),
        tuple(values.shape),
        None if offsets_R1 is None else tuple(offsets_R1.shape),
        where,
    )
    if mask_RB.dtype != torch.uint8 or (
        offsets_R1 is not None and offsets_R1.dtype != torch.int64
    ):
        raise CheckpointError(f"{where}: the mask must be U8, the offsets I64.")
    if values.dtype not in DTYPES.values():
        raise CheckpointError(
            f"{where}: values are {values.dtype}; expected one of {', '.join(DTYPES)}."
        )
    mask = mask_RB.numpy()
    if offsets_R1 is None:
        # check_shapes has seen that the groups divide the columns.
        _check_groups(mask, cols // values.shape[1], values.shape[2], where)
        return
    # The offsets are redundant; a file whose two answers differ is refused, not
    # trusted.
    counts_R = np.bitwise_count(mask).sum(axis=1, dtype=np.int64)
    expected_R1 = np.concatenate(([0], np.cumsum(counts_R)))
    wrong = np.flatnonzero(expected_R1 != offsets_R1.numpy())
    if len(wrong):
        row = int(wrong[0])
        raise CheckpointError(
            f"{where}: offsets[{row}] is {int(offsets_R1[row])}, but the bitmap has "
            f"{int(expected_R1[row])} values before row {row} of {rows}."
        )
    if len(values) != expected_R1[-1]:
        raise CheckpointError(
            f"{where}: {len(values)} values, but the bitmap has {expected_R1[-1]} "
            "bits set."
        )


def check_shapes(
    shape: tuple[int, int],
    mask: tuple[int, ...],
    values: tuple[int, ...],
    offsets: tuple[int, ...] | None,
    where: str,
) -> None:
    """Refuse parts whose shapes alone, as headers tell them, contradict each other.

    Raises:
        CheckpointError: Naming the part and both shapes.
    """
    rows, cols = shape
    if cols % 8 or mask != (rows, cols // 8):
        raise CheckpointError(
            f"{where}: the mask has shape {list(mask)}, expected [{rows}, {cols}/8]."
        )
    if offsets is None:
        groups, kept = values[1:] if len(values) == 3 else (0, 0)
        if values[:1] != (rows,) or not groups or cols % groups or kept * groups > cols:
            raise CheckpointError(
                f"{where}: has no offsets, and its values have shape {list(values)}; "
                f"expected [{rows}, {cols}/m, n]."
            )
    # A bound before anything is read: no file may claim more values than elements.
    elif len(values) != 1 or values[0] > rows * cols or offsets != (rows + 1,):
        raise CheckpointError(
            f"{where}: values of shape {list(values)} and offsets of shape "
            f"{list(offsets)} do not fit a {rows} x {cols} matrix."
        )


def _check_groups(mask_RB: NDArray[np.uint8], m: int, kept: int, where: str) -> None:
    rows, cols = mask_RB.shape[0], mask_RB.shape[1] * 8
    for start, stop in _chunks(rows, cols):
        counts = _kept(mask_RB[start:stop]).reshape(stop - start, -1, m).sum(axis=2)
        wrong = np.flatnonzero((counts != kept).any(axis=1))
        if len(wrong):
            raise CheckpointError(
                f"{where}: row {start + int(wrong[0])} has a group of {m} columns "
                f"with another number of bits set than {kept}."
            )


def _filled(kept_RC: NDArray[np.bool_], n: int, m: int) -> NDArray[np.bool_]:
    """With the first zeros of each group kept as well, up to n."""
    kept = kept_RC.reshape(-1, m)
    # A group with fewer non-zeros stores zeros too, so that every group has n values.
    missing = n - kept.sum(axis=1)
    if (missing < 0).any():
        raise ValueError(f"a group of {m} holds more than {n} non-zeros")
    # May hold at kept columns as well, which `|` leaves as they are.
    first = np.cumsum(~kept, axis=1) <= missing[:, None]
    filled: NDArray[np.bool_] = (kept | first).reshape(kept_RC.shape)
    return filled


def _bits(tensor: Tensor) -> NDArray[np.generic]:
    integer = INTEGERS[tensor.element_size()]
    # numpy has no bf16 and no fp8, and comparing floats would take -0.0 for 0.
    found: NDArray[np.generic] = tensor.contiguous().view(integer).numpy()
    return found


def _kept(mask_RB: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return np.unpackbits(mask_RB, axis=1, bitorder="little").view(np.bool_)


def _chunks(rows: int, cols: int) -> Iterator[tuple[int, int]]:
    step = max(1, CHUNK_ELEMENTS // max(cols, 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
