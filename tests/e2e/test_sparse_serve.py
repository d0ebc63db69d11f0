"""Compressed experts in real vLLM engines against plain torch on the dense weights.

V vocabulary, T tokens.
"""

from pathlib import Path

import pytest

from tests.e2e.test_plugin_mixtral import (
    Case,
    expected,
    expected_loads,
    make_original,
    make_plan,
)
from tests.engine import VOCAB, Loads, assert_same, served
from tests.family_cases import COMPRESSED, ENGINE
from tests.family_cases import make_pruned as make_family
from tests.reference import LayerCut
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.convert import convert
from vllm_moe_prune.cut.execute import execute_plan
from vllm_moe_prune.decide.cut_plan import load_plan

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.usefixtures("engines_in_this_process"),
]

# Uniform, so that plain torch knows the pruned model; the last layer has no zeros.
HALF = Case(
    {
        layer: LayerCut(keep=(6, 1, 4, 3), sparsity=0.5 if layer < 3 else 0.0)
        for layer in range(4)
    },
    "block_sparse_moe.gate_up_down",
)

# vLLM's DeepSeek has a loader of its own, and so has whoever packs experts.
LOADED_DENSE = ("v2", "v3")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def packed(dense: Path) -> Path:
    return make_packed(dense)


def make_dense(folder: Path) -> Path:
    """A pruned checkpoint with zeros, stored dense."""
    original = make_original(folder / "ckpt", HALF.layout)
    out = original.with_name("dense")
    plan = load_plan(make_plan(original, HALF, slim="magnitude"))
    execute_plan(open_checkpoint(original), plan, out)
    return out


def make_packed(dense: Path) -> Path:
    """The same, compressed."""
    out = dense.with_name("packed")
    result = convert(open_checkpoint(dense), out, "bitmask")
    assert result.dense_layers == (3,)
    return out


def test_compressed_computes_what_dense_with_zeros_does(
    dense: Path, packed: Path
) -> None:
    assert_same(served(packed), expected(dense))


def test_zeros_are_left_out_while_a_dense_checkpoint_loads(dense: Path) -> None:
    assert_same(served(dense, quantization="moe_prune"), expected(dense))


def test_layers_without_zeros_are_served_where_vllm_has_no_kernel(
    tmp_path: Path,
) -> None:
    """On CPUs those of vLLM's want sizes that divide by 32."""
    full = tiny_checkpoint(
        tmp_path / "full",
        **{"layers": 2, "hidden": 80, "heads": 1, "vocab": VOCAB},
        **{"dtype": "float32", "tokenizer": False},
    )
    packed = tmp_path / "packed"
    assert convert(open_checkpoint(full), packed, "bitmask").dense_layers == (0, 1)
    expected_TV = expected(full)
    assert_same(served(packed), expected_TV)
    assert_same(served(full, quantization="moe_prune"), expected_TV)


@pytest.mark.parametrize("name", COMPRESSED)
def test_every_family_computes_what_dense_with_zeros_does(
    name: str, tmp_path: Path
) -> None:
    case = COMPRESSED[name]
    zeros, expected_TV, right_loads = make_family(tmp_path, case)
    out = tmp_path / "packed"
    result = convert(open_checkpoint(zeros), out, "bitmask")
    assert result.stored_bytes < result.dense_bytes
    loads: Loads = {}
    assert_same(served(out, loads, **ENGINE[case.family]), expected_TV)
    assert loads == right_loads
    if name in LOADED_DENSE:
        options = {"quantization": "moe_prune", **ENGINE[case.family]}
        assert_same(served(zeros, **options), expected_TV)


def test_bfloat16_is_as_far_from_the_truth_as_dense_is(
    dense: Path, packed: Path
) -> None:
    truth_TV = expected(dense)
    errors = [
        (served(folder, dtype="bfloat16") - truth_TV).abs().mean().item()
        for folder in (dense, packed)
    ]
    assert errors[1] <= 1.5 * errors[0]


@pytest.mark.slow
def test_compiled_without_a_graph_break(packed: Path, dense: Path) -> None:
    loads: Loads = {}
    found_TV = served(packed, loads, enforce_eager=False)
    assert_same(found_TV, expected(dense))
    assert loads == expected_loads(dense, Case({}, HALF.layout))
