"""Every enumeration that is read of a checkpoint, beside the library's own.

Values that the library accepts are read too, or are refused by a list here that says
why; a value that a later library adds makes these tests fail.
"""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from compressed_tensors import CompressionFormat
from compressed_tensors.quantization import (
    ActivationOrdering,
    QuantizationArgs,
    QuantizationStrategy,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils.quantization_config import AwqFormat

from tests.families import family_fields
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.archs import find_arch, supported
from vllm_moe_prune.calibrate.forward import StreamingModel
from vllm_moe_prune.checkpoint.gptq_awq import read_auto_form
from vllm_moe_prune.checkpoint.index import ITEM_BYTES
from vllm_moe_prune.checkpoint.quantized_tensors import read_form
from vllm_moe_prune.checkpoint.reader import DTYPES
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.errors import CheckpointError


def test_every_data_type_of_safetensors_can_be_copied() -> None:
    theirs = safetensors.torch._TYPES
    assert set(theirs) <= set(ITEM_BYTES)
    assert {name: theirs[name].itemsize for name in theirs} == {
        name: ITEM_BYTES[name] for name in theirs
    }
    assert {name: DTYPES[name] for name in theirs} == theirs


ROPE: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 128},
    "longrope": {
        "factor": 2.0,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 128,
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "proportional": {"partial_rotary_factor": 0.5, "factor": 1.0},
}


@pytest.mark.parametrize("family", supported())
def test_every_kind_of_rope_is_built_as_transformers_does(
    family: str, tmp_path: Path
) -> None:
    assert ROPE.keys() == ROPE_INIT_FUNCTIONS.keys() | {"default"}
    sizes = {"layers": 1, "hidden": 32, "heads": 2, "vocab": 40, "tokenizer": False}
    sizes |= {"max_positions": 256, "model_type": family, "first_k_dense_replace": 0}
    latent = find_arch(family, "").attention.keys() >= {"kv_b_proj"}
    # So much of a head is rotated, where the family says it.
    fields = family_fields(family, 8, 96, 2, None, 1)
    share = fields.get("partial_rotary_factor", 1)
    sizes["qk_rope_head_dim" if latent else "head_dim"] = int(16 / share)
    if "rotary_dim" in fields:
        sizes |= {"head_dim": 32, "rotary_dim": 16}
    ids_ST = torch.arange(3, 35)[None]
    for kind, values in ROPE.items():
        for key, name in (("rope_parameters", "rope_type"), ("rope_scaling", "type")):
            rope = {name: kind, "rope_theta": 10000.0} | values
            folder = tmp_path / f"{kind}-{key}"
            tiny_checkpoint(folder, **sizes | {key: rope})
            model = StreamingModel(open_checkpoint(folder))
            if kind in ROPE_INIT_FUNCTIONS:
                found, _ = ROPE_INIT_FUNCTIONS[kind](model.config)
                assert torch.equal(model.rotary.inv_freq, found)
            hidden, _ = model.enter(0, model.embed(ids_ST))
            assert bool(torch.isfinite(hidden).all())


def weights(**values: Any) -> dict[str, Any]:
    args = {"num_bits": 4, "strategy": "group", "group_size": 32} | values
    group = {"targets": ["Linear"], "weights": args, "format": "pack-quantized"}
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": group},
            "format": "pack-quantized",
        }
    }


@pytest.mark.parametrize("order", [*ActivationOrdering, None, True, False])
def test_every_activation_ordering_is_read_or_is_vllms_to_refuse(order: Any) -> None:
    value = order.value if isinstance(order, ActivationOrdering) else order
    config = weights(actorder=value)
    QuantizationArgs.model_validate(
        config["quantization_config"]["config_groups"]["group_0"]["weights"]
    )
    # Groups of reordered columns: vLLM serves none such any more.
    if order in (ActivationOrdering.GROUP, ActivationOrdering.DYNAMIC, True):
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_form(config, "here")
        return
    form = read_form(config, "here")
    assert form is not None
    assert form.act_order == (order is not None and order is not False)


def test_strategies_and_formats_are_those_of_compressed_tensors() -> None:
    read = {"channel": {}, "group": {"group_size": 32}, "block": {}}
    other = {"tensor", "token", "tensor_group", "attn_head"}
    assert {one.value for one in QuantizationStrategy} == read.keys() | other
    formats = {"pack-quantized", "int-quantized", "float-quantized", "naive-quantized"}
    # Not weights in groups, rows or blocks, or with other scales.
    refused = {"dense", "sparse-bitmask", "sparse-24-bitmask", "marlin-24"}
    refused |= {"mixed-precision", "nvfp4-pack-quantized", "mxfp4-pack-quantized"}
    refused |= {"mxfp8-quantized"}
    assert {one.value for one in CompressionFormat} == formats | refused
    for kind in ("int", "float"):
        for stored in (f"{kind}-quantized", "naive-quantized"):
            config = weights(num_bits=8, type=kind, strategy="channel", group_size=None)
            block = config["quantization_config"]
            block["format"] = block["config_groups"]["group_0"]["format"] = stored
            assert read_form(config, "here") is not None, stored


def test_layouts_of_awq_and_gptq_are_spelt_as_transformers_takes_them() -> None:
    block = {"bits": 4, "group_size": 32}
    assert {one.value for one in AwqFormat} == {"gemm", "gemv", "gemv_fast", "llm-awq"}
    for key in ("version", "format"):
        for spelling in ("gemm", "GEMM"):
            config = {"quant_method": "awq", key: spelling} | block
            found = read_auto_form({"quantization_config": config}, "here")
            assert found is not None
    legacy = {"quant_method": "awq", "w_bit": 4, "q_group_size": 32}
    assert read_auto_form({"quantization_config": legacy}, "here") == found
    for key in ("checkpoint_format", "format"):
        for spelling in ("gptq", "GPTQ", "gptq_v2"):
            config = {"quant_method": "gptq", key: spelling} | block
            found = read_auto_form({"quantization_config": config}, "here")
            assert found is not None
            assert found.zeros_less_one == (spelling.lower() == "gptq")
    for method, key, value in (
        ("awq", "version", "gemv"),
        ("gptq", "checkpoint_format", "marlin"),
    ):
        config = {"quant_method": method, key: value} | block
        with pytest.raises(CheckpointError, match=value):
            read_auto_form({"quantization_config": config}, "here")
