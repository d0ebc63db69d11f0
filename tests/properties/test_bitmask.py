"""The bitmask format against loops written from its definition, for every bit pattern.

R rows, C columns.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_prune.errors import CheckpointError
from vllm_moe_prune.kernels.bitmask import Bitmask, check, pack, unpack

INTEGERS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e5m2: torch.uint8,
}


def random_matrix(
    rows: int, cols: int, dtype: torch.dtype, sparsity: float, seed: int
) -> torch.Tensor:
    """Any bits at all, NaNs and denormals too, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    integer = INTEGERS[dtype]
    limits = torch.iinfo(integer)
    bits_RC = torch.randint(
        limits.min, limits.max, (rows, cols), generator=generator, dtype=torch.int64
    ).to(integer)
    bits_RC[torch.rand(rows, cols, generator=generator) < sparsity] = 0
    return bits_RC.view(dtype)


def bits(matrix: torch.Tensor) -> list[list[int]]:
    found: list[list[int]] = matrix.view(INTEGERS[matrix.dtype]).tolist()
    return found


def by_definition(
    matrix_RC: torch.Tensor,
) -> tuple[list[list[int]], list[int], list[int]]:
    """Mask bytes, values as integers, offsets: one element at a time."""
    mask, values, offsets = [], [], [0]
    for row in bits(matrix_RC):
        line = [0] * (len(row) // 8)
        for column, element in enumerate(row):
            if element != 0:
                line[column // 8] |= 1 << (column % 8)
                values.append(element)
        mask.append(line)
        offsets.append(len(values))
    return mask, values, offsets


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 9),
    bytes_per_row=st.integers(1, 6),
    dtype=st.sampled_from(list(INTEGERS)),
    sparsity=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_packing_follows_the_definition_and_loses_no_bit(
    rows: int, bytes_per_row: int, dtype: torch.dtype, sparsity: float, seed: int
) -> None:
    matrix_RC = random_matrix(rows, 8 * bytes_per_row, dtype, sparsity, seed)
    packed = pack(matrix_RC)
    mask, values, offsets = by_definition(matrix_RC)
    assert packed.mask_RB.tolist() == mask
    assert packed.values.view(INTEGERS[dtype]).tolist() == values
    assert packed.starts_R1.tolist() == offsets
    check(packed, (rows, 8 * bytes_per_row), "here")
    assert bits(unpack(packed)) == bits(matrix_RC)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_pattern_comes_back_and_only_plus_zero_is_dropped(
    dtype: torch.dtype,
) -> None:
    matrix_RC = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(256, 256)
    packed = pack(matrix_RC)
    assert len(packed.values) == 2**16 - 1
    assert bits(unpack(packed)) == bits(matrix_RC)


@settings(deadline=None, max_examples=40)
@given(
    group=st.sampled_from([(2, 4), (1, 4), (4, 8), (3, 16)]),
    dtype=st.sampled_from(list(INTEGERS)),
    seed=st.integers(0, 10**6),
)
def test_n_of_m_is_stored_at_a_fixed_rate(
    group: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    n, m = group
    generator = torch.Generator().manual_seed(seed)
    matrix_RC = random_matrix(5, 48, dtype, 0.0, seed)
    groups = matrix_RC.view(INTEGERS[dtype]).view(-1, m)
    # At least m - n zeros in every group, in some of them more.
    order = torch.rand(groups.shape, generator=generator).argsort(dim=1)
    groups[order >= n] = 0
    groups[::3, : m - n + 1] = 0
    packed = pack(matrix_RC, group)
    assert packed.offsets_R1 is None
    assert packed.values.shape == (5, 48 // m, n)
    check(packed, (5, 48), "here")
    assert bits(unpack(packed)) == bits(matrix_RC)


def test_too_many_values_for_a_fixed_rate_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 2"):
        pack(torch.ones(1, 8), (2, 4))


def damaged(**parts: Any) -> Bitmask:
    """A good 3 x 16 matrix with some parts replaced."""
    packed = pack(random_matrix(3, 16, torch.bfloat16, 0.5, 7))
    good = {
        "mask_RB": packed.mask_RB,
        "values": packed.values,
        "offsets_R1": packed.offsets_R1,
    }
    return Bitmask(**(good | parts))


GOOD = damaged()
OFFSETS = GOOD.starts_R1


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"mask_RB": GOOD.mask_RB[:2]}, "mask has shape"),
        ({"mask_RB": GOOD.mask_RB ^ 1}, "offsets"),
        ({"values": GOOD.values[:-1]}, "bits set"),
        ({"values": torch.ones(49).bfloat16()}, "do not fit"),
        ({"values": GOOD.values.view(1, -1)}, "do not fit"),
        ({"offsets_R1": OFFSETS[:-1]}, "do not fit"),
        ({"offsets_R1": OFFSETS.flip(0)}, r"offsets\[0\]"),
        ({"offsets_R1": OFFSETS + 1}, r"offsets\[0\]"),
        ({"offsets_R1": OFFSETS - 2**62}, r"offsets\[0\]"),
        ({"offsets_R1": OFFSETS.int()}, "I64"),
        ({"values": GOOD.values.double()}, r"values are torch\.float64"),
        ({"values": GOOD.values.short()}, r"values are torch\.int16"),
        ({"offsets_R1": None}, "no offsets"),
        ({"offsets_R1": None, "values": torch.ones(3, 4, 2).bfloat16()}, "group of 4"),
        ({"offsets_R1": None, "values": torch.ones(3, 4, 5).bfloat16()}, "no offsets"),
        ({"offsets_R1": None, "values": torch.ones(3, 0, 2).bfloat16()}, "no offsets"),
    ],
)
def test_parts_that_disagree_are_refused(parts: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        check(damaged(**parts), (3, 16), "here")
