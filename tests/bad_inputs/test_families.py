"""Checkpoints of Arctic and DeepSeek that lie are refused when they are opened."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_checkpoint
from vllm_moe_prune.checkpoint.reader import check_routers
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.errors import CheckpointError

ROUTER = "model.layers.1.mlp.gate."
EXPERT = "model.layers.1.mlp.experts.3."
V3, V2, V1, ARCTIC = "deepseek_v3", "deepseek_v2", "deepseek", "arctic"
QWEN3, LITE = "qwen3_moe", "glm4_moe_lite"
Tensors = dict[str, torch.Tensor]


def changed(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


VALUES: list[tuple[str, dict[str, Any], str]] = [
    (V1, {"first_k_dense_replace": -1}, "first_k_dense_replace is -1"),
    (V1, {"first_k_dense_replace": "1"}, "first_k_dense_replace is '1'"),
    (V1, {"first_k_dense_replace": 0}, "layer 0: router"),
    (V1, {"first_k_dense_replace": 2}, "layer 1 has no experts by config.json"),
    (V1, {"first_k_dense_replace": 9}, "layer 1 has no experts by config.json"),
    (V1, {"moe_layer_freq": 0}, "moe_layer_freq is 0"),
    (V1, {"moe_layer_freq": True}, "moe_layer_freq is True"),
    (V1, {"n_shared_experts": -2}, "n_shared_experts is -2"),
    (V1, {"n_shared_experts": "2"}, "n_shared_experts is '2'"),
    (V1, {"n_shared_experts": 0}, "n_shared_experts is 0"),
    (V1, {"n_shared_experts": None}, "n_shared_experts is 0"),
    (V1, {"norm_topk_prob": "yes"}, "norm_topk_prob is 'yes'"),
    (V1, {"scoring_func": "tanh"}, "scoring_func is 'tanh'"),
    (V1, {"intermediate_size": None}, "intermediate_size is None"),
    (V2, {"n_group": 3}, "16 router rows do not divide into 3 groups"),
    (V2, {"n_group": 0}, "n_group is 0"),
    (V2, {"n_group": 10**30}, "do not divide"),
    (V2, {"topk_group": 5}, "topk_group is 5"),
    (V2, {"topk_group": 0}, "topk_group is 0"),
    (V2, {"topk_group": [2]}, r"topk_group is \[2\]"),
    (V2, {"topk_method": ["greedy"]}, "topk_method"),
    (V2, {"routed_scaling_factor": "1"}, "routed_scaling_factor is '1'"),
    (V2, {"routed_scaling_factor": 0}, "routed_scaling_factor is 0"),
    (V2, {"routed_scaling_factor": True}, "routed_scaling_factor is True"),
    (V3, {"num_nextn_predict_layers": -1}, "num_nextn_predict_layers is -1"),
    (V3, {"num_nextn_predict_layers": 0}, "tensors of layer 2 found"),
    (V3, {"mtp_per_layer_config": {"1": {}}}, "mtp_per_layer_config"),
    (V3, {"mtp_per_layer_config": {"0": {"n_routed_experts": 8}}}, "expert 8 found"),
    (ARCTIC, {"moe_layer_frequency": 0}, "moe_layer_frequency is 0"),
    (ARCTIC, {"moe_layer_frequency": 3}, "layer 0 has no experts by config.json"),
    (ARCTIC, {"parallel_attn_mlp_res": 1}, "parallel_attn_mlp_res is 1"),
    (ARCTIC, {"parallel_attn_mlp_res": False}, "parallel_attn_mlp_res is False"),
    (LITE, {"mlp_layer_types": "sparse"}, "mlp_layer_types is sparse; expected a list"),
    (LITE, {"mlp_layer_types": ["dense", 1]}, "mlp_layer_types is .*; expected a list"),
    (LITE, {"mlp_layer_types": ["dense"]}, "mlp_layer_types lists 1 layers"),
    (LITE, {"mlp_layer_types": ["sparse"] * 2}, "says layer 0 is sparse, but first_k"),
    (QWEN3, {"num_experts": "8"}, "num_experts is '8'; expected a whole"),
    (QWEN3, {"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]; only without it"),
    (QWEN3, {"num_local_experts": 7}, "num_experts is 8, but num_local_experts"),
    (QWEN3, {"per_layer_config": {"1": {"num_experts": 7}}}, "Call it num_local_exp"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(model_type: str) -> Path:
        if model_type not in made:
            path = tmp_path_factory.mktemp(model_type)
            further = {"num_nextn_predict_layers": 1} if model_type == V3 else {}
            made[model_type] = tiny_checkpoint(
                path, model_type=model_type, layers=2, shards=1, **further
            )
        return made[model_type]

    return folder


@pytest.mark.parametrize(("model_type", "values", "says"), VALUES)
def test_config_values(
    model_type: str,
    values: dict[str, Any],
    says: str,
    folders: Callable[[str], Path],
) -> None:
    folder = folders(model_type)
    intact = (folder / "config.json").read_text()
    open_checkpoint(folder)
    changed(folder, **values)
    try:
        with pytest.raises(CheckpointError, match=says):
            open_checkpoint(folder)
    finally:
        (folder / "config.json").write_text(intact)


def without(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def with_value(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return lambda tensors: tensors.update({name: make(tensors[name]).contiguous()})


O_PROJ = "model.layers.0.self_attn.o_proj.weight"
BIAS, SCALE = ROUTER + "e_score_correction_bias", EXPERT + "up_proj.weight_scale_inv"
TENSORS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "no bias": (without(BIAS), "e_score_correction_bias' is missing"),
    "a short bias": (with_value(BIAS, lambda bias: bias[:-1]), r"shape \[15\]"),
    "a bias of whole numbers": (with_value(BIAS, torch.Tensor.long), "I64 of shape"),
    "a bias of NaN": (
        with_value(BIAS, lambda bias: bias * float("nan")),
        "NaN or infinity",
    ),
    "no scale": (without(SCALE), "the scales of fp8, is missing"),
    "a scale too few": (with_value(SCALE, lambda scale: scale[:-1]), "expected F32"),
    "a scale of another type": (
        with_value(SCALE, lambda scale: scale.half()),
        "F16 of shape",
    ),
    "attention without scales": (without(O_PROJ + "_scale_inv"), "o_proj.* is missing"),
    "attention with a scale too few": (
        with_value(O_PROJ + "_scale_inv", lambda scale: scale[:-1]),
        "o_proj.*expected F32",
    ),
    "fp8 that is no matrix": (
        with_value(O_PROJ, lambda weight: weight.view(2, -1, weight.shape[1])),
        "o_proj.*only matrices",
    ),
    "one expert in bf16": (
        with_value(EXPERT + "up_proj.weight", lambda weight: weight.bfloat16()),
        "the same matrix of expert 0 is F8_E4M3",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(name: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(
        tmp_path, model_type=V3, layers=2, shards=1, fp8=(32, 32), tokenizer=False
    )
    spoil, says = TENSORS[name]
    path = folder / "model.safetensors"
    tensors = load_file(path)
    spoil(tensors)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=says):
        check_routers(open_checkpoint(folder))


@pytest.mark.parametrize(
    "said",
    [
        {"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [32, 32]},
        {"quant_method": "fp8"},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "fp8", "weight_block_size": [0, 32]},
        {"quant_method": "fp8", "weight_block_size": ["32", 32]},
        {"quant_method": "fp8", "weight_block_size": 128},
    ],
)
def test_quantizations(said: dict[str, Any], tmp_path: Path) -> None:
    folder = tiny_checkpoint(
        tmp_path, model_type=V3, layers=2, shards=1, fp8=(32, 32), tokenizer=False
    )
    changed(folder, quantization_config=said)
    with pytest.raises(
        CheckpointError, match=r"quantized|weight_block_size|group_size"
    ):
        open_checkpoint(folder)
