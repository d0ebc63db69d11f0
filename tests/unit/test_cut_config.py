"""config.json of an output: plain where layers are alike, refused where they differ."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from tests.reference import (
    DROP_BLOCK,
    DROP_MOE,
    Cuts,
    LayerCut,
    read_json,
    read_tensors,
    write_plan,
)
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.calibrate.data import Tokens
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.execute import execute_plan
from vllm_moe_prune.decide.cut_plan import CutPlan, load_plan

STOCK, OURS = ["MixtralForCausalLM"], ["MoePruneMixtralForCausalLM"]
HALF = LayerCut(keep=(0, 2))
# A layer whose MoE sublayer was never there, as transformers writes it.
NO_MOE = {"num_local_experts": 0, "skip": ["mlp"]}


def make_model(folder: Path, **config: Any) -> Path:
    return tiny_checkpoint(
        folder,
        layers=4,
        experts=4,
        hidden=16,
        width=8,
        vocab=32,
        shards=1,
        tokenizer=False,
        **config,
    )


def hand_plan(folder: Path, checkpoint: Checkpoint, cuts: Cuts, **how: str) -> CutPlan:
    return load_plan(write_plan(folder / "plan.json", checkpoint, cuts, **how))


def pruned(source: Path, out: Path, cuts: Cuts, **how: str) -> dict[str, Any]:
    checkpoint = open_checkpoint(source)
    execute_plan(checkpoint, hand_plan(out.parent, checkpoint, cuts, **how), out)
    config: dict[str, Any] = read_json(out / "config.json")
    return config


def test_equal_layers_leave_plain_counts_and_the_stock_class(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    config = pruned(model, tmp_path / "out", dict.fromkeys(range(4), HALF))
    assert config["num_local_experts"] == 2
    assert config["architectures"] == STOCK
    assert "per_layer_config" not in config


def test_every_other_field_stays_even_unknown_ones(tmp_path: Path) -> None:
    odd = {"rope_scaling": None, "our_own": {"a": [1, "é"]}, "num_experts": "none"}
    model = make_model(tmp_path / "model", **odd)
    config = pruned(model, tmp_path / "out", dict.fromkeys(range(4), HALF))
    expected = read_json(model / "config.json") | {"num_local_experts": 2}
    assert {key: config[key] for key in expected} == expected
    assert config.keys() - expected.keys() == {"moe_prune"}


def test_layers_that_differ_are_told_by_their_real_attribute_names(
    tmp_path: Path,
) -> None:
    model = make_model(tmp_path / "model")
    cuts = {0: LayerCut(keep=(3,)), 1: HALF, 2: DROP_MOE}
    config = pruned(model, tmp_path / "out", cuts)
    assert config["architectures"] == OURS
    assert config["num_local_experts"] == 4
    assert config["num_experts_per_tok"] == 2
    assert config["per_layer_config"] == {
        "0": {"num_local_experts": 1, "num_experts_per_tok": 1},
        "1": {"num_local_experts": 2},
        "2": {"num_local_experts": 0, "skip": ["mlp"]},
    }


def test_transformers_refuses_to_read_one_count_of_layers_that_differ(
    tmp_path: Path,
) -> None:
    model, out = make_model(tmp_path / "model"), tmp_path / "out"
    pruned(model, out, {1: HALF, 2: DROP_MOE})
    config = AutoConfig.from_pretrained(out)
    with pytest.raises(RuntimeError, match="per-layer attribute"):
        _ = config.num_local_experts
    counts = [layer.num_local_experts for layer in config.per_layer_config]
    assert counts == [4, 2, 0, 4]


def test_dropped_blocks_shift_what_is_told_per_layer(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "chunked"]
    model = make_model(tmp_path / "model", layer_types=kinds)
    config = pruned(model, tmp_path / "out", {0: DROP_BLOCK, 2: DROP_BLOCK, 3: HALF})
    assert config["num_hidden_layers"] == 2
    assert config["layer_types"] == ["sliding_attention", "chunked"]
    assert config["per_layer_config"] == {"1": {"num_local_experts": 2}}


def test_layers_made_equal_again_are_stock_again(tmp_path: Path) -> None:
    model, between = make_model(tmp_path / "model"), tmp_path / "between"
    uneven = pruned(model, between, {0: LayerCut(keep=(0, 1, 3)), 3: DROP_MOE})
    assert "per_layer_config" in uneven
    cuts = {0: HALF, 1: HALF, 2: HALF, 3: DROP_BLOCK}
    config = pruned(between, tmp_path / "out", cuts)
    assert "per_layer_config" not in config
    assert (config["architectures"], config["num_local_experts"]) == (STOCK, 2)


def test_redirecting_needs_the_plugin(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    half = LayerCut(keep=(0, 2), clusters=((0, 1), (2, 3)))
    config = pruned(
        model, tmp_path / "out", dict.fromkeys(range(4), half), routing="redirect"
    )
    assert config["architectures"] == OURS
    assert config["num_local_experts"] == 2


def test_the_remap_table_is_named_with_its_hash(tmp_path: Path) -> None:
    model, out = make_model(tmp_path / "model"), tmp_path / "out"
    block = pruned(model, out, {1: HALF})["moe_prune"]
    assert block == {
        "format_version": 1,
        "tool_version": "1.2.3",
        "remap": "expert_remap.json",
        "remap_sha256": hashlib.sha256(
            (out / "expert_remap.json").read_bytes()
        ).hexdigest(),
    }


def test_what_the_input_told_per_layer_is_kept(tmp_path: Path) -> None:
    """A layer may have chosen fewer experts, or another width, before any cut."""
    told = {"1": {"num_experts_per_tok": 1}, "3": {"sliding_window": 8}}
    model = make_model(tmp_path / "model", per_layer_config=told)
    assert pruned(model, tmp_path / "same", {})["per_layer_config"] == told
    config = pruned(model, tmp_path / "out", {0: DROP_BLOCK, 1: HALF})
    assert config["per_layer_config"] == {
        "0": {"num_experts_per_tok": 1, "num_local_experts": 2},
        "2": {"sliding_window": 8},
    }


def model_with_a_layer_without_moe(folder: Path) -> Path:
    model = make_model(folder, per_layer_config={"1": NO_MOE})
    path = model / "model.safetensors"
    tensors = {
        name: tensor
        for name, tensor in read_tensors(model).items()
        if not name.startswith("model.layers.1.block_sparse_moe.")
    }
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("slim", ["none", "magnitude", "wanda"])
def test_a_layer_that_never_had_experts_stays_so(tmp_path: Path, slim: str) -> None:
    model, out = model_with_a_layer_without_moe(tmp_path / "model"), tmp_path / "out"
    checkpoint = open_checkpoint(model)
    cuts = {0: LayerCut(keep=(0, 1, 2), sparsity=0.5), 2: DROP_BLOCK}
    plan = hand_plan(tmp_path, checkpoint, cuts, slim=slim)
    tokens = Tokens(
        ids_ST=torch.arange(32).reshape(2, 16), source="counting", sha256="0" * 64
    )
    execute_plan(checkpoint, plan, out, tokens=tokens)
    config = read_json(out / "config.json")
    assert config["per_layer_config"] == {"0": {"num_local_experts": 3}, "1": NO_MOE}
    again = open_checkpoint(out)
    assert [layer.num_experts for layer in again.layers] == [3, 0, 4]
    assert not again.layers[1].dropped
