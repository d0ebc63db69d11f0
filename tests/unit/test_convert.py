"""Storing a checkpoint compressed and dense again: the same weights, the same files."""

import filecmp
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.reference import LayerCut, write_plan
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.checkpoint.compressed import CompressedTensor
from vllm_moe_prune.checkpoint.index import read_index
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.reader import read_row, read_tensor
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.predict import model_facts
from vllm_moe_prune.decide.cut_plan import CutPlan, LayerPlan, load_plan
from vllm_moe_prune.errors import CheckpointError, OutputError
from vllm_moe_prune.kernels.bitmask import pack
from vllm_moe_prune.pipeline import RunOptions, convert, cut, verify
from vllm_moe_prune.plugin.launch import needs_plugin
from vllm_moe_prune.recipes.schema import Recipe

PACKED = RunOptions(storage="bitmask")
LAYERS = 3
TIMES = "run.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("source") / "ckpt"
    tiny_checkpoint(folder, layers=LAYERS, experts=4, hidden=32, width=48)
    return open_checkpoint(folder)


def plan(
    source: Checkpoint, pattern: str = "unstructured", experts: int = 4
) -> CutPlan:
    """Half of the weights of all layers but the last become zero."""
    return CutPlan(
        tool_version="test",
        model=model_facts(source).model,
        recipe=Recipe(),
        slim="magnitude",
        pattern=pattern,
        layers=tuple(
            LayerPlan(
                layer=index,
                experts=experts,
                keep=(0, 2, 3),
                sparsity=0.5 if index < LAYERS - 1 else 0.0,
            )
            for index in range(LAYERS)
        ),
    )


def same_files(left: Path, right: Path) -> None:
    names = {path.name for path in left.iterdir()}
    assert names == {path.name for path in right.iterdir()}
    _, different, unread = filecmp.cmpfiles(left, right, names - {TIMES}, shallow=False)
    assert not different
    assert not unread


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_there_and_back_is_the_same_folder_to_the_byte(
    pattern: str, source: Checkpoint, tmp_path: Path
) -> None:
    dense, packed, again = (tmp_path / name for name in ("dense", "packed", "again"))
    decided = plan(source, pattern)
    cut(source, decided, dense, RunOptions(max_shard_bytes=40_000))
    result = convert(open_checkpoint(dense), packed, PACKED)
    convert(open_checkpoint(packed), again, RunOptions(max_shard_bytes=40_000))
    same_files(dense, again)
    # What is stored follows from the zeros: 48 % of two layers of three, less 1/16.
    opened, plain = open_checkpoint(packed), open_checkpoint(dense)
    assert result.dense_layers == (LAYERS - 1,)
    assert result.stored_bytes == opened.stored_bytes < plain.tensor_bytes
    assert opened.fingerprint == plain.fingerprint
    for name, info in plain.tensors.items():
        found = opened.tensors[name]
        bits = [read_tensor(item).view(torch.int16) for item in (info, found)]
        assert torch.equal(*bits), name
        expert = ".experts." in name and ".layers.2." not in name
        assert isinstance(found, CompressedTensor) == expert
        if isinstance(found, CompressedTensor):
            assert (found.offsets is None) == (pattern == "2:4")
    checked = [verify(folder, source) for folder in (dense, packed)]
    assert checked[0].zeros == checked[1].zeros > 0
    assert [one.tensors_hashed for one in checked] == [
        len(read_index(folder)) for folder in (dense, packed)
    ]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("arctic", {}),
        ("deepseek_v2", {}),
        ("deepseek_v3", {}),
        ("deepseek_v3", {"fp8": (32, 32)}),
        ("deepseek_v3", {"layout": "mlp.packed"}),
        ("mixtral", {"layout": "block_sparse_moe.packed"}),
        ("olmoe", {}),
        ("qwen3_moe", {"fp8": (32, 32)}),
        ("glm4_moe", {}),
        ("minimax_m2", {"fp8": (32, 32)}),
        ("qwen2_moe", {}),
    ],
    ids=[
        *("arctic", "v2", "v3", "v3-fp8", "v3-packed", "mixtral-packed"),
        *("olmoe", "qwen3-fp8", "glm4", "m2-fp8", "qwen2"),
    ],
)
def test_every_family_goes_there_and_back(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "source"
    tiny_checkpoint(folder, model_type=family, layers=2, shards=1, **options)
    original = open_checkpoint(folder)
    keep = tuple(range(original.layers[1].num_experts))
    cuts = {1: LayerCut(keep=keep, sparsity=0.5)}
    written = write_plan(tmp_path / "plan.json", original, cuts, slim="magnitude")
    dense, packed, again = (tmp_path / name for name in ("dense", "packed", "again"))
    cut(original, load_plan(written), dense, RunOptions())
    result = convert(open_checkpoint(dense), packed, PACKED)
    assert 1 not in result.dense_layers
    assert result.stored_bytes < result.dense_bytes
    convert(open_checkpoint(packed), again, RunOptions())
    same_files(dense, again)
    verify(packed, original)


def test_cutting_into_the_layout_gives_what_converting_gives(
    source: Checkpoint, tmp_path: Path
) -> None:
    dense, packed, direct = (tmp_path / name for name in ("dense", "packed", "direct"))
    cut(source, plan(source), dense, RunOptions())
    convert(open_checkpoint(dense), packed, PACKED)
    cut(source, plan(source), direct, PACKED)
    same_files(packed, direct)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "dense",
        "direct",
        "packed",
    ]


def test_compressed_experts_that_changed_places_are_found(
    source: Checkpoint, tmp_path: Path
) -> None:
    """Every part fits: with a pattern, those of all experts have the same shapes."""
    out = tmp_path / "out"
    cut(source, plan(source, "2:4"), out, PACKED)
    assert verify(out).tensors_hashed == len(read_index(out))
    path = out / "model.safetensors"
    tensors = load_file(path)
    moe = "model.layers.0.block_sparse_moe.experts.{}.w2."
    for part in ("values", "mask"):
        one, two = (moe.format(expert) + part for expert in (0, 2))
        tensors[one], tensors[two] = tensors[two].clone(), tensors[one].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    said = rf"'{moe.format(0)}mask' holds what '{moe.format(2)}mask' held \(4 such"
    with pytest.raises(CheckpointError, match=said):
        verify(out)


def test_compressing_what_is_compressed_changes_nothing(
    source: Checkpoint, tmp_path: Path
) -> None:
    cut(source, plan(source), tmp_path / "once", PACKED)
    convert(open_checkpoint(tmp_path / "once"), tmp_path / "twice", PACKED)
    same_files(tmp_path / "once", tmp_path / "twice")


def test_another_tools_zeros_are_compressed_too(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "ckpt", layers=1, experts=2, shards=1)
    before = json.loads((folder / "config.json").read_text())
    result = convert(open_checkpoint(folder), tmp_path / "packed", PACKED)
    assert result.dense_layers == (0,)
    assert needs_plugin(open_checkpoint(tmp_path / "packed"))
    after = json.loads((tmp_path / "packed/config.json").read_text())
    assert after["architectures"] == before["architectures"]
    convert(open_checkpoint(tmp_path / "packed"), tmp_path / "again", RunOptions())
    assert json.loads((tmp_path / "again/config.json").read_text()) == before


def test_transformers_refuses_instead_of_inventing_experts(
    source: Checkpoint, tmp_path: Path
) -> None:
    cut(source, plan(source), tmp_path / "packed", PACKED)
    with pytest.raises(OSError, match="vllm-moe-prune"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_experts_in_one_tensor_are_stored_like_one_matrix(
    pattern: str, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path / "ckpt", layout="mlp.packed", layers=LAYERS)
    source = open_checkpoint(folder)
    decided = plan(source, pattern, experts=8)
    dense, packed, again = (tmp_path / name for name in ("dense", "packed", "again"))
    cut(source, decided, dense, RunOptions())
    # The first expert has no values: offsets of the second begin at 0 as well.
    spoilt = load_file(dense / "model.safetensors")
    for name, tensor in spoilt.items():
        if ".layers.0.mlp.experts." in name:
            tensor[0] = 0
    save_file(spoilt, dense / "model.safetensors", metadata={"format": "pt"})
    assert convert(open_checkpoint(dense), packed, PACKED).dense_layers == (2,)
    name = "model.layers.0.mlp.experts.down_proj"
    whole = load_file(dense / "model.safetensors")[name]
    with safe_open(packed / "model.safetensors", framework="pt") as file:
        mask, values = (
            file.get_tensor(f"{name}.{part}") for part in ("mask", "values")
        )
        fixed = f"{name}.offsets" not in file.keys()  # noqa: SIM118
    assert mask.shape == (*whole.shape[:-1], whole.shape[-1] // 8)
    assert fixed == (pattern == "2:4")
    rows = math.prod(whole.shape[:-1])
    expected = pack(whole.view(rows, -1), (2, 4) if fixed else None)
    assert torch.equal(values, expected.values)
    opened = open_checkpoint(packed).tensors[name]
    assert opened.shape == whole.shape
    assert torch.equal(read_row(opened, 1), whole[1])
    convert(open_checkpoint(packed), again, RunOptions())
    found = load_file(again / "model.safetensors")
    for each, tensor in load_file(dense / "model.safetensors").items():
        assert torch.equal(found[each], tensor), each


def test_a_killed_conversion_continues_with_the_same_bytes(
    source: Checkpoint, tmp_path: Path
) -> None:
    dense, whole, killed = (tmp_path / name for name in ("dense", "whole", "killed"))
    cut(source, plan(source), dense, RunOptions())
    small = RunOptions(storage="bitmask", max_shard_bytes=20_000)
    convert(open_checkpoint(dense), whole, small)

    def stop(progress: object) -> None:
        if getattr(progress, "stage", "") == "convert":
            raise KeyboardInterrupt

    options = RunOptions(storage="bitmask", max_shard_bytes=20_000, report=stop)
    with pytest.raises(KeyboardInterrupt):
        convert(open_checkpoint(dense), killed, options)
    assert not killed.exists()
    with pytest.raises(OutputError, match="--resume"):
        convert(open_checkpoint(dense), killed, small)
    resumed = RunOptions(storage="bitmask", max_shard_bytes=20_000, resume=True)
    convert(open_checkpoint(dense), killed, resumed)
    same_files(whole, killed)


def test_parts_are_named_so_that_no_reader_takes_them_for_something_else(
    source: Checkpoint, tmp_path: Path
) -> None:
    cut(source, plan(source), tmp_path / "packed", PACKED)
    with safe_open(tmp_path / "packed/model.safetensors", framework="pt") as file:
        parts = [name for name in file.keys() if ".layers.0." in name]  # noqa: SIM118
    experts = [name for name in parts if ".experts." in name]
    assert len(experts) == 3 * 3 * 3
    mangled = ("weight", "scale", "zero", "bias", "g_idx")
    assert not any(word in name for name in experts for word in mangled)
