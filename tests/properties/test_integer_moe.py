"""Experts of integers: every kernel against dequantized weights and the formula.

T tokens, D hidden, F width, N rows, K columns, G groups, E experts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_moe_prune.kernels import cpu_library, int_blocks
from vllm_moe_prune.kernels.cpu_library import AMX, AVX2, AVX512, Borders
from vllm_moe_prune.kernels.int_blocks import IntBlocks, Integers
from vllm_moe_prune.kernels.quantized import (
    PACKED,
    PLAIN,
    SCALE,
    Form,
    Quantized,
    Scales,
    dequantize,
    pack,
    quantize_by,
    scales_of,
    zeros_of,
)

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
FORMS = [
    *(Form("int4", 32), Form("int4", 128), Form("int4", 64, zero_point=True)),
    *(Form("int4"), Form("int8")),
]

pytestmark = pytest.mark.skipif(
    cpu_library.library() is None, reason="there is no compiled kernel"
)


def quantized(weight_NK: Tensor, form: Form) -> tuple[Integers, Tensor]:
    """What kernels get of a matrix, and what it stands for, by the library."""
    scales = scales_of(weight_NK, form, torch.float32)
    values = quantize_by(weight_NK, scales, form).to(torch.int8)
    matrix = Quantized(values, Scales(*scales))
    parts = pack(matrix, form)
    words = parts[PACKED] if form.bits == "int4" else parts[PLAIN].view(torch.int32)
    dense = dequantize(matrix, form, torch.float32)
    return Integers(words, parts[SCALE], zeros_of(parts, form)), dense


def made(
    form: Form, hidden: int, width: int, experts: int, seed: int
) -> tuple[IntBlocks, IntBlocks, list[list[Tensor]]]:
    """The blocks of some experts, and their weights: gate, up and down of each."""
    generator = torch.Generator().manual_seed(seed)
    bits = 4 if form.bits == "int4" else 8
    ups, downs, dense = [], [], []
    for _ in range(experts):
        weights = [
            torch.randn(shape, generator=generator) * shape[1] ** -0.5 + 0.01
            for shape in ((width, hidden), (width, hidden), (hidden, width))
        ]
        found = [quantized(weight, form) for weight in weights]
        gate, up, down = (integers for integers, _ in found)
        ups.append(int_blocks.encode([gate, up], form.group_size or hidden, bits))
        downs.append(int_blocks.encode([down], form.group_size or width, bits))
        dense.append([one for _, one in found])
    return int_blocks.join(ups), int_blocks.join(downs), dense


def by_formula(
    x_TD: Tensor,
    weights_TK: Tensor,
    ids_TK: Tensor,
    experts: dict[int, list[Tensor]],
    rounding: Callable[[Tensor], Tensor] = Tensor.double,
) -> Tensor:
    """In float64, one slot at a time; experts that are not there add nothing.

    Args:
        x_TD: Tokens.
        weights_TK: Of the routed experts.
        ids_TK: Of the routed experts.
        experts: Gate, up and down of each.
        rounding: What becomes of the input of a product: of tokens before gate and up,
            of the activations before down.
    """
    given_TD = rounding(x_TD).double()
    out_TD = torch.zeros(x_TD.shape, dtype=torch.float64)
    for token, (weights, ids) in enumerate(zip(weights_TK, ids_TK, strict=True)):
        for weight, expert in zip(weights.tolist(), ids.tolist(), strict=True):
            if expert in experts:
                gate, up, down = (one.double() for one in experts[expert])
                x_D = given_TD[token]
                inner_F = torch.nn.functional.silu(gate @ x_D) * (up @ x_D)
                inner_F = rounding(inner_F.to(x_TD.dtype)[None])[0].double()
                out_TD[token] += weight * (down @ inner_F)
    return out_TD


def ways(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Every path that this machine has for such tokens."""
    for level in (0, AVX2, AVX512):
        yield {"at_level": level, "borders": Borders()}
    yield {}
    if cpu_library.level() == AMX and dtype == torch.bfloat16:
        yield {"borders": Borders(tile_from=1)}
        yield {"borders": Borders(tile_from=3)}


@dataclass
class Layer:
    """Some experts, and tokens of which each is routed to two of them."""

    form: Form
    tokens: int
    hidden: int
    width: int
    experts: int
    dtype: torch.dtype
    seed: int

    def __post_init__(self) -> None:
        made_of = (self.form, self.hidden, self.width, self.experts, self.seed)
        self.w13, self.w2, self.dense = made(*made_of)
        generator = torch.Generator().manual_seed(self.seed)
        x_TD = torch.randn(self.tokens, self.hidden, generator=generator)
        self.x_TD = x_TD.to(self.dtype)
        self.weights_TK = torch.rand(self.tokens, 2, generator=generator)
        scores_TE = torch.rand(self.tokens, self.experts, generator=generator)
        self.ids_TK = scores_TE.topk(2).indices.to(torch.int32)

    def expected(self, rounding: Callable[[Tensor], Tensor]) -> Tensor:
        among = dict(enumerate(self.dense))
        return by_formula(self.x_TD, self.weights_TK, self.ids_TK, among, rounding)

    def error(self, expected_TD: Tensor, **how: Any) -> float:
        """Of the kernel: the largest, relative to the largest value."""
        routed = (self.x_TD, self.weights_TK, self.ids_TK, None)
        found_TD = cpu_library.fused_moe(*routed, self.w13, self.w2, self.width, **how)
        missed = (found_TD.double() - expected_TD).abs().max()
        return float(missed / expected_TD.abs().max())


LAYERS = st.builds(
    Layer,
    form=st.sampled_from(FORMS),
    tokens=st.sampled_from([1, 2, 5, 12, 13, 33, 70]),
    hidden=st.sampled_from([128, 384]),
    width=st.sampled_from([128, 256]),
    experts=st.sampled_from([2, 5]),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 10**6),
)


@settings(deadline=None, max_examples=30)
@given(LAYERS)
def test_every_path_multiplies_by_what_the_library_dequantizes(layer: Layer) -> None:
    expected_TD = layer.expected(Tensor.double)
    for how in ways(layer.dtype):
        assert layer.error(expected_TD, **how) <= TOLERANCE[layer.dtype], how


@settings(deadline=None, max_examples=30)
@given(LAYERS)
def test_rounded_tokens_are_multiplied_as_their_definition_says(layer: Layer) -> None:
    expected_TD = layer.expected(int_blocks.rounded)
    for dots in cpu_library.all_dots():
        error = layer.error(expected_TD, dots=dots, borders=Borders())
        # Sums in another order turn a value between the products to its neighbor.
        assert error <= max(TOLERANCE[layer.dtype], 1e-3), dots


def one_expert(hidden: int) -> tuple[IntBlocks, IntBlocks]:
    """Gate and up of one output and of ones; down of one input."""
    ones_NW = torch.full((1, hidden // 4), 0x01010101, dtype=torch.int32)
    one_NG = torch.ones(1, 1)
    up = int_blocks.encode([Integers(ones_NW, one_NG, None)] * 2, hidden, 8)
    down = Integers(
        torch.ones(hidden, 1, dtype=torch.int32), torch.ones(hidden, 1), None
    )
    return up, int_blocks.encode([down], 32, 8)


@pytest.mark.parametrize(
    ("values", "stands_for"),
    [
        ([127.0, 0.5, 1.5, -0.5, -2.5], [127.0, 0.0, 2.0, 0.0, -2.0]),
        ([1e-31, 1e-31], [0.0, 0.0]),
        ([0.0], [0.0]),
        ([1e18, 1e18], [1e18, 1e18]),
        ([float("inf"), 1.0], [float("nan")] * 2),
        ([1.0, float("nan")], [float("nan")] * 2),
    ],
)
def test_what_is_rounded_and_how(values: list[float], stands_for: list[float]) -> None:
    x_TD = torch.zeros(1, 64)
    x_TD[0, : len(values)] = torch.tensor(values)
    found_D = int_blocks.rounded(x_TD)[0]
    expected = torch.tensor(stands_for)
    assert torch.allclose(found_D[: len(values)], expected, rtol=1e-6, equal_nan=True)
    assert not found_D[32:].any()  # a group does not touch its neighbor
    w13, w2 = one_expert(64)
    one = torch.ones(1, 1)
    for dots in cpu_library.all_dots():
        ids = torch.zeros(1, 1, dtype=torch.int32)
        got = cpu_library.fused_moe(x_TD, one, ids, None, w13, w2, 1, dots=dots)
        total = found_D.sum()
        wanted = torch.nn.functional.silu(total) * total
        assert torch.allclose(got, wanted, rtol=1e-5, equal_nan=True), dots


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.words)
def test_blocks_are_what_the_library_dequantizes(form: Form) -> None:
    w13, w2, dense = made(form, 128, 256, 2, 0)
    for expert, (gate, up, down) in enumerate(dense):
        found = [
            *int_blocks.decode(w13, expert, 2, (256, 128)),
            *int_blocks.decode(w2, expert, 1, (128, 256)),
        ]
        for one, expected in zip(found, (gate, up, down), strict=True):
            assert torch.allclose(one, expected, rtol=1e-6, atol=1e-7)


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 40),
    words=st.integers(1, 20),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([2, 8, 24, 32, 96, 1 << 60]),
    has_zeros=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_odd_shapes_and_groups_decode_to_the_formula(
    rows: int, words: int, bits: int, group: int, has_zeros: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    cols = words * 32 // bits
    low = -(1 << (bits - 1))
    words_NW = torch.randint(-(2**31), 2**31, (rows, words), generator=generator)
    groups = -(-cols // group)
    scales_NG = torch.rand(rows, groups, generator=generator)
    zeros_NG = torch.randint(low, -low, (rows, groups), generator=generator)
    if group % 3:
        scales_NG = scales_NG.bfloat16()
    source = Integers(
        words_NW.to(torch.int32), scales_NG, zeros_NG if has_zeros else None
    )
    encoded = int_blocks.encode([source], group, bits)
    shifts = torch.arange(0, 32, bits)
    fields = (words_NW[:, :, None] >> shifts) & ((1 << bits) - 1)
    unsigned_NK = fields.flatten(1)
    # Four bits count from the lowest value, eight have a sign.
    signed = torch.where(unsigned_NK >= -low, unsigned_NK + 2 * low, unsigned_NK)
    values_NK = unsigned_NK + low if bits == 4 else signed
    of_K = torch.arange(cols) // group
    expected = values_NK.float() * scales_NG.float()[:, of_K]
    if has_zeros:
        expected = (values_NK - zeros_NG[:, of_K]).float() * scales_NG.float()[:, of_K]
    (found,) = int_blocks.decode(encoded, 0, 1, (rows, cols))
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_experts_of_other_processes_add_nothing() -> None:
    w13, w2, dense = made(Form("int4", 32), 128, 128, 2, 0)
    x_TD = torch.randn(21, 128)
    weights_TK = torch.rand(21, 3)
    ids_TK = torch.rand(21, 5).topk(3).indices.to(torch.int32)
    expert_map = torch.tensor([-1, 1, -1, -1, 0], dtype=torch.int32)
    found_TD = cpu_library.fused_moe(x_TD, weights_TK, ids_TK, expert_map, w13, w2, 128)
    expected_TD = by_formula(x_TD, weights_TK, ids_TK, {4: dense[0], 1: dense[1]})
    assert torch.allclose(found_TD.double(), expected_TD, atol=1e-4)
