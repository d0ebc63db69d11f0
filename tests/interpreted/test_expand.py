"""Expansion of chosen experts against the definition, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.interpreted.making import DTYPES, layer
from vllm_moe_prune.kernels import blocks
from vllm_moe_prune.kernels.blocks import FP8, Blocks
from vllm_moe_prune.kernels.triton.expand import chosen, expand


def check(
    w: Blocks, shape: tuple[int, int], sources: int, used: list[int], out: torch.dtype
) -> None:
    rows, cols = shape
    found = torch.full((len(used), sources * rows, cols), 7.0, dtype=out)
    expand(w, torch.tensor(used, dtype=torch.int32), sources, found)
    bits = blocks.BITS[found.element_size()]
    for expert, wanted in enumerate(used):
        expected = torch.full_like(found[expert], 7.0)
        if wanted:
            expected = torch.cat(blocks.decode(w, expert, sources, shape, out))
        assert torch.equal(found[expert].view(bits), expected.view(bits)), expert


@settings(max_examples=25)
@given(
    shape=st.tuples(st.integers(1, 80), st.integers(1, 150)),
    sources=st.sampled_from([1, 2]),
    experts=st.lists(
        st.tuples(st.sampled_from([0.0, 0.5, 0.65, 1.0]), st.booleans()),
        min_size=1,
        max_size=3,
    ),
    dtype=st.sampled_from([*DTYPES, FP8]),
    out=st.sampled_from(DTYPES),
)
def test_chosen_experts_are_what_was_encoded(
    shape: tuple[int, int],
    sources: int,
    experts: list[tuple[float, bool]],
    dtype: torch.dtype,
    out: torch.dtype,
) -> None:
    w = layer(shape, sources, [zeros for zeros, _ in experts], dtype)
    used = [int(wanted) for _, wanted in experts]
    check(w, shape, sources, used, out if dtype == FP8 else dtype)


@pytest.mark.parametrize("out", DTYPES)
def test_every_fp8_value_is_exact(out: torch.dtype) -> None:
    """Subnormals, both zeros and NaN as well."""
    every = torch.arange(256, dtype=torch.uint8).view(FP8).view(8, 32)
    w = blocks.encode([every], [torch.ones(1, 1)])
    found = torch.zeros(1, 8, 32, dtype=out)
    expand(w, torch.ones(1, dtype=torch.int32), 1, found)
    assert torch.equal(found[0].isnan(), every.float().isnan())
    assert torch.equal(found[0].nan_to_num(), every.to(out).nan_to_num())


@pytest.mark.parametrize("out", DTYPES)
def test_fp8_is_multiplied_by_scales_and_rounded_once(out: torch.dtype) -> None:
    check(layer((40, 70), 2, [0.5, 0.0], FP8), (40, 70), 2, [1, 1], out)


def test_minus_zero_and_payloads_of_nan_survive() -> None:
    odd = torch.tensor([-32768, 0x7FC1, -63, 0x7F81, 1, 0, 0, 0], dtype=torch.int16)
    w = blocks.encode([odd.view(torch.bfloat16).repeat(3, 4)])
    found = torch.zeros(1, 3, 32, dtype=torch.bfloat16)
    expand(w, torch.ones(1, dtype=torch.int32), 1, found)
    assert torch.equal(found[0].view(torch.int16), odd.repeat(3, 4))


def test_only_experts_that_are_here_count_as_chosen() -> None:
    ids = torch.tensor([[0, 5], [-1, 3], [9, 0]], dtype=torch.int32)
    expert_map = torch.tensor([2, -1, -1, 0, -1, -1], dtype=torch.int32)
    local = blocks.local_ids(ids, expert_map, 4)
    assert local.tolist() == [[2, -1], [-1, 0], [-1, 2]]
    assert chosen(local, 4).tolist() == [1, 0, 1, 0]
    # Without a map, an id that no expert has is nobody's.
    assert chosen(blocks.local_ids(ids, None, 4), 4).tolist() == [1, 0, 0, 1]
