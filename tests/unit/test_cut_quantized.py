"""Cuts that quantize, and cuts of what is quantized already. E experts."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from tests.killing import Killed, at_layer
from tests.quantized import dense_tensors, write_dense, write_untrimmed
from tests.quantizing import INT4, STAGES, planned, quantized, tiny
from tests.reference import (
    DROP_BLOCK,
    DROP_MOE,
    Cuts,
    LayerCut,
    Reference,
    folder_bytes,
    raw_bytes,
    read_json,
    read_tensors,
)
from tests.tiny import tiny_text
from vllm_moe_prune import pipeline
from vllm_moe_prune.calibrate.data import load_tokens
from vllm_moe_prune.calibrate.expert_forward import run_experts
from vllm_moe_prune.calibrate.forward import StreamingModel
from vllm_moe_prune.checkpoint.quantized_tensors import PartedTensor
from vllm_moe_prune.checkpoint.reader import read_expert, read_weight
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.execute import execute_plan
from vllm_moe_prune.cut.verify import verify
from vllm_moe_prune.kernels.quantized import Form, dequantize, pack
from vllm_moe_prune.recipes.flags import with_overrides
from vllm_moe_prune.recipes.loading import load_recipe
from vllm_moe_prune.recipes.schema import Calibration, QuantizeStage
from vllm_moe_prune.slim.rtn import rtn

UNEVEN: Cuts = {
    0: LayerCut(keep=(5, 0, 3)),
    1: DROP_MOE,
    2: DROP_BLOCK,
    3: LayerCut(keep=(1, 2, 4, 6, 7)),
}
RECIPES = {"turbo": ("drop-moe", 2), "turbo-block": ("drop-block", 1)}
FAMILIES = ("mixtral", "arctic", "deepseek_v2", "deepseek_v3")


@pytest.mark.parametrize("name", STAGES)
def test_sizes_are_met_and_the_output_is_what_it_says(
    name: str, tmp_path: Path
) -> None:
    source = tiny(tmp_path / "model")
    plan, result = quantized(source, tmp_path / "out", UNEVEN, STAGES[name])
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert plan.predicted is not None
    assert len(files) == plan.predicted.shards > 1
    assert sum(path.stat().st_size for path in files) == plan.predicted.file_bytes
    stored = read_tensors(tmp_path / "out")
    total = sum(tensor.nbytes for tensor in stored.values())
    assert total == plan.predicted.tensor_bytes < 0.8 * source.tensor_bytes
    verified = verify(tmp_path / "out", source)
    assert verified.expert_sparsity == pytest.approx(plan.predicted.expert_sparsity)
    assert result.achieved.parameters_after == plan.predicted.parameters
    again, dense = open_checkpoint(tmp_path / "out"), dense_tensors(tmp_path / "out")
    assert again.tensors.keys() == dense.keys()
    for name, tensor in dense.items():
        assert raw_bytes(read_weight(again, name)) == raw_bytes(tensor), name
    assert again.stored_bytes == total


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name == "mixtral" else pytest.mark.slow)
        for name in FAMILIES
    ],
)
@pytest.mark.parametrize("name", ["zero-points", "gptq", "awq"])
def test_experts_are_near_their_originals_and_all_else_is_the_same(
    family: str, name: str, tmp_path: Path
) -> None:
    source = tiny(tmp_path / "model", family)
    quantized(source, tmp_path / "out", {}, STAGES[name])
    before = read_tensors(source.folder)
    after = read_tensors(
        write_untrimmed(source.folder, tmp_path / "out", tmp_path / "dense")
    )
    scales = {}
    for layer in source.moe_layers:
        norm = f"model.layers.{layer.index}.post_attention_layernorm.weight"
        scales[layer.index] = before[norm].float() / after[norm].float()
    changed = 0
    for at, old in before.items():
        new, layer = after[at], source.arch.layer_of(at)
        scale = scales.get(layer, torch.ones(128)) if layer is not None else None
        reads = "gate" in at or "up_proj" in at or ".w1." in at or ".w3." in at
        if ".experts." in at and ("down" in at or ".w2." in at):
            inner = at.replace("down_proj", "up_proj").replace(".w2.", ".w3.")
            assert scale is not None
            shift = rows_scale(before[inner], after[inner].float() / scale)
            near(old, new.float() / shift)
            changed += 1
        elif ".experts." in at:
            assert scale is not None
            found = new.float() / scale
            if "up_proj" in at or ".w3." in at:
                found = found * rows_scale(old, found)[:, None]
            near(old, found)
            changed += 1
        elif scale is not None and layer in scales and reads and "residual" not in at:
            scaled = at.endswith(("gate.weight", "gate_proj.weight", "up_proj.weight"))
            expected = old.float() * scale if scaled else old.float()
            assert torch.equal(new.float(), expected), at
        elif not at.endswith("post_attention_layernorm.weight"):
            assert raw_bytes(new) == raw_bytes(old), at
    assert changed == 3 * sum(layer.num_experts for layer in source.moe_layers)
    if name == "awq":
        powers = torch.cat(list(scales.values())).log2()
        assert torch.equal(powers, powers.round())
        assert powers.abs().max() > 0
    else:
        assert all(bool((scale == 1).all()) for scale in scales.values())


def rows_scale(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """By which power of two each row was divided."""
    ratio = old.float().norm(dim=1) / new.float().norm(dim=1)
    return torch.exp2(ratio.log2().round())


def near(old: torch.Tensor, new: torch.Tensor) -> None:
    error = (old.float() - new.float()).norm() / old.float().norm()
    # GPTQ moves weights on purpose, the further the fewer tokens there are.
    assert 0 < error < 0.5


@pytest.mark.slow
def test_data_makes_the_model_s_answers_better_than_rounding_does(
    tmp_path: Path,
) -> None:
    source = tiny(tmp_path / "model", vocab=512)
    text = str(tiny_text(tmp_path, seed=5))
    heldout = load_tokens(source, Calibration(source=text, samples=2, seed=1))
    ids_ST = heldout.ids_ST[:, :128]

    def says(folder: Path) -> torch.Tensor:
        return Reference(folder).logits(ids_ST).log_softmax(dim=-1)

    truth_STV, lost = says(source.folder), {}
    for name in ("rtn", "gptq", "awq"):
        stage = {"method": name, "group_size": 64}
        quantized(source, tmp_path / name, {}, stage, samples=32)
        found_STV = says(write_dense(tmp_path / name, tmp_path / f"{name}-dense"))
        lost[name] = float((truth_STV.exp() * (truth_STV - found_STV)).sum(-1).mean())
    assert 0 < lost["gptq"] < lost["rtn"], lost
    assert 0 < lost["awq"] < lost["rtn"], lost


def test_experts_that_no_token_reached_are_rounded_and_reported(tmp_path: Path) -> None:
    source = tiny(tmp_path / "model", experts=16, layers=2, seed=3)
    text = tmp_path / "short.txt"
    text.write_text("one expert")
    plan = planned(source, {}, STAGES["gptq"])
    calibration = Calibration(source=str(text), samples=1, sequence_length=2)
    tokens = load_tokens(source, calibration)
    result = execute_plan(source, plan, tmp_path / "out", tokens=tokens)
    form = Form("int4", 32, zero_point=True)
    dense, stored = dense_tensors(tmp_path / "out"), read_tensors(source.folder)
    for record, layer in zip(result.records, result.achieved.layers, strict=True):
        assert record.unseen == list(layer.unseen)
        assert len(record.unseen) >= 16 - 2 * tokens.ids_ST.numel()
        for expert in range(16):
            moe = f"model.layers.{record.layer}.block_sparse_moe"
            name = f"{moe}.experts.{expert}.w1.weight"
            rounded = dequantize(rtn(stored[name], form), form, torch.bfloat16)
            assert torch.equal(dense[name], rounded) == (expert in record.unseen)


@pytest.mark.parametrize("name", ["all-int8", "awq"])
def test_a_resumed_cut_writes_the_same_bytes(name: str, tmp_path: Path) -> None:
    source = tiny(tmp_path / "model")
    quantized(source, tmp_path / "whole", UNEVEN, STAGES[name])

    with pytest.raises(Killed):
        quantized(source, tmp_path / "out", UNEVEN, STAGES[name], report=at_layer(2))
    assert not (tmp_path / "out").exists()
    quantized(source, tmp_path / "out", UNEVEN, STAGES[name], resume=True)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


@pytest.mark.parametrize("name", ["zero-points", "int8", "fp8"])
def test_trimming_copies_packed_experts_byte_for_byte(
    name: str, tmp_path: Path
) -> None:
    source = tiny(tmp_path / "model")
    quantized(source, tmp_path / "whole", {}, STAGES[name])
    whole = open_checkpoint(tmp_path / "whole")
    plan, _ = quantized(whole, tmp_path / "st", UNEVEN, {})
    quantized(source, tmp_path / "ts", UNEVEN, STAGES[name])
    sides = [read_tensors(tmp_path / side) for side in ("st", "ts")]
    assert sides[0].keys() == sides[1].keys()
    for at, tensor in sides[0].items():
        assert raw_bytes(tensor) == raw_bytes(sides[1][at]), at
    assert plan.predicted is not None
    files = (tmp_path / "st").glob("*.safetensors")
    assert sum(path.stat().st_size for path in files) == plan.predicted.file_bytes
    verify(tmp_path / "st", whole)
    configs = [read_json(tmp_path / side / "config.json") for side in ("st", "ts")]
    for key in ("quantization_config", "architectures", "per_layer_config"):
        assert configs[0].get(key) == configs[1].get(key)


GROUP = {
    "format": None,
    "input_activations": None,
    "output_activations": None,
    "targets": ["Linear"],
    "weights": {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": None,
        "num_bits": 4,
        "observer": "minmax",
        "observer_kwargs": {},
        "scale_dtype": None,
        "strategy": "channel",
        "symmetric": True,
        "type": "int",
        "zp_dtype": None,
    },
}
FOREIGN: dict[str, tuple[Form, str, dict[str, Any]]] = {
    "W4A16": (
        Form("int4", 64),
        "pack-quantized",
        {"strategy": "group", "group_size": 64},
    ),
    "W4A16-rows": (Form("int4"), "pack-quantized", {}),
    "FP8-dynamic": (
        Form("fp8"),
        "float-quantized",
        {"num_bits": 8, "type": "float"},
    ),
}


def foreign(folder: Path, name: str) -> Path:
    """A checkpoint as llm-compressor writes it: attention is quantized as well."""
    source = tiny(folder)
    form, stored_as, words = FOREIGN[name]
    config = read_json(folder / "config.json")
    ignore, tensors = ["lm_head"], {}
    for at, tensor in read_tensors(folder).items():
        base = at.removesuffix(".weight")
        if tensor.dim() != 2 or "embed" in at or "lm_head" in at:
            tensors[at] = tensor
        elif base.endswith(".gate"):
            tensors[at] = tensor
            ignore.append(base)
        else:
            packed = pack(rtn(tensor, form), form)
            tensors |= {f"{base}.{part}": each for part, each in packed.items()}
    dynamic = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    inputs = dynamic if form.bits == "fp8" else None
    weights = GROUP["weights"] | words
    config["quantization_config"] = {
        "config_groups": {
            "group_0": GROUP | {"input_activations": inputs, "weights": weights}
        },
        "format": stored_as,
        "global_compression_ratio": None,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.12.2",
    }
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    assert len(source.layers) == 4
    return folder


@pytest.mark.parametrize("name", FOREIGN)
def test_what_others_quantized_is_read_and_trimmed(name: str, tmp_path: Path) -> None:
    folder = foreign(tmp_path / "model", name)
    source, dense = open_checkpoint(folder), dense_tensors(folder)
    assert source.tensors.keys() == dense.keys()
    for at, tensor in dense.items():
        assert raw_bytes(read_weight(source, at)) == raw_bytes(tensor), at
    quantized(source, tmp_path / "out", UNEVEN, {})
    verify(tmp_path / "out", source)
    before, after = read_tensors(folder), read_tensors(tmp_path / "out")
    kept = {0: (0, (5, 0, 3)), 1: (1, ()), 2: (3, (1, 2, 4, 6, 7))}
    for at, tensor in after.items():
        parts = at.split(".")
        if "layers" in parts:
            layer, experts = kept[int(parts[2])]
            parts[2] = str(layer)
            if "experts" in parts:
                parts[5] = str(experts[int(parts[5])])
            elif at.endswith("gate.weight"):
                tensor, rows = before[".".join(parts)], tensor
                assert torch.equal(rows, tensor[list(experts)])
        assert raw_bytes(tensor) == raw_bytes(before[".".join(parts)]), at
    ids_ST = torch.randint(3, 500, (2, 32), generator=torch.Generator().manual_seed(0))
    model = StreamingModel(source)
    hidden_STD = model.embed(ids_ST)
    for layer in source.layers:
        hidden_STD, x_ND = model.enter(layer.index, hidden_STD)
        assert x_ND is not None
        routing = model.route(layer, x_ND)
        out_ND = run_experts(
            x_ND, routing, layer, partial(read_expert, source, layer), model.act
        )
        hidden_STD += out_ND.view_as(hidden_STD)
    loss, count = model.nll(hidden_STD, ids_ST)
    logits = Reference(write_dense(folder, tmp_path / "dense")).logits(ids_ST)
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids_ST[:, 1:].flatten()
    )
    assert loss / count == pytest.approx(float(expected), rel=0.02)


def test_layers_named_in_the_config_keep_their_meaning(tmp_path: Path) -> None:
    source = tiny(tmp_path / "model")
    quantized(source, tmp_path / "whole", {}, INT4)
    path = tmp_path / "whole" / "config.json"
    config = read_json(path)
    ignored = ["lm_head", *(f"model.layers.{at}.self_attn.q_proj" for at in range(4))]
    config["quantization_config"]["ignore"] = ignored
    path.write_text(json.dumps(config))
    whole = open_checkpoint(tmp_path / "whole")
    quantized(whole, tmp_path / "out", UNEVEN, {})
    found = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert found["ignore"] == ignored[:4]
    # Layer 3 is layer 2 now; a pattern that no other number can be written into
    # becomes the list of what it meant.
    for pattern, expected in (
        (r"re:model\.layers\.3\..*", [r"re:model\.layers\.2\..*"]),
        (r"re:.*\.[13]\.self_attn.q_proj", [*ignored[2:4]]),
    ):
        config["quantization_config"]["ignore"] = [pattern]
        path.write_text(json.dumps(config))
        out = tmp_path / f"out-{len(expected)}"
        quantized(open_checkpoint(tmp_path / "whole"), out, UNEVEN, {})
        found = read_json(out / "config.json")["quantization_config"]
        assert found["ignore"] == expected
        verify(out, open_checkpoint(tmp_path / "whole"))


def test_the_config_is_what_the_library_reads_and_leaves_the_rest_alone(
    tmp_path: Path,
) -> None:
    source = tiny(tmp_path / "model", "deepseek_v3")
    quantized(source, tmp_path / "out", {}, STAGES["gptq-ordered"])
    block = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert block["quant_method"] == "compressed-tensors"
    assert block["format"] == "pack-quantized"
    (group,) = block["config_groups"].values()
    weights = group["weights"]
    assert (weights["num_bits"], weights["group_size"]) == (4, 32)
    assert weights["symmetric"] is True
    assert weights["actorder"] == "weight"
    assert group["input_activations"] is None
    inner = {name.rpartition(".")[2].removesuffix("$") for name in block["ignore"]}
    assert {"lm_head", "gate", "kv_b_proj", "o_proj", "down_proj"} <= inner
    assert not any("experts\\.0" in name for name in block["ignore"])
    assert sum("mlp\\.gate_proj" in name for name in block["ignore"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "action"), RECIPES.items())
def test_combined_recipes_scale_to_any_depth(
    name: str, action: tuple[str, int], tmp_path: Path
) -> None:
    source = tiny(tmp_path / "model", layers=8, experts=4)
    calibration = {
        "calibration": str(tiny_text(tmp_path, 20_000)),
        "samples": 4,
        "sequence_length": 64,
    }
    recipe = with_overrides(load_recipe(name), calibration)
    plan, _, verified = pipeline.run(
        source, recipe, tmp_path / "out", pipeline.RunOptions()
    )
    actions = [layer.action for layer in plan.layers]
    assert actions.count(action[0]) == action[1]
    assert actions.count("keep") == 8 - action[1]
    assert plan.quantize.group_size == 128
    assert verified.experts == 4 * (8 - action[1])
    block = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert block["format"] == "pack-quantized"
    passes = read_json(tmp_path / "out" / "provenance.json")["forward_passes"]
    assert passes == {"measure": 1, "cut": 1}


def test_a_scope_takes_every_matrix_but_routers_and_embeddings(tmp_path: Path) -> None:
    latent = {"q_lora_rank": 64, "kv_lora_rank": 64}
    source = tiny(tmp_path / "model", "deepseek_v3", **latent)
    cuts: Cuts = {3: DROP_MOE}
    quantized(source, tmp_path / "out", cuts, STAGES["all-gptq"])
    out = open_checkpoint(tmp_path / "out")
    before, after = read_tensors(source.folder), dense_tensors(tmp_path / "out")
    plain = {
        name
        for name, info in out.tensors.items()
        if len(info.shape) == 2 and not isinstance(info, PartedTensor)
    }
    further = {"eh_proj.weight", "embed_tokens.weight", "shared_head.head.weight"}
    assert all(
        name.endswith("mlp.gate.weight") or name.partition(".layers.")[2][2:] in further
        for name in plain - {"model.embed_tokens.weight"}
    ), plain
    packed = out.tensors.keys() - plain
    assert "lm_head.weight" in packed
    for name in packed:
        if isinstance(out.tensors[name], PartedTensor):
            near(before[name], after[name])
    verify(tmp_path / "out", source)
    # Data decides all but the head, which is rounded: verify compares its bytes.
    with pytest.raises(ValidationError, match="awq scales experts alone"):
        QuantizeStage.model_validate(STAGES["awq"] | {"scope": ["experts", "head"]})
