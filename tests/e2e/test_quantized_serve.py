"""Quantized experts in real vLLM engines against dequantized ones in plain torch.

The plugin in float32 has to be right but for rounding. Stock vLLM's kernels compute in
bfloat16, and those for int4 and int8 round activations to 8 bits on the way.
V vocabulary, T tokens.
"""

import json
import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import save_file
from torch import Tensor

from tests.engine import TOKENS, VOCAB, assert_same, served, served_by_stock
from tests.family_cases import ENGINE, UNEVEN, UNSORTED
from tests.gptq_awq import make as make_layout
from tests.quantized import add_outliers, write_dense, write_untrimmed
from tests.quantizing import ALL
from tests.reference import (
    DROP_BLOCK,
    DROP_MOE,
    Cuts,
    LayerCut,
    Reference,
    read_json,
    read_tensors,
    write_plan,
)
from tests.reference_families import FamilyReference, Removed
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.calibrate.data import Tokens, sha256_of
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.execute import execute_plan
from vllm_moe_prune.decide.cut_plan import load_plan
from vllm_moe_prune.errors import ServeError
from vllm_moe_prune.kernels.quantized import Form
from vllm_moe_prune.plugin.compat import has_amx
from vllm_moe_prune.plugin.launch import serve_command
from vllm_moe_prune.recipes.schema import QuantizeStage

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.usefixtures("engines_in_this_process"),
]

MIXTRAL: Cuts = {
    0: LayerCut(keep=(0, 2, 3, 5, 7)),
    1: DROP_MOE,
    3: LayerCut(keep=(6, 0, 2)),
}
DEEPSEEK: Cuts = {1: DROP_MOE, 2: UNEVEN, 3: UNSORTED}
AWQ = {"method": "awq", "group_size": 32, "zero_point": True}
EXACT = {"moe_prune_activations": "exact"}
GPTQ = {"method": "gptq", "group_size": 32, "act_order": True, "scope": ALL}


def make_original(folder: Path, **options: Any) -> Path:
    sizes = {"vocab": VOCAB, "dtype": "float32", "tokenizer": False}
    sizes |= {"rms_norm_eps": 1e-6}  # as transformers has it for latent norms
    return add_outliers(tiny_checkpoint(folder, **(sizes | options)))


def make_cut(original: Path, out: Path, cuts: Cuts, stage: dict[str, Any]) -> Path:
    source = open_checkpoint(original)
    path = write_plan(out.with_suffix(".json"), source, cuts)
    quantize = QuantizeStage.model_validate(stage)
    plan = load_plan(path).model_copy(update={"quantize": quantize})
    seeded = torch.Generator().manual_seed(0)
    ids_ST = torch.randint(3, VOCAB, (8, 64), generator=seeded)
    execute_plan(
        source,
        plan,
        out,
        tokens=Tokens(ids_ST=ids_ST, source="random", sha256=sha256_of(ids_ST)),
    )
    return out


def mixtral_says(folder: Path, cuts: Cuts | None = None) -> Tensor:
    logits_STV = Reference(folder, cuts).logits(torch.tensor([TOKENS]))
    return logits_STV[0].log_softmax(dim=-1)


def deepseek_says(folder: Path, cuts: Cuts) -> Tensor:
    keep = {at: cut.keep for at, cut in cuts.items() if cut.keep is not None}
    moe = tuple(at for at, cut in cuts.items() if cut == DROP_MOE)
    reference = FamilyReference(folder, Removed(keep=keep, moe=moe))
    return reference.logits(torch.tensor([TOKENS]))[0].log_softmax(dim=-1)


def test_the_plugin_serves_uneven_mixtral(tmp_path: Path) -> None:
    original = make_original(tmp_path / "original")
    pruned = make_cut(original, tmp_path / "pruned", MIXTRAL, AWQ)
    dense = write_untrimmed(original, pruned, tmp_path / "dense")
    found_TV = served(pruned)
    assert_same(found_TV, mixtral_says(dense, MIXTRAL))
    assert (found_TV - mixtral_says(original, MIXTRAL)).abs().max() > 0.01


def test_the_plugin_serves_uneven_deepseek(tmp_path: Path) -> None:
    original = make_original(
        tmp_path / "original", model_type="deepseek_v3", q_lora_rank=64
    )
    pruned = make_cut(original, tmp_path / "pruned", DEEPSEEK, GPTQ)
    dense = write_untrimmed(original, pruned, tmp_path / "dense")
    found_TV = served(pruned, **ENGINE["deepseek_v3"])
    assert_same(found_TV, deepseek_says(dense, DEEPSEEK))
    assert (found_TV - deepseek_says(original, DEEPSEEK)).abs().max() > 0.01


def test_the_plugin_serves_what_was_trimmed_after_it_was_quantized(
    tmp_path: Path,
) -> None:
    original = make_original(tmp_path / "original")
    stage = {"method": "rtn", "weights": "int8", "scope": ALL}
    whole = make_cut(original, tmp_path / "whole", {}, stage)
    pruned = make_cut(whole, tmp_path / "pruned", MIXTRAL, {})
    dense = write_dense(whole, tmp_path / "dense")
    assert_same(served(pruned), mixtral_says(dense, MIXTRAL))


def test_what_vllm_has_no_kernel_for_stays_quantized(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    original = make_original(tmp_path / "original", dtype="bfloat16")
    stage = {"method": "rtn", "group_size": 32, "zero_point": True, "scope": ALL}
    whole = make_cut(original, tmp_path / "whole", {}, stage)
    with caplog.at_level(logging.DEBUG, "vllm_moe_prune"):
        found_TV = served(whole, dtype="bfloat16", additional_config=EXACT)
    said = [one.getMessage() for one in caplog.records if "our kernel" in one.message]
    assert len(said) == 4
    assert "layers.0.block_sparse_moe.experts: int4 experts" in said[0]
    dense = write_dense(whole, tmp_path / "dense")
    truth_TV = mixtral_says(dense)
    errors = [
        (log_probs_TV - truth_TV).abs().mean().item()
        for log_probs_TV in (
            *(found_TV, served(whole, dtype="bfloat16")),
            served(dense, dtype="bfloat16"),
        )
    ]
    exact, rounded, from_dense = errors
    assert exact <= 1.2 * from_dense
    assert exact != rounded
    assert rounded <= 4 * from_dense


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_no_kernel_runs_is_dequantized_with_a_warning(
    dtype: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    original = make_original(tmp_path / "original", dtype=dtype)
    stage = {"method": "rtn", "weights": "fp8"}
    whole = make_cut(original, tmp_path / "whole", {}, stage)
    found_TV = served(whole, dtype=dtype)
    said = [one.getMessage() for one in caplog.records if "dequantized" in one.message]
    assert len(said) == 4
    assert "layers.0.block_sparse_moe.experts: no kernel runs fp8" in said[0]
    dense = write_dense(whole, tmp_path / "dense")
    assert torch.equal(found_TV, served(dense, dtype=dtype))


def test_experts_that_are_not_quantized_are_left_to_vllm(tmp_path: Path) -> None:
    folder = make_original(tmp_path / "model")
    expected_TV = mixtral_says(folder)
    form, config = Form("int8"), read_json(folder / "config.json")
    group = {"targets": ["Linear"], "weights": form.args, "format": form.format}
    block = QuantizationConfig.model_validate(
        {
            "config_groups": {"group_0": group | {"input_activations": form.inputs}},
            "format": form.format,
            "quantization_status": "compressed",
            # float32 is what vLLM's quantized linear layers do not take.
            "ignore": ["lm_head", r"re:.*self_attn.*", r"re:.*block_sparse_moe.*"],
        }
    )
    config["quantization_config"] = block.model_dump(mode="json")
    (folder / "config.json").write_text(json.dumps(config))
    assert_same(served(folder), expected_TV)


STOCK = {
    "int4": {"method": "gptq", "group_size": 64},
    "int8": {"method": "rtn", "weights": "int8"},
    "fp8": {"method": "rtn", "weights": "fp8", "group_size": 128},
}


@pytest.mark.parametrize("name", ["gptq-symmetric", "awq"])
def test_the_layouts_of_other_tools_are_served_when_trimmed_or_refused(
    name: str, tmp_path: Path
) -> None:
    """By vLLM's kernels, which need AMX; elsewhere one line says so."""
    sizes = {"hidden": 128, "width": 128, "vocab": VOCAB, "tokenizer": False}
    stands_for = make_layout(tmp_path / "model", name, group=64, **sizes)
    dense = tiny_checkpoint(tmp_path / "dense", experts=6, **sizes)
    for path in dense.glob("*.safetensors*"):
        path.unlink()
    save_file(stands_for, dense / "model.safetensors", metadata={"format": "pt"})
    cuts: Cuts = {0: LayerCut(keep=(5, 0, 3)), 1: DROP_MOE}
    truth_TV = mixtral_says(dense, cuts)
    pruned = make_cut(tmp_path / "model", tmp_path / "pruned", cuts, {})
    if not has_amx():
        for refused in (partial(served, dtype="bfloat16"), serve_command):
            with pytest.raises(ServeError, match=r"which on CPUs need AMX; [^\n]+\Z"):
                refused(str(pruned))
        return
    assert serve_command(str(pruned))
    found_TV = served(pruned, dtype="bfloat16")
    # vLLM's kernels for 4 bits round inputs to 8; anything misread is far worse.
    assert (found_TV - truth_TV).abs().mean() < 0.15
    assert (truth_TV - mixtral_says(dense)).abs().mean() > 0.3


def test_uniform_mixtral_is_served_by_stock_vllm_or_with_the_plugin(
    tmp_path: Path,
) -> None:
    """Stock vLLM's kernels need AMX; elsewhere the plugin has what it lacks."""
    uniform: Cuts = {at: LayerCut(keep=(6, 1, 4, 3)) for at in range(4)}
    sizes = {"hidden": 128, "width": 128, "dtype": "bfloat16", "vocab": VOCAB}
    original = tiny_checkpoint(tmp_path / "original", tokenizer=False, **sizes)
    models = {
        name: make_cut(original, tmp_path / name, uniform, stage)
        for name, stage in STOCK.items()
    }
    for model in models.values():
        architectures = read_json(model / "config.json")["architectures"]
        assert architectures == ["MixtralForCausalLM"]
    denses = {
        name: write_dense(model, tmp_path / f"{name}-dense")
        for name, model in models.items()
    }
    both = models | {f"{name}-dense": dense for name, dense in denses.items()}
    if has_amx():
        found = served_by_stock(tmp_path, both, dtype="bfloat16")
    else:
        found = {name: served(each, dtype="bfloat16") for name, each in both.items()}
    for name, dense in denses.items():
        truth_TV = mixtral_says(dense)
        errors = [
            (found[key] - truth_TV).abs().mean().item()
            for key in (name, f"{name}-dense")
        ]
        assert errors[0] <= 2 * errors[1], name


DENSE = ".layers.2.mlp.experts."


def half_quantized(original: Path, whole: Path) -> None:
    """Put the original's experts of layer 2 back into a quantized copy of it."""
    dense = {at: one for at, one in read_tensors(original).items() if DENSE in at}
    kept = {at: one for at, one in read_tensors(whole).items() if DENSE not in at}
    for path in whole.glob("model*.safetensors*"):
        path.unlink()
    save_file(kept | dense, whole / "model.safetensors", metadata={"format": "pt"})
    config = read_json(whole / "config.json")
    config["quantization_config"]["ignore"].append(r"re:.*[2]\.mlp\.experts.*")
    (whole / "config.json").write_text(json.dumps(config))
    (whole / "tensor_hashes.json").unlink(missing_ok=True)


def test_lists_of_modules_hold_for_other_numbers_and_vllms_names(
    tmp_path: Path,
) -> None:
    """Layer 2, whose experts are dense, is layer 1; ``mlp`` is ``block_sparse_moe``."""
    original = make_original(tmp_path / "original", layout="mlp.gate_up_down")
    stage = {"method": "rtn", "weights": "int8"}
    whole = make_cut(original, tmp_path / "whole", {}, stage)
    half_quantized(original, whole)
    cuts = {0: DROP_BLOCK, 2: LayerCut(keep=(7, 1, 4)), 3: LayerCut(keep=(0, 2, 3))}
    pruned = make_cut(whole, tmp_path / "pruned", cuts, {})
    written = served(pruned)
    plain = write_dense(whole, tmp_path / "dense")
    shutil.copy(whole / "expert_remap.json", plain)
    expected = served(make_cut(plain, tmp_path / "expected", cuts, {}))
    assert_same(written, expected)
    loaded = served(
        whole,
        load_format="moe_prune",
        model_loader_extra_config={"plan": str(tmp_path / "pruned.json")},
    )
    assert_same(loaded, expected)
