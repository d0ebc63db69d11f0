"""Zeros outside the experts, and matrices that stay dense: counted, placed, served."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import tiny_checkpoint, tiny_text
from vllm_moe_prune import pipeline
from vllm_moe_prune.calibrate.data import load_tokens
from vllm_moe_prune.calibrate.forward import StreamingModel
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.reader import read_tensor
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.validate_plan import check_possible
from vllm_moe_prune.errors import PlanError, RecipeError
from vllm_moe_prune.recipes.schema import parse_recipe
from vllm_moe_prune.slim.wanda import wanda

FAMILIES = (
    *("mixtral", "arctic", "deepseek", "deepseek_v2", "deepseek_v3"),
    "olmoe",
    "qwen3_moe",
    "glm4_moe",
    "glm4_moe_lite",
    "minimax_m2",
    "qwen2_moe",
)
LAYERS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("scope")
    tiny_text(found)
    return found


def checkpoint_of(folder: Path, family: str) -> Checkpoint:
    path = folder / family
    if not path.exists():
        tiny_checkpoint(path, model_type=family, layers=LAYERS, dtype="float32")
    return open_checkpoint(path)


def recipe_of(folder: Path, slim: dict[str, Any], **data: Any) -> Any:
    calibration = {"samples": 3, "sequence_length": 24}
    calibration["source"] = str(folder / "text.txt")
    data = {"experts": {"method": "none"}, **data}
    return parse_recipe({**data, "slim": slim, "calibration": calibration}, "test")


def tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    return read_tensor(checkpoint.tensors[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "compensate"),
    [
        *(("wanda", False), ("wanda", True), ("sparsegpt", False)),
        ("magnitude", False),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_loses_as_many_weights_as_planned(
    folder: Path, tmp_path: Path, family: str, method: str, compensate: bool
) -> None:
    checkpoint = checkpoint_of(folder, family)
    scope = ["experts", "attention", "shared", "mlp"]
    recipe = recipe_of(
        folder,
        {"method": method, "scope": scope, "compensate": compensate},
        total_sparsity=0.4,
        sparsity_of="all",
    )
    out = tmp_path / "out"
    decided, result, verified = pipeline.run(
        checkpoint, recipe, out, pipeline.RunOptions()
    )
    assert decided.predicted is not None
    # Wanda zeroes whole weights per row, of which the shortest has 32.
    assert 0.4 <= decided.predicted.total_sparsity < 0.4 + 1 / 32
    assert verified.total_sparsity == pytest.approx(
        decided.predicted.total_sparsity, abs=1e-4
    )
    assert result.achieved.total_sparsity == pytest.approx(
        decided.predicted.total_sparsity, abs=1e-4
    )
    after = open_checkpoint(out)
    slimmed = {
        name
        for name, info in after.tensors.items()
        if not torch.equal(tensor(after, name), tensor(checkpoint, name))
    }
    layers = [name for name in after.tensors if name.startswith("model.layers.")]
    expected = {
        name
        for name in layers
        if len(after.tensors[name].shape) == 2
        and not name.endswith(("gate.weight", "eh_proj.weight"))
    }
    assert slimmed == expected


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_attention_is_slimmed_by_its_inputs_and_feeds_the_rest(
    folder: Path, tmp_path: Path, method: str
) -> None:
    checkpoint = checkpoint_of(folder, "mixtral")
    recipe = recipe_of(
        folder, {"method": method, "scope": ["attention"], "sparsity": 0.5}
    )
    out = tmp_path / "out"
    pipeline.run(checkpoint, recipe, out, pipeline.RunOptions())
    after = open_checkpoint(out)
    tokens = load_tokens(checkpoint, recipe.calibration)
    # What enters layer 1 in the output is what its matrices were calibrated on.
    from vllm_moe_prune.calibrate.perplexity import run_layer

    model = StreamingModel(after)
    hidden = model.embed(tokens.ids_ST)
    run_layer(model, 0, hidden)
    seen: dict[str, torch.Tensor] = {}

    def see(name: str, x_nD: torch.Tensor) -> None:
        seen[name] = torch.cat([seen[name], x_nD]) if name in seen else x_nD

    StreamingModel(checkpoint).watch_attention(1, hidden, see)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        inner = f"self_attn.{name}.weight"
        weight = tensor(checkpoint, f"model.layers.1.{inner}")
        found = tensor(after, f"model.layers.1.{inner}")
        if method == "wanda":
            squares = seen[inner].double().square().sum(0)
            assert torch.equal(found, wanda(weight, squares, 0.5, None))
        else:
            loss = [(seen[inner] @ (weight - w).T).norm() for w in (found, 0 * weight)]
            assert loss[0] < loss[1]
        assert int((found == 0).sum()) == weight.numel() // 2
    for name, info in after.tensors.items():
        if "self_attn" not in name:
            assert info.shape == checkpoint.tensors[name].shape
            assert torch.equal(tensor(after, name), tensor(checkpoint, name))


@pytest.mark.parametrize("method", ["wanda", "magnitude", "sparsegpt"])
def test_what_is_excluded_keeps_its_bytes(
    folder: Path, tmp_path: Path, method: str
) -> None:
    checkpoint = checkpoint_of(folder, "mixtral")
    slim = {"method": method, "sparsity": 0.5, "exclude": ["w2", "k_proj"]}
    recipe = recipe_of(folder, {**slim, "scope": ["experts", "attention"]})
    out = tmp_path / "out"
    pipeline.run(checkpoint, recipe, out, pipeline.RunOptions())
    after = open_checkpoint(out)
    for name in after.tensors:
        same = torch.equal(tensor(after, name), tensor(checkpoint, name))
        zeros = any(part in name for part in ("w1", "w3", "q_proj", "v_proj", "o_proj"))
        assert same != zeros, name


def test_fp8_weights_that_stay_are_not_compensated(
    folder: Path, tmp_path: Path
) -> None:
    path = tiny_checkpoint(tmp_path / "fp8", model_type="deepseek_v3", fp8=(16, 32))
    checkpoint = open_checkpoint(path)
    recipe = recipe_of(folder, {"method": "wanda", "sparsity": 0.5, "compensate": True})
    out = tmp_path / "out"
    plan, _, _ = pipeline.run(checkpoint, recipe, out, pipeline.RunOptions())
    assert not plan.compensate
    edited = plan.model_copy(update={"compensate": True})
    with pytest.raises(PlanError, match=r"slim\.compensate changes the weights"):
        check_possible(checkpoint, edited)


def test_an_exclusion_that_excludes_nothing_is_refused(folder: Path) -> None:
    checkpoint = checkpoint_of(folder, "mixtral")
    recipe = recipe_of(folder, {"method": "wanda", "sparsity": 0.5, "exclude": ["w9"]})
    with pytest.raises(RecipeError, match="'w9' is in no name"):
        pipeline.plan(checkpoint, recipe, None)
