"""The custom op as torch.compile sees it, and life without a compiled library."""

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from vllm_moe_prune.kernels import blocks, cpu_encode, cpu_library
from vllm_moe_prune.kernels.bitmask import pack
from vllm_moe_prune.plugin.quant.sparse_op import sparse_moe


def matrix(rows: int, cols: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(rows, cols, generator=generator)
    # Not a product: -0.0 is stored like any other value.
    return made.masked_fill(torch.rand(made.shape, generator=generator) >= 0.5, 0.0)


@pytest.fixture
def arguments() -> tuple[object, ...]:
    """A layer of two experts, 32 inputs, 16 in between, for three tokens."""
    w13 = blocks.join(
        [blocks.encode([matrix(16, 32, e), matrix(16, 32, e + 9)]) for e in (0, 1)]
    )
    w2 = blocks.join([blocks.encode([matrix(32, 16, e + 20)]) for e in (0, 1)])
    ids = torch.tensor([[0], [1], [0]], dtype=torch.int32)
    parts = (w13.masks_EBS, w13.starts_EB1, w13.values, w13.scales_EBC)
    more = (w2.masks_EBS, w2.starts_EB1, w2.values, w2.scales_EBC)
    return (matrix(3, 32, 7), torch.ones(3, 1), ids, None, *parts, *more, 16)


def test_the_op_tells_the_compiler_the_truth(arguments: tuple[object, ...]) -> None:
    torch.library.opcheck(sparse_moe, arguments)


def test_the_op_compiles_into_one_graph(arguments: tuple[object, ...]) -> None:
    def layer(*inputs: object) -> Tensor:
        return sparse_moe(*inputs) * 2

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), layer(*arguments))


@pytest.fixture
def _no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cpu_library, "EXTENSION_SUFFIXES", [])
    for cached in (cpu_library.library, cpu_library.level):
        cached.cache_clear()
    yield
    for cached in (cpu_library.library, cpu_library.level):
        cached.cache_clear()


def test_without_a_library_the_result_is_the_same_after_one_warning(
    arguments: tuple[object, ...],
    caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
) -> None:
    native = sparse_moe(*arguments)
    request.getfixturevalue("_no_library")
    with caplog.at_level(logging.WARNING):
        plain = [sparse_moe(*arguments) for _ in range(3)]
        dense = matrix(8, 32, 3)
        assert torch.equal(cpu_encode.unpack_matrix(pack(dense)), dense)
        assert cpu_encode.encode([dense]).masks_EBS.shape == (1, 2, 16)
    assert torch.allclose(plain[0], native, atol=1e-5)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "C++ compiler" in caplog.text
