"""Which form experts get in fewer bits, and what is refused. E experts."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.quantizing import INT4, STAGES, planned, quantized, tiny
from tests.reference import DROP_BLOCK, LayerCut, read_json
from vllm_moe_prune import pipeline
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.convert import convert
from vllm_moe_prune.cut.execute import execute_plan
from vllm_moe_prune.errors import (
    CalibrationError,
    CheckpointError,
    PlanError,
    RecipeError,
)
from vllm_moe_prune.recipes.schema import QuantizeStage, Recipe, parse_recipe


@pytest.mark.parametrize(
    ("weights", "width", "size"),
    [
        ("int4", 128, 128),
        ("int4", 192, 64),
        ("int4", 96, 32),
        ("fp8", 256, 128),
        ("fp8", 96, None),
        ("int8", 128, None),
    ],
)
def test_the_largest_group_that_fits_is_chosen(
    weights: Any, width: int, size: int | None, tmp_path: Path
) -> None:
    source = tiny(tmp_path / "model", width=width)
    recipe = Recipe(quantize=QuantizeStage(method="rtn", weights=weights))
    assert pipeline.plan(source, recipe, None).quantize.group_size == size


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    source = tiny(tmp_path / "model", width=96)
    for stage, says in (
        (INT4 | {"group_size": 64}, "96 columns do not divide into groups of 64"),
        (STAGES["fp8"], "blocks of 128 x 128"),
    ):
        recipe = Recipe(quantize=QuantizeStage.model_validate(stage))
        with pytest.raises(RecipeError, match=says):
            pipeline.plan(source, recipe, None)
    for size in ({"group_size": 64}, {}):
        recipe = Recipe(quantize=QuantizeStage(method="gptq", **size))
        odd = tiny(tmp_path / f"odd-{size}", width=40)
        with pytest.raises(RecipeError, match=r"method: rtn and .*weights: int8"):
            pipeline.plan(odd, recipe, None)
    quantized(source, tmp_path / "out", {}, INT4)
    again = open_checkpoint(tmp_path / "out")
    with pytest.raises(PlanError, match="quantized already"):
        quantized(again, tmp_path / "twice", {}, INT4)
    with pytest.raises(CheckpointError, match="its weights are quantized"):
        convert(again, tmp_path / "twice", "bitmask")
    mean = {0: LayerCut(keep=(0,), clusters=(tuple(range(8)),), reconstruct=True)}
    with pytest.raises(PlanError, match="averages experts"):
        quantized(again, tmp_path / "twice", mean, {})
    packed = tiny(tmp_path / "packed", layout="block_sparse_moe.packed")
    with pytest.raises(PlanError, match="a tensor for each matrix"):
        quantized(packed, tmp_path / "twice", {}, INT4)
    fp8 = tiny(tmp_path / "fp8", "deepseek_v3", fp8=(128, 128))
    with pytest.raises(PlanError, match="fp8 already"):
        quantized(fp8, tmp_path / "twice", {}, INT4)
    with pytest.raises(CalibrationError, match="quantizes by gptq, which needs"):
        execute_plan(source, planned(source, {}, STAGES["gptq"]), tmp_path / "twice")
    options = pipeline.RunOptions(storage="bitmask")
    with pytest.raises(PlanError, match="--storage bitmask cannot"):
        pipeline.cut(source, planned(source, {}, INT4), tmp_path / "twice", options)


def test_a_plan_that_was_edited_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    source = tiny(tmp_path / "model", width=96)
    plan = planned(source, {}, INT4)
    wide = plan.model_copy(
        update={"quantize": QuantizeStage(**INT4 | {"group_size": 64})}
    )
    layers = tuple(one.model_copy(update={"sparsity": 0.5}) for one in plan.layers)
    both = plan.model_copy(update={"slim": "magnitude", "layers": layers})
    for edited, says in (
        (wide, "w2.weight: 96 columns do not divide into groups of 64"),
        (both, "writes zeros and quantizes"),
    ):
        with pytest.raises(PlanError, match=says):
            execute_plan(source, edited, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("pattern", "becomes"),
    [
        (r"re:.*layers\.2\..*gate$", [r"re:.*layers\.1\..*gate$"]),
        (r"re:.*layers\.1\..*gate$", []),
        (
            r"re:.*layers.(0|2).self_attn.o",
            [f"model.layers.{layer}.self_attn.o_proj" for layer in (0, 1)],
        ),
        (
            r"re:.*layers.[0-9]+.block_sparse_moe.gate$",
            [r"re:.*layers.[0-9]+.block_sparse_moe.gate$"],
        ),
        (
            r"re:.*layers\.\d+\.block_sparse_moe\.experts\.0\.w1",
            [r"re:.*layers\.\d+\.block_sparse_moe\.experts\.0\.w1"],
        ),
    ],
)
def test_dropped_blocks_and_patterns_that_name_layers(
    pattern: str, becomes: list[str], tmp_path: Path
) -> None:
    quantized(tiny(tmp_path / "model"), tmp_path / "q", {}, INT4)
    path = tmp_path / "q" / "config.json"
    config = read_json(path)
    before = config["quantization_config"]["ignore"]
    config["quantization_config"]["ignore"] = [pattern, *before]
    path.write_text(json.dumps(config))
    again, out = open_checkpoint(tmp_path / "q"), tmp_path / "out"
    quantized(again, out, {1: DROP_BLOCK}, {})
    written = read_json(out / "config.json")["quantization_config"]["ignore"]
    assert written == [*becomes, *(one for one in before if one not in becomes)]


def test_a_scheme_by_name_survives_dropped_blocks(tmp_path: Path) -> None:
    source = tiny(tmp_path / "model")
    quantized(source, tmp_path / "q", {}, INT4 | {"group_size": 128})
    path = tmp_path / "q" / "config.json"
    config = read_json(path)
    config["quantization_config"]["config_groups"] = {"W4A16": ["Linear"]}
    path.write_text(json.dumps(config))
    quantized(open_checkpoint(tmp_path / "q"), tmp_path / "out", {1: DROP_BLOCK}, {})
    block = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert block["config_groups"] == {"W4A16": ["Linear"]}
    assert (
        open_checkpoint(tmp_path / "out").form == open_checkpoint(tmp_path / "q").form
    )


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"quantize": {"method": "gptq", "weights": "int8"}}, "needs method: rtn"),
        ({"quantize": {"weights": "fp8", "zero_point": True}}, "needs weights: int4"),
        ({"quantize": {"weights": "int8", "group_size": 128}}, "int4 or fp8"),
        ({"quantize": {"weights": "fp8", "group_size": 64}}, "fp8 has 128"),
        ({"quantize": {"method": "awq", "act_order": True}}, "needs method: gptq"),
        ({"quantize": {"method": "rtn", "group_size": 16}}, "quantize.group_size"),
        ({"quantize": {"method": "rtn"}, "total_sparsity": 0.5}, "do not go together"),
        ({"quantize": {"method": "rtn"}, "tune": {}}, "tune does not try out"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(
    data: dict[str, Any], says: str
) -> None:
    with pytest.raises(RecipeError, match=says):
        parse_recipe(data, "test")
