"""Experts multiplied from masks and values against the definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.interpreted.making import DTYPES, layer
from vllm_moe_prune.kernels import blocks
from vllm_moe_prune.kernels.blocks import FP8
from vllm_moe_prune.kernels.triton.fused import GROUP, fused_moe, grouped

# Largest error over the largest output, which is of the order of 1 without
# cancellation: a few units of the type's last place.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}


def check(
    zeros: list[float],
    sizes: tuple[int, int],
    ids_TK: torch.Tensor,
    expert_map: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    fp8: bool,
) -> torch.Tensor:
    hidden, width = sizes
    stored = FP8 if fp8 else dtype
    w13 = layer((width, hidden), 2, zeros, stored, scale=hidden**-0.5)
    w2 = layer((hidden, width), 1, zeros, stored, scale=width**-0.5)
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(len(ids_TK), hidden, generator=generator).to(dtype)
    weights_TK = torch.rand(ids_TK.shape, generator=generator)
    given_ = (x_TD, weights_TK, ids_TK, expert_map, w13, w2, width)
    found, wanted = fused_moe(*given_), blocks.fused_moe(*given_)
    assert found.dtype == wanted.dtype
    error = (found.float() - wanted.float()).abs().max()
    assert error <= TOLERANCE[dtype] * max(0.5, float(wanted.abs().max()))
    return found


@settings(max_examples=15)
@given(
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    zeros=st.lists(st.sampled_from([0.0, 0.5, 0.65, 1.0]), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    fp8=st.booleans(),
    data=st.data(),
)
def test_layers_are_what_the_definition_says(
    sizes: tuple[int, int],
    zeros: list[float],
    dtype: torch.dtype,
    fp8: bool,
    data: st.DataObject,
) -> None:
    experts = len(zeros)
    expert_map = None
    if data.draw(st.booleans()):
        # Of twice as many, every second one is here; the others elsewhere.
        expert_map = torch.full((2 * experts,), -1, dtype=torch.int32)
        expert_map[::2] = torch.arange(experts, dtype=torch.int32)
    some = st.integers(-1, experts - 1 if expert_map is None else 2 * experts - 1)
    rows = st.lists(st.tuples(some, some), min_size=1, max_size=GROUP + 4)
    ids = torch.tensor(data.draw(rows), dtype=torch.int32)
    check(zeros, sizes, ids, expert_map, dtype, fp8=fp8)


def test_padding_and_experts_elsewhere_give_zeros() -> None:
    ids = torch.full((3, 2), -1, dtype=torch.int32)
    assert not check([0.5], (32, 16), ids, None, torch.bfloat16, fp8=False).any()


@pytest.mark.parametrize("ids", [[0] * 40, [2, 0, -1, 2, 2], [-1], list(range(4)) * 5])
def test_every_slot_is_in_one_group_of_its_expert(ids: list[int]) -> None:
    expert_G, slot_GM = grouped(torch.tensor([ids]).T, 4)
    seen = {}
    for expert, slots in zip(expert_G.tolist(), slot_GM.tolist(), strict=True):
        real = [slot for slot in slots if slot < len(ids)]
        assert bool(real) == (expert >= 0)
        seen |= dict.fromkeys(real, expert)
    assert seen == {slot: at for slot, at in enumerate(ids) if at >= 0}
