"""Checkpoints in GPTQ's and AWQ's layouts, packed here bit by bit.

R outputs, C inputs, G groups.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.gptq_awq import BLOCKS, make
from tests.reference import (
    DROP_BLOCK,
    DROP_MOE,
    LayerCut,
    raw_bytes,
    read_json,
    read_tensors,
    write_plan,
)
from vllm_moe_prune.checkpoint.reader import read_weight
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.execute import execute_plan
from vllm_moe_prune.cut.predict import with_prediction
from vllm_moe_prune.cut.verify import verify
from vllm_moe_prune.decide.cut_plan import load_plan
from vllm_moe_prune.errors import CheckpointError
from vllm_moe_prune.plugin.load.load_check import LoadCheck

CUTS = {
    0: LayerCut(keep=(5, 0, 3)),
    1: DROP_MOE,
    2: DROP_BLOCK,
    3: LayerCut(keep=(1, 2, 4)),
}


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
    execute_plan(source, plan, out)
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
    from vllm_moe_prune.plugin.load.served_layer import ServedLayer

    make(tmp_path / "model", "gptq")
    source = open_checkpoint(tmp_path / "model")
    layers = [
        ServedLayer(index=at, experts=6, top_k=2, router_rows=6) for at in range(4)
    ]
    load_check = LoadCheck(source.arch, layers, "model")
    assert len(list(load_check.watch(read_tensors(source.folder).items()))) > 0
    load_check.finish()


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


@pytest.mark.parametrize("file", ["quantize_config.json", "quant_config.json"])
def test_copies_of_the_block_are_renumbered_too(file: str, tmp_path: Path) -> None:
    make(tmp_path / "model", "gptq-symmetric", layers=4)
    block = {
        "bits": 4,
        "dynamic": {
            r"-:model\.layers\.3\..*": {},
            r"+:.*\.[02]\..*q_proj": {"bits": 4},
        },
        "modules_to_not_convert": ["model.layers.2.block_sparse_moe.experts.5.w1"],
    }
    (tmp_path / "model" / file).write_text(json.dumps(block))
    source, out = open_checkpoint(tmp_path / "model"), tmp_path / "out"
    cuts = {1: DROP_BLOCK, 2: LayerCut(keep=(5, 0))}
    execute_plan(
        source, load_plan(write_plan(tmp_path / "plan.json", source, cuts)), out
    )
    names = "|".join(f"model\\.layers\\.{at}\\.self_attn\\.q_proj" for at in (0, 1))
    assert read_json(out / file) == {
        "bits": 4,
        "dynamic": {r"-:model\.layers\.2\..*": {}, f"+:(?:{names})$": {"bits": 4}},
        "modules_to_not_convert": ["model.layers.1.block_sparse_moe.experts.0.w1"],
    }
    assert read_json(out / "provenance.json")["corrected_files"] == [file]
