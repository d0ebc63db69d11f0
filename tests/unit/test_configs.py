"""config.json of families that transformers does not know, read without remote code."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from vllm_moe_prune import configs

# As published: Snowflake/snowflake-arctic-instruct, deepseek-ai/deepseek-moe-16b-base.
ARCTIC: dict[str, Any] = {
    "architectures": ["ArcticForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_arctic.ArcticConfig"},
    "hidden_size": 7168,
    "intermediate_size": 4864,
    "max_position_embeddings": 4096,
    "model_type": "arctic",
    "moe_layer_frequency": 1,
    "moe_token_dropping": False,
    "num_attention_heads": 56,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 35,
    "num_key_value_heads": 8,
    "num_local_experts": 128,
    "parallel_attn_mlp_res": True,
    "quantization": None,
    "rope_theta": 10000,
    "torch_dtype": "bfloat16",
    "use_residual": True,
    "vocab_size": 32000,
}
DEEPSEEK: dict[str, Any] = {
    "architectures": ["DeepseekForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "model_type": "deepseek",
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 28,
    "rope_scaling": None,
    "rope_theta": 10000,
    "torch_dtype": "bfloat16",
    "vocab_size": 102400,
}


def read(folder: Path, values: dict[str, Any]) -> Any:
    configs.register()
    (folder / "config.json").write_text(json.dumps(values))
    return AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("values", [ARCTIC, DEEPSEEK], ids=["arctic", "deepseek"])
def test_published_fields_are_read_as_they_are(
    values: dict[str, Any], tmp_path: Path
) -> None:
    config = read(tmp_path, values)
    gone = ("auto_map", "torch_dtype", "rope_theta", "rope_scaling")
    for key in values.keys() - set(gone):
        assert getattr(config, key) == values[key], key
    assert type(config).__module__.startswith("vllm_moe_prune.configs")
    assert config.rope_parameters["rope_theta"] == 10000
    assert config.num_experts in (128, 64)
    assert config.num_key_value_heads == values.get("num_key_value_heads", 16)


def test_layers_may_differ(tmp_path: Path) -> None:
    per_layer = {"3": {"num_local_experts": 5}, "4": {"skip": ["block_sparse_moe"]}}
    config = read(tmp_path, ARCTIC | {"per_layer_config": per_layer})
    counts = [layer.num_local_experts for layer in config.per_layer_config]
    assert counts == [128] * 3 + [5] + [128] * 31
    with pytest.raises(RuntimeError, match="num_local_experts"):
        _ = config.num_local_experts


def test_one_switch_with_two_answers_is_refused(tmp_path: Path) -> None:
    values = {key: ARCTIC[key] for key in ARCTIC.keys() - {"use_residual"}}
    assert read(tmp_path, values).use_residual is True
    with pytest.raises(ValueError, match="use_residual is False, but"):
        read(tmp_path, ARCTIC | {"use_residual": False})
