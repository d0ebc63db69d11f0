"""What ``recommend`` counts, against the published numbers and against real cuts."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.tiny import tiny_checkpoint
from vllm_moe_prune import pipeline
from vllm_moe_prune.checkpoint.build import build_checkpoint
from vllm_moe_prune.checkpoint.index import ITEM_BYTES, TensorInfo
from vllm_moe_prune.checkpoint.open import Checkpoint, Origin
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cli import app
from vllm_moe_prune.cut.predict import facts_of
from vllm_moe_prune.errors import RecipeError
from vllm_moe_prune.recipes.loading import load_recipe, shipped_recipes
from vllm_moe_prune.recipes.schema import Recipe, parse_recipe
from vllm_moe_prune.tune.recommend import (
    Costs,
    costs_of,
    parse_speed,
    plan_of_anyone,
    recommend,
    untouched,
)

GIB = 2**30


def mixtral_8x7b(folder: Path) -> Checkpoint:
    """Headers of the published model; there are no weights behind them."""
    hidden, width, layers, experts, keys = 4096, 14336, 32, 8, 1024
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (32000, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (32000, hidden),
    }
    for at in range(layers):
        layer = f"model.layers.{at}."
        for name, rows in (("q", hidden), ("k", keys), ("v", keys), ("o", hidden)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (rows, hidden)
        for norm in ("input", "post_attention"):
            shapes[f"{layer}{norm}_layernorm.weight"] = (hidden,)
        moe = f"{layer}block_sparse_moe."
        shapes[f"{moe}gate.weight"] = (experts, hidden)
        for expert in range(experts):
            for matrix in ("w1", "w2", "w3"):
                shape = (hidden, width) if matrix == "w2" else (width, hidden)
                shapes[f"{moe}experts.{expert}.{matrix}.weight"] = shape
    tensors = {}
    for name, shape in shapes.items():
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        size = count * ITEM_BYTES["BF16"]
        file = folder / "model.safetensors"
        tensors[name] = TensorInfo(
            name=name, dtype="BF16", shape=shape, file=file, offset=0, nbytes=size
        )
    config = {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    }
    return build_checkpoint(folder, config, tensors, Origin("mixtral", None))


def costs(checkpoint: Checkpoint, **recipe: Any) -> Costs:
    none = {"experts": {"method": "none"}, "slim": {"method": "none"}}
    asked = parse_recipe(none | recipe, "test")
    return costs_of(checkpoint, plan_of_anyone(facts_of(checkpoint, ""), asked))


def test_flops_and_sizes_are_those_of_the_paper(tmp_path: Path) -> None:
    """UNIFIED, Table 3: 54.4T, L8/32 42.9T, B5/32 46.0T; E2/8 changes no FLOPs.

    Its memory is that of the weights and about 0.6 GiB.
    """
    model = mixtral_8x7b(tmp_path)
    base = costs_of(model, untouched(facts_of(model, "")))
    layers = costs(model, layers={"moe_share": 0.25})
    blocks = costs(model, layers={"block_share": 0.15625})
    experts = costs(model, experts={"method": "score", "keep": 6})
    tflops = [round(one.flops / 1e12, 1) for one in (base, layers, blocks, experts)]
    assert tflops == [54.4, 42.9, 46.0, 54.4]
    sizes = [one.weight_bytes / GIB for one in (base, layers, blocks, experts)]
    assert sizes == pytest.approx([86.99, 65.99, 73.47, 65.99], abs=0.02)
    quantized = costs(model, quantize={"method": "awq"})
    assert quantized.flops == base.flops
    assert quantized.weight_bytes / GIB == pytest.approx(24.65, abs=0.05)
    # All but the embedding and 6 of 8 experts is read; experts are 4.125 bits.
    assert base.decode_bytes / 2 == pytest.approx(12.75e9, rel=0.001)
    assert base.decode_bytes / quantized.decode_bytes == pytest.approx(2.91, abs=0.005)


@pytest.mark.parametrize("family", ["mixtral", "arctic", "deepseek_v3"])
@pytest.mark.parametrize("name", ["fp8", "awq4"])
def test_sizes_are_those_of_real_plans(family: str, name: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, model_type=family, hidden=128, width=128)
    checkpoint = open_checkpoint(folder)
    recipe = load_recipe(name)
    found = costs_of(checkpoint, plan_of_anyone(facts_of(checkpoint, ""), recipe))
    plan = pipeline.plan(checkpoint, recipe, None)
    assert plan.predicted is not None
    assert found.weight_bytes == plan.predicted.tensor_bytes
    assert found.decode_bytes < found.weight_bytes


def test_fp8_scales_of_experts_are_read_as_often_as_experts(tmp_path: Path) -> None:
    sizes = {"hidden": 64, "width": 64, "layers": 2, "tokenizer": False}
    found, expected = [], []
    for fp8 in ((32, 32), (64, 64)):
        options = {"model_type": "deepseek_v3", "fp8": fp8}
        checkpoint = open_checkpoint(
            tiny_checkpoint(tmp_path / str(fp8), **sizes, **options)
        )
        nothing = plan_of_anyone(facts_of(checkpoint, ""), Recipe(name="nothing"))
        found.append(costs_of(checkpoint, nothing))
        (layer,) = [one for one in checkpoint.decoder_layers if one.has_moe]
        scales = {
            name: info.nbytes
            for name, info in checkpoint.tensors.items()
            if name.endswith("_scale_inv")
        }
        routed = sum(size for name, size in scales.items() if ".experts." in name)
        used = routed * layer.top_k // layer.num_experts
        expected.append(sum(scales.values()) - routed + used)
    fine, coarse = found
    assert fine.decode_bytes - coarse.decode_bytes == expected[0] - expected[1] > 0
    assert fine.flops == coarse.flops


def test_a_head_that_is_stored_twice_is_read_once(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, tokenizer=False)
    costs = []
    for tied in (False, True):
        config = json.loads((folder / "config.json").read_text())
        config["tie_word_embeddings"] = tied
        (folder / "config.json").write_text(json.dumps(config))
        checkpoint = open_checkpoint(folder)
        nothing = plan_of_anyone(facts_of(checkpoint, ""), Recipe(name="nothing"))
        costs.append(costs_of(checkpoint, nothing))
    assert costs[0] == costs[1]


@pytest.mark.slow
def test_a_wish_chooses_among_the_shipped_recipes(tmp_path: Path) -> None:
    model = mixtral_8x7b(tmp_path)
    recipes = [load_recipe(name) for name in shipped_recipes()]
    found = recommend(model, recipes, 24 * GIB, None)
    names = [one.recipe.name for one in found.choices]
    assert names == ["turbo-block", "gpu-int4", "turbo"]
    assert all(one.costs.weight_bytes <= 24 * GIB for one in found.choices)
    searches = {name for name in shipped_recipes() if name.startswith("best")}
    assert found.left_out == dict.fromkeys(searches, "searches for its plan")
    fast = recommend(model, recipes, None, 2.0)
    names = [one.recipe.name for one in fast.choices]
    assert set(names) == {"awq4", "gptq4", "gpu-int4", "turbo", "turbo-block"}
    assert all(one.faster(fast.original) >= 2 for one in fast.choices)
    everything = recommend(model, recipes, None, 0.1)
    sizes = [one.costs.weight_bytes for one in everything.choices]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) == len(recipes) - len(searches)
    with pytest.raises(RecipeError, match=r"The smallest is \S+ with .*GiB"):
        recommend(model, recipes, GIB, None)


def test_recipes_that_do_not_fit_the_model_are_left_out_with_the_reason(
    tmp_path: Path,
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(tmp_path, width=40))
    recipes = [load_recipe("awq4"), Recipe(name="nothing")]
    found = recommend(checkpoint, recipes, None, 0.5)
    assert "do not divide into groups of 32" in found.left_out["awq4"]


def test_the_command_says_it_in_json_and_in_words(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", hidden=128, width=128)
    wish = ["recommend", str(folder), "--speed", "1.2x"]
    said = CliRunner().invoke(app, [*wish, "--json"])
    assert said.exit_code == 0
    data = json.loads(said.stdout)
    first = data["recipes"][0]
    factor = data["original"]["decode_bytes"] / first["decode_bytes"]
    assert first["decode_bytes_factor"] == pytest.approx(factor, abs=1e-4)
    words = CliRunner().invoke(app, wish).stdout
    assert all(one["recipe"] in words for one in data["recipes"])


@pytest.mark.parametrize("text", ["", "x", "-1x", "0", "nan", "infx", "fast"])
def test_what_is_no_speed_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="is not a speed"):
        parse_speed(text)
    assert parse_speed(" 1.5X ") == 1.5
