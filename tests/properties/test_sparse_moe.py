"""Every kernel against sums written from the formula, over shapes, zeros and types.

T tokens, D hidden, F width, E experts, K slots per token.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_moe_prune.kernels import blocks, cpu_encode, cpu_library
from vllm_moe_prune.kernels.bitmask import pack
from vllm_moe_prune.kernels.blocks import Blocks
from vllm_moe_prune.kernels.cpu_library import COUNTS, Borders, fastest

# Largest error over the largest output: a few units of the type's last place.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
TYPES = st.sampled_from(list(TOLERANCE))
Matrices = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    """One layer and its input."""

    experts: list[Matrices]
    x_TD: Tensor
    weights_TK: Tensor
    ids_TK: Tensor

    @property
    def width(self) -> int:
        return len(self.experts[0][0])


def problem(
    *,
    tokens: int,
    hidden: int,
    width: int,
    experts: int,
    top_k: int,
    sparsity: float,
    dtype: torch.dtype,
    seed: int = 0,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, cols: int) -> Tensor:
        made = torch.randn(rows, cols, generator=generator) * cols**-0.5
        made[torch.rand(made.shape, generator=generator) < sparsity] = 0
        return made.to(dtype)

    scores_TE = torch.rand(tokens, experts, generator=generator)
    return Problem(
        [
            (matrix(width, hidden), matrix(width, hidden), matrix(hidden, width))
            for _ in range(experts)
        ],
        torch.randn(tokens, hidden, generator=generator).to(dtype),
        torch.rand(tokens, top_k, generator=generator),
        scores_TE.topk(top_k).indices.to(torch.int32),
    )


def by_formula(given_: Problem, here: list[int] | None = None) -> Tensor:
    """In float64, one slot at a time; ``here``: the experts of this process."""
    out_TD = torch.zeros(given_.x_TD.shape, dtype=torch.float64)
    for token, (weights, ids) in enumerate(
        zip(given_.weights_TK, given_.ids_TK, strict=True)
    ):
        x_D = given_.x_TD[token].double()
        for weight, expert in zip(weights.tolist(), ids.tolist(), strict=True):
            if here is not None and expert not in here:
                continue
            gate_FD, up_FD, down_DF = (m.double() for m in given_.experts[expert])
            gate_F, up_F = gate_FD @ x_D, up_FD @ x_D
            inner_F = gate_F / (1 + torch.exp(-gate_F)) * up_F
            inner_F = inner_F.to(given_.x_TD.dtype).double()
            out_TD[token] += weight * (down_DF @ inner_F)
    return out_TD


def tiles(matrix_NK: Tensor) -> Tensor:
    """Padded to whole blocks, [N / 16, 16, K / 32, 32]."""
    rows, cols = matrix_NK.shape
    padded = torch.nn.functional.pad(matrix_NK.float(), (0, -cols % 32, 0, -rows % 16))
    return padded.unflatten(1, (-1, 32)).unflatten(0, (-1, 16))


def as_fp8(matrix_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values in e4m3, the scales of 16 x 32 of them, and what they stand for."""
    (rows, cols), tiled = matrix_NK.shape, tiles(matrix_NK)
    scales = tiled.abs().amax(dim=(1, 3)) / 448 + 1e-6
    values = (tiled / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    dense = (values.float() * scales[:, None, :, None]).to(matrix_NK.dtype)
    cut = [part.flatten(2).flatten(0, 1)[:rows, :cols] for part in (values, dense)]
    return cut[0].contiguous(), scales, cut[1]


def encoded(experts: list[Matrices]) -> tuple[Blocks, Blocks]:
    return (
        blocks.join([cpu_encode.encode([gate, up]) for gate, up, _ in experts]),
        blocks.join([cpu_encode.encode([down]) for *_, down in experts]),
    )


def ways() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every path that this machine can run, by name."""
    best = cpu_library.level()
    for level in range(min(best, cpu_library.BF16) + 1):
        yield cpu_library.LEVELS[level], {"at_level": level, "borders": Borders()}
    if best >= cpu_library.BF16:
        yield "FP32 from two tokens", {"borders": Borders(dot_to=1)}
        yield "as measured", {}
    if best == cpu_library.AMX:
        yield "tiles", {"borders": Borders(tile_from=1)}
        yield "all three", {"borders": Borders(dot_to=1, tile_from=3)}


def assert_every_way(inputs: tuple[Any, ...], expected_TD: torch.Tensor) -> None:
    """Every path gives what is expected of a call with these inputs."""
    for name, how in ways():
        assert_close(cpu_library.fused_moe(*inputs, **how), expected_TD, name)


def assert_close(found_TD: Tensor, expected_TD: Tensor, what: str) -> None:
    largest = max(expected_TD.abs().max().item(), 1e-6)
    error = (found_TD.double() - expected_TD).abs().max().item() / largest
    assert error <= TOLERANCE[found_TD.dtype], f"{what}: {error}"


def test_the_library_was_built() -> None:
    """Without it the tests below would pass on the definition alone."""
    assert cpu_library.library() is not None, "run make install"


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.sampled_from([1, 2, 3, 5, 8, 9, 17, 33, 70]),
    hidden=st.sampled_from([8, 32, 40, 96, 136]),
    width=st.sampled_from([8, 16, 24, 64, 100]),
    experts=st.sampled_from([1, 3, 6]),
    top_k=st.sampled_from([1, 2]),
    sparsity=st.sampled_from([0.0, 0.4, 0.5, 0.65, 0.95, 1.0]),
    dtype=TYPES,
    seed=st.integers(0, 10**6),
)
def test_every_path_computes_the_formula(
    tokens: int,
    hidden: int,
    width: int,
    experts: int,
    top_k: int,
    sparsity: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    given_ = problem(
        tokens=tokens,
        hidden=hidden,
        width=width,
        experts=experts,
        top_k=min(top_k, experts),
        sparsity=sparsity,
        dtype=dtype,
        seed=seed,
    )
    w13, w2 = encoded(given_.experts)
    inputs = (given_.x_TD, given_.weights_TK, given_.ids_TK, None, w13, w2, width)
    expected_TD = by_formula(given_)
    assert_close(blocks.fused_moe(*inputs), expected_TD, "definition")
    assert_every_way(inputs, expected_TD)


@settings(deadline=None, max_examples=20)
@given(
    tokens=st.sampled_from([1, 2, 5, 12, 13, 33, 70]),
    hidden=st.sampled_from([8, 40, 136]),
    width=st.sampled_from([8, 16, 100]),
    sparsity=st.sampled_from([0.0, 0.5, 1.0]),
    dtype=TYPES,
    seed=st.integers(0, 10**6),
)
def test_fp8_weights_are_multiplied_by_their_scales(
    tokens: int, hidden: int, width: int, sparsity: float, dtype: torch.dtype, seed: int
) -> None:
    given_ = problem(
        tokens=tokens,
        hidden=hidden,
        width=width,
        experts=2,
        top_k=1,
        sparsity=sparsity,
        dtype=dtype,
        seed=seed,
    )
    made = [tuple(as_fp8(matrix) for matrix in expert) for expert in given_.experts]
    given_.experts[:] = [(gate[2], up[2], down[2]) for gate, up, down in made]
    for encode in (blocks.encode, cpu_encode.encode):
        w13 = blocks.join(
            [encode([gate[0], up[0]], [gate[1], up[1]]) for gate, up, _ in made]
        )
        w2 = blocks.join([encode([down[0]], [down[1]]) for *_, down in made])
        inputs = (given_.x_TD, given_.weights_TK, given_.ids_TK, None, w13, w2, width)
        expected_TD = by_formula(given_)
        assert_close(blocks.fused_moe(*inputs), expected_TD, "definition")
        assert_every_way(inputs, expected_TD)


def test_every_fp8_pattern_is_what_pytorch_says_it_is() -> None:
    """Each pattern as the weight of one output: denormals, both zeros, then NaNs."""
    one, nans = 0x38, (0x7F, 0xFF)
    gate, up, down = torch.zeros(3, 256, 256, dtype=torch.uint8)
    gate[:, 1] = one  # of an input that is 32, which silu leaves as it is
    down.fill_diagonal_(one)
    ones, halves = torch.ones(16, 8), torch.full((16, 8), 0.5)
    x_TD = torch.zeros(40, 256).bfloat16()
    x_TD[:, 0], x_TD[:, 1] = 1, 32
    routed = torch.ones(40, 1), torch.zeros(40, 1, dtype=torch.int32)
    for number in range(3):
        up[:, 0] = torch.arange(256)
        up[list(nans), 0] = 0
        if number:
            up[7, 0] = nans[number - 1]
        gates, ups, downs = (part.view(blocks.FP8) for part in (gate, up, down))
        w13 = cpu_encode.encode([gates, ups], [ones, halves])
        w2 = cpu_encode.encode([downs], [ones])
        expected_D = (32 * 0.5 * ups[:, 0].float()).bfloat16()
        for name, how in ways():
            for count in (1, 13, 40):
                tokens = (x_TD[:count], routed[0][:count], routed[1][:count])
                found_TD = cpu_library.fused_moe(*tokens, None, w13, w2, 256, **how)
                if number:
                    assert found_TD.isnan().all(), name
                else:
                    assert torch.equal(found_TD, expected_D.expand(count, -1)), name


def test_borders_are_where_other_instructions_become_the_faster_ones() -> None:
    rising, falling = list(map(float, COUNTS)), [9.5 - count for count in COUNTS]
    flat, slow = [4.5] * len(COUNTS), [100.0] * len(COUNTS)
    assert fastest(rising, slow, falling) == Borders(dot_to=4, tile_from=5)
    assert fastest(rising, flat, slow) == Borders(dot_to=4)
    assert fastest(slow, rising, flat) == Borders(dot_to=0, tile_from=5)
    assert fastest(slow, flat, slow) == Borders(dot_to=0)
    disturbed = [*flat[:3], 6.0, *flat[4:]]
    assert fastest(disturbed, [5.5] * len(COUNTS), slow) == Borders()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_native_encoding_is_the_definition_to_the_bit(dtype: torch.dtype) -> None:
    for hidden, width in ((40, 24), (64, 96), (8, 16), (72, 17)):
        given_ = problem(
            tokens=1,
            hidden=hidden,
            width=width,
            experts=1,
            top_k=1,
            sparsity=0.5,
            dtype=dtype,
        )
        gate_FD, up_FD, down_DF = given_.experts[0]
        gate_FD[0, 0], up_FD[0, 1] = -0.0, float("nan")
        for sources in ([gate_FD, up_FD], [down_DF]):
            native, plain = cpu_encode.encode(sources), blocks.encode(sources)
            assert torch.equal(native.masks_EBS, plain.masks_EBS)
            assert torch.equal(native.starts_EB1, plain.starts_EB1)
            integer = blocks.BITS[dtype.itemsize]
            assert torch.equal(native.values.view(integer), plain.values.view(integer))
            shape = tuple(sources[0].shape)
            again = blocks.decode(plain, 0, len(sources), (shape[0], shape[1]))
            # The second of two, as values of other experts lie before it.
            both = blocks.join([plain, plain])
            fast = cpu_encode.decode(both, 1, len(sources), (shape[0], shape[1]))
            for one, other in zip(fast, again, strict=True):
                assert torch.equal(one.view(integer), other.view(integer))
            for found, source in zip(again, sources, strict=True):
                assert torch.equal(
                    found.contiguous().view(integer), source.view(integer)
                )


@settings(deadline=None, max_examples=20)
@given(
    rows=st.integers(1, 20),
    cols=st.sampled_from([8, 40, 256]),
    sparsity=st.sampled_from([0.0, 0.5, 1.0]),
    dtype=TYPES,
)
def test_native_unpacking_gives_back_every_bit(
    rows: int, cols: int, sparsity: float, dtype: torch.dtype
) -> None:
    matrix_RC = torch.randn(rows, cols).to(dtype)
    matrix_RC[torch.rand(rows, cols) < sparsity] = 0
    found = cpu_encode.unpack_matrix(pack(matrix_RC))
    assert torch.equal(found, matrix_RC)
    fixed = matrix_RC.clone()
    fixed.view(-1, 4)[:, 1:3] = 0
    assert torch.equal(cpu_encode.unpack_matrix(pack(fixed, (2, 4))), fixed)


@given(
    rows=st.integers(1, 40),
    cols=st.sampled_from([8, 40, 96]),
    first=st.tuples(st.integers(0, 3), st.sampled_from([0, 8, 16])),
    sparsity=st.sampled_from([0.0, 0.5, 1.0]),
    dtype=TYPES,
    fixed=st.booleans(),
)
def test_stored_matrices_become_the_blocks_of_the_dense_ones(
    rows: int,
    cols: int,
    first: tuple[int, int],
    sparsity: float,
    dtype: torch.dtype,
    fixed: bool,
) -> None:
    row, col = first
    whole = [torch.randn(rows + row + 1, cols + col + 8).to(dtype) for _ in range(2)]
    for matrix_RC in whole:
        matrix_RC[torch.rand(matrix_RC.shape) < sparsity] = 0
        if fixed:
            matrix_RC.view(-1, 4)[:, 1:3] = 0
    stored = [pack(one, (2, 4) if fixed else None) for one in whole]
    dense = [one[row : row + rows, col : col + cols].contiguous() for one in whole]
    found = cpu_encode.encode_stored(stored, first, (rows, cols))
    expected = blocks.encode(dense)
    assert torch.equal(found.masks_EBS, expected.masks_EBS)
    assert torch.equal(found.starts_EB1, expected.starts_EB1)
    assert torch.equal(
        found.values.view(torch.uint8), expected.values.view(torch.uint8)
    )


def test_elements_of_unknown_size_never_reach_native_code() -> None:
    packed = pack(torch.eye(8))
    with pytest.raises(AssertionError):
        cpu_encode.unpack_matrix(replace(packed, values=packed.values.double()))
    with pytest.raises(AssertionError):
        cpu_encode.encode([torch.eye(8).double()])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_experts_of_other_processes_add_nothing(dtype: torch.dtype) -> None:
    given_ = problem(
        tokens=21,
        hidden=64,
        width=48,
        experts=5,
        top_k=3,
        sparsity=0.5,
        dtype=dtype,
    )
    here = [4, 1]
    w13, w2 = encoded([given_.experts[expert] for expert in here])
    expert_map_G = torch.tensor([-1, 1, -1, -1, 0], dtype=torch.int32)
    inputs = (given_.x_TD, given_.weights_TK, given_.ids_TK, expert_map_G, w13, w2, 48)
    expected_TD = by_formula(given_, here)
    assert_close(blocks.fused_moe(*inputs), expected_TD, "definition")
    assert_every_way(inputs, expected_TD)


def test_ids_that_no_expert_has_are_left_out() -> None:
    given_ = problem(
        tokens=4,
        hidden=32,
        width=32,
        experts=2,
        top_k=2,
        sparsity=0.5,
        dtype=torch.bfloat16,
    )
    w13, w2 = encoded(given_.experts)
    ids_TK = torch.tensor([[-1, 2], [2**31 - 1, -(2**31)], [-1, -1], [9, 2]])
    for _, how in ways():
        found_TD = cpu_library.fused_moe(
            given_.x_TD, given_.weights_TK, ids_TK, None, w13, w2, 32, **how
        )
        assert torch.equal(found_TD, torch.zeros_like(found_TD))


def test_width_split_over_two_processes_adds_up() -> None:
    given_ = problem(
        tokens=6,
        hidden=64,
        width=96,
        experts=3,
        top_k=2,
        sparsity=0.5,
        dtype=torch.float32,
    )
    total_TD = torch.zeros(6, 64)
    for part in (slice(0, 48), slice(48, 96)):
        w13, w2 = encoded(
            [(gate[part], up[part], down[:, part]) for gate, up, down in given_.experts]
        )
        total_TD += cpu_library.fused_moe(
            given_.x_TD, given_.weights_TK, given_.ids_TK, None, w13, w2, 48
        )
    assert_close(total_TD, by_formula(given_), "two halves")


@pytest.mark.parametrize("tokens", [13, 40, 100])
def test_inputs_that_are_expanded_in_several_chunks(tokens: int) -> None:
    given_ = problem(
        tokens=tokens,
        hidden=1160,
        width=600,
        experts=1,
        top_k=1,
        sparsity=0.5,
        dtype=torch.bfloat16,
    )
    w13, w2 = encoded(given_.experts)
    inputs = (given_.x_TD, given_.weights_TK, given_.ids_TK, None, w13, w2, 600)
    expected_TD = blocks.fused_moe(*inputs).double()
    assert_every_way(inputs, expected_TD)


@pytest.mark.slow
def test_many_tokens_at_once() -> None:
    given_ = problem(
        tokens=4096,
        hidden=64,
        width=64,
        experts=4,
        top_k=2,
        sparsity=0.5,
        dtype=torch.bfloat16,
    )
    w13, w2 = encoded(given_.experts)
    inputs = (given_.x_TD, given_.weights_TK, given_.ids_TK, None, w13, w2, 64)
    expected_TD = blocks.fused_moe(*inputs).double()
    assert_every_way(inputs, expected_TD)
