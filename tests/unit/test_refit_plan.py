"""Which layers a recipe refits, and plans whose layers cannot be."""

from pathlib import Path
from typing import Any

import pytest

from tests.reference import DROP_MOE
from tests.refitting import HALF, model, plan_of, some_tokens
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.cut.execute import execute_plan
from vllm_moe_prune.cut.predict import model_facts
from vllm_moe_prune.decide.build_plan import make_plan
from vllm_moe_prune.decide.check_plan import check_plan
from vllm_moe_prune.errors import PlanError
from vllm_moe_prune.recipes.schema import ExpertStage, LayerStage, Recipe, SlimStage
from vllm_moe_prune.stages.measure import collect
from vllm_moe_prune.stages.preflight import RunOptions, validate_plan


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return model(tmp_path_factory.mktemp("refit") / "model")


def decided(checkpoint: Checkpoint, layers: LayerStage, **experts: Any) -> list[int]:
    stage = ExpertStage(
        method="score", criterion="router-norm", refit="ridge", **experts
    )
    recipe = Recipe(experts=stage, layers=layers, slim=SlimStage(method="none"))
    stats = collect(checkpoint, [recipe], None, RunOptions())
    plan = make_plan(stats, recipe, model_facts(checkpoint), tool_version="0")
    assert plan.refits is plan.needs_activations
    return [layer.layer for layer in plan.layers if layer.refit]


@pytest.mark.parametrize(
    ("layers", "experts", "expected"),
    [
        ({}, {}, []),
        ({}, {"drop": 0.5, "budget": "per-layer"}, [0, 1, 2, 3]),
        ({"drop_moe": [1]}, {}, [2]),
        ({"drop_moe": [1, 2]}, {}, [3]),
        ({"drop_blocks": [1]}, {}, [0]),
        ({"drop_blocks": [1, 2]}, {}, [0]),
        ({"drop_blocks": [0]}, {}, [1]),
        ({"drop_blocks": [2], "drop_moe": [1]}, {}, [3]),
    ],
)
def test_layers_that_lost_experts_and_those_that_take_over(
    tmp_path: Path,
    layers: dict[str, Any],
    experts: dict[str, Any],
    expected: list[int],
) -> None:
    checkpoint = model(tmp_path / "model", layers=4)
    stage = LayerStage.model_validate(layers)
    assert decided(checkpoint, stage, **experts) == expected


def test_a_layer_without_experts_is_not_refitted(checkpoint: Checkpoint) -> None:
    plan = plan_of(checkpoint, {1: DROP_MOE}, [1])
    with pytest.raises(PlanError, match=r"plan: layer 1: refit, but .* no experts"):
        check_plan(plan, checkpoint.layers, checkpoint.fingerprint, "plan")


def test_fp8_experts_stay_as_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = model(tmp_path / "model", fp8=(16, 16))
    assert not decided(checkpoint, LayerStage(), drop=0.5, budget="per-layer")
    asked = {"experts": {"refit": "ridge"}}
    left_out = plan_of(checkpoint, {1: HALF}, [], recipe=asked)
    validate_plan(checkpoint, left_out, RunOptions(), "plan")
    assert "experts stay fp8, so none are refitted" in caplog.text
    plan = plan_of(checkpoint, {1: HALF}, [1])
    with pytest.raises(PlanError, match=r"the plan refits experts .* stay fp8"):
        execute_plan(checkpoint, plan, tmp_path / "out", tokens=some_tokens())
