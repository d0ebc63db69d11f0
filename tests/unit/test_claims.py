"""config.json compared with the headers when a checkpoint is opened."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.gptq_awq import make
from tests.quantized import read_json
from tests.quantizing import INT4, STAGES, quantized, tiny
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.calibrate.forward import StreamingModel
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.errors import CheckpointError
from vllm_moe_prune.progress import peak_rss_bytes

PLAIN = (
    "mixtral",
    "arctic",
    "deepseek",
    "olmoe",
    "qwen3_moe",
    "glm4_moe",
    "minimax_m2",
    "qwen2_moe",
)
MLA = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")
FAMILIES = PLAIN + MLA
SMALL: dict[str, Any] = {"layers": 2, "tokenizer": False, "vocab": 40}
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w3"
QUERY = "model.layers.1.self_attn.q_proj"


def edit(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(read_json(path) | values))


def edit_block(folder: Path, **values: Any) -> None:
    block = read_json(folder / "config.json")["quantization_config"]
    edit(folder, quantization_config=block | values)


def edit_tensors(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Put tensors in, or take them out."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        mine = {name: value for name, value in changes.items() if name in tensors}
        new = tensors | mine
        if path.name in ("model.safetensors", "model-00001-of-00001.safetensors"):
            new |= changes
        kept = {name: value for name, value in new.items() if value is not None}
        save_file(kept, path, metadata={"format": "pt"})


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(folder)
    said = str(error.value)
    assert "\n" not in said
    return said


SIZES: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [
    ("vocab_size", FAMILIES, ("embed_tokens", "vocab_size")),
    ("num_attention_heads", FAMILIES, ("self_attn", "num_attention_heads")),
    ("num_key_value_heads", PLAIN, ("k_proj", "num_key_value_heads")),
    ("head_dim", PLAIN, ("q_proj", "head_dim")),
    ("qk_rope_head_dim", MLA, ("qk_rope_head_dim",)),
    ("qk_nope_head_dim", MLA, ("qk_nope_head_dim",)),
    ("kv_lora_rank", MLA, ("kv_lora_rank",)),
    ("v_head_dim", MLA, ("v_head_dim",)),
    ("q_lora_rank", MLA[1:], ("q_lora_rank",)),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_that_the_tensors_do_not_have_are_refused(
    family: str, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path / "model", model_type=family, **SMALL)
    right = read_json(folder / "config.json")
    open_checkpoint(folder)
    tried = 0
    for key, families, says in SIZES:
        for value in (3, 1 << 31, 1 << 62) if family in families else ():
            edit(folder, **right | {key: value})
            said = refused(folder)
            assert all(fragment in said for fragment in says), said
            tried += 1
    assert tried == 3 * (4 if family not in MLA else 6 + (family != "deepseek_v2"))


@pytest.mark.parametrize(
    "name", ["lm_head", "model.norm", "model.layers.0.input_layernorm"]
)
def test_shapes_that_config_json_does_not_ask_for_are_refused(
    name: str, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path / "model", **SMALL | {"layers": 1, "shards": 1})
    old = load_file(folder / "model.safetensors")[f"{name}.weight"]
    edit_tensors(folder, {f"{name}.weight": old[:-1].contiguous()})
    assert name in refused(folder)


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_one_dense_matrix_among_packed_experts_is_refused(
    name: str, tmp_path: Path
) -> None:
    dense = make(tmp_path / "model", name, **SMALL)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    gone: dict[str, torch.Tensor | None] = {
        at: None for at in stored if at.startswith(EXPERT)
    }
    edit_tensors(
        tmp_path / "model", gone | {f"{EXPERT}.weight": dense[f"{EXPERT}.weight"]}
    )
    said = refused(tmp_path / "model")
    assert f"{EXPERT}.weight is stored as BF16" in said
    assert "in parts (qweight" in said


@pytest.mark.parametrize("stage", ["int4", "int8", "fp8-rows"])
def test_one_dense_matrix_among_quantized_experts_is_refused(
    stage: str, tmp_path: Path
) -> None:
    source, out = tiny(tmp_path / "model", layers=2), tmp_path / "out"
    quantized(source, out, {}, STAGES[stage])
    dense = torch.ones(128, 128, dtype=torch.bfloat16)
    for path in out.glob("*.safetensors"):
        tensors = load_file(path)
        mine = [at for at in tensors if at.startswith(f"{EXPERT}.")]
        for at in mine:
            del tensors[at]
        if mine:
            tensors[f"{EXPERT}.weight"] = dense
        save_file(tensors, path, metadata={"format": "pt"})
    (out / "model.safetensors.index.json").unlink(missing_ok=True)
    names = sorted(out.glob("*.safetensors"))
    merged = {at: one for path in names for at, one in load_file(path).items()}
    for path in names:
        path.unlink()
    save_file(merged, out / "model.safetensors", metadata={"format": "pt"})
    assert f"{EXPERT}.weight is stored as BF16" in refused(out)


def test_one_bf16_matrix_among_fp8_experts_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", shards=1, fp8=(32, 32), **SMALL)
    # All of one role, which is as alike as single roles need to be.
    stored = load_file(folder / "model.safetensors")
    changes: dict[str, torch.Tensor | None] = {}
    for at, tensor in stored.items():
        if at.endswith("w2.weight") and "layers.1" in at:
            changes |= {at: tensor.bfloat16(), f"{at}_scale_inv": None}
    edit_tensors(folder, changes)
    said = refused(folder)
    assert "w2.weight is stored as BF16" in said
    assert "F8_E4M3" in said


BLOCKS: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "strategy": "channel"},
            }
        },
    },
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_left_over_from_other_weights_is_refused(
    name: str, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(
        tmp_path / "model", layers=1, quantization_config=BLOCKS[name]
    )
    said = refused(folder)
    assert "no tensor is quantized" in said
    assert "Delete quantization_config" in said


def test_quantized_weights_without_a_block_are_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", **SMALL | {"layers": 1, "shards": 1})
    name = f"{QUERY.replace('.1.', '.0.')}.weight"
    query = load_file(folder / "model.safetensors")[name]
    edit_tensors(folder, {name: query.to(torch.float8_e4m3fn)})
    assert "has no quantization_config" in refused(folder)


def plain_query(folder: Path) -> None:
    """Store one query projection of an FP8 checkpoint in bf16."""
    stored = load_file(folder / "model.safetensors")[f"{QUERY}.weight"]
    dense = {f"{QUERY}.weight": stored.bfloat16(), f"{QUERY}.weight_scale_inv": None}
    edit_tensors(folder, dense)


def warned(folder: Path, caplog: pytest.LogCaptureFixture) -> str:
    """What opening a checkpoint says beside; once, however often it is opened."""
    caplog.clear()
    open_checkpoint(folder)
    open_checkpoint(folder)
    assert len(caplog.messages) <= 1
    return "".join(caplog.messages)


def test_lists_of_fp8_are_compared_with_what_is_stored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_checkpoint(tmp_path / "model", shards=1, fp8=(32, 32), **SMALL)
    for key in ("modules_to_not_convert", "ignored_layers"):
        edit_block(folder, **{key: ["lm_head", "gate"]})
        assert warned(folder, caplog) == ""
    edit_block(folder, modules_to_not_convert=[QUERY])
    assert "says that it is not quantized" in warned(folder, caplog)
    plain_query(folder)
    for names in (
        [QUERY],
        [r".*layers\.1.*q_proj$"],
        ["lm_head", "1.self_attn.q_proj"],
    ):
        edit_block(folder, modules_to_not_convert=names, ignored_layers=None)
        assert warned(folder, caplog) == ""
    edit_block(folder, modules_to_not_convert=["lm_head", "model.layers.1.mlp"])
    said = warned(folder, caplog)
    assert f"{QUERY}.weight is stored as BF16" in said
    assert "says that it is quantized" in said
    experts = {
        name: tensor.bfloat16()
        for name, tensor in load_file(folder / "model.safetensors").items()
        if "layers.1" in name and ".experts." in name and name.endswith("weight")
    }
    gone = dict.fromkeys(f"{name}_scale_inv" for name in experts)
    edit_tensors(folder, experts | gone)
    said = refused(folder)
    assert "w1.weight is stored as BF16" in said
    assert "modules_to_not_convert" in said
    for listed in ("model.layers.1.", "model.layers.1.block_sparse_moe.experts.0.w1"):
        edit_block(folder, modules_to_not_convert=[listed, QUERY])
        open_checkpoint(folder)


def test_lists_of_compressed_tensors_are_compared_with_what_is_stored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, out = tiny(tmp_path / "model", layers=2), tmp_path / "out"
    quantized(source, out, {}, INT4)
    ignored = read_json(out / "config.json")["quantization_config"]["ignore"]
    assert warned(out, caplog) == ""
    edit_block(out, ignore=[name for name in ignored if "q_proj" not in name])
    said = warned(out, caplog)
    assert "q_proj.weight is stored as BF16" in said
    assert "2 such matrices" in said
    edit_block(out, ignore=[*ignored, r"re:.*layers\.1\..*experts\..*"])
    assert "says that it is not quantized (24 such" in warned(out, caplog)


def test_rules_of_gptqmodel_are_compared_with_what_is_stored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "model"
    make(folder, "gptq-symmetric", **SMALL)
    edit_block(folder, dynamic={"-:.*self_attn.*": {}})
    assert "says that it is not quantized (8 such" in warned(folder, caplog)
    for rules in ({}, None, {r"-:.*gate$": {}, "+:.*w1": {"bits": 4}}):
        edit_block(folder, dynamic=rules)
        assert warned(folder, caplog) == ""


@pytest.mark.parametrize(
    ("method", "block", "says"),
    [
        ("fp8", {"modules_to_not_convert": ["["]}, "is not a pattern"),
        ("fp8", {"modules_to_not_convert": [3]}, "which is not a name"),
        ("fp8", {"ignored_layers": "lm_head"}, "not a list of names"),
        ("fp8", {"modules_to_not_convert": [r"(?:.|.)*[0-9]$"]}, "takes too long"),
        ("gptq", {"dynamic": ["-:.*"]}, "dynamic"),
        ("gptq", {"dynamic": {"-:(": {}}}, "is not a pattern"),
    ],
)
def test_lists_that_nobody_can_read_are_refused(
    method: str, block: dict[str, Any], says: str, tmp_path: Path
) -> None:
    if method == "fp8":
        tiny_checkpoint(tmp_path / "model", shards=1, fp8=(32, 32), **SMALL)
        plain_query(tmp_path / "model")
    else:
        make(tmp_path / "model", "gptq-symmetric", **SMALL)
    edit_block(tmp_path / "model", **block)
    assert says in refused(tmp_path / "model")


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_a_quantized_router_is_refused(name: str, tmp_path: Path) -> None:
    make(tmp_path / "model", name, layers=1, experts=8)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    moe = "model.layers.0.block_sparse_moe."
    rows = 8
    parts = {
        "gptq": {"qweight": (8, rows), "qzeros": (2, 1), "g_idx": (64,)},
        "awq": {"qweight": (64, 1), "qzeros": (2, 1)},
    }[name]
    changes: dict[str, torch.Tensor | None] = {
        f"{moe}gate.{part}": torch.zeros(shape, dtype=torch.int32)
        for part, shape in parts.items()
    }
    changes |= {
        f"{moe}gate.scales": torch.ones(2, rows, dtype=torch.float16),
        f"{moe}gate.weight": None,
    }
    assert stored[f"{moe}gate.weight"].shape[0] == rows
    edit_tensors(tmp_path / "model", changes)
    assert "the router is quantized" in refused(tmp_path / "model")


@pytest.mark.parametrize(
    ("alias", "architecture", "works"),
    [
        ("kimi_k3", "DeepseekV3ForCausalLM", "deepseek_v3"),
        ("deepseek-v3", "Custom", "deepseek_v3"),
        ("DeepseekV2", "Custom", "deepseek_v2"),
        ("deepseek_moe", "Custom", "deepseek"),
        ("snowflake", "ArcticForCausalLM", "arctic"),
        ("mixtral_tuned", "MoePruneMixtralForCausalLM", "mixtral"),
        ("gpt2", "GPT2LMHeadModel", None),
    ],
)
def test_an_alias_of_a_family_says_which_name_works(
    alias: str, architecture: str, works: str | None, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path / "model", **SMALL)
    edit(folder, model_type=alias, architectures=[architecture])
    said = refused(folder)
    assert (f"set model_type to {works!r}" in said) == (works is not None)
    assert ("set model_type" in said) == (works is not None)


@pytest.mark.parametrize(("declared", "missing"), [(None, 2), (0, 2), (1, 2)])
def test_undeclared_mtp_layers_name_their_key(
    declared: int | None, missing: int, tmp_path: Path
) -> None:
    options = SMALL | {"model_type": "deepseek_v3", "num_nextn_predict_layers": 2}
    folder = tiny_checkpoint(tmp_path / "model", **options)
    assert sum(layer.mtp for layer in open_checkpoint(folder).layers) == missing
    edit(folder, num_nextn_predict_layers=declared)
    said = refused(folder)
    assert f"num_nextn_predict_layers: set it to {missing}" in said
    assert "num_hidden_layers is 2" in said


def test_a_number_of_experts_per_layer_is_read_and_checked(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", shards=1, **SMALL)
    moe = "model.layers.1.block_sparse_moe."
    stored = load_file(folder / "model.safetensors")
    gone: dict[str, torch.Tensor | None] = {
        name: None
        for name in stored
        if name.startswith((f"{moe}experts.6", f"{moe}experts.7"))
    }
    edit_tensors(folder, gone | {f"{moe}gate.weight": stored[f"{moe}gate.weight"][:6]})
    edit(folder, num_local_experts=[8, 6])
    assert [layer.num_experts for layer in open_checkpoint(folder).layers] == [8, 6]
    for wrong in ([8, 8], [8], [8, 6, 6], [8, "6"], [8, -6], [8, None], []):
        edit(folder, num_local_experts=wrong)
        refused(folder)
    edit(folder, num_local_experts=8, per_layer_config={"1": {"num_local_experts": 6}})
    assert [layer.num_experts for layer in open_checkpoint(folder).layers] == [8, 6]


def test_mixed_data_types_say_the_remedy(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", shards=1, **SMALL)
    name = f"{EXPERT}.weight"
    stored = load_file(folder / "model.safetensors")
    edit_tensors(folder, {name: stored[name].half()})
    assert "Save the model again in one dtype" in refused(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_allocated_by_a_size_that_no_tensor_has(
    family: str, tmp_path: Path
) -> None:
    """Without the attention that would tell, and by a share of a head."""
    folder = tiny_checkpoint(tmp_path / "model", model_type=family, shards=1, **SMALL)
    edit(
        folder,
        rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}
        | {"partial_rotary_factor": 1 << 31, "original_max_position_embeddings": 64},
    )
    with pytest.raises(CheckpointError, match="not a part of a head"):
        StreamingModel(open_checkpoint(folder))
    stored = load_file(folder / "model.safetensors")
    edit_tensors(folder, {name: None for name in stored if "self_attn" in name})
    size = "qk_rope_head_dim" if family in MLA else "head_dim"
    edit(folder, rope_parameters=None, **{size: 1 << 31})
    with pytest.raises(CheckpointError, match=r"self_attn\..* is missing"):
        StreamingModel(open_checkpoint(folder))
    assert peak_rss_bytes() < 6 << 30
