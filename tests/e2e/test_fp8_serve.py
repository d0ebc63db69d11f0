"""FP8 checkpoints in real vLLM engines, on processors with AMX and without.

With AMX vLLM's kernels run what fits them; what does not, and everything elsewhere, is
run by ours or dequantized while loading. In float32 that is always so, and exact.
V vocabulary, T tokens.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import save_file
from torch import Tensor

from tests.engine import TOKENS, VOCAB, assert_same, served
from tests.family_cases import ENGINE, EQUAL, STOCK, UNEVEN, Case, halved, make_pruned
from tests.quantized import write_dense
from tests.reference import Reference, read_json, read_tensors
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.convert import convert
from vllm_moe_prune.kernels.quantized import Form
from vllm_moe_prune.plugin.compat import has_amx

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.usefixtures("engines_in_this_process"),
]
# vLLM's CPU kernels take blocks of 128 x 128, and routers of its own only.
UNIFORM = Case(
    "deepseek_v3",
    {1: halved(EQUAL), 2: EQUAL},
    architecture=STOCK,
    config={
        "fp8": (128, 128),
        "dtype": "bfloat16",
        "layers": 3,
        "hidden": 256,
        "width": 256,
        "moe_intermediate_size": 128,
        "q_lora_rank": 128,
    },
)
MLA = ENGINE["deepseek_v3"]
SAID = "No kernel runs FP8 linear layers on this CPU"


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What is logged; what is said once is said again."""
    from vllm_moe_prune.plugin.quant.dequantized_linear import warn_once

    warn_once.cache_clear()
    yield caplog
    warn_once.cache_clear()


def test_block_scales_are_served_whatever_the_processor(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    """Experts of layer 1 stay compressed, those of layer 2 are dense."""
    dense, truth_TV, _ = make_pruned(tmp_path, UNIFORM)
    assert read_json(dense / "config.json")["architectures"] == [STOCK]
    packed = tmp_path / "packed"
    assert convert(open_checkpoint(dense), packed, "bitmask").dense_layers == (2,)
    errors = [
        (served(folder, dtype="bfloat16", **MLA) - truth_TV).abs().mean().item()
        for folder in (dense, packed)
    ]
    assert errors[1] <= 1.5 * errors[0]
    assert errors[0] < 0.1
    assert said.text.count(SAID) == (0 if has_amx() else 1)
    for folder in (dense, packed):
        assert_same(served(folder, dtype="float32", **MLA), truth_TV)
    assert "16-bit activations only" in said.text or not has_amx()


def test_experts_are_served_where_vllm_has_no_kernel(tmp_path: Path) -> None:
    """On CPUs those of vLLM's want routers of its own; groups of layer 2 are uneven."""
    case = replace(UNIFORM, cuts={1: halved(EQUAL), 2: UNEVEN}, architecture=None)
    dense, truth_TV, _ = make_pruned(tmp_path, case)
    packed = tmp_path / "packed"
    assert convert(open_checkpoint(dense), packed, "bitmask").dense_layers == (2,)
    for folder in (dense, packed):
        found_TV = served(folder, dtype="bfloat16", **MLA)
        assert (found_TV - truth_TV).abs().mean().item() < 0.1


def quantize_attention(folder: Path, form: Form, inputs: dict[str, Any] | None) -> None:
    """Store the matrices of attention in FP8, as compressed-tensors does."""
    stored = {}
    for name, tensor in read_tensors(folder).items():
        stored[name] = tensor
        if "self_attn" in name:
            high, wide = (128, 128) if form.is_blocked else (1, tensor.shape[1])
            tiles = tensor.float().unflatten(0, (-1, high)).unflatten(2, (-1, wide))
            scale = tiles.abs().amax((1, 3), keepdim=True) / 448
            stored[name] = (tiles / scale).view_as(tensor).to(torch.float8_e4m3fn)
            stored[f"{name}_scale"] = scale[:, 0, :, 0].to(tensor.dtype).contiguous()
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    group = {"targets": ["Linear"], "weights": form.args, "format": form.format}
    block = QuantizationConfig.model_validate(
        {
            "config_groups": {"group_0": group | {"input_activations": inputs}},
            "format": form.format,
            "quantization_status": "compressed",
            "ignore": ["lm_head", r"re:.*block_sparse_moe.*"],
        }
    )
    config = read_json(folder / "config.json")
    config["quantization_config"] = block.model_dump(mode="json")
    (folder / "config.json").write_text(json.dumps(config))


def mixtral_says(folder: Path) -> Tensor:
    logits_STV = Reference(folder).logits(torch.tensor([TOKENS]))
    return logits_STV[0].log_softmax(dim=-1)


@pytest.mark.parametrize("weights_only", [False, True], ids=["w8a8", "w8a16"])
@pytest.mark.parametrize("size", [128, None], ids=["blocks", "rows"])
def test_linear_layers_of_compressed_tensors_are_served(
    size: int | None,
    weights_only: bool,
    tmp_path: Path,
    said: pytest.LogCaptureFixture,
) -> None:
    sizes = {"layers": 2, "hidden": 256, "kv_heads": 1, "heads": 2, "vocab": VOCAB}
    folder = tiny_checkpoint(
        tmp_path / "model", dtype="float32", tokenizer=False, **sizes
    )
    form = Form("fp8", size)
    quantize_attention(folder, form, None if weights_only else form.inputs)
    assert open_checkpoint(folder).form == form
    truth_TV = mixtral_says(write_dense(folder, tmp_path / "dense"))
    if size is None and not weights_only:  # torch has a kernel, for any CPU
        found_TV = served(folder, dtype="bfloat16")
        assert (found_TV - truth_TV).abs().mean() < 0.5  # activations are FP8 too
        assert SAID not in said.text
    assert_same(served(folder), truth_TV)
    assert SAID in said.text
