"""Checkpoints in GPTQ's and AWQ's layouts, packed here bit by bit.

R outputs, C inputs, G groups.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.reference import (
    DROP_BLOCK,
    DROP_MOE,
    LayerCut,
    raw_bytes,
    read_json,
    read_tensors,
    write_plan,
)
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.checkpoint.reader import read_weight
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.apply import cut
from vllm_moe_prune.cut.predict import with_prediction
from vllm_moe_prune.decide.plan import load_plan
from vllm_moe_prune.errors import CheckpointError
from vllm_moe_prune.plugin.tally import WeightTally
from vllm_moe_prune.verify import verify

GROUP = 32
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
BLOCKS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "desc_act": True, "sym": False},
    "gptq_v2": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
    "awq": {"quant_method": "awq", "version": "gemm", "zero_point": True},
}
CUTS = {
    0: LayerCut(keep=(5, 0, 3)),
    1: DROP_MOE,
    2: DROP_BLOCK,
    3: LayerCut(keep=(1, 2, 4)),
}


def words(values: Tensor, order: list[int]) -> Tensor:
    """Each eight values of a row as one int32: value ``order[i]`` at bits 4 i."""
    packed = torch.zeros(values.shape[0], values.shape[1] // 8, dtype=torch.int64)
    for place, which in enumerate(order):
        packed |= values[:, which::8].long() << (4 * place)
    return packed.to(torch.int32)


def quantised(name: str, tensor: Tensor, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Parts of a matrix with random numbers, and what they stand for."""
    rows, cols = tensor.shape
    made = torch.Generator().manual_seed(seed)
    groups = cols // GROUP
    values_RC = torch.randint(0, 16, (rows, cols), generator=made)
    zero_RG = torch.randint(1, 16, (rows, groups), generator=made)
    scale_RG = (torch.rand(rows, groups, generator=made) / 50 + 0.001).half()
    group_C = torch.arange(cols) // GROUP
    if name != "awq":
        group_C = group_C[torch.randperm(cols, generator=made)]
    dense = torch.empty(rows, cols)
    for col in range(cols):
        at = int(group_C[col])
        steps_R = values_RC[:, col] - zero_RG[:, at]
        dense[:, col] = steps_R.float() * scale_RG[:, at].float()
    parts = {"scales": scale_RG.T}
    if name == "awq":
        parts["qweight"] = words(values_RC.T, AWQ_ORDER)
        parts["qzeros"] = words(zero_RG.T, AWQ_ORDER)
    else:
        parts["qweight"] = words(values_RC, list(range(8))).T
        less = 1 if name == "gptq" else 0
        parts["qzeros"] = words(zero_RG.T - less, list(range(8)))
        parts["g_idx"] = group_C.to(torch.int32)
    found = {part: each.contiguous() for part, each in parts.items()}
    return found, dense.bfloat16()


def make(folder: Path, name: str) -> dict[str, Tensor]:
    """A checkpoint in a layout; returns what it should be read as."""
    tiny_checkpoint(folder, hidden=64, width=96, experts=6)
    stored, expected = {}, {}
    for seed, (at, tensor) in enumerate(read_tensors(folder).items()):
        plain = tensor.dim() != 2 or "embed" in at or "lm_head" in at or ".gate." in at
        if plain:
            stored[at] = expected[at] = tensor
            continue
        parts, expected[at] = quantised(name, tensor, seed)
        base = at.removesuffix(".weight")
        stored |= {f"{base}.{part}": each for part, each in parts.items()}
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = read_json(folder / "config.json")
    config["quantization_config"] = {"bits": 4, "group_size": GROUP} | BLOCKS[name]
    (folder / "config.json").write_text(json.dumps(config))
    return expected


@pytest.mark.parametrize("name", BLOCKS)
def test_weights_are_read_as_what_they_stand_for(name: str, tmp_path: Path) -> None:
    expected = make(tmp_path / "model", name)
    found = open_checkpoint(tmp_path / "model")
    assert found.tensors.keys() == expected.keys()
    for at, tensor in expected.items():
        assert torch.equal(read_weight(found, at), tensor), at


@pytest.mark.parametrize("name", BLOCKS)
def test_trimming_copies_packed_experts_byte_for_byte(
    name: str, tmp_path: Path
) -> None:
    make(tmp_path / "model", name)
    source, out = open_checkpoint(tmp_path / "model"), tmp_path / "out"
    plan = load_plan(write_plan(tmp_path / "plan.json", source, CUTS))
    plan = with_prediction(source, plan)
    cut(source, plan, out)
    assert plan.predicted is not None
    (file,) = out.glob("*.safetensors")
    assert file.stat().st_size == plan.predicted.file_bytes
    assert verify(out, source).tensors_compared == len(read_tensors(out))
    verify(out)
    before, after = read_tensors(tmp_path / "model"), read_tensors(out)
    experts = 0
    for at, tensor in after.items():
        place = at.split(".")
        if "layers" in place:
            layer = (0, 1, 3)[int(place[2])]
            place[2] = str(layer)
            kept = CUTS[layer].keep
            if "experts" in place and kept is not None:
                place[5] = str(kept[int(place[5])])
                experts += 1
            elif at.endswith(".gate.weight") and kept is not None:
                assert torch.equal(tensor, before[".".join(place)][list(kept)])
                continue
        assert raw_bytes(tensor) == raw_bytes(before[".".join(place)]), at
    assert experts == 6 * 3 * (3 if name == "awq" else 4)
    config = read_json(out / "config.json")
    assert config["quantization_config"] == source.config["quantization_config"]
    layers = [at for at in read_json(out / "expert_remap.json")["layers"]]
    assert [len(layer["kept"]) for layer in layers] == [3, 0, 3]


def test_the_plugin_s_tally_knows_the_names(tmp_path: Path) -> None:
    from vllm_moe_prune.plugin.layers import ServedLayer

    make(tmp_path / "model", "gptq")
    source = open_checkpoint(tmp_path / "model")
    layers = [ServedLayer(at, 6, 2, 6) for at in range(4)]
    tally = WeightTally(source.arch, layers, "model")
    assert len(list(tally.watch(read_tensors(source.folder).items()))) > 0
    tally.finish()


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({"bits": 8}, "bits: Input should be 4"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": "x"}, "group_size"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format"),
        ({"quant_method": "awq", "version": "gemv"}, "version"),
        ({"group_size": 64}, r"qzeros: I32 of shape"),
        ({"quant_method": "awq"}, "expected I32 of shape"),
        ({"quant_method": "bitsandbytes"}, "can be pruned"),
    ],
)
def test_other_layouts_are_refused(
    block: dict[str, Any], says: str, tmp_path: Path
) -> None:
    make(tmp_path, "gptq")
    config = read_json(tmp_path / "config.json")
    config["quantization_config"] |= block
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("part", ["qzeros", "scales", "g_idx", "qweight"])
def test_lost_parts_are_refused(part: str, tmp_path: Path) -> None:
    make(tmp_path, "gptq")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors[f"model.layers.1.block_sparse_moe.experts.2.w1.{part}"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts\.2\.w1"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_matrices_without_a_size_are_refused(name: str, tmp_path: Path) -> None:
    make(tmp_path, name)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["group_size"] = -1
    path.write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    key = next(one for one in sorted(tensors) if one.endswith(".qweight"))
    tensors[key] = tensors[key][:0]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="qweight: has no weights"):
        open_checkpoint(tmp_path)


def test_groups_that_are_not_there_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "gptq")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.block_sparse_moe.experts.2.w1.g_idx"][3] = 99
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="groups that are not there"):
        read_weight(
            open_checkpoint(tmp_path),
            "model.layers.1.block_sparse_moe.experts.2.w1.weight",
        )
