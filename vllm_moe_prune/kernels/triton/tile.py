"""What the kernels have in common: a tile of weights from masks and values."""

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(knobs.runtime.interpret)
"""Whether kernels are interpreted, which knows no assembly."""


@triton.jit
def popcount(words):
    """Bits set in each int32."""
    if INTERPRETED:
        pairs = words - ((words >> 1) & 0x55555555)
        nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
        return ((((nibbles + (nibbles >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24) & 0xFF
    return tl.inline_asm_elementwise(
        "popc.b32 $0, $1;", "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def from_e4m3(bits):
    """The float32 that bits of e4m3 stand for; exact, on devices without FP8 too."""
    # e4m3's fields one place up are a float16 with an exponent that is 8 too small.
    half = ((bits & 0x80).to(tl.int16) << 8) | ((bits & 0x7F).to(tl.int16) << 7)
    found = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), found)


@triton.jit
def weights_of(
    masks,
    values,
    first,
    scales,
    SCALED: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCKS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Weights [16 BLOCKS, 2 STEPS], and where the values of the next steps begin.

    masks [BLOCKS, STEPS] int32; values: what ``first`` [BLOCKS] counts from; scales
    [BLOCKS, STEPS] float32, of e4m3 only.
    """
    counts = popcount(masks)
    start = first[:, None] + tl.cumsum(counts, axis=1) - counts
    lanes = tl.arange(0, 32)
    # A value's place is the number of bits set before it.
    before = popcount(masks[:, :, None] & ((1 << lanes) - 1)[None, None, :])
    kept = ((masks[:, :, None] >> lanes[None, None, :]) & 1) != 0
    found = tl.load(values + (start[:, :, None] + before), mask=kept, other=0)
    if SCALED:
        found = (from_e4m3(found) * scales[:, :, None]).to(DTYPE)
    # [block, step, n, i] -> [block, n, step, i]
    parts = tl.permute(tl.reshape(found, (BLOCKS, STEPS, 16, 2)), (0, 2, 1, 3))
    return tl.reshape(parts, (BLOCKS * 16, STEPS * 2)), first + tl.sum(counts, axis=1)
