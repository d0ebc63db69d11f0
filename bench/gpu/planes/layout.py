"""Planes of bytes: the layout of planes.cu, and a matrix encoded in it.

A task is a strip of 16 rows and a segment of the columns. Of every 16 columns a lane
has 8 weights, in the order in which mma.m16n8k16 wants them; a mask says which are
stored, 32 bits for each block of 64 columns. Values stand in a table with a column for
each lane: 4 of them a row, as 4 high and 4 low bytes. What a task may have asked for
when a block begins is planned here, so that nothing in the ring is overwritten while
any lane may still read it, and everything is there AHEAD blocks later.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

UNIT, AHEAD, BLOCK, STRIP, LANES = 4, 2, 64, 16, 32
Bits = npt.NDArray[np.uint16]
LANE = np.arange(LANES)
GROUP, WITHIN = LANE // 4, LANE % 4
ROWS = np.stack([GROUP, GROUP, GROUP + 8, GROUP + 8] * 2, 1)
FIRST = 2 * WITHIN
COLS = np.stack([FIRST, FIRST + 1] * 2 + [FIRST + 8, FIRST + 9] * 2, 1)
"""Of the 8 weights that a lane has in 16 rows and 16 columns."""


class TooUnequalError(Exception):
    """Zeros are spread so unequally that lanes drift apart by more than a ring."""


class Planes(NamedTuple):
    """A matrix."""

    values: npt.NDArray[np.uint8]
    """[rows, 32, 8], all tasks one behind the other."""
    masks: npt.NDArray[np.uint32]
    """[tasks, blocks, 32]."""
    firsts: npt.NDArray[np.uint32]
    """The first row of each task."""
    until: npt.NDArray[np.uint16]
    """[tasks, blocks + 1]: rows asked for when a block begins, the first before any."""
    segments: int

    @property
    def rows(self) -> int:
        """N."""
        return len(self.masks) // self.segments * STRIP

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Blocks of a task, segments, strips: as planes.cu is called."""
        return self.masks.shape[1], self.segments, self.rows // STRIP

    @property
    def nbytes(self) -> int:
        """Of all parts."""
        return sum(part.nbytes for part in self[:4])


def encode(weight_NK: Bits, segments: int, ring: int) -> Planes:
    """A matrix of the bits of bf16.

    Args:
        weight_NK: N divides by 16, K by 64 times ``segments``.
        segments: Parts of the columns that different warps take.
        ring: Rows that a warp keeps in shared memory: 32 or 64.

    Raises:
        TooUnequalError: The ring is too short for these zeros.
    """
    n, k = weight_NK.shape
    assert n % STRIP == 0
    assert k % (BLOCK * segments) == 0
    blocks = k // segments // BLOCK
    tables, masks, firsts, plans, row = [], [], [], [], 0
    for strip in range(0, n, STRIP):
        for segment in range(segments):
            begin = segment * blocks * BLOCK
            part = weight_NK[strip : strip + STRIP, begin : begin + blocks * BLOCK]
            steps = np.arange(blocks * 4)[None, :, None]
            # [lane, step, 8]
            own = part.reshape(STRIP, -1, 16)[ROWS[:, None], steps, COLS[:, None]]
            kept = (own != 0).reshape(LANES, blocks, 32)
            shifted = kept.astype(np.uint32) << np.arange(32, dtype=np.uint32)
            masks.append(shifted.sum(2, dtype=np.uint32).T)
            table, until = _task(own.reshape(LANES, -1), kept, ring)
            firsts.append(row)
            row += len(table)
            tables.append(table)
            plans.append(until)
    return Planes(
        np.concatenate(tables),
        np.ascontiguousarray(np.stack(masks)),
        np.array(firsts, np.uint32),
        np.stack(plans),
        segments,
    )


def _task(
    own_LW: Bits, kept: npt.NDArray[np.bool_], ring: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint16]]:
    """The table of a task, and what it asks for when."""
    used = kept.sum(2).cumsum(1)
    before = np.concatenate([np.zeros((LANES, 1), int), used[:, :-1]], 1)
    # A window is 3 rows, from the one that the next value is in.
    most = -(-used[:, -1].max() // 4) + 2
    total = -(-most // UNIT) * UNIT
    flat = kept.reshape(LANES, -1)
    lane, at = flat.nonzero()
    rank = flat.cumsum(1)[lane, at] - 1
    table = np.zeros((total, LANES, 8), np.uint8)
    table[rank // 4, lane, rank % 4] = own_LW[lane, at] >> 8
    table[rank // 4, lane, 4 + rank % 4] = own_LW[lane, at] & 255
    # What a block reads: from the slowest lane's row to behind the fastest one's.
    low, need = before.min(0) // 4, np.minimum(used.max(0) // 4 + 3, total)
    free = (low + ring) // UNIT * UNIT
    plan = np.concatenate([[min(ring, total)], np.minimum(free, total)])
    plan = np.maximum.accumulate(plan)
    there = plan[np.maximum(np.arange(len(low)) + 1 - AHEAD, 0)]
    if (there < need).any():
        raise TooUnequalError(f"a ring of {ring} rows is too short for a task's zeros")
    return table, plan.astype(np.uint16)


def fragments(x_TK: Bits, tiles: int) -> Bits:
    """Tokens [8 tiles, K] as mma.m16n8k16 wants them: [K / 16, tiles, lane, 4]."""
    parts = x_TK.reshape(tiles, 8, -1, 16)
    columns = np.stack([FIRST, FIRST + 1, FIRST + 8, FIRST + 9], 1)
    found = parts[:, GROUP[:, None], :, columns]  # [lane, 4, tiles, steps]
    return np.ascontiguousarray(found.transpose(3, 2, 0, 1))
